#!/usr/bin/env python3
"""Write the mean of the weights of several checkpoints as a model like any other: of the last ones of a run, say.

    python scripts/average_checkpoints.py run/checkpoint-10000 run/checkpoint-11000 run/best --out averaged
    python scripts/eval_loss.py averaged
    python scripts/compare.py run averaged

Each weight is summed in fp32, one tensor in memory at a time, and stored in the precision of the first. The checkpoints
have to be of one model: the same config, tokenizer, chat template, and names and shapes of the weights. The mean of
adapters is not that of their models, so each has to be exported first. DIR appears when it is whole; evaluate it before
you trust it. Of checkpoints of one run it holds recipe.yaml and run.json, by which evaluations and the card know it.
"""

from pathlib import Path

from evaluation.model import EvaluatedModel, find_model, trust_option
from utils.command_line import OneLineParser
from utils.errors import UserError, one_line_errors


def arguments():
    parser = OneLineParser(__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="folder of a model; two or more")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, a new or an empty one")
    trust_option(parser)
    options = parser.parse_args()
    if len({Path(name).resolve() for name in options.checkpoints}) < len(options.checkpoints):
        raise UserError("command line: a checkpoint is given twice, as itself or by a link: give each once")
    if len(options.checkpoints) < 2:
        raise UserError("command line: give two checkpoints or more")
    return options


if __name__ == "__main__":
    with one_line_errors():
        OPTIONS = arguments()

import json
import shutil
import signal
import sys

import torch
from safetensors import safe_open
from transformers import AutoConfig

from publishing.weights import read_weights
from publishing.whole_folder import check_room, check_target, whole_folder
from run.model_files import as_readable_as_others, config_changes
from run.record_file import read_record, write_record
from training.adapter_files import is_adapter
from training.checkpoint_files import check_model_files
from training.pretrained import load_pretrained
from training.weight_files import WEIGHTS, check_headers
from utils.files import read_json, read_text
from utils.launch import say, set_up_process

INDEX = "model.safetensors.index.json"
# Taken from the first checkpoint, where it has them.
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "chat_template.jinja",
)
# By safetensors' names: those of weights, and of what else a model may keep beside them (positions, a mask).
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def main(options) -> None:
    set_up_process()
    found = [find_model(name, options.trust_remote_code) for name in options.checkpoints]
    for model in found:
        out = check_target(options.out, model.folder)
    models = [Weights(model.folder, name) for model, name in zip(found, options.checkpoints, strict=True)]
    first = models[0]
    for other in models[1:]:
        check_same_model(first, other, options.trust_remote_code)
    check_room(out, sum(shape.numel() * first.dtypes[name].itemsize for name, shape in first.shapes.items()))
    with whole_folder(out) as work:
        for path in first.files:
            names = [name for name, file in first.file_of.items() if file == path]
            with open(work / path.name, "wb") as file:
                file.write(header({name: first.shapes[name] for name in names}, first.dtypes))
                for name in names:
                    file.write(as_bytes(mean(name, models, first.dtypes[name])))
        for name in (*COPIED, *([INDEX] * first.has_index)):
            if (first.folder / name).is_file():
                shutil.copyfile(first.folder / name, work / name)
        for pattern in ("LICENSE*", "*.py"):  # code that a config of a known architecture may name all the same
            for path in first.folder.glob(pattern):
                shutil.copyfile(path, work / path.name)
        copy_run(found, work)
        as_readable_as_others(work)
        written = read_weights(work)
    say(f"in {options.out}: the mean of {len(models)} checkpoints, {written}")


