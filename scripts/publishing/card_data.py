"""A model card's front matter, which the hub reads: languages, licence, base model, data sets, evaluation results."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCardData, try_to_load_from_cache
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from evaluation.result_files import Metric, ResultFile
from publishing.provenance import TrainedRun, shareable_text
from sources.registry import find_source
from training.contamination import BENCHMARKS
from utils.errors import UserError
from utils.files import read_text

# Of the base models of the recipes that ship, by their cards on the hub.
BASE_LICENCES = {
    "stabilityai/stablelm-base-alpha-3b": "cc-by-sa-4.0",
    "stabilityai/stablelm-base-alpha-7b": "cc-by-sa-4.0",
    "HuggingFaceTB/SmolLM2-135M": "apache-2.0",
}
EVALUATED_DATA = {"gsm8k": BENCHMARKS["gsm8k_test"][0].repo}  # the hub data set of an evaluation
DETAILS = ("language ", "turn ")  # parts of eval_loss.py's results that are in the table of the card alone


class Adapted(NamedTuple):
    """The base model of an adapter: its name for others, and on the hub; None there where it is a folder here."""

    name: str
    hub_name: str | None


def card_data(
    name: str, run: TrainedRun | None, results: dict[str, ResultFile], prompts: list[str], adapted: Adapted | None
) -> ModelCardData:
    """The front matter of a model's card.

    Args:
        name: of the model.
        results: result files of its evaluations by name.
        prompts: in its chat format, for the hub's widget.
        adapted: of an adapter.
    """
    scores = eval_results(run, results)
    return ModelCardData(
        language=languages(run) or None if run else None,
        license=base_licence(run) if run else None,
        library_name="peft" if adapted else "transformers",
        pipeline_tag="text-generation",
        tags=["sft", "conversational"] if run else ["conversational"],
        base_model=adapted.hub_name if adapted else run.base_model if run else None,
        datasets=hub_data_sets(run) or None if run else None,
        widget=[{"text": prompt} for prompt in prompts],
        model_name=name if scores else None,
        eval_results=scores or None,
    )


def languages(run: TrainedRun) -> list[str]:
    """Of the mix, ISO 639-1: what its options ask for, else what the source is known to be in; sorted."""
    found = set()
    for name, options in run.recipe.datasets.chosen().items():
        if asked := getattr(options, "lang", None):
            found.update(code.strip().partition("-")[0] for code in asked.split(","))
        elif run.hub_data_set(name):
            found.update(find_source(name, options).languages)
    return sorted(found)


def hub_data_sets(run: TrainedRun) -> list[str]:
    """Hub names, in the order of the mix."""
    names = map(run.hub_data_set, run.recipe.datasets.chosen())
    return list(dict.fromkeys(filter(None, names)))  # once, of however many splits of it


def base_licence(run: TrainedRun) -> str | None:
    """The licence of the base model as its card names it, None where that is not to be had."""
    if run.recipe.from_scratch:
        return None
    name = run.base_model or run.recipe.model_name
    if run.base_model in BASE_LICENCES:
        return BASE_LICENCES[name]
    card = try_to_load_from_cache(name, "README.md") if run.base_model else Path(name) / "README.md"
    try:
        block = REGEX_YAML_BLOCK.search(read_text(Path(card))) if isinstance(card, str | Path) else None
        values = yaml.safe_load(block[2]) if block else {}
    except (UserError, yaml.YAMLError):
        return None
    found = values.get("license") if isinstance(values, dict) else None
    return found if isinstance(found, str) else None


def eval_results(run: TrainedRun | None, results: dict[str, ResultFile]) -> list[EvalResult]:
    """For the card's model-index: those of the evaluations, and the run's own where eval_loss.py has none."""
    found = []
    if run and "loss" not in results:
        for key, value in run.validation.items():
            if key.startswith("eval_") and is_number(value):
                part, _, kind = key.removeprefix("eval").rpartition("_")
                found.append(_on_validation(run, part.removeprefix("_"), kind, value, kind))
    for evaluation, name, metric in measured(results):
        label = name + describe_interval(metric, ", 95 %: {} to {}")
        kind, _, part = name.partition("/")
        if run and evaluation == "loss":
            if not part.startswith(DETAILS):
                found.append(_on_validation(run, part, kind, metric.value, label))
            continue
        dataset = EVALUATED_DATA.get(evaluation, evaluation)
        if evaluation == "harness":  # lm_eval's, whose metrics are named the other way round, arc_easy/acc (chat)
            dataset, _, kind = name.rpartition("/")
        found.append(
            _result(
                metric_type=kind,
                metric_value=metric.value,
                metric_name=label,
                dataset_type=dataset,
                dataset_name=dataset,
            )
        )
    return found


def measured(results: dict[str, ResultFile]) -> Iterator[tuple[str, str, Metric]]:
    """(evaluation, name of the metric, metric) of every metric that has a number."""
    for evaluation, content in results.items():
        for name, metric in content.results.items():
            if metric.value is not None:
                yield evaluation, shareable_text(name), metric


def _on_validation(run: TrainedRun, dataset: str, kind: str, value: float, label: str) -> EvalResult:
    """A figure of the validation split of a data set of the mix, of the whole mix where it is ''."""
    hub = run.hub_data_set(dataset) if dataset in run.recipe.datasets.chosen() else None
    what = {"dataset_type": hub or dataset or "mix", "dataset_name": dataset or "all data sets of the mix"}
    return _result(metric_type=kind, metric_value=value, metric_name=label, dataset_split="validation", **what)


def _result(metric_value: float, **more: Any) -> EvalResult:
    return EvalResult(
        task_type="text-generation", task_name="Text generation", metric_value=round(metric_value, 6), **more
    )


def describe_interval(metric: Metric, form: str) -> str:
    """The ends of a metric's 95 % interval put into a form; nothing where it has none."""
    return form.format(*(f"{end:.4f}" for end in metric.interval)) if metric.interval else ""


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
