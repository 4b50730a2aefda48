"""How long a step takes a card: a roofline of products, attention, memory and network.

Everything takes as long as its FLOPs or its bytes need at the rates of `planning/cards.py`, one after the other, but
for what the engine sends while it computes. Nothing of it is measured but what `planning/measured.py` compares with it.
"""

from dataclasses import dataclass, replace

import numpy as np

from planning.cards import (
    CUDNN,
    FLASH,
    HOST_MEMORY,
    LINK,
    MEMORY,
    PCIE,
    PER_MACHINE,
    PRODUCTS,
    PRODUCTS_IN_FP32,
    Card,
)
from planning.work import UPDATE_BYTES, Load, Traffic, Work
from training.state_layout import ModelSize, StateLayout

# Seconds that a micro-batch of conversations of all lengths takes beyond its products and bytes: what one H100 needed
# for the 3B on the mix's lengths (0.89 s a step of four, by this roofline 0.31: benchmarks/h100.json). Nobody has
# looked for its cause yet; a micro-batch of full rows has nothing of it.
MIXED_LENGTHS = 0.145


@dataclass(frozen=True)
class Pace:
    """Of an engine on a card.

    Attributes:
        element: bytes of a number in forward and backward.
        mfu: share of the card's peak that forward and backward reach; None: by the roofline.
        mixed: micro-batches are of conversations of all lengths.
    """

    card: Card
    work: Work
    layout: StateLayout
    size: ModelSize
    traffic: Traffic
    element: int
    moments: int
    mfu: float | None = None
    mixed: bool = True

    def computing(self, load: Load) -> np.ndarray:
        """Seconds of forward and backward of each micro-batch."""
        work, card = self.work, self.card
        model_flops = work.per_token * load.tokens + work.per_target * load.targets
        pairs = load.short_pairs + load.long_pairs
        if self.mfu is not None:
            return (model_flops + work.per_pair * pairs) / (self.mfu * card.flops)
        again = work.again * load.tokens + work.logits_twice * work.forward * work.per_target * load.targets
        reached = card.flops * (PRODUCTS_IN_FP32 if self.element == 4 else PRODUCTS)
        memory = card.bandwidth * MEMORY
        products = np.maximum((model_flops + again) / reached, work.weight_bytes / memory)
        is_hopper = card.name == "h100"  # on others all attention is flash attention 2 (training/attention.py)
        attention = load.short_pairs / FLASH + load.long_pairs / (CUDNN if is_hopper else FLASH)
        moved = work.token_bytes * load.tokens + work.target_bytes * load.targets + work.micro_batch_bytes
        seconds = products + work.per_pair * attention / card.flops + (moved + self._state_bytes()) / memory
        return np.where(load.tokens > 0, seconds + MIXED_LENGTHS * self.mixed, 0.0)

    def evaluating(self, load: Load) -> float:
        """Seconds of the forward pass over all of `load` on all cards: of attention and of what moves a third."""
        work, times = self.work, 3 * self.work.forward
        products = {"per_token": times * work.per_token, "per_target": times * work.per_target}
        forward = work._replace(again=0.0, logits_twice=False, **products)
        three_times = replace(self, work=forward, mixed=False).computing(load)
        return float(three_times.sum()) / 3 / self.layout.processes

    def step(self, load: Load) -> float:
        """Seconds of an optimizer step.

        Engines that exchange something at every micro-batch wait there for the slowest process, the others once.
        """
        busy, traffic = self.computing(load), self.traffic
        last = float(busy[-1].max())
        shared = self._seconds(traffic.micro_batch, self.layout.shards)
        host = traffic.from_host / (PCIE * LINK)
        once = self._seconds(traffic.step, self.layout.shards)
        overlaps = self.layout.engine in ("plain", "fsdp2") or self.layout.buckets > 1
        if self.layout.engine in ("plain", "zero1"):
            seconds = float(busy.sum(0).max())
        else:
            slowest, sent = busy.max(1), max(shared, host)
            seconds = float((np.maximum(slowest, sent) if overlaps else slowest + sent).sum())
        replicas = self._replicas(traffic.replicas)
        hidden = 2 / 3 * last if overlaps else 0.0  # behind the backward pass of the last micro-batch
        return seconds + once + max(0.0, replicas - hidden) + self._update()

    def _state_bytes(self) -> float:
        """That engines copy at each micro-batch: gradients into buckets, gathered weights out of theirs."""
        return self.size.trained * {"plain": 0, "zero1": 2, "zero2": 3, "zero3": 7, "fsdp2": 6}[self.layout.engine]

    def _update(self) -> float:
        """Seconds of the optimizer's step."""
        shard = self.size.trained / self.layout.shards
        each = UPDATE_BYTES - 8 + self.moments * 1.0
        if not self.layout.optimizer_on_host:
            return shard * each / (self.card.bandwidth * MEMORY)
        together = min(PER_MACHINE, self.layout.processes)
        return shard * together * each / HOST_MEMORY + self.traffic.host_step / (PCIE * LINK)

    def _seconds(self, sent: float, group: int) -> float:
        """For so many bytes of each card, in rings of a group that lies within a machine or goes over several."""
        rate = self.card.link if group <= PER_MACHINE else min(self.card.link, self.card.network)
        return sent / (rate * LINK)

    def _replicas(self, sent: float) -> float:
        """For so many bytes of each card to its replicas: under plain all cards, of hybrid shards one a machine, with
        the network for eight rings at once."""
        if self.layout.engine == "plain" or self.layout.processes <= PER_MACHINE:
            return self._seconds(sent, self.layout.replicas)
        return sent * min(self.layout.shards, PER_MACHINE) / (self.card.network * LINK)
