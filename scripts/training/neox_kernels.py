"""Triton kernels of training/neox.py, each one pass over memory. Rows are tokens; sums and roots are in fp32."""

import torch
import triton
import triton.language as tl


def add_three(residual: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """residual + first + second: fp32 of fp32 and twice half precision, all contiguous and of one shape."""
    output, count, block = torch.empty_like(residual), residual.numel(), 4096
    _add_three[triton.cdiv(count, block),](residual, first, second, output, count, block)
    return output


def rotate(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> None:
    """Rotate the first dimensions of queries and keys in place, by the angle (sign 1) or back (-1).

    Args:
        qkv: [tokens, heads, 3 * head size], contiguous: of each head query, key, value.
        cos, sin: fp32 [positions, rotary dimensions], contiguous, each half alike; token t stands at position t, and
            where there are more tokens than positions, in a padded batch, the rows of positions repeat.
    """
    (tokens, heads, width), rotary = qkv.shape, cos.shape[1]
    blocks = triton.next_power_of_2(heads), triton.next_power_of_2(rotary // 2)
    _rotate[tokens, 2](qkv, cos, sin, sign, len(cos), heads, width, rotary // 2, *blocks)


def two_norms(
    x: torch.Tensor, weights: tuple[torch.Tensor, ...], epsilon: float, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Two layer norms of the same x, fp32 [rows, width], with one reading of it.

    `weights` are the weight and bias of the one, then of the other, fp32 [width].
    Returns: both results, `dtype` [rows, width]; the rows' means and inverse roots, fp32 [rows].
    """
    rows, width = x.shape
    first, second = (torch.empty_like(x, dtype=dtype) for _ in range(2))
    mean, root = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    block = triton.next_power_of_2(width)
    _two_norms[rows,](x, *weights, first, second, mean, root, width, epsilon, block, num_warps=_warps(block))
    return first, second, mean, root


def two_norms_backward(
    gradients: list[torch.Tensor],
    x: torch.Tensor,
    mean: torch.Tensor,
    root: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and of the four weights, fp32, the latter [4, width].

    `gradients` are of both results in half precision, and what x's gradient is from elsewhere, fp32; contiguous.
    """
    rows, width = x.shape
    of_x, block = torch.empty_like(x), triton.next_power_of_2(width)
    # Each program sums up the weights' gradients of its own rows: as many as the device runs at once.
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    partial = torch.empty(4, programs, width, dtype=torch.float32, device=x.device)
    _two_norms_backward[programs,](
        *(*gradients, x, mean, root, weight1, weight2, of_x, partial),
        *(rows, width, triton.cdiv(rows, programs), programs, block),
        num_warps=_warps(block),
    )
    return of_x, partial.sum(1)


def _warps(block: int) -> int:
    return min(16, max(4, block // 512))


# What changes with every batch is not specialised: a new kernel would be compiled in the middle of a run.
@triton.jit(do_not_specialize=["count"])
def _add_three(residual, first, second, output, count, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < count
    total = tl.load(first + place, inside).to(tl.float32) + tl.load(second + place, inside).to(tl.float32)
    tl.store(output + place, tl.load(residual + place, inside) + total, inside)


@triton.jit(do_not_specialize=["positions"])
def _rotate(qkv, cos, sin, sign, positions, heads, width, half, heads_block: tl.constexpr, half_block: tl.constexpr):
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)  # part 0: queries, 1: keys
    head, column = tl.arange(0, heads_block)[:, None], tl.arange(0, half_block)[None, :]
    inside = (head < heads) & (column < half)
    place = qkv + token * heads * width + head * width + part * (width // 3) + column
    angle = (token % positions) * 2 * half + column
    cosine, sine = tl.load(cos + angle, column < half), tl.load(sin + angle, column < half) * sign
    low, high = tl.load(place, inside).to(tl.float32), tl.load(place + half, inside).to(tl.float32)
    tl.store(place, low * cosine - high * sine, inside)
    tl.store(place + half, high * cosine + low * sine, inside)


@triton.jit
def _two_norms(
    x, weight1, bias1, weight2, bias2, first, second, mean, root, width, epsilon, block: tl.constexpr
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    inside = column < width
    place = row * width + column
    values = tl.load(x + place, inside, 0.0)
    average = tl.sum(values, 0) / width
    off = tl.where(inside, values - average, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(off * off, 0) / width + epsilon)
    tl.store(mean + row, average)
    tl.store(root + row, inverse)
    normed = off * inverse
    tl.store(first + place, normed * tl.load(weight1 + column, inside) + tl.load(bias1 + column, inside), inside)
    tl.store(second + place, normed * tl.load(weight2 + column, inside) + tl.load(bias2 + column, inside), inside)


@triton.jit(do_not_specialize=["rows", "share"])
def _two_norms_backward(
    of_first, of_second, of_rest, x, mean, root, weight1, weight2, of_x, partial,
    rows, width, share, programs, block: tl.constexpr
):  # fmt: skip
    program, column = tl.program_id(0), tl.arange(0, block)
    inside = column < width
    scale1, scale2 = tl.load(weight1 + column, inside, 0.0), tl.load(weight2 + column, inside, 0.0)
    sum_w1 = tl.zeros((block,), tl.float32)
    sum_b1 = tl.zeros((block,), tl.float32)
    sum_w2 = tl.zeros((block,), tl.float32)
    sum_b2 = tl.zeros((block,), tl.float32)
    for number in range(share):
        row = program.to(tl.int64) * share + number
        here = column < tl.where(row < rows, width, 0)
        place, of_row = row * width + column, tl.minimum(row, rows - 1)
        inverse = tl.load(root + of_row)
        normed = tl.where(here, tl.load(x + place, here, 0.0) - tl.load(mean + of_row), 0.0) * inverse
        gradient1 = tl.load(of_first + place, here, 0.0).to(tl.float32)
        gradient2 = tl.load(of_second + place, here, 0.0).to(tl.float32)
        scaled = gradient1 * scale1 + gradient2 * scale2
        of_norms = (scaled - tl.sum(scaled, 0) / width - normed * (tl.sum(scaled * normed, 0) / width)) * inverse
        tl.store(of_x + place, tl.load(of_rest + place, here, 0.0) + of_norms, here)
        sum_w1 += gradient1 * normed
        sum_b1 += gradient1
        sum_w2 += gradient2 * normed
        sum_b2 += gradient2
    place = partial + program * width + column
    tl.store(place, sum_w1, inside)
    tl.store(place + programs * width, sum_b1, inside)
    tl.store(place + 2 * programs * width, sum_w2, inside)
    tl.store(place + 3 * programs * width, sum_b2, inside)
