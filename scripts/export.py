#!/usr/bin/env python3
"""Write a checkpoint as a clean folder for use elsewhere, with its model card; as GGUF and on the hub if asked to.

    python scripts/export.py stablelm_7b/checkpoint-12000 stablelm-7b-sft
    python scripts/export.py stablelm_7b exported --dtype bf16 --max_shard_size 2GB
    python scripts/export.py stablelm_7b exported --gguf stablelm_7b.gguf --gguf_dtype q8_0
    python scripts/export.py stablelm_7b exported --push_to_hub me/stablelm-7b-sft --private
    python scripts/export.py stablelm_7b_lora exported --adapter

CHECKPOINT is a run's checkpoint, a run's folder (its final model), or any folder with a causal LM and a chat template;
an adapter is merged into its base model, or with --adapter written by itself, without the paths of this machine.
OUT gets safetensors, tokenizer with chat template, generation config with the stop token, card, and nothing else; it is
read by transformers 4 and 5, and by what takes their folders (vLLM, converters). It appears only when it is whole and
was read back by a fresh process, with the ids of training and the logits of CHECKPOINT. (--adapter copies the adapter's
weights as they are: they are not read back, and the base model is not loaded.)

Weights are written in the precision that the run computed in: a run in bf16 or fp16 keeps fp32 weights, twice the size.
The embedding's rows beyond the tokenizer's tokens, which trip converters and can be sampled, are removed; --vocab name
gives them tokens (<|unused_0|>, ...) instead, and keep leaves them.
"""

import argparse
import re
from pathlib import Path

from evaluation.model import find_model, trust_option
from utils.command_line import OneLineParser
from utils.errors import UserError, one_line_errors, reason
from utils.requirements import require


def shard_size(text: str) -> str:
    """A size such as 5GB, as argparse's `type`."""
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB)", text):
        raise argparse.ArgumentTypeError(f"{text} is no size such as 5GB or 500MB")
    return text


def arguments():
    parser = OneLineParser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a model")
    parser.add_argument("out", metavar="OUT", help="folder to write, a new one or an empty one")
    trust_option(parser)
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="precision of the weights (the run's)")
    parser.add_argument("--max_shard_size", type=shard_size, metavar="SIZE", help="of a weights file (5GB)")
    parser.add_argument("--vocab", choices=("trim", "name", "keep"), help="rows that have no token (trim)")
    parser.add_argument("--adapter", action="store_true", help="write an adapter by itself, not merged")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="write it as one file for llama.cpp, too")
    parser.add_argument("--gguf_dtype", choices=("f16", "q8_0"), help="precision of that file (f16)")
    parser.add_argument("--push_to_hub", metavar="REPO", help="publish it there, as you/name")
    parser.add_argument("--private", action="store_true", help="for you and your organization alone, if it is new")
    options = parser.parse_args()
    if options.private and not options.push_to_hub:
        raise UserError("command line: --private says how to publish: give --push_to_hub REPO too")
    if options.gguf_dtype and not options.gguf:
        raise UserError("command line: --gguf_dtype says how to write a GGUF file: give --gguf FILE too")
    for name in ("dtype", "max_shard_size", "vocab", "gguf"):
        if options.adapter and getattr(options, name):
            raise UserError(f"command line: --adapter writes the adapter as it is: leave out --{name}")
    options.max_shard_size, options.vocab = options.max_shard_size or "5GB", options.vocab or "trim"
    if options.gguf:
        require("gguf")
    return options


if __name__ == "__main__":
    with one_line_errors():
        OPTIONS = arguments()

import contextlib
import gc
import shutil
import signal
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from evaluation.chat_model import load_chat_tokenizer
from evaluation.model import EvaluatedModel
from publishing.adapter import check_adapter, copy_adapter, name_base_for_others
from publishing.foreign import clean_configs, shareable_card
from publishing.hub import check_hub, push
from publishing.model_card import model_card
from publishing.prompting import describe_prompting
from publishing.provenance import TrainedRun, find_run
from publishing.read_back import logits_of
from publishing.verification import check_precision, check_same, distance, make_reference, read_back
from publishing.vocabulary import fit_vocabulary
from publishing.weights import Weights, decimal_bytes, read_weights
from publishing.whole_folder import check_room, check_target, whole_folder
from run.model_files import as_readable_as_others, save_model
from run.saving import is_disk_error
from training.adapter_files import is_adapter, read_base
from training.pretrained import load_pretrained
from training.weight_files import model_folder
from utils.files import read_json, read_text
from utils.launch import DTYPES, say, set_up_process
from utils.tables import counted


