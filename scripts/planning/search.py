"""For a launcher and a card: the setting of the recipe that is fastest of those that fit, and all that it needs.

Tried are only the keys that change nothing of what is learnt: how a step is cut (`micro_batch_tokens`), and whether
layers are computed again (`gradient_checkpointing`).
"""

import functools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from data.mix import Mix
from planning.cards import GIB, PER_MACHINE, Card
from planning.launchers import Launcher
from planning.measured import was_measured
from planning.models import as_here
from planning.speed import Pace
from planning.work import Load, load_of, loads_of_steps, traffic_of, work_of
from recipe.keys import Recipe
from run.retention import checkpoint_bytes, disk_peak
from training.adapters import AdapterSize, adapter_size
from training.memory import background_copies, estimate_memory, model_size, moment_bytes, peak_of
from training.micro_batches import grouped, largest_micro_batches, validation_numbers
from training.model import check_tiny, without_weights
from training.plan import EpochPlan, Position, epoch_plan, packs_per_step, steps_left, validation_rows
from training.state_layout import host_state
from utils.launch import DTYPES

# Of a card's memory, beside what a step holds: CUDA itself, the libraries' buffers, NCCL's.
RESERVE = GIB


@dataclass(frozen=True)
class Subject:
    """A run that is planned: what does not depend on where it runs."""

    recipe: Recipe
    config: PretrainedConfig
    model: PreTrainedModel  # without weights in memory; those that no text reaches want no gradient
    mix: Mix
    mfu: float | None = None
    cuts: dict = field(default_factory=dict)  # the steps that were cut so far, and how many there are

    @property
    def dtype(self) -> torch.dtype:
        """Of forward and backward: on a GPU, whatever is here."""
        return DTYPES[self.recipe.dtype]

    @functools.cached_property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @functools.cached_property
    def frozen(self) -> int:
        """Weights that no text reaches."""
        return sum(parameter.numel() for parameter in self.model.parameters() if not parameter.requires_grad)

    @functools.cached_property
    def adapter(self) -> AdapterSize | None:
        return adapter_size(self.recipe, self.model, self.dtype) if self.recipe.use_peft else None

    @functools.cached_property
    def epoch(self) -> EpochPlan:
        """The first; the others have as many tokens, or about as many."""
        return epoch_plan(self.mix, self.recipe, 0)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """Of each pack of it: int64 [packs]."""
        return self.epoch.tokens(self.mix, self.recipe)

    def loads(self, recipe: Recipe, processes: int) -> list[Load]:
        """Some steps of the epoch, cut as `recipe` says."""
        key = recipe.micro_batch_tokens, processes
        if key not in self.cuts:
            self.cuts[key] = loads_of_steps(self.mix, recipe, self.epoch, self.tokens, processes)
        return self.cuts[key]

    def steps(self, processes: int) -> tuple[int, int]:
        """Of the run and of an epoch."""
        if processes not in self.cuts:
            total = self.recipe.max_steps or steps_left(self.mix, self.recipe, processes, Position())
            self.cuts[processes] = total, math.ceil(len(self.epoch) / packs_per_step(self.recipe, processes))
        return self.cuts[processes]


def make_subject(recipe: Recipe, config: PretrainedConfig, mix: Mix, mfu: float | None = None) -> Subject:
    """Raises: UserError where no model can be made of the config, or none that is trained here."""
    model = without_weights(recipe, config)
    left_out = tuple(f"{name}." for name in check_tiny(as_here(recipe), config) or ())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not f"{name}.".startswith(left_out))
    return Subject(recipe, config, model, mix, mfu)


