"""Where a run stands, and what is due there."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from recipe.keys import Recipe
from run.best import Best, judge
from training.plan import Position

KEPT = ("step", "results", "evaluation_due", "wandb_id", "tracker_runs", "unlogged")  # by a checkpoint, as they are


class Due(NamedTuple):
    """What is to be done after a step."""

    log: bool
    evaluate: bool
    save: bool


@dataclass
class Progress:
    """The one owner of what changes with every step, and of what a checkpoint has to remember of it.

    Attributes:
        step: optimizer steps made.
        position: how far it has come in the data.
        results: of the last whole evaluation, by the names of metrics.jsonl.
        evaluation_due: an evaluation of this step was begun and not ended.
        wandb_id: of its run in Weights & Biases; None without one.
        tracker_runs: {tracker: by what it knows its run}, of those other than wandb that want to be told.
        unlogged: learning_rate and grad_norm of the step just made; empty once a line of metrics.jsonl has them.
        best: of all evaluations, by early_stopping_metric; None before the first.
        total_steps, epoch_conversations, held_out: of the plan: the last step, the conversations of an epoch, and
            whether there is a validation split.
        patience: evaluations in a row that may not be the best, before the run ends; None: any number.
    """

    total_steps: int
    epoch_conversations: int
    held_out: bool
    step: int = 0
    position: Position = field(default_factory=Position)
    results: dict[str, float] = field(default_factory=dict)
    evaluation_due: bool = False
    wandb_id: str | None = None
    tracker_runs: dict[str, str] = field(default_factory=dict)
    unlogged: dict[str, float] = field(default_factory=dict)
    best: Best | None = None
    patience: int | None = None

    @property
    def steps_left(self) -> int:
        return 0 if self.ends_early else max(0, self.total_steps - self.step)

    @property
    def ends_early(self) -> bool:
        """Whether too many evaluations in a row were not the best; not where it was the last step anyway."""
        out_of_patience = self.best and self.patience and self.best.evaluations_since >= self.patience
        return bool(out_of_patience) and self.step < self.total_steps

    @property
    def is_complete(self) -> bool:
        """Whether every step and every evaluation is made, so that only the final model is left to write."""
        return not self.steps_left and not self.evaluation_due

    def advance(self, position: Position, learning_rate: float, grad_norm: float) -> None:
        """A step is made, after which the data stand at `position`."""
        self.step, self.position = self.step + 1, position
        self.unlogged = {"learning_rate": learning_rate, "grad_norm": grad_norm}

    def end_evaluation(self, results: dict[str, float], metric: str) -> bool:
        """An evaluation is made. Returns whether it is the best so far, by a metric that `results` may have."""
        self.results, self.evaluation_due = results, False
        self.best = judge(self.best, metric, self.step, results.get(metric, math.nan))
        return self.best.step == self.step

    def due(self, recipe: Recipe) -> Due:
        """What the step just made calls for."""
        step, last = self.step, not self.steps_left
        every = {"epoch": self.position.conversations == 0, "steps": step % recipe.save_steps == 0, "no": False}
        return Due(
            log=step == 1 or step % recipe.logging_steps == 0 or last,
            evaluate=self.held_out and (step % recipe.eval_steps == 0 or last),
            save=every[recipe.save_strategy],
        )

    def as_metrics(self) -> dict[str, float]:
        """The step and the epoch, with which a line of metrics.jsonl begins."""
        epoch = self.position.epoch + self.position.conversations / self.epoch_conversations
        return {"step": self.step, "epoch": round(epoch, 4)}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, as JSON takes it."""
        best = self.best and asdict(self.best)
        return {name: getattr(self, name) for name in KEPT} | {"position": asdict(self.position), "best": best}