def main(options) -> None:
    # ---- What can be refused before anything large is read ----
    set_up_process()
    source = find_folder(options.checkpoint, options.trust_remote_code)
    out = check_target(Path(options.out), source.folder)
    stored, run = stored_weights(source), find_run(source)
    dtype = options.dtype or (run and computed_in(run)) or stored.dtype
    check_room(out, stored.count * DTYPES[dtype].itemsize)
    repo = check_hub(options.push_to_hub, options.private) if options.push_to_hub else None
    tokenizer = load_chat_tokenizer(source)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{source.name}: its tokenizer has no tokenizer.json (a fast tokenizer)")
    with named(source.name):
        describe_prompting(tokenizer)  # a template that takes no conversation is found before the weights are read
    if options.gguf:
        from publishing.gguf_file import check_gguf, write_gguf  # of a package that nothing else here needs

        check_gguf(options.gguf, source.folder, rows=max(tokenizer.get_vocab().values()) + 1)

    # ---- The model as it is, then in the precision asked for; never two at a time ----
    exact = "fp32" if is_adapter(source.name) else stored.dtype
    model = load(source, exact)
    with named(source.name):
        reference = make_reference(model, tokenizer, exact, source.trust_remote_code)
    if dtype != exact:
        del model
        gc.collect()
        model = load(source, dtype)
        check_finite(model, dtype)
    with named(source.name):
        say(f"vocabulary: {fit_vocabulary(model, tokenizer, options.vocab)}")
        logits = logits_of(model, reference.ids)
        check_precision(reference, logits, dtype)

    # ---- The folder: written, read back by another process, and only then there ----
    with whole_folder(out) as work:
        save(model, tokenizer, work, source.name, options.max_shard_size)
        del model
        gc.collect()
        write_beside(source, run, work, name=(repo or out.name).rpartition("/")[2], hub_name=repo)
        clean_configs(work)
        with named(options.out):
            check_same(reference, logits, read_back(work, reference), dtype)
        written = read_weights(work)
    say(f"weights: {stored.dtype}, {decimal_bytes(stored.size)} in {source.name}")
    say(f"         {written.dtype}, {decimal_bytes(written.size)} in {options.out}, {counted(written.files, 'file')}")
    apart = f"{distance(reference.logits, logits):.2g} of their spread"
    say(f"read back: the ids of {len(reference.chats)} chats are those of {source.name}, the logits within {apart}")
    say(f"in {options.out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if options.gguf:
        write_gguf(out, options.gguf, options.gguf_dtype or "f16")
        say(f"in {options.gguf}: {decimal_bytes(options.gguf.stat().st_size)} for llama.cpp")
    if repo:
        push(out, repo, options.private)


def export_adapter(options) -> None:
    """--adapter: the files of an adapter are copied, and its base model named as others know it."""
    set_up_process()
    source = find_folder(options.checkpoint, options.trust_remote_code)
    out = check_target(Path(options.out), source.folder)
    check_room(out, check_adapter(source.folder))
    repo = check_hub(options.push_to_hub, options.private) if options.push_to_hub else None
    tokenizer, run = load_chat_tokenizer(source), find_run(source)
    load_pretrained(AutoConfig, source.name, "", source.trust_remote_code)  # its base model's, for the card
    with whole_folder(out) as work:
        copy_adapter(source.folder, tokenizer, work)
        write_beside(source, run, work, name=(repo or out.name).rpartition("/")[2], hub_name=repo)
        base = name_base_for_others(work)  # last: the card is made of what can be loaded here
        clean_configs(work)
    say(f"in {options.out}: {', '.join(sorted(path.name for path in out.iterdir()))}; its base model: {base}")
    if repo:
        push(out, repo, options.private)


def find_folder(name: str, trust_remote_code: bool = False) -> EvaluatedModel:
    """`find_model` of what is a folder.  Raises: UserError."""
    if not Path(name).is_dir():
        raise UserError(f"{name}: no such folder under {Path.cwd()}")
    return find_model(name, trust_remote_code)


def stored_weights(source: EvaluatedModel) -> Weights:
    """What the weights files of the model hold; of an adapter those of its base model.

    Raises: UserError for what is no model, an adapter without its base, or quantized weights.
    """
    name, folder = source.name, source.folder
    if is_adapter(name):
        base = read_base(folder)
        folder = model_folder(base.name)
        if folder is None:
            raise UserError(f"{name}: its base model {base.name} is not on this machine: hf download {base.name}")
        bits = f", what its 4 bits ({base.quantization.kind}) stand for" if base.quantization else ""
        say(f"the adapter is merged, in fp32, into the weights of {base.name}{bits}")
    config, weights = read_json(folder / "config.json", "config"), read_weights(folder)
    if weights is None:
        raise UserError(f"{name}: holds no *.safetensors, the weights: save it by transformers' save_pretrained first")
    if (isinstance(config, dict) and config.get("quantization_config")) or weights.dtype not in DTYPES:
        raise UserError(f"{name}: its weights are quantized ({weights.dtype}): export the model they were made from")
    return weights


def computed_in(run: TrainedRun) -> str:
    """The precision of a run's forward and backward pass; fp16 without a GPU was fp32, which its record knows."""
    names = {str(value).removeprefix("torch."): name for name, value in DTYPES.items()}
    return names.get(run.record and run.record.dtype) or run.recipe.dtype


def load(source: EvaluatedModel, dtype: str):
    """On the CPU, where there is room for a model that a GPU cannot hold in fp32."""
    loaded = torch.float32 if is_adapter(source.name) else DTYPES[dtype]  # half would round an adapter before the sum
    model = load_pretrained(AutoModelForCausalLM, source.name, "", source.trust_remote_code, dtype=loaded)
    return model.to(DTYPES[dtype])


def save(model, tokenizer, folder: Path, name: str, max_shard_size: str) -> None:
    """`save_model`, where what transformers refuses to save of a model from elsewhere is one line."""
    try:
        save_model(model, tokenizer, folder, max_shard_size)
    except Exception as error:  # as many kinds as transformers has
        if is_disk_error(error):
            raise
        raise UserError(f"{name}: it cannot be saved: {reason(error)}") from error


def check_finite(model, dtype: str) -> None:
    """Refuse a precision that cannot hold the weights."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            most = f"{torch.finfo(DTYPES[dtype]).max:,.0f}"
            raise UserError(f"--dtype {dtype}: {name} holds weights over {most}, the largest number: give bf16 or fp32")


def write_beside(source: EvaluatedModel, run: TrainedRun | None, folder: Path, name: str, hub_name: str | None) -> None:
    """What belongs to a model beside what it is loaded from: card, curves, licence.

    A model that no run here has made keeps its own card, but for paths of this machine; an adapter's is not one of what
    it was merged into.
    """
    for path in source.folder.glob("LICENSE*"):
        shutil.copyfile(path, folder / path.name)
    adapter, card = is_adapter(source.name), source.folder / "README.md"
    if not run and card.is_file() and adapter == is_adapter(str(folder)):
        given = read_text(card, "card", errors="surrogateescape")  # in any encoding: its bytes stay as they are
        text = shareable_card(given, read_base(source.folder).name if adapter else None)
        (folder / "README.md").write_text(text, encoding="utf-8", errors="surrogateescape")
    if run and (run.folder / "training.png").is_file():
        shutil.copyfile(run.folder / "training.png", folder / "training.png")
    if not (folder / "README.md").exists():
        card = model_card(source, run, folder, name, hub_name)
        (folder / "README.md").write_text(str(card), encoding="utf-8")
    as_readable_as_others(folder)


@contextlib.contextmanager
def named(name: str):
    """Around what raises a `UserError` that does not say of which model."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what is half written is removed
    with one_line_errors():
        export_adapter(OPTIONS) if OPTIONS.adapter else main(OPTIONS)
