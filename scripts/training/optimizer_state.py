"""What resuming needs beside the model: optimizer, loss scaler and random states, in safetensors and JSON.

Adam's moments (and the fp32 weights, where the model itself is kept in half precision) are stored by parameter, as flat
fragments (`training/fragments.py`). So it does not matter who wrote them: a run goes on with another number of
processes or under another engine, each process reading what it needs; or with moments in another dtype, since those in
bf16 are stored as they are, and read into what the optimizer has. Here a parameter has its name in memory; in the
model's own files it has the name, and the cut, that transformers gives it.
(DeepSpeed's own checkpoints are pickles, and its engine refuses another number of processes: 0.19.8, engine.py.)
"""

import math
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from training.adamw import MOMENTS
from training.adapter_files import read_adapter
from training.adapters import has_adapter
from training.fragments import (
    Fragment,
    adam_of,
    allocate_moments,
    file_dtype,
    fragments,
    trained_dtype,
    update_from_weights,
    writes_fragments,
    zero_optimizer,
)
from utils.errors import UserError

# Bytes of a file of fragments. On a GPU that much is copied to the host at a time; CPU tensors are written in place.
PART_BYTES = 2 * 2**30


def optimizer_fragments(accelerator: Accelerator, model: PreTrainedModel, optimizer) -> list[Fragment]:
    """This process's share of the optimizer's state, as a checkpoint stores it: the moments, and the fp32 weights where
    the model's own files have fewer bits. With the language model itself."""
    if not writes_fragments(accelerator):
        return []
    allocate_moments(accelerator, optimizer)
    kinds = MOMENTS if file_dtype(accelerator, model) == torch.float32 else ("weights", *MOMENTS)
    held = fragments(accelerator, model, optimizer)
    return [Fragment(each.name, each.start, {kind: each.tensors[kind] for kind in kinds}) for each in held]


def save_optimizer(folder: Path, process_index: int, held: Sequence[Fragment]) -> list[Path]:
    """Write what `optimizer_fragments` has of this process; returns the files."""
    part: dict[str, torch.Tensor] = {}
    files: list[Path] = []
    size = 0

    def write() -> None:
        nonlocal size
        files.append(folder / f"optimizer-{process_index:05d}-{len(files):03d}.safetensors")
        save_file({key: tensor.cpu() for key, tensor in part.items()}, files[-1])
        part.clear()
        size = 0

    for fragment in held:
        for kind, tensor in fragment.tensors.items():
            if part and size + tensor.nbytes > PART_BYTES:
                write()
            part[f"{kind}/{fragment.start}/{fragment.name}"] = tensor
            size += tensor.nbytes
    if part:
        write()
    return files


def load_optimizer(
    files: Sequence[Path], model_folder: Path, accelerator: Accelerator, model: PreTrainedModel, optimizer, steps: int
) -> None:
    """Fill the optimizer's state from the files that any number of processes wrote to a checkpoint's trainer_state.

    `model_folder` has the checkpoint's model; `steps` are the updates that it has made, which Adam's bias correction
    counts. Every process calls this.
    Raises: UserError when the state of a parameter is not there, or no state that Adam could have.
    """
    stored = _Stored(files)
    kinds = ("weights", *MOMENTS) if stored.has_weights else MOMENTS  # else the model's own files are in fp32
    allocate_moments(accelerator, optimizer)
    own = [*fragments(accelerator, model, optimizer)]
    half = trained_dtype(model) != torch.float32
    with torch.no_grad():
        for fragment in own:
            for kind in kinds:
                stored.read_into(fragment.tensors[kind], kind, fragment.name, fragment.start)
        if half and not stored.has_weights:
            _read_fp32_model(model_folder, accelerator, model, own)
        if half or stored.has_weights:  # the model's file may have fewer bits, of an earlier dtype
            update_from_weights(accelerator)
        for fragment in own:
            for moment in MOMENTS:  # a weight may be no finite number from the start, in a row that nobody uses
                _check_moment(stored.folder, fragment.tensors[moment], moment, fragment.name)
    for state in adam_of(accelerator, optimizer).state.values():
        if isinstance(state["step"], torch.Tensor):
            state["step"].fill_(steps)
        else:
            state["step"] = steps


def _read_fp32_model(folder: Path, accelerator: Accelerator, model: PreTrainedModel, held: list[Fragment]) -> None:
    """Fill the fp32 weights from the model of a checkpoint, which was trained in fp32; every process calls this.

    transformers itself loads it, since it renames, merges and cuts: GPT-NeoX's `lm_head.weight` is `embed_out.weight`
    in the file, and a mixture's experts one key each. What it takes as it is, it maps from the file, which all
    processes share (5 MiB more for 445 MiB of GPT-NeoX); what it merges is copied (774 MiB for 478 MiB of Mixtral,
    transformers 5.23). So the processes of a machine take turns, and need no more than all of them loading the model
    in half precision at once, as each start does.
    Raises: UserError when a weight is not there.
    """
    for turn in range(accelerator.num_processes):
        if turn == accelerator.local_process_index:
            whole = read_adapter(folder, model) if has_adapter(model) else _read_whole(folder, model)
            for fragment in held:
                target, own = fragment.tensors["weights"], whole.get(fragment.name)
                there = 0 if own is None else own.numel() - fragment.start
                if there < target.numel():
                    _refuse(folder, max(0, there), target, "weights", fragment.name)
                target.copy_(own.view(-1)[fragment.start : fragment.start + target.numel()])
            del whole, own
        accelerator.wait_for_everyone()


