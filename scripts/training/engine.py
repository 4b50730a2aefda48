"""The engine: Accelerate's processes around the model and its optimizer, by DDP, DeepSpeed or FSDP2, on any machine."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel
from transformers.integrations import unset_hf_deepspeed_config

from recipe.keys import Recipe
from training.fragments import allocate_moments
from training.fsdp import (
    ShardScaler,
    begin_micro_batch,
    gathered_root,
    hand_over_gradients,
    norm_over_shards,
    shard_model,
    updated,
)
from training.fsdp_config import find_sharding, sharding_of
from training.host_weights import outline_of, receive_weights
from training.launcher_config import hide_plugins
from training.linear import HalfWeights
from training.loss import ScoredLoss
from training.neox import fuse_layers
from training.optimizer import clip_fused_step, make_optimizer
from training.optimizer_state import load_loss_scale, loss_scale_state
from training.plan import accumulation_steps
from training.shared_folder import check_shared_folder
from training.zero import deepspeed_plugin, ready_for_engine
from utils.launch import check_processes, has_gpu, meeting_by_gloo, num_processes, process_group_options


@dataclass
class Engine:
    """What makes an optimizer step.

    Attributes:
        model: the loss of the language model, as DDP, DeepSpeed or FSDP2 have wrapped it.
        language_model: itself, inside of it.
        outline: its names, shapes and configs as they were before the first step (`outline_of`): a thread writes a
            checkpoint by it, while the main one trains, evaluates and has the model reply, for which that gets another
            generation config and attention for a while.
        scheduler: stepped once after each update of the weights.
        half_weights: under autocast, of its linear layers.
    """

    accelerator: Accelerator
    model: torch.nn.Module
    language_model: PreTrainedModel
    outline: PreTrainedModel
    optimizer: Any
    scheduler: Any
    half_weights: HalfWeights | None = None

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around a micro-batch: gradients travel between processes once a step, in the backward pass of the last."""
        # Accelerate's DeepSpeed wrapper reads this too, and closes the accumulation window there, full or not: its
        # `backward` also makes the optimizer's step.
        self.accelerator.sync_gradients = last
        if sharding := sharding_of(self.accelerator):
            begin_micro_batch(self.model, last, sharding)
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
        hand_over_gradients(self.model)
        accelerator.unscale_gradients(self.optimizer)
        gradients = [updated(parameter).grad for parameter in self.model.parameters()]
        norm = torch.nn.utils.get_total_norm([own for own in gradients if own is not None], foreach=True)
        if sharding_of(accelerator):
            norm = norm_over_shards(norm, self.model, accelerator.device)
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

    @contextmanager
    def outside_of_the_loss(self) -> Iterator[None]:
        """Let the language model be called by itself, without a gradient. Every process calls this."""
        sharded = sharding_of(self.accelerator)  # whose weights are gathered in the precision of the forward pass
        with nullcontext() if sharded else self.accelerator.autocast(), gathered_root(self.model):
            yield

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
    """The accelerator of one process, of DDP, DeepSpeed or FSDP2, on GPUs or (over gloo) on CPUs; seeded.

    Args:
        deepspeed: the engine's complete config; None without it.
        step: at which this process begins, in a run that has an output_dir; None without.

    Raises:
        UserError: the processes do not find each other, do not see one output_dir, or stand at different steps.
    """
    sharding = find_sharding(recipe, dtype)
    hide_plugins("fsdp")
    with meeting_by_gloo():
        accelerator = Accelerator(
            mixed_precision={torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "no"),
            gradient_accumulation_steps=accumulation_steps(recipe, num_processes()) if deepspeed else 1,  # it asks
            cpu=not has_gpu() and deepspeed is None,
            deepspeed_plugin=deepspeed_plugin(deepspeed) if deepspeed else None,
            kwargs_handlers=process_group_options(deepspeed=deepspeed is not None),
        )
    if deepspeed:
        unset_hf_deepspeed_config()  # by which transformers would load a model under ZeRO-3 in ways of its own
    accelerator.sharding = sharding
    if sharding and accelerator.scaler:
        accelerator.scaler = ShardScaler(accelerator.device.type)
    if step is not None:
        check_shared_folder(recipe.output_dir)
    check_processes(accelerator, step or 0)
    set_seed(recipe.rng_seed)
    return accelerator


def prepare_engine(
    accelerator: Accelerator, language_model: PreTrainedModel, recipe: Recipe, total_steps: int
) -> Engine:
    """The model's loss, AdamW and the learning rate's curve, as `accelerator` runs them."""
    deepspeed, sharding = accelerator.state.deepspeed_plugin is not None, sharding_of(accelerator)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)
    outline = outline_of(language_model)
    model = ScoredLoss(language_model, recipe).train()
    if sharding:
        shard_model(model, language_model, accelerator, half or torch.float32)
    elif not deepspeed:
        receive_weights(model, accelerator.device)
    optimizer, scheduler = make_optimizer(model, recipe, total_steps, deepspeed)
    if deepspeed:
        ready_for_engine(accelerator, model)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    elif sharding:
        optimizer = accelerator.prepare(optimizer)
    else:  # a prepared schedule would be stepped num_processes times a step
        model, optimizer = accelerator.prepare(model, optimizer)
    autocast = half and not deepspeed and not sharding
    half_weights = for_autocast(language_model, optimizer.optimizer, half) if autocast else None
    # The first goes on from where it stands after drawing what weights are new. What the others draw while training is
    # each one's own: else NEFTune's noise and dropout would be the same on all of them.
    if accelerator.process_index:
        set_seed((recipe.rng_seed + accelerator.process_index) % 2**32)
    return Engine(accelerator, model, language_model, outline, optimizer, scheduler, half_weights)


def for_autocast(model: PreTrainedModel, optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> HalfWeights:
    """Prepare a model of fp32 weights, on its device, for what autocast to `dtype` does in half precision."""
    weights = HalfWeights(model, optimizer, dtype)
    if model.device.type == "cuda":
        fuse_layers(model)
    return weights
