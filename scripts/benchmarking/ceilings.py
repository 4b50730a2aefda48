"""What a device can do at most: products of matrices, a copy, attention; the ceilings under which a step runs."""

import time
from collections.abc import Callable
from statistics import median

import torch

from benchmarking.contenders import DEVICE
from training.attention import varlen_attention
from training.linear import add_product


def seconds_of(work: Callable[[], object], rounds: int = 15) -> float:
    """The median time of some work of the device, after three rounds to warm up."""
    for _ in range(3):
        work()
    times = []
    for _ in range(rounds):
        if DEVICE.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    return median(times)


def measure_ceilings(tokens: int, hidden: int, heads: int) -> dict[str, float]:
    """FLOP/s and bytes a second of what a layer of this width does with so many tokens in bf16, on random numbers.

    `matmul` is of the four forward products of a GPT-NeoX layer together, `matmul_sum` of their weights' gradients
    added up in fp32; `attention` forward and backward together, of one conversation and of eight, in FLOPs as
    training/flops.py counts them; `copy` counts reads and writes.
    """

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16) * 0.1

    widths = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)]
    flops = sum(2 * tokens * fan_in * fan_out for fan_in, fan_out in widths)
    operands = [
        (random(tokens, fan_in), random(fan_out, fan_in), random(tokens, fan_out)) for fan_in, fan_out in widths
    ]
    sums = [torch.zeros(fan_out, fan_in, device=DEVICE) for fan_in, fan_out in widths]

    def products() -> None:
        for inputs, weight, _ in operands:
            torch.nn.functional.linear(inputs, weight)

    def gradients() -> None:
        for (inputs, _, outputs), total in zip(operands, sums, strict=True):
            add_product(total, outputs.T, inputs)

    found = {"matmul": flops / seconds_of(products), "matmul_sum": flops / seconds_of(gradients)}
    block = torch.randn(max(2**20, 16 * tokens * hidden), device=DEVICE)
    target = torch.empty_like(block)
    found["copy"] = 2 * block.nbytes / seconds_of(lambda: target.copy_(block))
    if DEVICE.type == "cuda":
        for name, lengths in {"attention": [tokens], "attention_of_eight": [tokens // 8] * 8}.items():
            pairs = sum(length * (length + 1) / 2 for length in lengths)
            found[name] = 3 * 4 * pairs * hidden / seconds_of(attention(lengths, hidden, heads))
    return found


def attention(lengths: list[int], hidden: int, heads: int) -> Callable[[], None]:
    """Forward and backward of attention as training has it, on conversations of these lengths."""
    shape = 1, heads, sum(lengths), hidden // heads
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    boundaries = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    gradient = torch.randn_like(q).transpose(1, 2)

    def run() -> None:
        output, _ = varlen_attention(None, q, k, v, None, boundaries, max(lengths), torch.tensor(lengths))
        torch.autograd.grad(output, (q, k, v), gradient)

    return run
