#!/usr/bin/env python3
"""Benchmarks of EleutherAI's lm-evaluation-harness (lm_eval) on a checkpoint, with and without its chat template.

    pip install -r requirements-eval.txt -c constraints.txt
    python scripts/eval_harness.py stablelm_7b --tasks arc_easy hellaswag --chat_template both
    accelerate launch scripts/eval_harness.py stablelm_7b/checkpoint-12000 --tasks mmlu --num_fewshot 5 --limit 100
    python scripts/eval_harness.py demo_output --tasks scripts/tasks/demo_world        # needs no network

A task is a name that lm_eval knows, a YAML file in its format, or a folder, of which all tasks are run; such files may
name Python functions, which are run too. With the chat template each prompt is a message of the user, few-shot examples
are earlier turns, a system message is only what the template writes by itself, and so are special tokens. Without it a
prompt is plain text. That choice can change scores more than training does: both stand in one table, beside what
Stability AI published of StableLM's base models where that has the task.

The result is CHECKPOINT/eval/harness.json: lm_eval's own dictionary under "lm_eval" (its samples as "items"), and the
first prompt of each task as text and as ids. An evaluation that was interrupted goes on where it stopped.
"""

import os

from evaluation.model import evaluation_parser, find_model, trust_option
from utils.command_line import positive
from utils.errors import UserError, one_line_errors, reason
from utils.requirements import require

MODES = {"on": ["chat"], "off": ["plain"], "both": ["chat", "plain"]}


def arguments():
    parser = evaluation_parser(__doc__, batch_size=lambda text: text if text == "auto" else positive(text))
    trust_option(parser)
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="names, YAML files, folders of them")
    parser.add_argument("--chat_template", choices=MODES, default="on", help="on unless given")
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="examples shown; else the task's own")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N documents of each task")
    parser.add_argument("--seed", type=int, metavar="N", help="of examples and sampling; else lm_eval's 0 and 1234")
    options = parser.parse_args()
    if (options.num_fewshot or 0) < 0:
        raise UserError("command line: --num_fewshot is 0 or more (--help shows how)")
    require("lm_eval", "requirements-eval.txt")
    return options, find_model(options.checkpoint, options.trust_remote_code)


