"""README.md of a model: its card, in the form of the seed's, filled from what really ran.

`publishing/model_card.md.jinja` is its text, `publishing/card_data.py` its front matter, `publishing/provenance.py`
what both are filled from. No secret and no path of this machine is in it.
"""

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCard
from transformers import AutoConfig, GenerationConfig

from evaluation.chat_model import load_chat_tokenizer
from evaluation.model import EvaluatedModel, find_model
from evaluation.result_files import Contamination, ResultFile
from publishing.card_data import Adapted, card_data, describe_interval, is_number, languages, measured
from publishing.foreign import last_part, public_name
from publishing.prompting import QUESTIONS, describe_prompting
from publishing.provenance import (
    RunRecord,
    TrainedRun,
    find_results,
    find_run,
    redacted,
    shareable_recipe,
    shareable_text,
)
from publishing.repeating import command_of, without_deepspeed
from publishing.weights import read_weights
from sources.registry import find_source
from training.adapter_files import is_adapter, read_base
from training.pretrained import load_pretrained
from utils.errors import UserError, reason
from utils.files import write_whole
from utils.launch import say
from utils.tables import counted

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
HUB = "https://huggingface.co"
LINK = re.compile(r"https://[^\s<>\[\]()`|*\\]+")  # which Markdown leaves whole
MATH = "grade_school_math_instructions"


def write_model_card(folder: Path, trust_remote_code: bool = False) -> None:
    """Write the card of the model in a folder; where that fails, say so: all else of the run is there."""
    path = folder / "README.md"
    try:
        model = find_model(str(folder), trust_remote_code)
        write_whole(path, str(model_card(model, find_run(model))))
    except Exception as error:  # as many kinds as transformers, Jinja and huggingface_hub have
        problem = error if isinstance(error, UserError) else getattr(error, "strerror", None) or reason(error)
        say(f"warning: {path}: the model's card could not be written: {problem}")


