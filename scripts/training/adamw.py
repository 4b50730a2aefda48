"""AdamW in one pass over memory: it clips, updates, and writes the weights' half-precision copies; its moments are kept
in fp32 or bf16.

For a weight the pass moves 30 bytes with moments in fp32, 22 in bf16. Torch's fused AdamW, which writes the clipped
gradients back, moves 32, and casting the copies behind it 6. Moments in bf16 take 4 bytes in place of 8.

A moment in bf16 is rounded up or down at random, so that it is right on average (Gupta et al. 2015, "Deep Learning with
Limited Numerical Precision"). Rounded to the nearest, it stays where it is as long as a step changes it by less than
half a unit in its last place, 2^-9 to 2^-8 of it. With beta2 = 0.999 a second moment could never fall: 1,000 steps
after gradients had fallen to a tenth it was 2.8 times as large as it should be; rounded at random 1.001 times, on
average (a single one is off by 6 %). With the seed's 0.95 it is off by 0.4 to 0.6 % either way, and what the weights
have moved in 2,000 steps by 0.1 %. The random numbers are Philox's (Salmon et al. 2011, "Parallel Random Numbers: As
Easy as 1, 2, 3") of seed, parameter, update and element: all processes draw the same, and a stopped run its own again.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
ROUNDS = 7  # of Philox: the fewest that pass all of BigCrush (Salmon et al. 2011, table 2)


class AdamW(torch.optim.AdamW):
    """Torch's, but for how a step is computed. As its fused one it divides gradients by `grad_scale` and leaves out the
    step where `found_inf` is not 0, tensors that are set before a step.

    Attributes:
        copies: of weights in half precision, each written with its weight; `HalfWeights` fills it.
    """

    def __init__(
        self,
        groups: Iterable[dict],
        rate: float,
        betas: tuple[float, float],
        epsilon: float,
        state_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        kernel: bool = False,
    ):
        """
        Args:
            groups: of contiguous parameters in fp32.
            state_dtype: of the moments, fp32 or bf16.
            seed: of their rounding; under 2^32.
            kernel: whether to compute by the Triton kernel; else by PyTorch's operations, with the same result.
        """
        super().__init__(groups, rate, betas, epsilon, fused=True)
        for group in self.param_groups:
            group["state_dtype"] = state_dtype
        self.seed, self.update = seed, update_by_kernel if kernel else update_by_operations
        self.copies: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        allocate_state(self)
        number = 0
        for group in self.param_groups:
            chosen: dict[bool, list[tuple[int, Tensor]]] = {True: [], False: []}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    chosen[parameter in self.copies].append((number, parameter))
                number += 1
            for has_copy, own in chosen.items():
                if own:
                    numbers, parameters = zip(*own, strict=True)
                    self._update(group, numbers, parameters, has_copy)

    def _update(self, group: dict, numbers: tuple[int, ...], parameters: tuple[Tensor, ...], has_copy: bool) -> None:
        states = [self.state[parameter] for parameter in parameters]
        self.update(
            list(parameters),
            [parameter.grad.contiguous() for parameter in parameters],
            *([state[moment] for state in states] for moment in MOMENTS),
            [self.copies[parameter] for parameter in parameters] if has_copy else [],
            [state["step"] for state in states],
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
            group["lr"],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            self.seed,
            list(numbers),
        )


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Make Adam's state, zeros at step 0, as optimizers do at their first step; what is there stays."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                torch_own = isinstance(optimizer, torch.optim.Adam)  # AdamW among them; DeepSpeed's counts with an int
                device = parameter.device if group.get("fused") or group.get("capturable") else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device) if torch_own else 0
                dtype = group.get("state_dtype", parameter.dtype)
                for moment in MOMENTS:
                    state[moment] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)


@torch.library.custom_op("adamw::update", mutates_args=("weights", "firsts", "seconds", "copies", "steps"))
def update_by_kernel(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    copies: Sequence[Tensor],
    steps: Sequence[Tensor],
    divisor: Tensor | None,
    left_out: Tensor | None,
    rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    seed: int,
    numbers: Sequence[int],
) -> None:
    """One update, on a CUDA GPU.

    Args:
        weights, gradients: fp32, contiguous.
        firsts, seconds: moments, fp32 or bf16, of the weights' shapes.
        copies: of the weights, fp16 or bf16; empty for weights without.
        steps: fp32 scalars, the updates before this one; counted up.
        divisor: of the gradients, fp32 scalar; None for 1.
        left_out: fp32 scalar, not 0 where nothing is to be changed; None for 0.
        numbers: of the parameters, by which their random numbers are told apart.
    """
    from training import adamw_kernel  # Triton is imported where it runs

    step_sizes, roots = count_update(steps, left_out, rate, beta1, beta2)
    for index, weight in enumerate(weights):
        adamw_kernel.update(
            weight,
            gradients[index],
            firsts[index],
            seconds[index],
            copies[index] if copies else None,
            *(steps[index], step_sizes[index], roots[index], divisor, left_out),
            *(beta1, beta2, epsilon, 1 - rate * weight_decay, seed, numbers[index]),
            *(quarter_of(weight.numel()), ROUNDS),
        )


@update_by_kernel.register_fake
def _(*_):
    return None


def update_by_operations(
    weights: list[Tensor],
    gradients: list[Tensor],
    firsts: list[Tensor],
    seconds: list[Tensor],
    copies: list[Tensor],
    steps: list[Tensor],
    divisor: Tensor | None,
    left_out: Tensor | None,
    rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    seed: int,
    numbers: list[int],
) -> None:
    """What `update_by_kernel` does, bit for bit, on any device."""
    step_sizes, roots = count_update(steps, left_out, rate, beta1, beta2)
    shrink = 1 - rate * weight_decay
    # Bounds what is in memory beside the tensors: 2 MB on a CPU, which its cache holds; about 1 GB on a GPU.
    chunk = 2**22 if weights[0].is_cuda else 2**14
    for index, weight in enumerate(weights):
        flat = [tensors[index].view(-1) for tensors in (weights, gradients, firsts, seconds)]
        flat += [copies[index].view(-1)] if copies else []
        quarter = quarter_of(weight.numel())
        for start in range(0, quarter, chunk):
            words = [None] * 4
            if firsts[index].dtype == torch.bfloat16:
                places = torch.arange(start, min(start + chunk, quarter), device=weight.device)
                words = philox(seed, numbers[index], places, steps[index].long())
            for part, word in enumerate(words):
                low, high = part * quarter + start, min(part * quarter + min(start + chunk, quarter), weight.numel())
                if low >= high:
                    break
                here = [tensor[low:high] for tensor in flat]
                gradient = here[1] if divisor is None else here[1] / divisor
                first = here[2].float() * beta1 + gradient * (1 - beta1)
                second = here[3].float() * beta2 + gradient * gradient * (1 - beta2)
                # By way of fp64: on a CPU, MKL rounds one root in five of many fp32 numbers the other way.
                denominator = second.double().sqrt().float() / roots[index] + epsilon
                new = here[0] * shrink - first / denominator * step_sizes[index]
                if word is not None:
                    first = round_at_random(first, word[: high - low] & 0xFFFF)
                    second = round_at_random(second, word[: high - low] >> 16)
                for old, own in zip((here[0], *here[2:]), (new, first, second, new), strict=False):
                    old.copy_(own if left_out is None else torch.where(left_out > 0, old, own.to(old.dtype)))


def count_update(
    steps: Sequence[Tensor], left_out: Tensor | None, rate: float, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """Count the updates up, unless this one is left out, without waiting for the device.

    Returns: fp32 [parameters], the size of each one's step, and the root of its second moment's bias correction.
    """
    torch._foreach_add_(steps, 1)
    if left_out is not None:
        torch._foreach_sub_(steps, [left_out] * len(steps))
    counts = torch.stack(list(steps)).double().clamp(min=1)
    return (rate / (1 - beta1**counts)).float(), (1 - beta2**counts).sqrt().float()


# ---- Rounding at random ----


def quarter_of(count: int) -> int:
    """How far apart the four elements of a parameter of so many are that share a draw of Philox: aligned for a GPU's
    wide loads."""
    return -(-count // 64) * 16


def philox(seed: int, number: int, places: Tensor, update: Tensor) -> list[Tensor]:
    """Four words of 32 random bits for each place: Philox4x32 (Salmon et al. 2011), here of 7 rounds.

    Args:
        seed, number: its key.
        places: its first counter, int64 [places].
        update: its second, int64 scalar.

    Returns: int64 [places] each, from 0 to 2^32 - 1.
    """
    mask = 0xFFFFFFFF
    counter = [places, update.expand_as(places), torch.zeros_like(places), torch.zeros_like(places)]
    for _ in range(ROUNDS):
        # The products overflow int64, and their bits are those of the unsigned ones.
        left, right = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (right >> 32 & mask) ^ counter[1] ^ seed,
            right & mask,
            (left >> 32 & mask) ^ counter[3] ^ number,
            left & mask,
        ]
        seed, number = (seed + 0x9E3779B9) & mask, (number + 0xBB67AE85) & mask
    return counter


def round_at_random(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 to bf16: away from zero with the probability of what is cut off. `bits` are int64, random, 16 of each."""
    return ((values.view(torch.int32) + bits.int()) & -0x10000).view(torch.float32).bfloat16()
