"""The engine: Accelerate's processes around the model and its optimizer, with or without DeepSpeed, on any machine."""

import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, set_seed
from transformers import PreTrainedModel

from recipe.keys import Recipe
from training.deepspeed_config import optimizer_on_host
from training.linear import HalfWeights
from training.loss import ScoredLoss
from training.neox import fuse_layers
from training.optimizer import clip_fused_step, make_optimizer
from training.optimizer_state import allocate_moments, load_loss_scale, loss_scale_state
from training.plan import accumulation_steps
from training.shared_folder import check_shared_folder
from utils.launch import check_processes, has_gpu, num_processes, process_group_options


@dataclass
class Engine:
    """What makes an optimizer step.

    Attributes:
        model: the loss of the language model, as DDP or DeepSpeed have wrapped it.
        language_model: itself, inside of it.
        scheduler: stepped once after each update of the weights.
        half_weights: under autocast, of its linear layers.
    """

    accelerator: Accelerator
    model: torch.nn.Module
    language_model: PreTrainedModel
    optimizer: Any
    scheduler: Any
    half_weights: HalfWeights | None = None

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around a micro-batch: gradients travel between processes once a step, in the backward pass of the last."""
        # Accelerate's DeepSpeed wrapper reads this too, and closes the accumulation window there, full or not: its
        # `backward` also makes the optimizer's step.
        self.accelerator.sync_gradients = last
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            yield

    def clip_next_step(self, max_norm: float) -> torch.Tensor:
        """Have the optimizer's next step clip the gradients, and leave the weights alone where their norm is no finite
        number. Nothing of it waits for the device.

        Args:
            max_norm: of all gradients together; 0 clips nothing.
        Returns: that norm before clipping, fp32 scalar on the device.
        """
        accelerator = self.accelerator
        if accelerator.state.deepspeed_plugin is not None:  # its engine has done both
            return torch.as_tensor(accelerator.clip_grad_norm_(self.model.parameters(), max_norm or math.inf))
        accelerator.unscale_gradients(self.optimizer)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        clip_fused_step(self.optimizer.optimizer, norm, max_norm)
        return norm

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
    recipe: Recipe, dtype: torch.dtype, deepspeed: dict[str, Any] | None, step: int | None = None
) -> Accelerator:
    """The accelerator of one process, of DDP or of the DeepSpeed engine, on GPUs or (over gloo) on CPUs; seeded.

    Args:
        deepspeed: the engine's complete config; None without it.
        step: at which this process begins, in a run that has an output_dir; None without.

    Raises:
        UserError: the processes do not find each other, do not see one output_dir, or stand at different steps.
    """
    accelerator = Accelerator(
        mixed_precision={torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "no"),
        gradient_accumulation_steps=accumulation_steps(recipe, num_processes()) if deepspeed else 1,  # it asks
        cpu=not has_gpu() and deepspeed is None,
        deepspeed_plugin=_deepspeed_plugin(deepspeed) if deepspeed else None,
        kwargs_handlers=process_group_options(deepspeed=deepspeed is not None),
    )
    if step is not None:
        check_shared_folder(recipe.output_dir)
    check_processes(accelerator, step or 0)
    set_seed(recipe.rng_seed)
    return accelerator


def prepare_engine(
    accelerator: Accelerator, language_model: PreTrainedModel, recipe: Recipe, total_steps: int
) -> Engine:
    """The model's loss, AdamW and the learning rate's curve, as `accelerator` runs them."""
    deepspeed = accelerator.state.deepspeed_plugin is not None
    model = ScoredLoss(language_model, recipe).train()
    if not deepspeed:
        model.to(accelerator.device)
    optimizer, scheduler = make_optimizer(model, recipe, total_steps, deepspeed)
    if deepspeed:
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    else:  # a prepared schedule would be stepped num_processes times a step
        model, optimizer = accelerator.prepare(model, optimizer)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)
    half_weights = for_autocast(language_model, optimizer.optimizer, half) if half and not deepspeed else None
    return Engine(accelerator, model, language_model, optimizer, scheduler, half_weights)


def for_autocast(model: PreTrainedModel, optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> HalfWeights:
    """Prepare a model of fp32 weights, on its device, for what autocast to `dtype` does in half precision."""
    weights = HalfWeights(model, optimizer, dtype)
    if model.device.type == "cuda":
        fuse_layers(model)
    return weights


# ---- DeepSpeed's quirks ----


def _deepspeed_plugin(config: dict[str, Any]) -> DeepSpeedPlugin:
    # Accelerate refuses a launcher's config beside a complete one; the two have been compared already.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    if not optimizer_on_host(config["zero_optimization"]):
        # torch's own fused AdamW in place of DeepSpeed's, which it compiles at the first start for a minute or more,
        # behind a lock that outlives a kill. Both are bound by memory: a flat partition is one kernel for either.
        config["optimizer"]["params"] |= {"torch_adam": True, "fused": True}
    if not has_gpu():
        _prepare_cpu_engine()
    _join_alone()
    _quieten()
    return DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)


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
    # Port 0: torch's store takes a free one as it listens; one that was looked up before is sometimes taken by then.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(alone)