class Plan(NamedTuple):
    """Of a run on some cards. Bytes, hours; an estimate all of it.

    Attributes:
        launcher: how it is started.
        measured: whether a step of that model was, so started on such a card; of all others none was.
        keys: of the recipe, that differ from it.
        micro_batch_tokens: of the largest micro-batch of the run.
        recomputes: whether it checkpoints gradients.
        parts: of each card's memory, as `estimate_memory` has them, at the micro-batch of `keys`.
        fits: whether `peak` does.
        most_tokens: of the largest micro-batch that fits; 0 where none does.
        tokens_per_second, training_hours, evaluation_hours: of all cards; 0 where it does not fit.
        sent: by each card in a step, to its own machine and (by the machine) to others.
        host: of each machine's memory, by what it is for.
        checkpoint: of a checkpoint its model, and what resuming needs; disk: that the run takes at most.
    """

    launcher: Launcher
    measured: bool
    keys: dict[str, str]
    micro_batch_tokens: int
    recomputes: bool
    parts: dict[str, int]
    peak: int
    fits: bool
    most_tokens: int
    tokens_per_second: float
    training_hours: float
    evaluation_hours: float
    steps: int
    sent: tuple[float, float]
    host: dict[str, int]
    checkpoint: tuple[int, int]
    disk: int

    @property
    def hours(self) -> float:
        """Of the run, without loading and saving."""
        return self.training_hours + self.evaluation_hours


def plan_run(subject: Subject, launcher: Launcher, card: Card) -> Plan:
    """The fastest setting that fits; where none does, the one that needs the least memory.

    Raises: UserError where the recipe has no step.
    """
    recipe, found = subject.recipe, []
    for checkpointing in (False,) if recipe.torch_compile else (False, True):
        tried = recipe.model_copy(update={"gradient_checkpointing": checkpointing})
        most = _most_tokens(subject, tried, launcher, card)
        for cut in _cuts(tried, most, subject, launcher.cards):
            found.append(_planned(subject, cut, launcher, card, most))
    fitting = [plan for plan in found if plan.fits]
    if fitting:
        return min(fitting, key=lambda plan: plan.hours)
    return min(found, key=lambda plan: plan.peak)


def _cuts(recipe: Recipe, most: int, subject: Subject, processes: int) -> list[Recipe]:
    """The recipe with micro-batches of 1, 2, 4 and so on rows of max_length, as many as fit and none larger than a
    process needs."""
    needed = 1.5 * subject.tokens.mean() * packs_per_step(recipe, processes) / processes
    sizes = [recipe.max_length]
    while sizes[-1] < needed and 2 * sizes[-1] <= most:
        sizes.append(2 * sizes[-1])
    return [_cut_by(recipe, size) for size in reversed(sizes)]  # of equals the largest


def _cut_by(recipe: Recipe, tokens: int) -> Recipe:
    """The recipe with micro-batches of so many tokens; as it is where that would change the loss."""
    if recipe.loss_normalization == "micro_batch":
        return recipe
    return recipe.model_copy(update={"micro_batch_tokens": tokens})


def _most_tokens(subject: Subject, recipe: Recipe, launcher: Launcher, card: Card) -> int:
    """Of the largest micro-batch, in whole rows of max_length, that fits; 0 where none does."""

    def fits(rows: int) -> bool:
        cut = _cut_by(recipe, rows * recipe.max_length)
        return peak_of(_memory(subject, cut, launcher, _full_shape(recipe, rows))) + RESERVE <= card.memory

    low, high = 0, 1
    while high <= 4096 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * recipe.max_length


def _full_shape(recipe: Recipe, rows: int) -> tuple[int, int]:
    """Of a micro-batch of so many rows of max_length."""
    return (1, rows * recipe.max_length) if recipe.padding_free else (rows, recipe.max_length)


