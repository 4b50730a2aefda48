"""NEFTune: noise on the embeddings of what is trained on (Jain et al. 2023, "NEFTune: Noisy Embeddings Improve
Instruction Finetuning")."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from training.collate import Batch


@contextmanager
def noisy_embedding(model: PreTrainedModel, batch: Batch, alpha: float) -> Iterator[None]:
    """Have the input embedding of a model add noise to the tokens of a batch: uniform(-1, 1) * alpha / sqrt(L * d) by
    the paper's algorithm 1, so that the noise of a sequence has the same length on average whatever its size.

    d is the width of the embedding, L the tokens of a conversation: each one's own, in whichever layout, where the
    authors' code takes the padded width of the batch. It is drawn by the device's random generator, whose state
    checkpoints keep. With alpha 0 nothing is drawn.
    """
    if not alpha:
        yield
        return
    if batch.boundaries is None:
        lengths = batch.attention_mask.sum(1).clamp(min=1)[:, None, None]  # at least 1: an empty batch is padding
    else:
        own = batch.boundaries.diff()
        lengths = own.repeat_interleave(own, output_size=batch.input_ids.numel())[None, :, None]

    def add_noise(_layer, _inputs, embedded: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(embedded, dtype=torch.float32).uniform_(-1, 1)
        return embedded + (noise * alpha * (lengths.float() * embedded.shape[-1]).rsqrt()).to(embedded.dtype)

    hook = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()