class Weights:
    """The safetensors of a model's folder, read a tensor at a time.

    Attributes:
        files: of the weights, by name.
        has_index: whether an index names these, as of several.
        file_of: {name of a tensor: its file}, in the order in which a file holds them.
        shapes, dtypes: {name: torch.Size}, {name: torch.dtype}.
    """

    def __init__(self, folder: Path | None, name: str):
        """
        Raises: UserError for what is no folder with a model's safetensors, for an adapter, quantized weights, a file
            that is damaged, or one that is not as its run wrote it.
        """
        if folder is None:
            raise UserError(f"{name}: no such folder under {Path.cwd()}")
        if is_adapter(str(folder)):
            why = "the mean of adapters is not that of their models"
            raise UserError(f"{name}: is an adapter: {why}: export each first (export.py)")
        self.folder, self.name = folder, name
        weights = next((entry for entry in WEIGHTS if (folder / entry).is_file()), "none")
        if "safetensors" not in weights:
            raise UserError(f"{name}: holds no *.safetensors, the weights: save it by transformers' save_pretrained")
        check_model_files(folder, weights=True)
        check_headers(folder, name)
        self.files, self.has_index, listed = [folder / weights], weights == INDEX, None
        if self.has_index:
            index = read_json(folder / INDEX, "index of weights")
            listed = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
                raise UserError(f"{folder / INDEX}: damaged: no index of weights")
            self.files = [folder / Path(file).name for file in sorted(set(listed.values()))]
        if missing := [path for path in self.files if not path.is_file()]:
            raise UserError(f"{missing[0]}: not there, though {INDEX} names it")
        self.open = {path: safe_open(path, framework="pt") for path in self.files}
        self.file_of = {name: path for path, file in self.open.items() for name in file.keys()}  # noqa: SIM118
        if listed not in (None, {name: path.name for name, path in self.file_of.items()}):
            raise UserError(f"{folder / INDEX}: damaged: it lists other weights than its files hold")
        slices = {name: self.open[path].get_slice(name) for name, path in self.file_of.items()}
        self.shapes = {name: torch.Size(part.get_shape()) for name, part in slices.items()}
        kinds = {name: part.get_dtype() for name, part in slices.items()}
        if unknown := [name for name, kind in kinds.items() if kind not in DTYPES]:
            raise UserError(
                f"{self.file_of[unknown[0]]}: {unknown[0]} is {kinds[unknown[0]]}, of which there is no mean"
            )
        self.dtypes = {name: DTYPES[kind] for name, kind in kinds.items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self.open[self.file_of[name]].get_tensor(name)


def check_same_model(first: Weights, other: Weights, trust_remote_code: bool = False) -> None:
    """Raises: UserError with the first thing in which two models differ but in the numbers."""
    who = f"{other.name} and {first.name} are not checkpoints of one model"
    configs = [load_pretrained(AutoConfig, str(each.folder), each.name, trust_remote_code) for each in (first, other)]
    if changed := config_changes(*configs):
        raise UserError(f"{who}: config.json: {changed[0].replace(' then,', ' in the first,').replace(' now', '')}")
    here, there = reading_of(first.folder), reading_of(other.folder)
    if differing := [name for name in here if here[name] != there[name]]:
        raise UserError(f"{who}: they differ in {differing[0]}")
    if first.shapes != other.shapes:
        pairs = {name: (first.shapes.get(name), other.shapes.get(name)) for name in first.shapes | other.shapes}
        name, (here, there) = next((name, pair) for name, pair in pairs.items() if pair[0] != pair[1])
        here, there = (str([*shape]) if shape is not None else "absent" for shape in (here, there))
        raise UserError(f"{who}: {name} is {there} and {here}")


def reading_of(folder: Path) -> dict[str, object]:
    """By what a model's texts have their ids, and what it computes of them where that is code of its own."""
    names = ("tokenizer.json", "tokenizer_config.json")
    tokenizer, config = (read_json(path) if (path := folder / name).exists() else {} for name in names)
    template = folder / "chat_template.jinja"
    own = config.get("chat_template") if isinstance(config, dict) else None
    code = {path.name: path.read_bytes() for path in folder.glob("*.py")}
    template = read_text(template) if template.exists() else own
    return {"tokenizer.json": tokenizer, "their chat templates": template, "their own code (*.py)": code}


def copy_run(models: list[EvaluatedModel], folder: Path) -> None:
    """The recipe and the record of the run that all checkpoints are of, if they are; the record says what was averaged.

    Raises: UserError where the recipe cannot be read, OSError.
    """
    files = [model.recipe_file for model in models]
    if None in files or len({read_text(file) for file in files}) > 1:
        say("they are not of one run, so that no recipe is known of their mean: give eval_loss.py --recipe")
        return
    shutil.copyfile(files[0], folder / "recipe.yaml")
    names = [model.folder.resolve().name for model in models]
    try:
        write_record(read_record(files[0].with_name("run.json")) | {"averaged": names}, folder / "run.json")
    except UserError as problem:
        say(f"warning: the record of the run is left out: {problem}")


def mean(name: str, models: list[Weights], dtype: torch.dtype) -> torch.Tensor:
    """The mean of a tensor over the models, summed in fp32; of one that is no weight (positions, a mask) its value.

    Raises: UserError where it is no finite number, or where what is no weight differs.
    """
    total = models[0].tensor(name)
    if not total.is_floating_point():
        for model in models[1:]:
            if not torch.equal(model.tensor(name), total):
                raise UserError(
                    f"{model.name} and {models[0].name} differ in {name}, which has no mean ({total.dtype})"
                )
        return total
    total = total.to(torch.promote_types(total.dtype, torch.float32), copy=True)
    for model in models[1:]:
        total += model.tensor(name)
    total = (total / len(models)).to(dtype)
    if not total.isfinite().all():
        bad = [model.name for model in models if not model.tensor(name).isfinite().all()]
        raise UserError(f"{', '.join(bad) or 'the mean'}: {name} holds what is no finite number: leave it out")
    return total


def header(shapes: dict[str, torch.Size], dtypes: dict[str, torch.dtype]) -> bytes:
    """The beginning of a safetensors file, which says where each tensor lies behind it.

    `safetensors` itself writes a file only of tensors that are all in memory; its README has the format.
    """
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * dtypes[name].itemsize
        entries[name] = {"dtype": NAMES[dtypes[name]], "shape": [*shape], "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def as_bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what is half written is removed
    with one_line_errors():
        main(OPTIONS)
