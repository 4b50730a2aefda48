"""What a run leaves behind while it trains: metrics.jsonl, training.png, the progress bar, the trackers."""

import json
import math
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from recipe.keys import Recipe
from run.curves import Curves
from run.lines import append_lines
from run.progress import Progress
from run.samples import Samples
from run.trackers import Trackers
from training.replies import Reply, shown
from utils.errors import reason
from utils.launch import say
from utils.tables import progress_bar


class RunLog:
    """Writes one line of metrics at a time; does nothing on any process but the first.

    metrics.jsonl is the record; the curves and the trackers are given the same lines.
    """

    def __init__(self, recipe: Recipe, progress: Progress, main_process: bool):
        """
        Args:
            progress: where the run begins; remembers the runs of the trackers, as `Trackers` has it.

        Raises:
            UserError: as `Trackers`.
        """
        self.path = recipe.output_dir / "metrics.jsonl"
        self.curves = Curves(self.path)
        self.main_process = main_process
        self._drawer = ThreadPoolExecutor(max_workers=1)
        self._drawing: Future | None = None
        self.trackers = Trackers(recipe, progress) if main_process else None
        self.progress_bar = progress_bar(
            total=progress.total_steps,
            initial=progress.step,
            desc="training",
            unit="step",
            disable=not main_process,
            smoothing=0.1,
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
        append_lines(self.path, [json.dumps(line, allow_nan=False)])
        self.trackers.log(metrics)
        shown = {"loss": "loss", "learning_rate": "rate", "tokens_per_second": "tok/s", "mfu": "MFU"}
        postfix = {label: f"{metrics[key]:.4g}" for key, label in shown.items() if key in metrics}
        if postfix:
            self.progress_bar.set_postfix(postfix, refresh=False)  # with the next step

    def show_evaluation(self, step: int, results: dict[str, float]) -> None:
        """Print an evaluation under the progress bar: a line for each data set, and one for all."""
        if not self.main_process:
            return
        losses = [key.removesuffix("_loss") for key in results if key.endswith("_loss")]
        names = [key.removeprefix("eval").removeprefix("_") for key in losses]
        width = max((len(name) for name in names), default=0)
        with self.progress_bar.external_write_mode():
            print(f"\nvalidation after step {step:,}")
            for name in names:
                key = f"eval_{name}" if name else "eval"
                loss, accuracy = results[f"{key}_loss"], results[f"{key}_accuracy"]
                print(f"  {name or 'all':<{width}}  loss {loss:.4f}  token accuracy {accuracy:.2%}", flush=True)
        self.draw()

    def write_samples(self, step: int, samples: Samples, replies: list[Reply]) -> None:
        """Add replies to samples.jsonl, print them under the progress bar, and log them as a table.

        Raises: UserError where the disk is full.
        """
        if not self.main_process:
            return
        samples.write(step, replies)
        with self.progress_bar.external_write_mode():
            print(f"replies after step {step:,}")
            for prompt, reply in zip(samples.prompts, replies, strict=True):
                question, end = prompt.messages[-1]["content"], "" if reply.ended else " ..."
                print(f"  > {shown(question)}\n  {shown(reply.text)}{end}", flush=True)
        self.trackers.log_table("samples", step, ["step", "prompt", "reply", "ended"], samples.table(step, replies))

    def draw(self) -> None:
        """Draw the curves so far, so that a run that is killed has them too: beside the steps, none of which waits.

        At 100,000 lines a drawing takes 0.7 s of a core, and the first of a start 1.4 more to read them. Where
        evaluations come faster than that some are passed over; the end draws all.
        """
        if self.main_process and (self._drawing is None or self._drawing.done()):
            self.wait_for_drawing()
            self._drawing = self._drawer.submit(self.curves.draw, self.path.with_name("training.png"))

    def wait_for_drawing(self) -> None:
        """Wait for a drawing that is on its way, and say why where there is none."""
        drawing, self._drawing = self._drawing, None
        try:
            if drawing:
                drawing.result()
        except Exception as error:  # no reason to stop, whatever it is: an MPLBACKEND that is none, a full disk
            say(f"\ntraining.png could not be drawn: {getattr(error, 'strerror', None) or reason(error)}")

    def close(self) -> None:
        """Draw the curves for the last time; the trackers go on until their own `finish`."""
        self.progress_bar.close()
        if self.main_process:
            self.wait_for_drawing()
            self.draw()
            self.wait_for_drawing()
            self._drawer.shutdown()
