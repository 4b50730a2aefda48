"""The engine: Accelerate's processes around the model and its optimizer, with or without DeepSpeed, on any machine."""

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, set_seed
from transformers import PreTrainedModel

from recipe.keys import Recipe
from training.loss import ScoredLoss
from training.optimizer import make_optimizer
from training.optimizer_state import allocate_moments, load_loss_scale, loss_scale_state
from training.plan import accumulation_steps
from utils.launch import check_processes, has_gpu, num_processes, process_group_options, say


@dataclass
class Engine:
    """What makes an optimizer step.

    Attributes:
        model: the loss of the language model, as DDP or DeepSpeed have wrapped it.
        language_model: itself, inside of it.
        scheduler: stepped once after each update of the weights.
    """

    accelerator: Accelerator
    model: torch.nn.Module
    language_model: PreTrainedModel
    optimizer: Any
    scheduler: Any

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Let what runs inside take the memory of a real step, and leave the optimizer as it is."""
        scale = loss_scale_state(self.accelerator)
        allocate_moments(self.accelerator, self.optimizer)
        try:
            yield
        finally:
            load_loss_scale(self.accelerator, scale)

    def close(self) -> None:
        """Leave the other processes; the language model stays. Every process calls this."""
        self.accelerator.wait_for_everyone()
        # DDP goes before its process group: the other way round it may wait for ever in gloo's destructor, which joins
        # a thread that waits for the interpreter (torch 2.13).
        self.model, self.optimizer = self.accelerator.free_memory(self.model, self.optimizer)
        self.accelerator.end_training()


def start_accelerator(
    recipe: Recipe, dtype: torch.dtype, deepspeed: dict[str, Any] | None, step: int = 0
) -> Accelerator:
    """The accelerator of one process, of DDP or of the DeepSpeed engine, on GPUs or (over gloo) on CPUs; seeded.

    Args:
        deepspeed: the engine's complete config; None without it.
        step: at which this process begins.

    Raises:
        UserError: the processes do not find each other, or stand at different steps.
    """
    accelerator = Accelerator(
        mixed_precision={torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "no"),
        gradient_accumulation_steps=accumulation_steps(recipe, num_processes()) if deepspeed else 1,  # it asks
        cpu=not has_gpu() and deepspeed is None,
        deepspeed_plugin=_deepspeed_plugin(deepspeed) if deepspeed else None,
        kwargs_handlers=process_group_options(deepspeed=deepspeed is not None),
    )
    check_processes(accelerator, step)
    set_seed(recipe.rng_seed)
    return accelerator


def prepare_engine(
    accelerator: Accelerator, language_model: PreTrainedModel, recipe: Recipe, total_steps: int
) -> Engine:
    """The model's loss, AdamW and the learning rate's curve, as `accelerator` runs them."""
    deepspeed = accelerator.state.deepspeed_plugin is not None
    model = ScoredLoss(language_model, recipe).train()
    optimizer, scheduler = make_optimizer(model, recipe, total_steps, deepspeed)
    if deepspeed:
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    else:  # a prepared schedule would be stepped num_processes times a step
        model, optimizer = accelerator.prepare(model, optimizer)
    return Engine(accelerator, model, language_model, optimizer, scheduler)


# ---- DeepSpeed's quirks ----


def _deepspeed_plugin(config: dict[str, Any]) -> DeepSpeedPlugin:
    # Accelerate refuses a launcher's config beside a complete one; the two have been compared already.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    reason = _why_not_fused_adam()
    if reason:
        config["optimizer"]["params"] |= {"torch_adam": True, "fused": True}
        say(f"DeepSpeed: plain torch AdamW, since FusedAdam cannot be used ({reason})")
    if not has_gpu():
        _prepare_cpu_engine()
    _join_alone()
    _quieten()
    return DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)


def _why_not_fused_adam() -> str | None:
    """Why DeepSpeed's FusedAdam, which it compiles at first use, cannot be used here; None when it can."""
    if not has_gpu():
        return "no GPU"
    from deepspeed.ops.op_builder import FusedAdamBuilder

    try:
        FusedAdamBuilder().load(verbose=False)
    except Exception as error:  # whatever the compiler, its absence or its version leads to
        return str(error).strip().split("\n")[0] or type(error).__name__
    return None


def _prepare_cpu_engine() -> None:
    """Let the engine run on CPU processes over gloo."""
    # With use_cpu Accelerate would count one process under DeepSpeed (state.py); hiding the GPUs says the same.
    if os.environ.pop("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import deepspeed.ops

    # A shared-memory all-reduce for inference, which would be compiled for a minute at the first start and not used.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _quieten() -> None:
    """Leave out what the engine says of its own inner workings, such as the rate of its schedule before the start."""
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)


def _join_alone() -> None:
    """Give a process that no distributed launcher started the variables of a group of one, which the engine needs."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone)
