"""How an engine lays a run's state over its processes, and what that takes of a device and of its host.

Nothing here needs a process group, so that a run can be planned on any machine (`scripts/plan.py`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from training.deepspeed_config import optimizer_on_host
from training.fsdp_config import Sharding
from utils.launch import num_processes


@dataclass(frozen=True)
class StateLayout:
    """An engine, by what decides over memory and traffic.

    Attributes:
        engine: `plain` is one process or DistributedDataParallel.
        shards: processes that a state which is cut is cut among.
        replicas: groups of such processes, each with the whole state. Under plain every process is one.
        optimizer_on_host, parameters_on_host: offloaded from a GPU; without one all is in the same memory anyway.
        bucket: gradients that DeepSpeed reduces at once (`reduce_bucket_size`); None: the square of the hidden size.
        buckets: of them, two where one is filled while the other is reduced (`overlap_comm`).
        all_reduces: stages 1 and 2 give each process the sum of all gradients, of which it keeps its share: DeepSpeed's
            default (`use_multi_rank_bucket_allreduce`), and without that where `reduce_scatter` is false.
        live: weights that ZeRO-3 leaves gathered (`stage3_max_live_parameters`).
        sub_group: weights that ZeRO-3 updates at once (`sub_group_size`).
        reshard: FSDP2's `reshard_after_forward`.
    """

    engine: Literal["plain", "zero1", "zero2", "zero3", "fsdp2"] = "plain"
    shards: int = 1
    replicas: int = 1
    optimizer_on_host: bool = False
    parameters_on_host: bool = False
    bucket: int | None = None
    buckets: int = 1
    all_reduces: bool = False
    live: int = 10**9
    sub_group: int = 10**9
    reshard: bool = True

    @property
    def processes(self) -> int:
        return self.shards * self.replicas

    @property
    def name(self) -> str:
        """In words, for a table."""
        if self.engine == "plain":
            return "DDP" if self.processes > 1 else "one process"
        what = "FSDP2" if self.replicas == 1 else "HSDP"
        what = f"ZeRO-{self.engine[-1]}" if self.is_deepspeed else what
        return what + ", offload" * (self.optimizer_on_host or self.parameters_on_host)

    def __str__(self) -> str:
        """As `name`, with the processes, and how they share a model in hybrid shards."""
        hybrid = f" ({self.replicas} replicas of {self.shards} shards)" * (self.name.startswith("HSDP"))
        return self.name + hybrid + f", {self.processes} processes" * (self.processes > 1)

    @property
    def is_deepspeed(self) -> bool:
        return self.engine.startswith("zero")

    @property
    def keeps_half_weights(self) -> bool:
        """Whether forward and backward run on weights in half precision, without autocast."""
        return self.engine != "plain"


def replicated(processes: int) -> StateLayout:
    """One process, or DistributedDataParallel."""
    return StateLayout(replicas=processes)


def deepspeed_layout(zero: Mapping[str, Any], processes: int) -> StateLayout:
    """By the section `zero_optimization` of DeepSpeed's config; the defaults are those of deepspeed 0.19's
    runtime/zero/config.py."""
    stage = max(1, min(3, zero.get("stage", 0)))
    overlap = zero.get("overlap_comm")
    bucket = zero.get("reduce_bucket_size", 5e8)
    all_reduces = zero.get("use_multi_rank_bucket_allreduce", True) or not zero.get("reduce_scatter", True)
    return StateLayout(
        engine=f"zero{stage}",
        shards=processes,
        optimizer_on_host=optimizer_on_host(zero),
        parameters_on_host=stage == 3 and (zero.get("offload_param") or {}).get("device", "none") != "none",
        bucket=None if bucket == "auto" else int(bucket),
        buckets=2 if overlap or (overlap is None and stage == 3) else 1,
        all_reduces=stage < 3 and all_reduces,
        live=int(zero.get("stage3_max_live_parameters", 1e9)),
        sub_group=int(zero.get("sub_group_size", 1e9)),
    )


def fsdp2_layout(processes: int, replicas: int = 1, reshard: bool = True, offload: bool = False) -> StateLayout:
    """FSDP2 (`fully_shard` of each decoder layer and of the root); with several replicas hybrid shards (HSDP)."""
    on_host = {"optimizer_on_host": offload, "parameters_on_host": offload}
    return StateLayout("fsdp2", max(1, processes // replicas), replicas, reshard=reshard, **on_host)


def layout_of_this_run(zero: Mapping[str, Any] | None, sharding: Sharding | None) -> StateLayout:
    """Of the engine that the launcher started these processes for.

    Args:
        zero: the section `zero_optimization` of DeepSpeed's config; None without DeepSpeed.
        sharding: of FSDP2; None without it.
    """
    processes = num_processes()
    if zero is not None:
        return deepspeed_layout(zero, processes)
    if sharding is not None:
        return fsdp2_layout(processes, sharding.replicas, sharding.gather_again, sharding.on_host)
    return replicated(processes)


# ---- Bytes ----


class ModelSize(NamedTuple):
    """Weights, by what an engine does with them."""

    trained: int
    frozen_bytes: int  # of those that are not: an adapter's model
    layer: int  # weights of one of the layers
    ends: int  # of embedding and output layer
    hidden: int  # width


def device_state(
    layout: StateLayout, size: ModelSize, element: int, moments: int, gpu: bool, accumulates: bool = False
) -> dict[str, int]:
    """Bytes of a device for `weights`, `gradients`, `optimizer`; `step`, which the optimizer's step needs beside them;
    `transient`, what forward and backward hold for a while: gathered layers, gradients on their way.

    The first three are those of the ZeRO paper (Rajbhandari et al. 2020, section 3.1: 2 + 2 + 12 bytes a parameter in
    half precision, of which stage 1 shards the 12, stage 2 the gradients and stage 3 the weights too). What else
    DeepSpeed holds is read from deepspeed 0.19 (runtime/zero/stage_1_and_2.py, stage3.py), FSDP2 from torch 2.13
    (distributed/fsdp/_fully_shard).

    Args:
        element: bytes of a number in forward and backward.
        moments: bytes of Adam's two of a weight, without DeepSpeed.
        accumulates: a step has several micro-batches.
    """
    trained, shard = size.trained, math.ceil(size.trained / layout.shards)
    if layout.engine == "plain":
        # DDP copies gradients into its buckets (gradient_as_bucket_view is off in Accelerate); autocast keeps copies of
        # the matrices in half precision through the forward pass. AdamW makes no copy of anything.
        return {
            "weights": size.frozen_bytes + trained * (4 if element == 4 else 6),
            "gradients": trained * (8 if layout.replicas > 1 else 4),
            "optimizer": trained * moments,
            "step": 0,
            "transient": 0,
        }
    if layout.engine == "fsdp2":
        return _fsdp2_state(layout, size, element, moments, gpu)
    bucket = size.hidden**2 if layout.bucket is None else layout.bucket
    if not gpu:  # where memory that is never touched takes no room
        bucket = min(bucket, trained)
    buckets = bucket * element * layout.buckets
    offloaded = gpu and layout.optimizer_on_host
    optimizer = 0 if offloaded else shard * 12  # fp32 masters also where the model is fp32
    if layout.engine == "zero3":
        weights = math.ceil(size.frozen_bytes / layout.shards) + shard * element
        whole = trained + size.frozen_bytes // element
        return {
            "weights": 0 if gpu and layout.parameters_on_host else weights,
            "gradients": (0 if offloaded else shard * element) + buckets,  # grad_partitions_flat_buffer
            "optimizer": optimizer,
            # The gradients of a sub-group, joined and then in fp32 (_prepare_fp32_grad_for_sub_group).
            "step": 0 if offloaded else min(shard, layout.sub_group) * (element + 4),
            # Weights stay gathered that come again within max_reuse_distance, up to max_live_parameters in all; beside
            # them the gradients of a layer before they are in a bucket.
            "transient": (min(whole, layout.live) + size.layer) * element,
        }
    # Under stage 2 with an optimizer on the host gradients go there bucket by bucket; without one those of a
    # micro-batch come beside the sum of those before it (independent_gradient_partition_epilogue).
    own = trained if layout.engine == "zero1" else 0 if offloaded else shard
    added = own * element if accumulates and layout.engine == "zero2" else 0
    return {
        "weights": size.frozen_bytes + trained * element,
        "gradients": own * element + buckets,
        "optimizer": optimizer,
        "step": 0 if offloaded else shard * 4,  # the gradients in fp32
        "transient": added,
    }


def _fsdp2_state(layout: StateLayout, size: ModelSize, element: int, moments: int, gpu: bool) -> dict[str, int]:
    """fp32 weights, gradients and moments, all sharded; computed with in half precision (MixedPrecisionPolicy)."""
    shard, offloaded = math.ceil(size.trained / layout.shards), gpu and layout.parameters_on_host
    # The root stays gathered from forward to backward; of the layers the one at work, the next, and the piece that it
    # arrives in. Gradients of a layer are whole, and copied in fp32 to be summed; those of the root at the end.
    layers = 3 * size.layer if layout.reshard else size.trained - size.ends
    at_work = layers * element + size.layer * (element + 4)
    at_the_end = size.ends * (element + 4)
    return {
        "weights": 0 if offloaded else math.ceil(size.frozen_bytes / layout.shards) + 4 * shard,
        "gradients": 0 if offloaded else 4 * shard,
        "optimizer": 0 if offloaded else moments * shard,
        "step": 0,
        "transient": size.ends * element + max(at_work, at_the_end),
    }


def host_state(layout: StateLayout, size: ModelSize, element: int, moments: int) -> dict[str, int]:
    """Bytes that a process with a GPU keeps on the host: of the offloaded optimizer fp32 weights, both moments and the
    gradients in fp32 (ZeRO-Offload, Ren et al. 2021, figure 1), and the weights that ZeRO-3 gathers from."""
    found, shard = {}, math.ceil(size.trained / layout.shards)
    if layout.optimizer_on_host:
        if layout.engine == "fsdp2":
            found["optimizer"] = shard * (8 + moments)
        else:  # stage 3 adds the step's gradients up there as well
            found["optimizer"] = shard * (16 + (element if layout.engine == "zero3" else 0))
    if layout.parameters_on_host and layout.engine == "zero3":
        found["weights"] = math.ceil(size.frozen_bytes / layout.shards) + shard * element
    return found
