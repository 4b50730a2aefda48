"""training.png: the curves of metrics.jsonl, drawn at every evaluation, in a second however long the run is."""

import os
import re
from collections import defaultdict
from functools import cache
from operator import itemgetter
from pathlib import Path

from recipe.refusals import RESERVED_DATASETS
from run.lines import metrics_lines
from utils.files import UNFINISHED

# Bins of a curve at most, twice and more of the 430 pixels that a panel is wide: every line looks as all points would.
MOST_BINS = 1024
NO_DATASETS = [f"loss_{name}" for name in RESERVED_DATASETS]  # of run/health.py: they look like a data set's loss
PANELS = {
    "training loss": lambda name: name == "loss" or (name.startswith("loss_") and name not in NO_DATASETS),
    "validation loss": lambda name: name.startswith("eval_") and name.endswith("loss"),
    "validation accuracy": lambda name: name.startswith("eval_") and name.endswith("accuracy"),
    "learning rate": lambda name: name == "learning_rate",
    "gradient norm": lambda name: name == "grad_norm",
    "tokens a second": lambda name: name == "tokens_per_second",
}
Point = tuple[int, float]  # step and value


class Curve:
    """The points of one metric by step; of many, the lowest and the highest of each of equally wide bins, and the last.

    As many as MOST_BINS are kept as they are.
    """

    def __init__(self):
        self.width = 1  # of a bin, in steps
        self.bins: dict[int, tuple[Point, Point]] = {}  # its lowest and its highest
        self.last: Point | None = None

    def add(self, step: int, value: float) -> None:
        self.last = point = (step, value)
        number = step // self.width
        low, high = self.bins.get(number, (point, point))
        self.bins[number] = (point if value < low[1] else low, point if value > high[1] else high)
        while len(self.bins) > MOST_BINS:
            self._widen()

    def _widen(self) -> None:
        self.width *= 2
        bins, self.bins = self.bins, {}
        for number, (low, high) in bins.items():
            lower, higher = self.bins.get(number // 2, (low, high))
            self.bins[number // 2] = (min(low, lower, key=_value), max(high, higher, key=_value))

    def points(self) -> list[Point]:
        """By step."""
        return sorted({point for pair in self.bins.values() for point in pair} | {self.last}, key=_step)


_step, _value = itemgetter(0), itemgetter(1)


class Curves:
    """The curves of a metrics.jsonl, of which only the lines that are new are read each time."""

    def __init__(self, metrics: Path):
        self.metrics = metrics
        self.curves: dict[str, Curve] = defaultdict(Curve)
        self.read = 0  # bytes
        self.is_drawn = cache(lambda name: any(belongs(name) for belongs in PANELS.values()))

    def read_on(self) -> None:
        """Take in the lines that came since the last time.  Raises: OSError."""
        for end, line in metrics_lines(self.metrics, self.read):
            self.read = end
            for name, value in line.items():
                if self.is_drawn(name) and isinstance(value, (int, float)):
                    self.curves[name].add(line["step"], value)

    def draw(self, image: Path) -> None:
        """Draw training and validation loss, accuracy, learning rate, gradient norm and speed, by step; nothing without
        a metrics.jsonl.  Raises: OSError."""
        if not self.metrics.exists():
            return
        from matplotlib.figure import Figure  # not pyplot, which takes twice as long to import

        self.read_on()
        figure = Figure(figsize=(15, 8), layout="constrained")
        axes = figure.subplots(2, 3)
        trained = PANELS["training loss"]
        datasets = sorted(name.removeprefix("loss_") for name in self.curves if trained(name) and name != "loss")
        for axis, (title, belongs) in zip(axes.flat, PANELS.items(), strict=True):
            for name in sorted(filter(belongs, self.curves)):
                dataset = _dataset_of(name)
                style = {"color": "black", "linewidth": 2, "label": "all"}
                if dataset in datasets:  # of one colour in every panel
                    style = {"color": f"C{datasets.index(dataset)}", "linewidth": 1, "label": dataset}
                axis.plot(*zip(*self.curves[name].points(), strict=True), marker=".", **style)
            axis.set(title=title, xlabel="optimizer step")
            axis.grid(alpha=0.3)
            if len(axis.lines) > 1:
                axis.legend(fontsize="small")
        # Whole or not at all: a run may end in the middle of it, and somebody may be looking at it.
        work = image.with_name(f".{image.name}.{os.getpid()}{UNFINISHED}")
        try:
            figure.savefig(work, dpi=110, format="png")
            os.replace(work, image)
        except OSError:
            work.unlink(missing_ok=True)
            raise


def _dataset_of(name: str) -> str | None:
    """`vicuna` of loss_vicuna, eval_vicuna_loss and eval_vicuna_accuracy; None of what is of all together."""
    own = re.fullmatch(r"eval_(.+)_(?:loss|accuracy)|loss_(.+)", name)
    return own and (own[1] or own[2])
