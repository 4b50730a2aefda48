"""What the steps of a run add up to: losses, tokens, FLOPs, and what its time goes into."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from data.mix import Mix
from run.pace import Pace
from training.collate import Batch
from training.flops import ModelFlops
from training.memory import peak_memory
from utils.launch import num_processes


class Clock:
    """What a run's time goes into, over all its starts.

    Attributes:
        seconds: of `data` (waiting for a batch), `training`, `evaluation`, `saving` and `samples`.
    """

    def __init__(self):
        self.seconds = dict.fromkeys(("data", "training", "evaluation", "saving", "samples"), 0.0)

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
        self,
        mix: Mix,
        device: torch.device,
        clock: Clock,
        model_flops: ModelFlops | None = None,
        peak_flops: float | None = None,
    ):
        """
        Args:
            model_flops: what the model's batches take.
            peak_flops: FLOP/s that the device can reach; without both there is no `mfu`.
        """
        self.names = mix.names
        self.clock, self.device = clock, device
        self.model_flops, self.peak_flops = model_flops, peak_flops
        self.flops = self.flops_of_step = 0.0  # of this process
        # Of each data set the sum of its losses, and of its scored tokens' weights (without weights their number); then
        # the loss and the real tokens. In fp64: a count by ones stands still at 16.8 million in fp32.
        self.sums = torch.zeros(2 * len(mix.names) + 2, device=device, dtype=torch.double)
        self.of_step = torch.zeros_like(self.sums)
        self.tokens = self.steps = 0
        self.seconds, self.waited = self._training_seconds(), clock.seconds["data"]
        self.pace = Pace(device, num_processes())

    def add(self, batch: Batch, losses: torch.Tensor, loss: torch.Tensor) -> None:
        """Add a micro-batch: the loss of each of its scored tokens, and its share of the step's loss."""
        losses = losses.detach().double()
        weights = torch.ones_like(losses) if batch.weights is None else batch.weights.double()
        self.of_step.index_add_(0, batch.dataset, losses * weights)
        self.of_step.index_add_(0, batch.dataset + len(self.names), weights)
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
        self.pace.end_step(counts)

    def close(self, accelerator: Accelerator) -> dict[str, float]:
        """The metrics since the last call, over all processes: mean loss, each data set's own and its share; then real
        tokens a second, in all and of a device, the share of that time spent waiting for data, the model FLOPs
        utilisation, the highest memory so far of the first process (on a CPU: all that was resident), and of several
        processes who waits for whom (`Pace.close`)."""
        sums = torch.cat([self.sums, self.sums.new_tensor([self.flops])])
        *by_dataset, loss, new_tokens, flops = accelerator.reduce(sums).tolist()
        self.tokens += int(new_tokens)
        metrics = {"loss": loss / self.steps} if self.steps else {}
        losses, weights = by_dataset[: len(self.names)], by_dataset[len(self.names) :]
        for name, total, weight in zip(self.names, losses, weights, strict=True):
            if weight:
                metrics |= {f"loss_{name}": total / weight, f"share_{name}": weight / sum(weights)}
        seconds, waited = self._training_seconds(), self.clock.seconds["data"]
        passed, devices = max(1e-9, seconds - self.seconds), accelerator.num_processes
        metrics |= {
            "tokens": self.tokens,
            "tokens_per_second": new_tokens / passed,
            "tokens_per_second_per_device": new_tokens / passed / devices,
            "data_wait_share": (waited - self.waited) / passed,
            "peak_memory_gib": peak_memory(self.device) / 2**30,
        }
        metrics |= self.pace.close(accelerator, passed)
        if self.peak_flops:
            metrics["mfu"] = flops / passed / (self.peak_flops * devices)
        self.sums.zero_()
        self.flops, self.steps, self.seconds, self.waited = 0.0, 0, seconds, waited
        return metrics

    def _training_seconds(self) -> float:
        return self.clock.seconds["data"] + self.clock.seconds["training"]

    def state_dict(self) -> dict[str, Any]:
        """This process's part for a checkpoint, as JSON takes it."""
        scalars = {name: getattr(self, name) for name in ("tokens", "steps", "seconds", "waited", "flops")}
        return {"sums": self.sums.tolist(), **scalars, "clock": dict(self.clock.seconds)}

    def load_state_dict(self, states: list[dict[str, Any]], with_sums: bool = True) -> None:
        """Go on from what `state_dict` returned on this process, or on several, whose sums are added."""
        self.tokens, self.steps, self.seconds = (states[0][name] for name in ("tokens", "steps", "seconds"))
        self.clock.seconds.update(states[0]["clock"])
        self.waited = states[0].get("waited", self.clock.seconds["data"])  # not in the first checkpoints of format 1
        self.flops = sum(state.get("flops", 0.0) for state in states) if with_sums else 0.0
        if with_sums and len(states[0]["sums"]) == len(self.sums):  # not where the mix was changed
            self.sums += torch.tensor([state["sums"] for state in states], dtype=torch.double).sum(0).to(self.sums)
