"""Steps that go wrong: losses and gradients that are no finite numbers, the end of fp16's loss scale, spikes."""

import json
import math
import statistics
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data.mix import Mix
from run.lines import append_lines
from run.progress import Progress
from run.stats import TrainingStats
from training.batches import Batches
from training.engine import Engine
from training.optimizer_state import loss_scale
from utils.launch import stop_all

WINDOW = 100  # steps whose median gradient norm is the usual one, and lines of metrics likewise for the loss
ENOUGH = 20  # of them before anything is called a spike
# A gradient norm over 5 times its median, or a loss over 1.5 times; none of the demo's 536 steps is one.
NORM_SPIKE, LOSS_SPIKE = 5.0, 1.5
FP16_ADVICE = (
    "the fp16 loss scale is at its minimum and gradients still overflow: the run has diverged, or the model is not one "
    "for fp16; where the GPU has it, go on with --dtype bf16 --allow_changes"
)


class StepHealth:
    """Counts what went wrong; the same on every process, since all of it follows from the gradient norm.

    Attributes:
        skipped: steps without an update of the weights, which the learning rate's curve does not count.
        bad: those of them whose loss or gradient was no finite number; the others are the fp16 loss scaler's.
    """

    def __init__(self, max_bad_steps: int, bad_steps_file: Path | None):
        """
        Args:
            bad_steps_file: where bad steps and their examples are written; None on all processes but the first.
        """
        self.max_bad_steps, self.file = max_bad_steps, bad_steps_file
        self.skipped = self.bad = self.bad_in_a_row = self.norm_spikes = 0
        self.norm_peak = 0.0
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def judge(
        self,
        grad_norm: float,
        updated: bool,
        progress: Progress,
        stats: TrainingStats,
        engine: Engine,
        batches: Batches,
    ) -> None:
        """Count the step that was just made, or left out. Every process calls this.

        Args:
            grad_norm, updated: as `train_step` of sft.py returns them.
            progress: before the step.

        Raises:
            UserError: on the first process (SystemExit on the others): too many steps went wrong.
        """
        if updated:
            stats.end_step()
            self.good_step(grad_norm)
            return
        accelerator = engine.accelerator
        loss = stats.step_loss(accelerator)
        overflow = accelerator.mixed_precision == "fp16" and math.isfinite(loss)  # which its scaler answers by itself
        stats.end_step(counts=overflow)
        if overflow:
            self.overflow(loss_scale(accelerator))
        else:
            self.bad_step(progress.step + 1, loss, grad_norm, batches.mix, batches.step_rows(progress.position))

    def good_step(self, grad_norm: float) -> None:
        """The weights were updated."""
        self.bad_in_a_row = 0
        self.norm_spikes += _is_spike(grad_norm, self.norms, NORM_SPIKE)
        self.norm_peak = max(self.norm_peak, grad_norm)
        self.norms.append(grad_norm)

    def overflow(self, loss_scale: float | None) -> None:
        """fp16 gradients overflowed and the scaler left the step out; its scale is halved now.

        Raises:
            UserError: on the first process (SystemExit on the others): the scale has sunk below 1, where DeepSpeed too
                gives up (its min_loss_scale).
        """
        self.skipped += 1
        self.bad_in_a_row = 0
        if loss_scale is not None and loss_scale < 1:
            stop_all(FP16_ADVICE)

    def bad_step(self, step: int, loss: float, grad_norm: float, mix: Mix, rows: np.ndarray) -> None:
        """The loss or the gradient norm was no finite number, and the weights were not updated.

        Args:
            rows: of the training split, the step's conversations over all processes.

        Raises:
            UserError: on the first process (SystemExit on the others): it was the last of max_bad_steps in a row.
        """
        self.skipped, self.bad, self.bad_in_a_row = self.skipped + 1, self.bad + 1, self.bad_in_a_row + 1
        if self.file:
            examples = [
                {
                    "dataset": mix.names[mix.train.dataset[row]],
                    "conversation": int(mix.train.position[row]),
                    "begins": mix.train.messages(row)[0]["content"][:80],
                }
                for row in rows
            ]
            line = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "examples": examples}
            append_lines(self.file, [json.dumps(line, ensure_ascii=False)])
            print(f"\nstep {step:,} left out: loss {loss}, gradient norm {grad_norm}; see {self.file}", flush=True)
        if self.bad_in_a_row >= self.max_bad_steps:  # over it where a resumed run has a lower limit
            stop_all(
                f"{self.bad_in_a_row} steps in a row without a finite loss and gradient, up to step {step:,}: stopped; "
                "bad_steps.jsonl in output_dir lists their conversations"
            )

    def metrics(self, loss: float | None, loss_scale: float | None) -> dict[str, Any]:
        """For a line of metrics, which begins a new count of spikes.

        Args:
            loss: the line's; None when all its steps were left out.
        """
        metrics: dict[str, Any] = {"grad_norm_max": self.norm_peak}
        if self.norm_spikes:
            metrics["grad_norm_spikes"] = self.norm_spikes
        if loss is not None:
            metrics |= {"loss_spike": 1} if _is_spike(loss, self.losses, LOSS_SPIKE) else {}
            self.losses.append(loss)
        if self.skipped:
            metrics["skipped_steps"] = self.skipped
        if self.bad:
            metrics["bad_steps"] = self.bad
        if loss_scale is not None:
            metrics["loss_scale"] = loss_scale
        self.norm_spikes, self.norm_peak = 0, 0.0
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, as JSON takes it."""
        state = {name: getattr(self, name) for name in ("skipped", "bad", "bad_in_a_row", "norm_spikes", "norm_peak")}
        return state | {"norms": list(self.norms), "losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, deque(value, maxlen=WINDOW) if isinstance(value, list) else value)


def _is_spike(value: float, before: deque[float], factor: float) -> bool:
    return len(before) >= ENOUGH and value > factor * statistics.median(before)


@contextmanager
def one_line_at_minimum_scale():
    """DeepSpeed raises a bare Exception where its fp16 loss scale cannot sink any further (0.19.8, loss_scaler.py)."""
    try:
        yield
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        stop_all(FP16_ADVICE)