if __name__ == "__main__":
    with one_line_errors():
        OPTIONS, CHECKPOINT = arguments()
    if os.environ.get("RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"  # lm_eval's progress bars, on the first process only

import difflib
import json
import logging
import re
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.api.metrics import mean
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from evaluation.chat_model import load_chat_model
from evaluation.harness import SharedModel
from evaluation.intervals import wilson
from evaluation.results import Evaluation, metric, start_processes
from utils.launch import say
from utils.schemas import Schema, read_as
from utils.tables import make_table, show_table

PUBLISHED = Path(__file__).parent / "tasks" / "stablelm_base_scores.json"
CPU_BATCH_SIZE = 8  # on a GPU lm_eval tries which one fits


class PublishedScores(Schema):
    note: str
    num_fewshot: int
    models: dict[str, dict[str, dict[str, float]]]  # {model: {task: {metric: value}}}


def main(options, checkpoint) -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about what this script does on purpose
    published = read_as(PublishedScores, PUBLISHED, "a file of published scores")
    # Before any process group exists, as data sets may have to be downloaded.
    manager, tasks = load_tasks(options.tasks)

    accelerator = start_processes()
    chat = "chat" in MODES[options.chat_template]
    model, tokenizer = load_chat_model(checkpoint, accelerator.device, options.dtype, template=chat)
    settings = {
        "tasks": {name: task.VERSION for name, task in manager.load(tasks)["tasks"].items()},
        "chat_template": options.chat_template,
        "num_fewshot": options.num_fewshot,
        "limit": options.limit,
        "seed": options.seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "lm_eval": version("lm_eval"),
    }
    evaluation = Evaluation(accelerator, checkpoint, "harness", settings, options.output)
    batch_size = options.batch_size or ("auto" if accelerator.device.type == "cuda" else CPU_BATCH_SIZE)
    lm = SharedModel(model, tokenizer, evaluation, batch_size)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    asked = {"num_fewshot": options.num_fewshot, "limit": options.limit, "task_manager": manager}
    asked |= {} if options.seed is None else dict.fromkeys(seeds, options.seed)
    if not accelerator.is_main_process:
        asked["bootstrap_iters"] = 0  # the intervals of perplexities and the like, which the first process computes

    harness, results, items, first_prompts, prompts = {}, {}, {}, {}, {}
    for mode in MODES[options.chat_template]:
        say(f"--- {mode} ---")
        lm.begin(chat=mode == "chat")
        found = simple_evaluate(lm, tasks=tasks, apply_chat_template=mode == "chat", **asked)
        first_prompts[mode], prompts[mode] = lm.first_prompts(), lm.prompts.hexdigest()
        for task, count in lm.cut.items():
            cut = f"{count:,} of {lm.requests[task]:,} requests are longer than the model's {lm.max_length:,} positions"
            evaluation.warn(f"{task} ({mode}): {cut} and lost their beginning")
        if found is None:  # lm_eval gives it to the first process
            continue
        items |= as_items(found.pop("samples"), mode)
        results |= as_results(found, mode, manager.load(tasks)["tasks"], items)
        harness[mode] = json.loads(json.dumps(found, default=handle_non_serializable))
        for task, shots in found["n-shot"].items():
            if options.num_fewshot not in (None, shots):
                evaluation.warn(f"{task} ({mode}): the task fixes its number of examples at {shots}")
    settings["prompts"] = prompts  # of all documents; compare.py says where two checkpoints were asked differently
    if accelerator.is_main_process:
        print_table(harness, results, options.limit, published)
    evaluation.write(results, first_prompts=first_prompts, lm_eval=harness, items=items)
    accelerator.end_training()


# ---- The tasks ----


def load_tasks(specs: list[str]) -> tuple[TaskManager, list]:
    """lm_eval's index of tasks, and those that were asked for, with their data.

    Raises: UserError where a task is not known, is damaged, has no data here, or is of a kind that is not run.
    """
    names, folders, all_known = [], [], False
    for spec in specs:
        path = Path(spec)
        if path.is_dir():
            found = TaskManager(include_path=path, include_defaults=False).all_subtasks
            if not found:
                raise UserError(f"--tasks {spec}: no task in the .yaml files of this folder")
            names += found
            folders.append(path)
        elif path.is_file():
            names.append(spec)
            if re.search(r"^group:", path.read_text(encoding="utf-8"), re.MULTILINE):
                folders.append(path.parent)  # where its members may be; others are lm_eval's own
                all_known = True
        elif path.suffix == ".yaml" or "/" in spec:
            raise UserError(f"--tasks {spec}: no such file or folder under {Path.cwd()}")
        else:
            names.append(spec)
            all_known = True
    if all_known:
        say("reading lm_eval's list of tasks")  # 14,000 files, some seconds
    manager = TaskManager(include_path=folders, include_defaults=all_known)
    tasks = []
    for name in dict.fromkeys(names):
        if name not in manager.task_index and not Path(name).is_file():
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks, n=4))
            hint = f"nearest: {near}" if near else "`lm_eval ls tasks` lists them, a file of yours is named by path"
            raise UserError(f"--tasks {name}: lm_eval knows no such task; {hint}")
        try:
            loaded = manager.load(name)
            tasks += list(loaded["groups"].values())[:1] or list(loaded["tasks"].values())  # a group comes first
            everything = manager.load(tasks)["tasks"]
        except Exception as error:  # of YAML, of datasets, of the hub, of the functions that a task names
            raise UserError(f"--tasks {name}: cannot be loaded: {reason(error)}") from error
    for name, task in everything.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError(f"--tasks {name}: runs code that the model writes, or has images or sound: not run here")
    return manager, tasks


# ---- What they come to ----


def label(name: str, filter_name: str) -> str:
    """A metric's name as lm_eval has it, without a filter that does nothing."""
    return name if filter_name == "none" else f"{name},{filter_name}"