def _read_whole(folder: Path, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The fp32 weights of the model in a folder, by their names in memory; not those that it lacks."""
    found, info = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return {name: weight for name, weight in found.named_parameters() if name not in info["missing_keys"]}


def _check_moment(folder: Path, tensor: torch.Tensor, kind: str, name: str) -> None:
    """Refuse what is not finite, or below zero where it is a mean of squares: a step would spread it over the model."""
    low, high = map(float, tensor.aminmax())  # NaN where one of them is
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{folder}: {kind} of {name} holds values that are no finite numbers")
    if kind == "exp_avg_sq" and low < 0:
        raise UserError(f"{folder}: {kind} of {name}, a mean of squares, holds {low:g}")


def _refuse(folder: Path, filled: int, tensor: torch.Tensor, kind: str, name: str) -> NoReturn:
    raise UserError(f"{folder}: holds {filled:,} of {tensor.numel():,} elements of {kind} of {name}")


class _Stored:
    """The fragments in a checkpoint, whoever wrote them."""

    def __init__(self, files: Sequence[Path]):
        self.folder = files[0].parent
        # (kind, parameter) -> the file, the key and the first element of each fragment.
        self.places: dict[tuple[str, str], list[tuple[Any, str, int]]] = defaultdict(list)
        for path in files:
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118, it is no mapping
                place = re.fullmatch(r"(\w+)/(\d{1,18})/(.*)", key, flags=re.DOTALL)
                if not place:
                    raise UserError(f"{path}: {key[:80]!r} is no part of an optimizer's state")
                self.places[place[1], place[3]].append((file, key, int(place[2])))
        self.has_weights = any(kind == "weights" for kind, _ in self.places)

    def read_into(self, tensor: torch.Tensor, kind: str, name: str, start: int) -> None:
        """Fill a flat tensor with the elements of a parameter from `start` on."""
        end, filled = start + tensor.numel(), 0
        for file, key, first in self.places[kind, name]:
            stored = file.get_tensor(key).view(-1)
            low, high = max(start, first), min(end, first + stored.numel())
            if low < high:
                tensor[low - start : high - start].copy_(stored[low - first : high - first])
                filled += high - low
        if filled != tensor.numel():
            _refuse(self.folder, filled, tensor, kind, name)


def loss_scale_state(accelerator: Accelerator) -> dict[str, Any]:
    """The fp16 loss scaler's numbers; empty without one. `by` says whose they are."""
    zero = zero_optimizer(accelerator)
    if zero is not None and getattr(zero.loss_scaler, "dynamic", False):
        names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        return {"by": "deepspeed", **{name: getattr(zero.loss_scaler, name) for name in names}}
    if accelerator.scaler is not None and accelerator.scaler.is_enabled():
        return {"by": "torch", **accelerator.scaler.state_dict()}
    return {}


def loss_scale(accelerator: Accelerator) -> float | None:
    """The factor by which fp16 losses are multiplied now; None without one."""
    state = loss_scale_state(accelerator)
    return state.get("cur_scale", state.get("scale"))


def load_loss_scale(accelerator: Accelerator, state: dict[str, Any]) -> None:
    """Set the loss scaler; from the other kind of scaler, and where there is none, what can be taken over."""
    now = loss_scale_state(accelerator)
    if not now or not state:
        return
    if now["by"] != state["by"]:
        stored = state.get("cur_scale", state.get("scale"))
        state = now | {"cur_scale" if now["by"] == "deepspeed" else "scale": stored}
    values = {name: value for name, value in state.items() if name != "by"}
    if now["by"] == "torch":
        accelerator.scaler.load_state_dict(values)
    else:
        vars(zero_optimizer(accelerator).loss_scaler).update(values)


def random_state() -> dict[str, Any]:
    """The states of this process's random generators, as JSON takes them."""
    numpy = np.random.get_state(legacy=False)
    state = {
        "python": random.getstate(),
        "numpy": numpy | {"state": numpy["state"] | {"key": numpy["state"]["key"].tolist()}},
        "torch": torch.get_rng_state().tolist(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().tolist()
    return state


def load_random_state(state: dict[str, Any]) -> None:
    """Set the random generators to what `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(state["numpy"] | {"state": state["numpy"]["state"] | {"key": key}})
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
