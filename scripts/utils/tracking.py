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

from utils.errors import UserError
from utils.launch import say
from utils.mix import Mix
from utils.recipe import Recipe


class RunLog:
    """Writes one line of metrics at a time; does nothing on any process but the first.

    metrics.jsonl is the record; the curves and the wandb run are made from the same lines.
    """

    def __init__(self, recipe: Recipe, total_steps: int, main_process: bool):
        self.path = recipe.output_dir / "metrics.jsonl"
        self.main_process = main_process
        self.wandb = _start_wandb(recipe) if main_process and recipe.log_wandb else None
        self.progress = tqdm(total=total_steps, desc="training", unit="step", disable=not main_process, smoothing=0.1)

    def write(self, metrics: dict[str, Any]) -> None:
        """Append one line; floats are kept in full, so that a line can be compared with a repeat of the run."""
        if not self.main_process:
            return
        # JSON knows no infinity, which the gradient norm is where fp16 overflows.
        line = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if self.wandb:
            # The step as a metric of its own: wandb drops rows whose `step=` lies behind what it has seen.
            self.wandb.log(metrics)
        shown = {"loss": "loss", "learning_rate": "rate", "tokens_per_second": "tok/s"}
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
            plot(self.path, self.path.with_name("training.png"))

    def close(self) -> None:
        """Draw the curves for the last time and end the wandb run."""
        self.progress.close()
        self.draw()
        if self.wandb:
            self.wandb.finish()


class TrainingStats:
    """Sums over the optimizer steps since the last line of metrics, kept on the device until the line is written.

    Attributes:
        tokens: real tokens (no padding) trained on so far, over all processes.
        skipped_steps: steps so far that fp16's loss scaler left out because a gradient overflowed.
    """

    def __init__(self, mix: Mix, device: torch.device):
        self.names = mix.names
        self.device = device
        self.tokens = self.last_step = self.skipped_steps = 0
        self._reset()

    def _reset(self) -> None:
        # Sum of losses, scored tokens. In fp64: a count by ones stands still at 16.8 million in fp32.
        self.by_dataset = torch.zeros(2, len(self.names), device=self.device, dtype=torch.double)
        self.loss = torch.zeros((), device=self.device, dtype=torch.double)
        self.new_tokens = torch.zeros((), device=self.device, dtype=torch.double)
        self.started = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around evaluation and saving, whose time does not count as training time; making batches does."""
        started = time.perf_counter()
        yield
        self.started += time.perf_counter() - started

    def add(self, batch: dict[str, torch.Tensor], losses: torch.Tensor, loss: torch.Tensor) -> None:
        """Add a micro-batch: the loss of each of its scored tokens, and its share of the step's loss."""
        losses = losses.detach().double()
        self.by_dataset[0].index_add_(0, batch["dataset"], losses)
        self.by_dataset[1].index_add_(0, batch["dataset"], torch.ones_like(losses))
        self.loss += loss.detach()
        self.new_tokens += batch["lengths"].sum()

    def close(self, accelerator: Accelerator, step: int) -> dict[str, float]:
        """The metrics of the steps up to `step`, over all processes: mean loss, each data set's own and its share.

        Raises:
            UserError: the loss is infinite or not a number, on every process alike.
        """
        sums = torch.cat([self.by_dataset.flatten(), self.loss[None], self.new_tokens[None]])
        *by_dataset, loss, new_tokens = accelerator.reduce(sums).tolist()
        self.tokens += int(new_tokens)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is not a finite number between steps {self.last_step + 1:,} and {step:,}: stopped"
            )
        metrics = {"loss": loss / (step - self.last_step)}
        self.last_step = step
        losses, counts = by_dataset[: len(self.names)], by_dataset[len(self.names) :]
        for name, total, count in zip(self.names, losses, counts, strict=True):
            if count:
                metrics |= {f"loss_{name}": total / count, f"share_{name}": count / sum(counts)}
        if self.skipped_steps:
            metrics["skipped_steps"] = self.skipped_steps
        metrics |= {"tokens": self.tokens, "tokens_per_second": new_tokens / (time.perf_counter() - self.started)}
        self._reset()
        return metrics


def _start_wandb(recipe: Recipe):
    import wandb

    folder = recipe.output_dir / recipe.log_dir
    folder.mkdir(parents=True, exist_ok=True)
    start = functools.partial(
        wandb.init,
        project=recipe.wandb_project,
        name=recipe.output_dir.resolve().name,
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
