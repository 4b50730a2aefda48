"""From rows of the mix to a batch of tensors: cut to max_length, laid end to end or padded, with what is scored."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from data.mix import Split
from recipe.keys import Recipe
from training.plan import WINDOW, random_stream


@dataclass(frozen=True)
class Batch:
    """A micro-batch: whole conversations laid end to end in one row, or (`padding_free: false`) padded, a row for each.

    What the model is scored on is given by positions, found here on the CPU: on a GPU a mask would have to be counted,
    and the host would wait for the device at every micro-batch.
    """

    input_ids: torch.Tensor  # int64 [1, tokens], or [conversations, longest]
    scored: torch.Tensor  # int64 [scored tokens], rising: where in the flattened input_ids the next token is a target
    targets: torch.Tensor  # int64 [scored tokens], that next token
    dataset: torch.Tensor  # int64 [scored tokens], the index of the data set that each is from
    lengths: tuple[int, ...]  # real tokens of each conversation; empty for an empty batch: two tokens without a target
    position_ids: torch.Tensor | None = None  # int64 [1, tokens], from 0 in each conversation; None where it is padded
    boundaries: torch.Tensor | None = None  # int32 [conversations + 1], where each begins, the last ends; None: padded
    attention_mask: torch.Tensor | None = None  # int64 like input_ids, 0 at padding; None where there is none
    weights: torch.Tensor | None = None  # fp32 [scored tokens], what each counts in the loss; None: all alike

    @property
    def total_weight(self) -> float:
        """What its scored tokens count in the loss, together; of a batch on the CPU."""
        return len(self.targets) if self.weights is None else self.weights.double().sum().item()

    def to(self, device: torch.device) -> "Batch":
        """The same on a device; from pinned memory without waiting for it."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same in memory that a GPU can fetch by itself."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{key: function(v) for key, v in values.items() if isinstance(v, torch.Tensor)})

    def model_inputs(self) -> dict[str, Any]:
        """What the model's body is called with.

        Padding-free these are the names by which transformers (5.23, modeling_flash_attention_utils.py) hands the
        boundaries to flash-attn, and `conversation_lengths` for the functions of training/attention.py.
        """
        if self.boundaries is None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        lengths = self.lengths or (self.input_ids.numel(),)
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.boundaries,
            "cu_seq_lens_k": self.boundaries,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
            "conversation_lengths": torch.tensor(lengths),  # stays on the CPU
        }

    def conversations(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of each conversation its input_ids, int64 [length], and which of them are targets, bool [length]."""
        is_target = torch.zeros(self.input_ids.numel(), dtype=torch.bool)
        is_target[self.scored.cpu() + 1] = True
        padded_width = self.input_ids.shape[1] if self.boundaries is None else None
        start = 0
        for length in self.lengths:
            yield self.input_ids.view(-1)[start : start + length].cpu(), is_target[start : start + length]
            start += padded_width or length


def collate(split: Split, rows: np.ndarray, recipe: Recipe, pad_token_id: int, epoch: int | None) -> Batch:
    """The batch of some examples.

    Args:
        rows: int64, examples of the split; none gives a batch that has a forward and a backward pass and adds nothing.
        epoch: draws the windows of examples over max_length; None takes their first max_length tokens.
    """
    examples = [cut(split, row, recipe, epoch) for row in rows]
    lengths, counts = [len(ids) for ids, _ in examples], [scored.sum() for _, scored in examples]
    dataset = np.repeat(split.dataset[rows], counts)
    if not examples:
        examples, widths = [(np.full(2, pad_token_id), np.zeros(2, dtype=bool))], [2]
    else:
        widths = lengths if recipe.padding_free else [max(lengths)] * len(lengths)

    starts = np.cumsum([0, *widths])
    input_ids = np.full(starts[-1], pad_token_id, dtype=np.int64)
    is_target, is_real = np.zeros((2, starts[-1]), dtype=bool)
    for start, (ids, scored) in zip(starts, examples, strict=False):
        input_ids[start : start + len(ids)] = ids
        is_target[start : start + len(ids)] = scored
        is_real[start : start + len(ids)] = True
    targets = np.flatnonzero(is_target)  # never a conversation's first token, so that the one before is its own
    batch = {"scored": targets - 1, "targets": input_ids[targets], "dataset": dataset}
    if recipe.padding_free:
        batch["position_ids"] = (np.arange(starts[-1]) - np.repeat(starts[:-1], widths))[None]
        batch["input_ids"] = input_ids[None]
    else:
        batch["input_ids"] = input_ids.reshape(len(widths), -1)
        batch["attention_mask"] = is_real.reshape(len(widths), -1)
    tensors = {name: torch.from_numpy(array.astype(np.int64, copy=False)) for name, array in batch.items()}
    if recipe.padding_free:
        tensors["boundaries"] = torch.from_numpy(starts.astype(np.int32))
    if split.weights is not None:
        tensors["weights"] = torch.from_numpy(np.repeat(split.relative_weights[rows], counts).astype(np.float32))
    return Batch(lengths=tuple(lengths), **tensors)


def end_to_end(conversations: list[torch.Tensor]) -> Batch:
    """The padding-free batch of some conversations, int64 [length] each, without a target."""
    lengths, none = tuple(len(ids) for ids in conversations), torch.empty(0, dtype=torch.int64)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    return Batch(torch.cat(conversations)[None], none, none, none, lengths, positions, boundaries)


def cut(split: Split, row: int, recipe: Recipe, epoch: int | None) -> tuple[np.ndarray, np.ndarray]:
    """input_ids and scored of one example, at most max_length tokens of it; the first of a window is never a target."""
    ids, scored = split.tokens(row)
    start = window_start(scored, row, recipe, epoch)
    scored = scored[start : start + recipe.max_length].copy()
    scored[0] = False
    return ids[start : start + recipe.max_length], scored


def kept_targets(split: Split, recipe: Recipe, epoch: int | None) -> np.ndarray:
    """The targets that are left of each example when it is cut as an epoch sees it: int64 [examples]."""
    kept = split.targets.copy()
    for row in np.flatnonzero(split.lengths > recipe.max_length):
        kept[row] = cut(split, row, recipe, epoch)[1].sum()
    return kept


def window_start(scored: np.ndarray, row: int, recipe: Recipe, epoch: int | None) -> int:
    """Where the window of max_length tokens starts that an epoch sees of an example.

    A longer example is cut to a random window with probability random_offset_probability, else to its start; never at
    random for epoch None (validation). A window without a target would teach nothing, so only those with one are drawn.
    `scored`, bool [tokens], is the whole example's.
    """
    length = recipe.max_length
    if len(scored) <= length or epoch is None:
        return 0
    rng = random_stream(recipe, WINDOW, epoch, row)
    if rng.random() >= recipe.random_offset_probability:
        return 0
    # A window [o, o + length) holds a target when one lies in [o + 1, o + length).
    targets = np.concatenate([[0], np.cumsum(scored)])
    held = targets[length:] - targets[1 : len(scored) - length + 2]
    return int(rng.choice(np.flatnonzero(held > 0))) if held.any() else 0
