"""`benchmark.py roofline`: how long a step takes a device that reaches given rates, from a trace of the real step.

Every operation takes as long as its FLOPs or its bytes need, whichever is longer, one after the other. What is not
counted: launches that the GPU waits for, traffic that its cache saves or a kernel repeats, communication. The count is
the same each time, so that the worth of a change is seen without a GPU; what a GPU really does is for `train --gpu`.

Under `torch_compile` the layers' operations between two matrix products or attentions count as one kernel, which reads
what comes from outside of it once and writes what is used outside of it. That is a model of what Inductor does, as no
compiler runs on fake tensors. Sums over the tokens, as of a bias's gradient, are kernels of their own in it.
"""

import json
from collections import Counter, defaultdict
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarking.measuring import in_a_process
from benchmarking.operations import Operation
from benchmarking.parts import PARTS
from benchmarking.trace import Trace
from benchmarking.traced_step import Step, trace_step
from benchmarking.train import shape
from training.flops import PEAK_FLOPS
from utils.errors import UserError

# What an H100 SXM of 80 GB reached of its 989 TFLOP/s and 3.35 TB/s: the products of a layer of the 3B shape, PyTorch's
# FlashAttention-2 and cuDNN's attention on 4,096 tokens, forward and backward, AdamW (benchmarks/h100_parts.json).
# FLOP/s and bytes/s.
H100 = {"products": 710e12, "products in fp32": 50e12, "attention": 200e12, "cudnn attention": 349e12, "bytes": 2.5e12}
PEAK = PEAK_FLOPS["H100"]
USES = {"head": "logits", "weight casts": "weights in half precision", None: "other"}  # of memory, by who made it
MICRO_BATCHES = 4  # of a step, as in train.gpu_works
ALONE = ("bias gradients", "weight casts", "gradient accumulation")  # nothing to be fused with


