"""A model's weights, written into its folder by parts, from what the processes hold of them.

The first process has one part at a time, and of it what the others send it: so a model that no process could hold is
written whole. transformers writes each part as it would all of it (`save_pretrained`), under the names that its readers
know: `embed_out.weight` for what is `lm_head.weight` in memory, one key for each expert. What it cuts or merges lies
within a layer, so a layer is never cut.
"""

import json
import os
import re
import tempfile
from itertools import groupby
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from run.processes import Processes
from run.snapshot import Weights
from training.fragments import Fragment

PART_BYTES = 2 * 2**30  # of a file, and of what is copied from a GPU at a time
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Layout = list[tuple[str, int, int]]  # of what a process holds: parameter, first element, elements


def save_weights(model: PreTrainedModel, folder: Path, weights: Weights, processes: Processes) -> None:
    """Write config.json, generation_config.json and the weights. Every process calls this.

    Args:
        model: for its names, shapes and configs.
        weights: what this process gives.

    Raises: on the first process OSError and the like.
    """
    held, dtype = weights.held, weights.dtype
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    parts = plan_parts(shapes, dtype.itemsize)
    layouts: list[Layout] = processes.gather([(each.name, each.start, len(each.tensors["model"])) for each in held])
    weight_map: dict[str, str] = {}
    problem = None
    for number, names in enumerate(parts, 1):
        tensors = _collect(names, shapes, held, layouts, dtype, processes)
        if not processes.is_first or problem:
            continue  # the others go on sending, and wait for each other at the end
        file = WEIGHTS if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        try:
            if number == 1:
                tensors |= weights.buffers
            weight_map |= dict.fromkeys(_write(model, folder, tensors, file), file)
        except Exception as error:
            problem = error
    if problem:
        raise problem
    if processes.is_first and len(parts) > 1:
        size = sum((folder / file).stat().st_size for file in set(weight_map.values()))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def plan_parts(shapes: dict[str, torch.Size], element: int) -> list[list[str]]:
    """The parameters of each file: whole layers, as many as PART_BYTES hold, at least one."""
    parts: list[list[str]] = [[]]
    size = 0
    for _, names in groupby(shapes, key=lambda name: re.match(r"(?:.*?\.\d+\.)?", name)[0] or name):
        layer = list(names)
        own = sum(shapes[name].numel() for name in layer) * element
        if parts[-1] and size + own > PART_BYTES:
            parts.append([])
            size = 0
        parts[-1] += layer
        size += own
    return parts


def _collect(
    names: list[str],
    shapes: dict[str, torch.Size],
    held: list[Fragment],
    layouts: list[Layout],
    dtype: torch.dtype,
    processes: Processes,
) -> dict[str, torch.Tensor]:
    """The parameters of these names, whole, on the first process; the others give it what they hold of them."""
    wanted = set(names)
    own = [each for each in held if each.name in wanted]
    if not processes.is_first:
        if own:
            processes.send(torch.cat([each.tensors["model"].cpu() for each in own]).view(torch.uint8))
        return {}
    whole: dict[str, torch.Tensor] = {}

    def put(name: str, start: int, values: torch.Tensor) -> None:
        if len(values) == shapes[name].numel():
            whole[name] = values.view(shapes[name])
            return
        if name not in whole:
            whole[name] = torch.empty(shapes[name], dtype=dtype)
        whole[name].view(-1)[start : start + len(values)] = values

    for each in own:
        put(each.name, each.start, each.tensors["model"])
    for process, layout in enumerate(layouts):
        sent = [place for place in layout if place[0] in wanted] if process else []
        if sent:
            values = torch.empty(sum(elements for *_, elements in sent), dtype=dtype)
            processes.receive(values.view(torch.uint8), process)
            for (name, start, _), piece in zip(sent, values.split([place[2] for place in sent]), strict=True):
                put(name, start, piece)
    return {name: whole[name] for name in names}


def _write(model: PreTrainedModel, folder: Path, tensors: dict[str, torch.Tensor], file: str) -> list[str]:
    """Have transformers write these tensors of a model, and all that is no weight; returns their names in the file."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as work:
        model.save_pretrained(work, state_dict=tensors, max_shard_size=2**62)
        os.replace(Path(work) / WEIGHTS, folder / file)
        for path in Path(work).iterdir():
            if not (folder / path.name).exists():  # the same beside every part
                os.replace(path, folder / path.name)
    with safe_open(folder / file, framework="pt") as written:
        return [*written.keys()]
