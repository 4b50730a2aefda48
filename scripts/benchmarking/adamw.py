"""AdamW of training/adamw.py on this device: how exact it is beside fp64, and how long it takes beside torch's own."""

from collections.abc import Callable

import torch

from benchmarking.ceilings import seconds_of
from benchmarking.contenders import BETAS, DEVICE, EPSILON, LEARNING_RATE
from training.adamw import MOMENTS, AdamW
from training.neox import why_no_kernels
from training.optimizer import clip_fused_step

STEPS = 20
MAX_NORM = 1.0  # under the norm of the gradients, so that they are clipped


def measure_adamw(count: int) -> dict[str, dict[str, float]]:
    """Of each way to make a step of so many weights with copies in bf16, after some of them on the same gradients:
    how far all that the weights have moved, and both moments, are from fp64 (norm by norm); the share of weights and
    moments that are bit for bit those of PyTorch's operations; and nanoseconds a weight, the copies' cast included.
    """
    kernel = DEVICE.type == "cuda" and not why_no_kernels(DEVICE)
    ways: dict[str, Callable] = {"torch's fused AdamW": torch_own}
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        ways[f"operations, moments in {name}"] = lambda weight, dtype=dtype: ours(weight, dtype, False)
        if kernel:
            ways[f"kernel, moments in {name}"] = lambda weight, dtype=dtype: ours(weight, dtype, True)
    found, states, exact = {}, {}, in_fp64(count)
    for name, make in ways.items():
        weight = torch.nn.Parameter(start(count))
        optimizer, step = make(weight)
        for number in range(STEPS):
            weight.grad = gradient(count, number)
            clip_fused_step(optimizer, weight.grad.norm(), MAX_NORM)
            step()
        moved = weight.detach().double() - start(count)
        reached = [moved, *(optimizer.state[weight][moment].double() for moment in MOMENTS)]
        errors = {
            what: float((own - expected).norm() / expected.norm())
            for what, own, expected in zip(("weights", *MOMENTS), reached, exact, strict=True)
        }
        states[name] = [weight.detach().clone(), *(optimizer.state[weight][moment].clone() for moment in MOMENTS)]
        if name.startswith("kernel"):
            others = states[name.replace("kernel", "operations")]
            same = [(own == other).double().mean() for own, other in zip(states[name], others, strict=True)]
            errors["same as operations"] = float(min(same))
        found[name] = errors | {"nanoseconds": 1e9 * seconds_of(step, rounds=5) / count}
    return found


def start(count: int) -> torch.Tensor:
    """Weights to begin with, fp32."""
    return torch.randn(count, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE) * 0.02


def gradient(count: int, step: int) -> torch.Tensor:
    """That of a step, fp32: of many sizes, and not around 0."""
    generator = torch.Generator(DEVICE).manual_seed(step + 1)
    sizes = torch.logspace(-6, 0, count, device=DEVICE)
    return (torch.randn(count, generator=generator, device=DEVICE) + 0.3) * sizes


def in_fp64(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the weights should have moved, and the moments that there should be."""
    moved, first, second = (torch.zeros(count, dtype=torch.float64, device=DEVICE) for _ in range(3))
    for step in range(STEPS):
        own = gradient(count, step).double()
        own /= max(1.0, (float(own.norm()) + 1e-6) / MAX_NORM)
        first.lerp_(own, 1 - BETAS[0])
        second.lerp_(own * own, 1 - BETAS[1])
        mean, square = first / (1 - BETAS[0] ** (step + 1)), second / (1 - BETAS[1] ** (step + 1))
        moved -= LEARNING_RATE * mean / (square.sqrt() + EPSILON)
    return moved, first, second


def ours(weight: torch.nn.Parameter, dtype: torch.dtype, kernel: bool) -> tuple[AdamW, Callable]:
    """AdamW, and what makes its step."""
    groups = [{"params": [weight], "weight_decay": 0.0}]
    optimizer = AdamW(groups, LEARNING_RATE, BETAS, EPSILON, dtype, kernel=kernel)
    optimizer.copies = {weight: weight.detach().bfloat16()}
    return optimizer, optimizer.step


def torch_own(weight: torch.nn.Parameter) -> tuple[torch.optim.AdamW, Callable]:
    """The same of torch's, with the cast."""
    optimizer = torch.optim.AdamW([weight], LEARNING_RATE, BETAS, EPSILON, weight_decay=0.0, fused=True)
    copy = weight.detach().bfloat16()

    def step() -> None:
        optimizer.step()
        copy.copy_(weight.detach())

    return optimizer, step


def adamw_table(figures: dict[str, dict[str, float]]) -> str:
    """As a Markdown table."""
    lines = ["| AdamW | weights off by | moments off by | bit for bit | ns a weight |", "|---|---|---|---|---|"]
    for name, own in figures.items():
        same = f"{own['same as operations']:.4%}" if "same as operations" in own else ""
        moments = ", ".join(f"{own[moment]:.1e}" for moment in MOMENTS)
        lines.append(f"| {name} | {own['weights']:.1e} | {moments} | {same} | {own['nanoseconds']:.3f} |")
    return "\n".join(lines)
