"""What a checkpoint is written from: what a process holds at one moment, in place or copied to the host's memory."""

import copy
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from recipe.keys import Recipe
from run.stats import TrainingStats
from training.adapter_files import adapter_tensors
from training.adapters import has_adapter
from training.engine import Engine
from training.fragments import Fragment, file_dtype, model_fragments
from training.optimizer_state import optimizer_fragments, random_state
from utils.launch import say


@dataclass
class Weights:
    """What of a trained model this process gives to its files.

    Attributes:
        dtype: of `held`, the parts of a model's weights; there are none of a model with adapters.
        buffers: what a model's files hold beside its parameters, on the first process.
        adapter: the adapter's tensors by their names in its file.
    """

    dtype: torch.dtype
    held: list[Fragment] = field(default_factory=list)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    adapter: dict[str, torch.Tensor] | None = None


@dataclass
class Snapshot:
    """A moment of a run as this process has to write it: `state` and `process` of state.json and process-<n>.json."""

    state: dict[str, Any]
    process: dict[str, Any]
    weights: Weights
    optimizer: list[Fragment]

    @property
    def bytes(self) -> int:
        """Of its tensors."""
        tensors = [*self.weights.buffers.values(), *(self.weights.adapter or {}).values()]
        tensors += [tensor for each in [*self.weights.held, *self.optimizer] for tensor in each.tensors.values()]
        return sum(tensor.nbytes for tensor in tensors)


class HostCopies:
    """Memory of the host for one snapshot, taken once and used for each."""

    def __init__(self, device: torch.device):
        self.device, self.tensors = device, {}
        self.pins = device.type == "cuda"

    def copy(self, snapshot: Snapshot) -> None:
        """Put copies in place of the tensors."""
        for what, held in {"model": snapshot.weights.held, "optimizer": snapshot.optimizer}.items():
            for each in held:
                for kind, tensor in each.tensors.items():
                    each.tensors[kind] = self._copied((what, each.name, each.start, kind), tensor)
        for what, named in {"buffer": snapshot.weights.buffers, "adapter": snapshot.weights.adapter or {}}.items():
            for name, tensor in named.items():
                named[name] = self._copied((what, name), tensor)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _copied(self, key: tuple, tensor: torch.Tensor) -> torch.Tensor:
        if key not in self.tensors:
            self.tensors[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if self.pins and tensor.numel():
                self._pin(self.tensors[key])
        return self.tensors[key].copy_(tensor.detach(), non_blocking=True)

    def _pin(self, tensor: torch.Tensor) -> None:
        """Have its memory pinned as it is (torch's own pinned memory comes in powers of two: 1.64 times a 7B's
        tensors), so that a copy from the GPU is quick; where the system allows no more of it, it is not."""
        cudart = torch.cuda.cudart()
        if cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0) == cudart.cudaError.success:
            return
        self.pins = False
        say("save_in_background: the system pins no more memory: training waits longer for the copies of a checkpoint")
        with suppress(RuntimeError):  # CUDA's last error, which the next kernel of the training would raise as its own
            torch.ones(1, device=self.device)


def trained_weights(engine: Engine) -> Weights:
    """What this process gives to the model's files, in place, not copied."""
    accelerator, model = engine.accelerator, engine.language_model
    if has_adapter(model):
        return Weights(torch.float32, adapter=adapter_tensors(model) if accelerator.is_main_process else None)
    buffers = saved_buffers(model) if accelerator.is_main_process else {}
    return Weights(file_dtype(accelerator, model), [*model_fragments(accelerator, model)], buffers)


def saved_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a model's files hold beside its parameters; the same on every process."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


def take_snapshot(engine: Engine, recipe: Recipe, state: dict[str, Any], stats: TrainingStats) -> Snapshot:
    """What this process has to write of a checkpoint, its tensors in place, not copied, all else as it is now."""
    process, optimizer = {"stats": stats.state_dict(), "random": random_state()}, []
    if not recipe.save_only_model:
        optimizer = optimizer_fragments(engine.accelerator, engine.language_model, engine.optimizer)
    return Snapshot(copy.deepcopy(state), process, trained_weights(engine), optimizer)
