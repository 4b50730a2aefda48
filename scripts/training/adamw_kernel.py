"""The Triton kernel of training/adamw.py. Rounded as PyTorch's operations there are, each operation by itself: memory
decides how long it takes, and the same numbers on a GPU and a CPU can be compared bit for bit."""

import torch
import triton
import triton.language as tl

BLOCK = 1024  # draws of a program, of four elements each


def update(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    copy: torch.Tensor | None,
    step: torch.Tensor,
    step_size: torch.Tensor,
    root: torch.Tensor,
    divisor: torch.Tensor | None,
    left_out: torch.Tensor | None,
    beta1: float,
    beta2: float,
    epsilon: float,
    shrink: float,
    seed: int,
    number: int,
    quarter: int,
    rounds: int,
) -> None:
    """One update of a parameter; what is not said here is as in `training.adamw.update_by_kernel`.

    Args:
        step: the updates, this one among them.
        step_size, root: its numbers, of `count_update`.
        shrink: the factor of weight decay.
        quarter: how far apart elements are that share a draw, of `quarter_of`.
        rounds: of Philox.
    """
    count, rounded = weight.numel(), first.dtype == torch.bfloat16
    _update[triton.cdiv(quarter, BLOCK),](
        *(weight, gradient, first, second, copy, step, step_size, root, divisor, left_out, count, quarter),
        *(beta1, 1 - beta1, beta2, 1 - beta2, epsilon, shrink, seed, number, rounded, rounds, BLOCK),
        enable_fp_fusion=False,
    )


@triton.jit(do_not_specialize=["seed", "number"])
def _update(
    weight, gradient, first, second, copy, step, step_size, root, divisor, left_out, count, quarter,
    beta1, rest1, beta2, rest2, epsilon, shrink, seed, number,
    rounded: tl.constexpr, rounds: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    draw = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    end = tl.full((), count, tl.int64)
    if left_out is not None:
        end = tl.where(tl.load(left_out) > 0, 0, end)
    scale = 1.0
    if divisor is not None:
        scale = tl.load(divisor)
    size, correction = tl.load(step_size), tl.load(root)
    if rounded:
        zero = draw.to(tl.uint32) * 0
        key, update = (number.to(tl.int64) << 32) | seed, zero + tl.load(step).to(tl.uint32)
        words = tl.philox(key, draw.to(tl.uint32), update, zero, zero, rounds)
    for part in tl.static_range(4):
        place = draw + part * quarter
        inside = (draw < quarter) & (place < end)
        slope = tl.div_rn(tl.load(gradient + place, inside, 0.0), scale)
        mean = tl.load(first + place, inside, 0.0).to(tl.float32) * beta1 + slope * rest1
        square = tl.load(second + place, inside, 0.0).to(tl.float32) * beta2 + slope * slope * rest2
        denominator = tl.div_rn(tl.sqrt_rn(square), correction) + epsilon
        new = tl.load(weight + place, inside, 0.0) * shrink - tl.div_rn(mean, denominator) * size
        if rounded:
            mean = _round_at_random(mean, words[part] & 0xFFFF)
            square = _round_at_random(square, words[part] >> 16)
        tl.store(weight + place, new, inside)
        tl.store(first + place, mean, inside)
        tl.store(second + place, square, inside)
        if copy is not None:
            tl.store(copy + place, new, inside)


@triton.jit
def _round_at_random(values, bits):
    """fp32 to bf16, as `training.adamw.round_at_random` does it."""
    cut = (values.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000
    return cut.to(tl.float32, bitcast=True).to(tl.bfloat16)
