"""What a run leaves behind while it trains: metrics.jsonl, training.png, the progress bar, Weights & Biases."""

import functools
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from utils.collate import Batch
from utils.errors import UserError
from utils.flops import ModelFlops
from utils.launch import say
from utils.memory import peak_memory
from utils.mix import Mix
from utils.recipe import Recipe


class RunLog:
    """Writes one line of metrics at a time; does nothing on any process but the first.

    metrics.jsonl is the record; the curves and the wandb run are made from the same lines.

    Attributes:
        wandb_id: by which a resumed run goes on in the same wandb run; None without one.
    """

    def __init__(
        self, recipe: Recipe, total_steps: int, main_process: bool, step: int = 0, wandb_id: str | None = None
    ):
        """
        Args:
            step, wandb_id: of the checkpoint that the run goes on from.
        """
        self.path = recipe.output_dir / "metrics.jsonl"
        self.main_process = main_process
        self.wandb = _start_wandb(recipe, wandb_id) if main_process and recipe.log_wandb else None
        self.wandb_id = self.wandb.id if self.wandb else wandb_id
        self.progress = tqdm(
            total=total_steps, initial=step, desc="training", unit="step", disable=not main_process, smoothing=0.1
        )

    def write(self, metrics: dict[str, Any]) -> None:
        """Append one line; floats are kept in full, so that a line can be compared with a repeat of the run.

        Raises:
            UserError: the disk is full.
        """
        if not self.main_process:
            return
        # JSON knows no infinity, which the gradient norm is where fp16 overflows.
        line = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot write: {error.strerror}; the checkpoints are whole") from error
        if self.wandb:
            # The step as a metric of its own: wandb drops rows whose `step=` lies behind what it has seen.
            self.wandb.log(metrics)
        shown = {"loss": "loss", "learning_rate": "rate", "tokens_per_second": "tok/s", "mfu": "MFU"}
        postfix = {label: f"{metrics[key]:.4g}" for key, label in shown.items() if key in metrics}
        if postfix:
            self.progress.set_postfix(postfix)

    def show_evaluation(self, step: int, results: dict[str, float]) -> None:
        """Print an evaluation under the progress bar: a line for each data set, and one for all."""
        if not self.main_process:
            return
        names = [key.removesuffix("_loss").removeprefix("eval").removeprefix("_") for key in results if "_loss" in key]
        width = max((len(name) for name in names), default=0)
        with self.progress.external_write_mode():
            print(f"\nvalidation after step {step:,}")
            for name in names:
                key = f"eval_{name}" if name else "eval"
                loss, accuracy = results[f"{key}_loss"], results[f"{key}_accuracy"]
                print(f"  {name or 'all':<{width}}  loss {loss:.4f}  token accuracy {accuracy:.2%}", flush=True)
        self.draw()

    def draw(self) -> None:
        """Draw the curves so far, so that a run that is stopped has them too."""
        if self.main_process:
            try:
                plot(self.path, self.path.with_name("training.png"))
            except OSError as error:  # no reason to stop: what does not come back if it is not written says so itself
                say(f"\ntraining.png could not be drawn: {error.strerror}")

    def close(self) -> None:
        """Draw the curves for the last time and end the wandb run."""
        self.progress.close()
        self.draw()
        if self.wandb:
            self.wandb.finish()


