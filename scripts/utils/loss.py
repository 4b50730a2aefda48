"""The training loss: cross-entropy at the scored positions only, without ever holding all their logits.

Logits for 4 x 4096 tokens of StableLM's vocabulary are 3.3 GB in fp32, and as much again for their gradient. So the
model's body runs as usual, the hidden states of the scored positions are picked out, and the output layer is applied to
them in chunks that are computed again in the backward pass.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

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

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor):
        """Score a batch.

        Args:
            input_ids, attention_mask: int64 [batch, length].
            labels: int64 [batch, length]; the token itself where it is scored, else -100. Position i predicts
                labels[:, i + 1].

        Returns:
            losses: fp32 [scored tokens], in the order of the batch's rows and positions.
            predictions: int64 [scored tokens], the likeliest token of each position; None while training.
        """
        hidden = self.model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        targets = labels[:, 1:]
        scored = targets != -100
        hidden, targets = hidden[:, :-1][scored], targets[scored]

        head = self.model.get_output_embeddings()
        rows = max(1, LOGITS_BUDGET // (4 * self.config.vocab_size))
        losses, predictions = [], []
        # At least one chunk, even an empty one: a batch without targets has a gradient too, of zeros.
        for chunk, target in zip(hidden.split(rows), targets.split(rows), strict=True):
            if self.training:
                losses.append(checkpoint(_cross_entropy, head, chunk, target, use_reentrant=False))
            else:
                logits = head(chunk)
                losses.append(F.cross_entropy(logits.float(), target, reduction="none"))
                predictions.append(logits.argmax(-1))
        return torch.cat(losses), None if self.training else torch.cat(predictions)


def _cross_entropy(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")