def model_card(
    model: EvaluatedModel,
    run: TrainedRun | None,
    described: Path | None = None,
    name: str | None = None,
    hub_name: str | None = None,
) -> ModelCard:
    """The card of a model in a folder, that `run` has made.

    Args:
        described: the folder that the card is for, where that is a copy (an export); the evaluations are those of
            `model`.
        name: its title; else the name of its run or folder.
        hub_name: where it can be loaded from, once it is there; else from its folder.

    Raises: UserError where tokenizer, config or weights are missing or damaged.
    """
    described = described or model.folder
    results = find_results(model)
    trust = model.trust_remote_code
    tokenizer = load_chat_tokenizer(EvaluatedModel(str(described), trust_remote_code=trust))
    config = load_pretrained(AutoConfig, str(described), trust_remote_code=trust)
    own_code, config = trust and bool(getattr(config, "auto_map", None)), config.get_text_config()
    name = shareable_text(" ".join((name or _run_name(model, run)).split()))
    prompting = describe_prompting(tokenizer)
    positions = getattr(config, "max_position_embeddings", None)
    adapted = _base_of_adapter(described)
    data = card_data(name, run, results, prompting.prompts, adapted)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"fence": fence, "code": code, "cell": cell, "plain": plain}
    text = environment.get_template(TEMPLATE.name).render(
        card_data=data.to_yaml(),
        name=name,
        model_type=config.model_type,
        weights=f"an adapter of {read_weights(described)}" if adapted else read_weights(described),
        adapted=adapted,
        positions=positions,
        room=min(256, positions // 2) if positions else 256,
        prompting=prompting,
        eos=tokenizer.eos_token,
        stops=_stop_tokens(described, tokenizer),
        question=QUESTIONS[0],
        address=hub_name or ".",
        own_code=own_code,
        address_note="" if hub_name else "  # the folder of this card",
        licence=_licence(run, data.license),
        result_rows=_result_rows(run, results),
        warnings=[shareable_text(f"{key}: {line}") for key, one in results.items() for line in one.warnings],
        limitations=_limitations(run),
        run=run,
        **(_of_the_run(run, model, results) if run else {"summary": "A chat model in the format of transformers."}),
    )
    return ModelCard(text)


def _base_of_adapter(folder: Path) -> Adapted | None:
    if not is_adapter(str(folder)):
        return None
    name = read_base(folder).name
    hub_name = public_name(name)
    return Adapted(hub_name or last_part(name), hub_name)


def _of_the_run(run: TrainedRun, model: EvaluatedModel, results: dict[str, ResultFile]) -> dict[str, Any]:
    """What the template says of a run."""
    recipe, record = run.recipe, run.record or RunRecord()
    values = shareable_recipe(recipe, run.base_model)
    base = f"[{run.base_model}]({HUB}/{run.base_model})" if run.base_model else code(values["model_name"])
    if recipe.from_scratch:
        base = f"random weights of the shape of {code(values['model_name'])}"
    elif not run.base_model:
        base += ", a model that is not on the hub"
    commit = record.git.commit and f", commit {record.git.commit}{' and changes of its own' * record.git.dirty}"
    packages = [name for name in ("transformers", "torch", "deepspeed") if name in record.packages]
    versions = ", ".join(f"{name} {record.packages[name]}" for name in packages)
    device = record.hardware.GPUs[0].partition(",")[0] if record.hardware.GPUs else "CPU"
    machine = f"{counted(record.num_processes, 'process')}, {device}" if record.num_processes else "an unknown machine"
    tokens = f", {run.tokens:,} tokens" if run.tokens else ""
    steps = "an unknown number of steps" if model.step is None else counted(model.step, "step")
    done = steps if run.epochs is None else f"{run.epochs:g} {'epoch' if run.epochs == 1 else 'epochs'} ({steps})"
    progress = done + tokens + (f", of {recipe.num_train_epochs:g} epochs" if recipe.max_steps is None else "")
    trained = f"fine-tuned for {done}{tokens}"
    if record.averaged:
        progress = f"the mean of the weights of {shareable_text(', '.join(record.averaged))}"
        trained = f"{progress}, fine-tuned"
    return {
        "summary": (
            f"A chat model: {base}, {trained} on the conversations of "
            f"{', '.join(recipe.datasets.chosen())}. It replies to a user, turn by turn."
        ),
        "languages": ", ".join(languages(run)) or "not known",
        "base": base,
        "code": plain(commit or "") + f" ({plain(versions)})" * bool(versions),
        "wandb": record.wandb if record.wandb and LINK.fullmatch(record.wandb) else "",
        "progress": progress,
        "dtype": record.dtype or recipe.dtype,
        "processes": machine,
        **command_of(recipe, run.record),
        "data_block": _yaml({"datasets": values.pop("datasets")}),
        "hyperparameter_block": _yaml(values),
        "deepspeed_block": json.dumps(redacted(record.deepspeed), indent=2) if record.deepspeed else None,
        "without_deepspeed": without_deepspeed(run.record),
        "data_rows": [_data_row(run, name) for name in recipe.datasets.chosen()],
        "curves": (run.folder / "training.png").is_file(),
        "contamination": _contamination(run, results),
    }


def _data_row(run: TrainedRun, name: str) -> list[str]:
    """A data set of the mix: its name, conversations, where it is from, and its licence."""
    options = run.recipe.datasets.chosen()[name]
    source, hub, counts = find_source(name, options), run.hub_data_set(name), run.data(name).conversations
    paths = options.input_file_path if isinstance(options.input_file_path, list) else [options.input_file_path]
    given = ", ".join(code(Path(path).name) for path in paths if path)
    place = f"[{hub}]({HUB}/datasets/{hub})" if hub else "data of its own"
    counted = [f"{counts[split]:,}" if split in counts else "?" for split in ("train", "validation")]
    return [name, *counted, place + (f", {given}" if given else ""), source.licence if hub else "not stated"]


def _result_rows(run: TrainedRun | None, results: dict[str, ResultFile]) -> list[list[str]]:
    rows = []
    if run and "loss" not in results:
        step = run.validation.get("step", 0)
        for key, value in run.validation.items():
            if key.startswith("eval_") and is_number(value):
                rows.append([f"validation after step {step:,}", plain(key), f"{value:.4f}", "", ""])
    for evaluation, name, metric in measured(results):
        count = "" if metric.n is None else f"{metric.n:,}"
        rows.append(
            [plain(evaluation), plain(name), f"{metric.value:.4f}", describe_interval(metric, "{} to {}"), count]
        )
    return rows


def _contamination(run: TrainedRun, results: dict[str, ResultFile]) -> str:
    """Whether a benchmark's test questions were in training, as far as that is known."""
    looked = results["gsm8k"].contamination if "gsm8k" in results else Contamination()
    if looked.contaminated is not None and looked.verdict:
        return f"GSM8K's test problems: {shareable_text(looked.verdict)}."
    if run.recipe.drop_contaminated:
        return (
            "training conversations that hold a question of GSM8K's test set, or 13 consecutive words of one, were "
            "left out before training."
        )
    if MATH in run.recipe.datasets.chosen() and run.hub_data_set(MATH):
        return (
            f"{MATH}, as it is published, holds GSM8K's 1,319 test problems beside its 7,473 training problems, and "
            "they were not left out: a score on GSM8K shows memory, not skill."
        )
    return "nobody has looked for test questions of benchmarks in the training data (scripts/prepare_data.py does)."


def _licence(run: TrainedRun | None, base: str | None) -> str:
    known = f"{plain(base)}, that of the base model" if base else "not known of the base model"
    if run is None:
        return "that of the model it comes from"
    if run.recipe.from_scratch:
        known = "none was chosen for these weights yet"
    data = "the training data have licences of their own, listed below, which whoever publishes the model has to follow"
    return f"{known}; {data}"


def _limitations(run: TrainedRun | None) -> list[str]:
    found = [
        "It states falsehoods as fluently as facts: check what matters.",
        "Nobody has tested it for safety. What is harmful or biased in its training data can come back in its replies.",
    ]
    if run is None:
        return found
    found.append(
        "It was fine-tuned on examples of good replies alone (SFT), without preferences or reinforcement learning."
    )
    longest = (
        f"Its training examples have at most {run.recipe.max_length:,} tokens: longer conversations are new to it."
    )
    spoken = languages(run)
    return [
        *found,
        longest,
        *([f"The mix was not chosen to hold other languages than {', '.join(spoken)}."] * bool(spoken)),
    ]


def _run_name(model: EvaluatedModel, run: TrainedRun | None) -> str:
    folder = model.folder.resolve()
    return f"{folder.parent.name}-{folder.name}" if run and run.folder.resolve() != folder else folder.name


def _stop_tokens(folder: Path, tokenizer: Any) -> list[str]:
    """At which generation stops, by the folder's generation_config.json."""
    try:
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        ends = None
    ends = ends if isinstance(ends, list) else [ends]
    return [tokenizer.convert_ids_to_tokens(one) for one in ends if one is not None] or [tokenizer.eos_token]


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, width=120).rstrip("\n")


# ---- Markdown ----


def plain(text: str) -> str:
    """A text of a file (a record, a result, a name) that stays what it is: no mark-up, no HTML, no line of its own."""
    return re.sub(r"[\\`*<>]|(?<=\])[(\[]", r"\\\g<0>", " ".join(text.split()))


def fence(text: str, language: str = "") -> str:
    """A code block that holds the text as it is."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def code(text: str) -> str:
    """A text as code within a line, newlines as \\n."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}".replace("\n", "\\n")


def cell(text: str) -> str:
    """A text as a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")