# What made the step as fast as it is, each by what takes it away again; in the order of the table's lines.
LEADS = {
    "weights cast once, gradients summed by the product": ("training.engine.for_autocast", lambda *_: None),
    "a GPT-NeoX's layers by our kernels": ("training.engine.fuse_layers", lambda _: 0),
    "cuDNN's attention": ("training.attention.cudnn_is_faster", lambda: False),
    "the head in larger chunks": ("training.loss.rows_of_a_chunk", lambda vocabulary, _: 2**28 // (4 * vocabulary)),
    "AdamW by our kernel": ("training.optimizer.why_no_kernels", lambda _: "as before"),
}
AS_IT_IS = "as it is, bf16"


def settings(tokens: int) -> dict[str, tuple[dict[str, Any], list[list[int]]]]:
    """What the table compares: of each line the keys of the recipe, and the conversations of each micro-batch."""
    plain = {"use_flash_attention": True, "gradient_accumulation_steps": MICRO_BATCHES}

    def of(conversations: int = 1, **keys) -> tuple[dict[str, Any], list[list[int]]]:
        return plain | {"per_device_train_batch_size": conversations} | keys, [[tokens] * conversations] * MICRO_BATCHES

    return {
        AS_IT_IS: of(),
        "torch_compile": of(torch_compile=True),
        "optimizer_state_dtype: bf16": of(optimizer_state_dtype="bf16"),
        "twice the tokens": of(2),
        "twice the tokens, optimizer_state_dtype: bf16": of(2, optimizer_state_dtype="bf16"),
        "gradient_checkpointing": of(gradient_checkpointing=True),
        "twice the tokens, gradient_checkpointing": of(2, gradient_checkpointing=True),
        "fp16": of(dtype="fp16"),
    }


def measure(gpu: str, layers: int | None, tokens: int, rates: dict[str, float], leads: bool = True) -> dict[str, dict]:
    """The figures of every line; for a process of its own, since it takes a fake GPU.

    With `leads` a line for each that has come to those before it, from the step without any of them on.
    """
    config, found = shape(gpu, layers), {}
    if not leads:
        keys, lengths = settings(tokens)[AS_IT_IS]
        return {AS_IT_IS: figures(trace_step(config, lengths, keys), rates)}
    for name, (keys, lengths) in settings(tokens).items():
        found[name] = figures(trace_step(config, lengths, keys), rates)
    keys, lengths = settings(tokens)[AS_IT_IS]
    for count, name in enumerate(["without the five below", *list(LEADS)[:-1]]):
        with ExitStack() as stack:
            for target, other in list(LEADS.values())[count:]:
                stack.enter_context(patch(target, other))
            found[name if not count else f"+ {name}"] = figures(trace_step(config, lengths, keys), rates)
    return found


def benchmark_roofline(gpu: str, layers: int | None, tokens: int, rates: dict[str, float] = H100) -> dict:
    """The figures of the step as it is, with those of every line of the table under `settings`."""
    lines = in_a_process(measure, gpu, layers, tokens, rates, without_gpu=True)
    return {**next(iter(lines.values())), "rates": rates, "settings": lines}


def predict(file: str, layers: int | None) -> dict:
    """What the roofline says of `benchmark.py gpu`'s full rows, at the rates that gpu.json has of the same machine."""
    parts = json.loads(Path(file).read_text(encoding="utf-8"))["parts"]
    try:
        ceilings, rows = (parts[name]["figures"] for name in ("ceilings", "this collection, rows"))
    except KeyError as error:
        raise UserError("benchmark: a prediction needs the ceilings and the rows of this collection") from error
    found = {"cudnn attention": "attention", "attention": "attention_of_eight", "bytes": "copy"}
    rates = H100 | {ours: ceilings[name] for ours, name in found.items() if name in ceilings}
    # Of three products of a layer one adds up the weights' gradients.
    rates["products"] = 3 / (2 / ceilings["matmul"] + 1 / ceilings["matmul_sum"])
    line = in_a_process(measure, "3b", layers, 4096, rates, False, without_gpu=True)[AS_IT_IS]
    return {"rates": rates, "predicted": line, "measured": rows["tokens"] / rows["seconds"]}


def prediction_table(figures: dict) -> str:
    """The predicted speed beside the measured one, and what the predicted time goes into."""
    predicted = figures["predicted"]
    parts = ", ".join(f"{name} {part['milliseconds']:.1f}" for name, part in predicted["parts"].items())
    return (
        f"predicted {predicted['tokens_per_second']:,.0f} tokens a second, measured {figures['measured']:,.0f}: "
        f"{figures['measured'] / predicted['tokens_per_second']:.1%} of it; ms a micro-batch: {parts}"
    )


def figures(step: Step, rates: dict[str, float]) -> dict:
    """Of a traced step, by micro-batch: seconds and what goes into them, and the most memory that is held."""
    parts: dict[str, Counter] = {part: Counter(milliseconds=0.0, flops=0, bytes=0) for part in PARTS}
    operations = step.trace.operations
    for operation, moved in zip(operations, bytes_moved(operations), strict=True):
        needed = moved / rates["bytes"]
        if operation.flops:
            needed = max(needed, operation.flops / rates[rate_of(operation)])
        part = {"milliseconds": 1000 * needed, "flops": operation.flops, "bytes": moved}
        parts[operation.part].update({name: value / step.micro_batches for name, value in part.items()})
    seconds = sum(part["milliseconds"] for part in parts.values()) / 1000
    memory = peak_memory(step)
    return {
        "milliseconds": 1000 * seconds,
        "tokens": step.tokens // step.micro_batches,
        "tokens_per_second": step.tokens / step.micro_batches / seconds,
        "mfu": step.model_flops / step.micro_batches / seconds / PEAK,
        "peak_memory_gib": sum(memory.values()),
        "memory_gib": memory,
        "parts": {name: dict(part) for name, part in parts.items()},
    }


def rate_of(operation: Operation) -> str:
    """By which of the rates an operation with FLOPs runs."""
    if operation.kind == "attention":
        return "cudnn attention" if "cudnn" in operation.name else "attention"
    return "products" if operation.dtype.itemsize == 2 else "products in fp32"


# ---- What a compiler fuses ----


def bytes_moved(operations: list[Operation]) -> list[float]:
    """Of each operation; of a fused kernel's, its operations' shares by what each would move alone."""
    moved = [float(operation.bytes) for operation in operations]
    readers = defaultdict(list)  # of each storage the operations that read it
    for number, operation in enumerate(operations):
        for access in operation.reads:
            readers[access.storage].append(number)
    for kernel in fused_kernels(operations):
        inside, made, read, written = set(kernel), set(), {}, {}
        for number in kernel:
            for access in operations[number].reads:
                if access.storage not in made:
                    read[access.storage, access.place] = access.size
            for access in operations[number].writes:
                made.add(access.storage)
                if not inside.issuperset(readers[access.storage]):
                    written[access.storage, access.place] = access.size
        alone = sum(moved[number] for number in kernel)
        share = min(1.0, sum((*read.values(), *written.values())) / alone) if alone else 1.0
        for number in kernel:
            moved[number] *= share
    return moved


def fused_kernels(operations: list[Operation]) -> list[list[int]]:
    """The numbers of the operations that a compiled layer does at once: those of one pass between two of its matrix
    products or attentions."""
    kernels = []
    compiled = [number for number, each in enumerate(operations) if each.layer is not None and each.part not in ALONE]
    for _, run in groupby(compiled, key=lambda number: (operations[number].layer, operations[number].backward)):
        for kind, kernel in groupby(run, key=lambda number: operations[number].kind):
            if kind == "memory":
                kernels.append([*kernel])
    return kernels


# ---- Memory ----


def peak_memory(step: Step) -> dict[str, float]:
    """GiB by what they are for, at the moment of the step when most are held; without what kernels take for their own
    work, as cuBLAS's 32 MiB, and without gaps between blocks."""
    trace: Trace = step.trace
    uses = {number: use for use, numbers in step.storages.items() for number in numbers}
    held, most = Counter(), Counter()
    for size, number in trace.events:
        use = uses.get(number)
        if use is None:
            use = USES.get(trace.born[number], "activations")
        held[use] += size
        if held.total() > most.total():
            most = held.copy()
    return {use: size / 2**30 for use, size in most.items()}


# ---- The tables ----


def roofline_table(figures: dict) -> str:
    """Every setting its line, and what the step's time goes into, as it is and compiled."""
    lines = figures["settings"]
    rows = ["| step | ms a micro-batch | tokens a second | MFU | peak memory, GiB |", "|---|---|---|---|---|"]
    for name, line in lines.items():
        rows.append(
            f"| {name} | {line['milliseconds']:.1f} | {line['tokens_per_second']:,.0f} | {line['mfu']:.1%} "
            f"| {line['peak_memory_gib']:.1f} |"
        )
    rows += ["", f"| ms a micro-batch | {' | '.join(lines)} |", "|---" * (len(lines) + 1) + "|"]
    for part in PARTS:
        spent = [line["parts"][part]["milliseconds"] for line in lines.values()]
        rows.append(f"| {part} | {' | '.join(f'{each:.1f}' for each in spent)} |")
    uses = sorted({use for line in lines.values() for use in line["memory_gib"]})
    rows += ["", f"| GiB at the peak | {' | '.join(lines)} |", "|---" * (len(lines) + 1) + "|"]
    for use in uses:
        held = [line["memory_gib"].get(use, 0.0) for line in lines.values()]
        rows.append(f"| {use} | {' | '.join(f'{each:.1f}' for each in held)} |")
    return "\n".join(rows)
