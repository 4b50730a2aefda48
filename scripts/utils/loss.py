"""The training loss: cross-entropy at the scored positions only, without ever holding all their logits.

Logits for 4 x 4096 tokens of StableLM's vocabulary are 3.3 GB in fp32, and as much again for their gradient. So the
model's body runs as usual, the hidden states of the scored positions are picked out, and the output layer is applied to
them in chunks. A chunk's gradient is computed beside its loss, in the memory of its logits: they are made once (in fp16
twice). Making them again took 29 % longer for a step of the small model of `scripts/benchmark.py train`, on a CPU.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from utils.collate import Batch
from utils.cross_entropy import cross_entropy_in_place

LOGITS_BUDGET = 256 * 2**20  # bytes of fp32 logits held at a time


class ScoredLoss(torch.nn.Module):
    """A causal LM whose forward returns the loss of every scored token.

    It is what `Accelerator.prepare` wraps, so that DDP and DeepSpeed see every parameter used inside one forward.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    @property
    def config(self):
        """The model's config, which Accelerate looks at under DeepSpeed."""
        return self.model.config

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Score a batch.

        Returns:
            total: fp32 scalar, the sum of the losses, to be differentiated.
            losses: fp32 [scored tokens], in the order of `batch.scored`, for the record.
            predictions: int64 [scored tokens], the likeliest token of each position; None while training.
        """
        hidden = self.model.base_model(**batch.model_inputs(), use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, batch.scored)
        head = self.model.get_output_embeddings()
        # At least one chunk, even an empty one: a batch without targets has a gradient too, of zeros.
        rows = max(1, LOGITS_BUDGET // (4 * self.config.get_text_config().vocab_size))
        if not self.training:
            return _evaluate(head, hidden, batch.targets, rows)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        if dtype == torch.float16 or not isinstance(head, torch.nn.Linear):
            # The gradients of fp16 are only kept from underflow by the loss scale, which comes in the backward pass.
            return _recomputed(head, hidden, batch.targets, rows)
        bias = None if head.bias is None else head.bias.to(dtype)
        total, losses = _LossAndGradients.apply(hidden.to(dtype), head.weight.to(dtype), bias, batch.targets, rows)
        return total, losses, None


def _evaluate(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, rows: int):
    losses, predictions = [], []
    for chunk, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = head(chunk)
        losses.append(_cross_entropy(logits, target))
        predictions.append(logits.argmax(-1))
    losses = torch.cat(losses)
    return losses.sum(), losses, torch.cat(predictions)


def _recomputed(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, rows: int):
    def loss_of(chunk: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return _cross_entropy(head(chunk), target)

    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    losses = torch.cat([checkpoint(loss_of, *chunk, use_reentrant=False) for chunk in chunks])
    return losses.sum(), losses.detach(), None


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


class _LossAndGradients(torch.autograd.Function):
    """The sum of the cross-entropies of hidden @ weight.T + bias, and each of them.

    Only the sum can be differentiated: its gradients are ready after the forward pass, up to the one factor that the
    backward pass brings. The losses and the weight's gradient are summed in fp32, whatever the dtype.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows):
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        of_hidden, of_bias = torch.empty_like(hidden), None if bias is None else torch.zeros_like(bias).float()
        of_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            of_logits = F.linear(hidden[part], weight, bias)  # logits, until the next line
            losses[part] = cross_entropy_in_place(of_logits, targets[part])
            if bias is not None:
                of_bias += of_logits.sum(0, dtype=torch.float32)
            of_hidden[part] = of_logits @ weight
            if weight.dtype == torch.float32:
                of_weight.addmm_(of_logits.T, hidden[part])
            else:
                of_weight += of_logits.T @ hidden[part]
        ctx.save_for_backward(of_hidden, of_weight.to(weight.dtype), None if bias is None else of_bias.to(bias.dtype))
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, factor, _):
        # In place: a second backward pass over the same forward would find them changed, and says so.
        gradients = [gradient if gradient is None else gradient.mul_(factor) for gradient in ctx.saved_tensors]
        return *gradients, None, None