def as_items(samples: dict[str, list[dict]], mode: str) -> dict[str, dict]:
    """What each document came to, keyed so that results of two checkpoints on the same document can be compared.

    Returns: {key: {"dataset": task and mode, "target", "responses", and its value of each metric}}.
    """
    items = {}
    for task, documents in samples.items():
        for sample in documents:
            key = f"{task} ({mode}) {sample['doc_id']} {sample['doc_hash'][:8]}"
            item = items.setdefault(key, {"dataset": f"{task} ({mode})", "target": sample["target"]})
            item["responses"] = sample["resps"]
            values = {name: sample[name] for name in sample["metrics"] if isinstance(sample[name], int | float)}
            item |= {label(name, sample["filter"]): value for name, value in values.items()}
    return json.loads(json.dumps(items, default=handle_non_serializable))


def as_results(found: dict, mode: str, tasks: dict, items: dict[str, dict]) -> dict[str, dict]:
    """Every metric of every task and group, with its interval: Wilson's of a share, else 1.96 times lm_eval's standard
    error on either side."""
    results = {}
    for task, name, filter_name, value, stderr in scores(found):
        better = {True: "higher", False: "lower"}.get(found["higher_is_better"].get(task, {}).get(name))
        bounds = (value - 1.96 * stderr, value + 1.96 * stderr) if stderr is not None else (None, None)
        field, dataset, count = label(name, filter_name), f"{task} ({mode})", found["results"][task].get("sample_len")
        own = [item for item in items.values() if item["dataset"] == dataset]
        more = {}
        if task in tasks and tasks[task].aggregation().get(name) is mean and all(field in item for item in own):
            more = {"ratio": [field, None], "where": {"dataset": dataset}}
            if stderr is not None and own and {item[field] for item in own} <= {0, 1}:
                bounds = wilson(sum(item[field] for item in own), len(own))
        results[f"{task}/{field} ({mode})"] = metric(value, bounds, better, count, **more)
    return results


def scores(found: dict):
    """(task or group, metric, filter, value, its standard error or None) of lm_eval's dictionary."""
    for task, values in found["results"].items():
        for key, value in values.items():
            name, comma, filter_name = key.partition(",")
            if comma and not name.endswith("_stderr") and isinstance(value, int | float):
                stderr = values.get(f"{name}_stderr,{filter_name}")
                yield task, name, filter_name, value, stderr if isinstance(stderr, int | float) else None


def print_table(
    harness: dict[str, dict], results: dict[str, dict], limit: int | None, published: PublishedScores
) -> None:
    """Each metric with and without the chat template, beside the published scores of tasks asked in the same way."""
    rows: dict[tuple, dict[str, str]] = defaultdict(dict)
    for mode, found in harness.items():
        for task, name, filter_name, value, _ in scores(found):
            row = rows[task, label(name, filter_name)]
            row["n"] = f"{found['results'][task].get('sample_len', 0):,}"
            result = results[f"{task}/{label(name, filter_name)} ({mode})"]
            ends = result["low"], result["high"]
            row[mode] = f"{value:.4f}" + ("" if None in ends else f" ({ends[0]:.4f} to {ends[1]:.4f})")
            for model, known in published.models.items():
                if found["n-shot"].get(task) == published.num_fewshot and name in known.get(task, {}):
                    row[model] = f"{known[task][name]:.4f}"
    columns = [name for name in ("n", *harness, *published.models) if any(name in row for row in rows.values())]
    table = make_table("lm-evaluation-harness", "task", "metric", *columns, names=2)
    last = None
    for (task, name), row in rows.items():
        table.add_row(task if task != last else "", name, *(row.get(column, "") for column in columns))
        last = task
    show_table(table)
    print("chat: with the chat template; plain: without; in brackets the 95 % interval")
    if len(columns) > 1 + len(harness):
        print(f"stablelm-base: {published.note}" + "; here, only the first documents" * bool(limit))


if __name__ == "__main__":
    with one_line_errors():
        main(OPTIONS, CHECKPOINT)
