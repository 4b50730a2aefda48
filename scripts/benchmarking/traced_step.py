"""One real optimizer step of sft.py on a fake GPU, traced."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from transformers import AutoConfig, AutoModelForCausalLM

import sft
from benchmarking.contenders import split_in_memory
from benchmarking.fake_gpu import all_reduce_hook, pretend_gpu, pretend_processes
from benchmarking.trace import Trace
from benchmarking.train import random_conversations
from data.mix import Mix
from recipe.keys import Recipe
from run.stats import Clock, TrainingStats
from training.batches import prefetched
from training.collate import Batch, collate
from training.engine import prepare_engine, start_accelerator
from training.flops import ModelFlops
from training.model import ready_for_training
from training.plan import Position
from utils.launch import set_up_process, training_dtype

BASE = {"model_name": "none", "output_dir": "nothing", "datasets": ["vicuna"], "dtype": "bf16", "logging_steps": 10}


@dataclass
class Step:
    """A traced step.

    Attributes:
        trace: with its operations and its memory.
        micro_batches: of the step.
        tokens: of all of them.
        model_flops: as training/flops.py counts them.
        storages: of `weights`, `weights in half precision`, `gradients` and `optimizer`, their numbers.
    """

    trace: Trace
    micro_batches: int
    tokens: int
    model_flops: float
    storages: dict[str, set[int]] = field(default_factory=dict)


def trace_step(
    config: dict, lengths: list[list[int]], keys: dict[str, Any], processes: int = 1, may_wait: tuple[str, ...] = ()
) -> Step:
    """Make a step of these micro-batches, each of conversations of so many tokens, all of them scored.

    Args:
        config: of the model, by its `model_type` (GPT-NeoX without one).
        keys: of the recipe, where they are not those of BASE.
        processes: under DDP, of which this is the first.
        may_wait: as `Trace` has it.
    """
    pretend_gpu()
    if processes > 1:
        pretend_processes(processes)
    recipe = Recipe.model_validate(BASE | {"max_length": max(2, *itertools.chain(*lengths))} | keys)
    conversations = random_conversations([*itertools.chain(*lengths)], config["vocab_size"], 1.0)
    split = split_in_memory(conversations)
    mix = Mix(["vicuna"], split, split)
    set_up_process()
    accelerator = start_accelerator(recipe, training_dtype(recipe.dtype), deepspeed=None)
    with Trace(may_wait) as trace:
        with torch.device("cuda"):
            model_config = AutoConfig.for_model(**{"model_type": "gpt_neox"} | config)
            model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
        engine = prepare_engine(accelerator, ready_for_training(model, recipe), recipe, total_steps=10)
        if processes > 1:
            engine.model.register_comm_hook(None, all_reduce_hook)
        stats = _Stats(mix, accelerator.device, Clock(), ModelFlops(model))
        stats.trace, stats.parameters = trace, [*model.parameters()]
        with engine.rehearsal():  # so that Adam's moments are there, as they are after the start of a run
            pass
        step = Step(trace, len(lengths), sum(map(sum, lengths)), 0.0)
        halves = [layer.half_weight for layer in engine.half_weights.layers] if engine.half_weights else []
        step.storages["weights in half precision"] = _numbers(trace, halves)
        step.storages["weights"] = _numbers(trace, [*model.parameters(), *model.buffers()])
        for _, micro_batches in prefetched(_steps(mix, recipe, lengths), accelerator.device):
            trace.begin(model.get_output_embeddings(), len(micro_batches))
            sft.train_step(engine, micro_batches, recipe, stats)
            trace.running = False
        step.model_flops = stats.flops_of_step
        step.storages["gradients"] = stats.gradients
        moments = [tensor for state in engine.optimizer.state.values() for tensor in state.values()]
        step.storages["optimizer"] = _numbers(trace, moments)
    AcceleratorState._reset_state(reset_partial_state=True)  # the next step may have another dtype
    return step


def _steps(mix: Mix, recipe: Recipe, lengths: list[list[int]]) -> Iterator[tuple[Position, list[Batch]]]:
    ends = np.cumsum([len(own) for own in lengths])
    rows = [np.arange(end - len(own), end) for end, own in zip(ends, lengths, strict=True)]
    yield Position(1), [collate(mix.train, own, recipe, pad_token_id=0, epoch=0) for own in rows]


class _Stats(TrainingStats):
    """Those of a run, which also tell the trace where a micro-batch ends."""

    trace: Trace
    parameters: list[torch.nn.Parameter]
    gradients: set[int]

    def add(self, *micro_batch) -> None:
        super().add(*micro_batch)
        self.gradients = _numbers(self.trace, [p.grad for p in self.parameters if p.grad is not None])
        self.trace.end_micro_batch()


def _numbers(trace: Trace, tensors: list[torch.Tensor]) -> set[int]:
    return {trace.number(tensor, None) for tensor in tensors}