def _largest_shape(subject: Subject, recipe: Recipe, cards: int, steps: int) -> tuple[int, int]:
    """Of a run's micro-batches: cut by tokens none is larger than full; else as `run/preflight.py` has it."""
    if recipe.micro_batch_tokens is not None:
        return _full_shape(recipe, recipe.micro_batch_tokens // recipe.max_length)
    return largest_micro_batches(subject.mix, recipe, cards, steps, Position())[0].shape


def _memory(subject: Subject, recipe: Recipe, launcher: Launcher, shape: tuple[int, int]) -> dict[str, int]:
    arguments = subject.parameters, launcher.layout, subject.dtype, shape, True, subject.adapter, subject.frozen
    return estimate_memory(recipe, subject.config, *arguments)


def _planned(subject: Subject, recipe: Recipe, launcher: Launcher, card: Card, most: int) -> Plan:
    layout, cards, element = launcher.layout, launcher.cards, subject.dtype.itemsize
    steps, epoch_steps = subject.steps(cards)
    shape = _largest_shape(subject, recipe, cards, steps)
    parts = _memory(subject, recipe, launcher, shape)
    fits = peak_of(parts) + RESERVE <= card.memory
    each = element if layout.is_deepspeed else 4
    size = model_size(subject.config, subject.parameters, subject.adapter, subject.frozen, each)
    traffic = traffic_of(layout, size, element)
    tokens_per_second = training = evaluation = 0.0
    loads = subject.loads(recipe, cards)
    if fits:
        work = work_of(recipe, subject.config, subject.model, layout, element)
        pace = Pace(card, work, layout, size, traffic, element, moment_bytes(recipe), subject.mfu)
        seconds = sum(pace.step(load) for load in loads) / len(loads)
        tokens_per_second = float(sum(load.read.sum() for load in loads)) / len(loads) / seconds
        # Not of the sampled steps: 24 of the seed's 15,980 have 4.5 % more tokens than the others.
        training = steps * float(subject.tokens.sum()) / epoch_steps / tokens_per_second
        evaluation = math.ceil(steps / recipe.eval_steps) * pace.evaluating(_validation(subject, recipe, cards))
    rounds = sum(len(load.tokens) for load in loads) / len(loads)
    saved = subject.parameters if subject.adapter is None else subject.adapter.weights
    model, state = checkpoint_bytes(recipe, saved, subject.dtype, layout.keeps_half_weights)
    merged = subject.parameters * element if recipe.merge_adapter else 0
    local = min(PER_MACHINE, cards)
    host = {name: local * each for name, each in host_state(layout, size, element, moment_bytes(recipe)).items()}
    loaded = element if recipe.use_peft or layout.is_deepspeed else 4  # by one process for all
    host["weights as they are loaded"] = subject.parameters * loaded
    if copies := background_copies(recipe, layout, model, state, local):
        host["a checkpoint's copies"] = copies
    return Plan(
        launcher=launcher,
        measured=was_measured(card, subject.recipe, subject.config, layout),
        keys=_difference(subject.recipe, recipe),
        micro_batch_tokens=math.prod(shape),
        recomputes=recipe.gradient_checkpointing,
        parts=parts,
        peak=peak_of(parts),
        fits=fits,
        most_tokens=most,
        tokens_per_second=tokens_per_second,
        training_hours=training / 3600,
        evaluation_hours=evaluation / 3600,
        steps=steps,
        sent=_sent(launcher, traffic.micro_batch * rounds + traffic.step, traffic.replicas),
        host=host,
        checkpoint=(model, state),
        disk=disk_peak(recipe, model, state, epoch_steps, steps) + merged,
    )


def _sent(launcher: Launcher, shared: float, replicas: float) -> tuple[float, float]:
    """Bytes of a step that a card sends, and that a machine sends to another."""
    between = 0.0
    if launcher.machines > 1:
        hybrid = launcher.layout.engine == "fsdp2" and launcher.layout.replicas > 1
        between = replicas * (PER_MACHINE if hybrid else 1) + (0 if hybrid else shared)
    return shared + replicas, between


def _validation(subject: Subject, recipe: Recipe, cards: int) -> Load:
    """All of the validation split, cut as a run cuts it: without padding it comes to the same in one piece."""
    mix, total = subject.mix, np.zeros(len(Load._fields))
    for dataset in range(len(mix.names)):
        rows = validation_rows(mix, dataset)
        numbers = np.zeros_like(rows) if recipe.padding_free else validation_numbers(mix, rows, recipe, cards)
        for chunk in grouped(rows, numbers):
            total += load_of(mix.validation.lengths[chunk], mix.validation.targets[chunk], recipe)
    return Load(*total[:, None, None])


def _difference(recipe: Recipe, planned: Recipe) -> dict[str, str]:
    names = ("gradient_checkpointing", "micro_batch_tokens")
    values = {name: (getattr(recipe, name), getattr(planned, name)) for name in names}
    return {name: str(new).lower() for name, (old, new) in values.items() if old != new}
