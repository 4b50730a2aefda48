"""AdamW and the learning rate curve, the same with and without DeepSpeed."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from recipe.keys import Recipe
from training.adamw import AdamW
from training.fsdp import shard_number, updated
from training.neox import why_no_kernels
from utils.launch import say


def warmup_decay(step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak rate at which optimizer step `step` (from 0) runs: DeepSpeed's WarmupDecayLR as it acts.

    DeepSpeed (0.19.8, runtime/lr_schedules.py) warms up along a logarithm, then decays along a line to 0. It steps its
    schedule after the optimizer, so step s runs at the rate of s - 1: the first two steps run at rate 0.
    """
    last, warmup_steps = step - 1, shortest_warmup(warmup_steps)
    if last < 0:
        return 0.0
    if last < warmup_steps:
        return math.log(last + 1) / math.log(warmup_steps)
    return max(0.0, (total_steps - last) / max(1, total_steps - warmup_steps))


def shortest_warmup(warmup_steps: int) -> int:
    """The steps of warm-up that DeepSpeed makes of a number: never under 2 (it refuses 0 and turns 1 into 2)."""
    return max(2, warmup_steps)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Matrices with weight decay, biases and norms (one dimension) without, as in the original's HF Trainer."""
    parameters = [updated(parameter) for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizer(model: torch.nn.Module, recipe: Recipe, total_steps: int, deepspeed: bool):
    """The optimizer and its schedule; under DeepSpeed stand-ins, since the engine builds both from its own config.

    `model` is on the device that it is trained on. Without our kernel, torch's fused AdamW computes with moments in
    fp32: 1.1 ns a weight on a CPU's core, where PyTorch's operations one by one take 18 (and 38 in bf16).

    Call `scheduler.step()` once after each optimizer step. It must not go through `Accelerator.prepare` without
    DeepSpeed: a prepared schedule is stepped num_processes times a step (accelerate 1.15, scheduler.py).
    """
    groups = parameter_groups(model, recipe.weight_decay)
    if deepspeed:
        from accelerate.utils import DummyOptim, DummyScheduler  # which Accelerate has only where DeepSpeed is

        optimizer = DummyOptim(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        return optimizer, DummyScheduler(optimizer)
    numbers = recipe.learning_rate, (recipe.adam_beta1, recipe.adam_beta2), recipe.adam_epsilon
    device = next(model.parameters()).device
    no_kernel = why_no_kernels(device) if device.type == "cuda" else "no GPU"
    if no_kernel and device.type == "cuda":
        say(f"AdamW: not the kernel of training/adamw.py: {no_kernel}")
    if no_kernel and recipe.optimizer_state_dtype == "fp32":
        optimizer = torch.optim.AdamW(groups, *numbers, fused=True)
    else:
        state_dtype = torch.bfloat16 if recipe.optimizer_state_dtype == "bf16" else torch.float32
        seed = (recipe.rng_seed + shard_number(model)) % 2**32  # each process's rows are rounded by draws of their own
        optimizer = AdamW(groups, *numbers, state_dtype, seed, kernel=not no_kernel)
    return optimizer, LambdaLR(optimizer, lambda step: warmup_decay(step, recipe.warmup_steps, total_steps))


def clip_fused_step(optimizer: torch.optim.AdamW, norm: torch.Tensor, max_norm: float) -> None:
    """Tell a fused AdamW's next step, or ours, by what to divide the gradients, and to be left out where `norm` is not
    finite.

    By the attributes through which torch's GradScaler tells it (torch 2.11 to 2.13, optim/adamw.py): it clips as it
    reads the gradients, and nobody waits for the norm. The divisor is torch's of `clip_grad_norm_`.
    """
    optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1) if max_norm else None
    optimizer.found_inf = norm.isfinite().logical_not().float()


def set_schedule(scheduler, updates: int) -> None:
    """Put the learning rate's curve where it is after so many updates of the weights."""
    schedule = getattr(scheduler, "scheduler", scheduler)  # of what Accelerate has wrapped, with DeepSpeed
    if isinstance(schedule, LambdaLR):
        schedule.last_epoch = updates
        schedule._last_lr = [
            rate * factor(updates) for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate
    elif updates:
        schedule.step(updates - 1)  # DeepSpeed counts from -1