class Clock:
    """What a run's time goes into, over all its starts.

    Attributes:
        seconds: of `data` (waiting for a batch), `training`, `evaluation` and `saving`.
    """

    def __init__(self):
        self.seconds = dict.fromkeys(("data", "training", "evaluation", "saving"), 0.0)

    @contextmanager
    def spend(self, what: str) -> Iterator[None]:
        """Count the time inside as spent on this."""
        started = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - started

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; the time until each comes counts as `data`."""
        while True:
            with self.spend("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


class TrainingStats:
    """Sums over the optimizer steps since the last line of metrics, kept on the device until the line is written.

    Attributes:
        tokens: real tokens (no padding) trained on so far, over all processes.
    """

    def __init__(
        self, mix: Mix, device: torch.device, clock: Clock, flops: ModelFlops | None = None, peak: float | None = None
    ):
        """
        Args:
            flops, peak: the model's, and the FLOP/s that the device can reach; without them there is no `mfu`.
        """
        self.names = mix.names
        self.clock, self.device = clock, device
        self.model_flops, self.peak = flops, peak
        self.flops = self.flops_of_step = 0.0  # of this process
        # Of each data set the sum of its losses, and its scored tokens; then the loss and the real tokens. In fp64: a
        # count by ones stands still at 16.8 million in fp32.
        self.sums = torch.zeros(2 * len(mix.names) + 2, device=device, dtype=torch.double)
        self.of_step = torch.zeros_like(self.sums)
        self.tokens = self.steps = 0
        self.seconds, self.waited = self._training_seconds(), clock.seconds["data"]

    def add(self, batch: Batch, losses: torch.Tensor, loss: torch.Tensor) -> None:
        """Add a micro-batch: the loss of each of its scored tokens, and its share of the step's loss."""
        losses = losses.detach().double()
        self.of_step.index_add_(0, batch.dataset, losses)
        self.of_step.index_add_(0, batch.dataset + len(self.names), torch.ones_like(losses))
        self.of_step[-2] += loss.detach()
        self.of_step[-1] += sum(batch.lengths)
        self.flops_of_step += self.model_flops.of(batch) if self.model_flops else 0.0

    def step_loss(self, accelerator: Accelerator) -> float:
        """The loss of the step just added, over all processes. Every process calls this."""
        return float(accelerator.reduce(self.of_step[-2]))

    def end_step(self, counts: bool = True) -> None:
        """Close the step just added; one that was left out does not count."""
        if counts:
            self.sums += self.of_step
            self.flops += self.flops_of_step
            self.steps += 1
        self.of_step.zero_()
        self.flops_of_step = 0.0

    def close(self, accelerator: Accelerator) -> dict[str, float]:
        """The metrics since the last call, over all processes: mean loss, each data set's own and its share; then real
        tokens a second, in all and of a device, the share of that time spent waiting for data, the model FLOPs
        utilisation, and the highest memory so far of the first process (on a CPU: all that was resident)."""
        sums = torch.cat([self.sums, self.sums.new_tensor([self.flops])])
        *by_dataset, loss, new_tokens, flops = accelerator.reduce(sums).tolist()
        self.tokens += int(new_tokens)
        metrics = {"loss": loss / self.steps} if self.steps else {}
        losses, counts = by_dataset[: len(self.names)], by_dataset[len(self.names) :]
        for name, total, count in zip(self.names, losses, counts, strict=True):
            if count:
                metrics |= {f"loss_{name}": total / count, f"share_{name}": count / sum(counts)}
        seconds, waited = self._training_seconds(), self.clock.seconds["data"]
        passed, devices = max(1e-9, seconds - self.seconds), accelerator.num_processes
        metrics |= {
            "tokens": self.tokens,
            "tokens_per_second": new_tokens / passed,
            "tokens_per_second_per_device": new_tokens / passed / devices,
            "data_wait_share": (waited - self.waited) / passed,
            "peak_memory_gib": peak_memory(self.device) / 2**30,
        }
        if self.peak:
            metrics["mfu"] = flops / passed / (self.peak * devices)
        self.sums.zero_()
        self.flops, self.steps, self.seconds, self.waited = 0.0, 0, seconds, waited
        return metrics

    def _training_seconds(self) -> float:
        return self.clock.seconds["data"] + self.clock.seconds["training"]

    def state_dict(self) -> dict[str, Any]:
        """This process's part for a checkpoint, as JSON takes it."""
        scalars = {name: getattr(self, name) for name in ("tokens", "steps", "seconds", "waited", "flops")}
        return {"sums": self.sums.tolist(), **scalars, "clock": self.clock.seconds}

    def load_state_dict(self, states: list[dict[str, Any]], with_sums: bool = True) -> None:
        """Go on from what `state_dict` returned on this process, or on several, whose sums are added."""
        self.tokens, self.steps, self.seconds = (states[0][name] for name in ("tokens", "steps", "seconds"))
        self.clock.seconds.update(states[0]["clock"])
        self.waited = states[0].get("waited", self.clock.seconds["data"])  # not in the first checkpoints of format 1
        self.flops = sum(state.get("flops", 0.0) for state in states) if with_sums else 0.0
        if with_sums and len(states[0]["sums"]) == len(self.sums):  # not where the mix was changed
            self.sums += torch.tensor([state["sums"] for state in states], dtype=torch.double).sum(0).to(self.sums)


def _start_wandb(recipe: Recipe, run_id: str | None):
    import wandb

    folder = recipe.output_dir / recipe.log_dir
    folder.mkdir(parents=True, exist_ok=True)
    start = functools.partial(
        wandb.init,
        project=recipe.wandb_project,
        name=recipe.output_dir.resolve().name,
        id=run_id,
        resume="allow",
        dir=folder,
        config=recipe.model_dump(mode="json"),
        settings=wandb.Settings(silent=True),
    )
    reason = ""
    try:
        # WANDB_MODE wins; verify=False: a key is enough here, whether the server takes it shows at the start.
        if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False, verify=False):
            raise wandb.UsageError("nobody is logged in")
        run = start()
    except wandb.Error as error:  # that, a node without the internet, or a key that the server refuses
        reason = f"{str(error).splitlines()[0]}, "
        run = start(mode="offline")
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    if run.offline:
        say(f"wandb: {reason}logging offline to {Path(run.dir).parent} (wandb sync uploads it)")
    elif not run.disabled:
        say(f"wandb: {run.url}")
    return run


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Every metric of a metrics.jsonl as its (step, value) points."""
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        metrics = json.loads(line)
        for name, value in metrics.items():
            if name != "step" and isinstance(value, (int, float)):
                curves[name].append((metrics["step"], value))
    return curves


def plot(metrics: Path, image: Path) -> None:
    """Draw metrics.jsonl: training and validation loss, accuracy, learning rate and gradient norm, by step."""
    if not metrics.exists():
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = read_metrics(metrics)
    panels = [
        ("training loss", lambda name: name == "loss" or name.startswith("loss_")),
        ("validation loss", lambda name: name.startswith("eval_") and name.endswith("loss")),
        ("validation accuracy", lambda name: name.startswith("eval_") and name.endswith("accuracy")),
        ("learning rate", lambda name: name == "learning_rate"),
        ("gradient norm", lambda name: name == "grad_norm"),
        ("tokens a second", lambda name: name == "tokens_per_second"),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
    datasets = sorted(name.removeprefix("loss_") for name in curves if name.startswith("loss_"))
    for axis, (title, belongs) in zip(axes.flat, panels, strict=True):
        for name in sorted(filter(belongs, curves)):
            dataset = name.removeprefix("eval_").removeprefix("loss_").removesuffix("_loss").removesuffix("_accuracy")
            style = {"color": "black", "linewidth": 2, "label": "all"}
            if dataset in datasets:  # of one colour in every panel
                style = {"color": f"C{datasets.index(dataset)}", "linewidth": 1, "label": dataset}
            axis.plot(*zip(*curves[name], strict=True), marker=".", **style)
        axis.set(title=title, xlabel="optimizer step")
        axis.grid(alpha=0.3)
        if len(axis.lines) > 1:
            axis.legend(fontsize="small")
    figure.savefig(image, dpi=110)
    plt.close(figure)
