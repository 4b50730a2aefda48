"""Which process the others wait for: a card that is slow, hot or shared shows in metrics.jsonl.

A step is as long as its slowest process needs; the others spend the difference in the collective of the backward pass.
So of each process the time of its forward passes, in which it waits for nobody, and of its backward passes are taken.
The one that waits least has the least backward time for its forward time; what another's backward passes take beyond
that ratio is waiting. On a GPU these are events on its stream, read where a line of metrics is written, so nothing
waits for the device that did not before. Where weights are gathered in the forward pass (ZeRO-3, FSDP2), it contains
waiting too, and tells less.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator


class Pace:
    """The forward and backward times of this process; nothing for one that is alone."""

    def __init__(self, device: torch.device, processes: int):
        self.measures, self.on_gpu = processes > 1, device.type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []
        self.of_step: list[tuple[str, Any, Any]] = []

    @contextmanager
    def spend(self, what: str) -> Iterator[None]:
        """Around a `forward` or `backward` pass."""
        if not self.measures:
            yield
            return
        begun = self._now()
        yield
        self.of_step.append((what, begun, self._now()))

    def end_step(self, counts: bool) -> None:
        """Close a step, or leave it out."""
        self.spans += self.of_step if counts else []
        self.of_step = []

    def close(self, accelerator: Accelerator, passed: float) -> dict[str, float]:
        """The metrics since the last call. Every process calls this.

        Args:
            passed: seconds of training since then.
        Returns: `backward_share` and `collective_wait_share` of that time, means over the processes; the
            `slowest_process`, which has the longest forward passes, and its `slowest_share` of those of all: 1 divided
            by the number of processes where all are alike. Nothing for a process that is alone, or without a step.
        """
        if not self.measures:
            return {}
        seconds = torch.zeros(1, 2, dtype=torch.double)
        for what, begun, ended in self.spans:
            seconds[0, int(what == "backward")] += begun.elapsed_time(ended) / 1000 if self.on_gpu else ended - begun
        self.spans = []
        forward, backward = accelerator.gather(seconds.to(accelerator.device)).cpu().T
        if not forward.all():
            return {}
        waited = backward - (backward / forward).min() * forward
        return {
            "backward_share": float(backward.mean()) / passed,
            "collective_wait_share": float(waited.mean()) / passed,
            "slowest_process": int(forward.argmax()),
            "slowest_share": float(forward.max() / forward.sum()),
        }

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
