#!/usr/bin/env python3
"""Exact match of a checkpoint on GSM8K's test problems, asked in its chat format and answered greedily.

    python scripts/eval_gsm8k.py stablelm_7b/checkpoint-12000
    accelerate launch scripts/eval_gsm8k.py stablelm_7b --data gsm8k_test.jsonl.gz --limit 200
    python scripts/eval_gsm8k.py stablelm_7b --few_shot 5 --examples gsm8k_train.jsonl

The problems are question and answer in JSON Lines, a JSON array or parquet, gzipped or not: --data FILE, else
gsm8k_test in the recipe's cache_dir, else openai/gsm8k on the hub. An answer is right when its final number has the
value of the reference's (scripts/metrics/final_number says which number that is). Interval: Wilson's, 95 %.

Where the recipe beside the checkpoint shows that it was trained on these problems, as the Open-Assistant mix was, a
warning says so, here and in the result, and the score on the others stands beside it. The result is
CHECKPOINT/eval/gsm8k.json with every reply; an evaluation that was interrupted goes on where it stopped.
"""

from evaluation.model import evaluation_parser, find_model, trust_option
from recipe.load import load_recipe
from utils.command_line import positive
from utils.errors import UserError, one_line_errors
from utils.requirements import require


def arguments():
    """The options, the checkpoint, and the recipe beside it or None."""
    parser = evaluation_parser(__doc__)
    trust_option(parser)
    parser.add_argument("--data", metavar="FILE", help="the problems")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N problems")
    parser.add_argument("--max_new_tokens", type=positive, default=512, metavar="N", help="of a reply (512)")
    parser.add_argument("--few_shot", type=positive, metavar="N", help="solved problems shown first, as earlier turns")
    parser.add_argument("--examples", metavar="FILE", help="where these come from, in the form of the problems")
    options = parser.parse_args()
    if (options.few_shot is None) != (options.examples is None):
        raise UserError("command line: --few_shot N and --examples FILE go together")
    require("evaluate")
    checkpoint = find_model(options.checkpoint, options.trust_remote_code)
    return options, checkpoint, load_recipe(checkpoint.recipe_file) if checkpoint.recipe_file else None


if __name__ == "__main__":
    with one_line_errors():
        OPTIONS, CHECKPOINT, RECIPE = arguments()

import time
from pathlib import Path

import evaluate

from data.files import find_data_file, source_files
from data.mix import prepare_mix
from data.records import read_records
from evaluation.chat_model import load_chat_model
from evaluation.generation import encode_chat, generate, room_for_reply
from evaluation.intervals import wilson
from evaluation.results import Evaluation, digest, load_metric, metric, start_processes
from recipe.keys import Recipe
from sources.source import Record
from training.contamination import BENCHMARKS, contaminated_rows, without_contamination
from training.model import load_tokenizer
from utils.launch import process_index, say
from utils.tables import counted, make_table, progress_bar, show_table

BATCH_SIZE = 32
# grade_school_math_instructions holds GSM8K's test problems with its training problems: 8,792 rows = 7,473 + 1,319.
WITH_TEST_PROBLEMS = "grade_school_math_instructions"


def main(options, checkpoint, recipe: Recipe | None) -> None:
    final_number = load_metric("final_number")
    cache_dir = recipe.cache_dir if recipe else Path(".cache")
    files = find_data_file("gsm8k_test", options.data, cache_dir, None, BENCHMARKS["gsm8k_test"][0])
    problems = read_problems(files, final_number)[: options.limit]
    examples = read_problems([Path(options.examples)], final_number)[: options.few_shot] if options.examples else []
    if shown := {example["question"] for example in examples} & {problem["question"] for problem in problems}:
        raise UserError(f"{options.examples}: holds a problem that is asked: {shown.pop()[:80]}")
    # Before any process group exists, as it may take longer than a collective waits.
    contamination = find_contamination(recipe, checkpoint, problems) if process_index() == 0 else {}

    accelerator = start_processes()
    model, tokenizer = load_chat_model(checkpoint, accelerator.device, options.dtype)
    # One item for each problem, named so that results of two checkpoints on the same problem can be compared.
    earlier = [turn for example in examples for turn in as_turns(example)]
    prompts = {
        f"{number} {digest([problem])}": encode_chat(tokenizer, [*earlier, as_turns(problem)[0]])
        for number, problem in enumerate(problems)
    }
    max_new_tokens = room_for_reply(model, [*prompts.values()], options.max_new_tokens)
    settings = {
        "problems": len(problems),
        "data": digest(problems),
        "few_shot": len(examples),
        "examples": digest(examples) if examples else None,
        "max_new_tokens": max_new_tokens,
        "final_number": final_number.version,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    evaluation = Evaluation(accelerator, checkpoint, "gsm8k", settings, options.output)
    if contamination.get("contaminated"):
        evaluation.warn(contamination["verdict"])
    else:
        say(f"contamination: {contamination.get('verdict')}")
    if max_new_tokens < options.max_new_tokens:
        evaluation.warn(f"replies of up to {max_new_tokens} tokens: more have no room in the model's positions")

    mine = evaluation.share(sorted(prompts, key=lambda key: -len(prompts[key])))
    started, tokens = time.perf_counter(), 0
    quiet = not accelerator.is_main_process
    with progress_bar(total=len(mine), desc="solving", unit="problem", disable=quiet) as progress:
        asked, most = [prompts[key] for key in mine], {"max_new_tokens": max_new_tokens}
        for place, reply in generate(model, tokenizer, asked, most, options.batch_size or BATCH_SIZE):
            tokens += reply.tokens
            evaluation.add(mine[place], {"reply": reply.text, "tokens": reply.tokens, "ended": reply.ended})
            progress.update()
    speed = {"new_tokens": tokens, "seconds": round(time.perf_counter() - started, 1)}  # of this process

    written = evaluation.gather()
    items = {key: {**problem, **written[key]} for key, problem in zip(prompts, problems, strict=True)}
    replies, answers = ([item[field] for item in items.values()] for field in ("reply", "answer"))
    scores = final_number.compute(predictions=replies, references=answers)
    in_training = contamination.get("problems") or []
    for place, item in enumerate(items.values()):
        item |= {"number": scores["numbers"][place], "correct": scores["correct"][place]}
        item |= {"no_number": item["number"] is None, "in_training": place in in_training}
    results = summarize(list(items.values()))
    if accelerator.is_main_process:
        print_table(results)
    evaluation.write(results, contamination=contamination, generation=speed, items=items)
    accelerator.end_training()


# ---- The problems ----


def read_problems(paths: list[Path], final_number: evaluate.Metric) -> list[dict[str, str]]:
    """Problems as {"question", "answer"}.

    Raises: UserError where a file is damaged, lacks a field, or has an answer without a number.
    """
    problems = []
    for path in paths:
        for number, values in read_records(path):
            record = Record(values, path, number, len(problems) + 1)
            problems.append({"question": record.get("question"), "answer": record.get("answer")})
            if not problems[-1]["question"].strip():
                raise record.error("field 'question' is blank")
    answers = [problem["answer"] for problem in problems]
    for number, found in enumerate(final_number.compute(predictions=answers, references=answers)["numbers"], 1):
        if found is None:
            raise UserError(f"{', '.join(map(str, paths))}: the answer of problem {number} has no final number")
    return problems


def as_turns(problem: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": problem["question"]}, {"role": "assistant", "content": problem["answer"]}]


def find_contamination(recipe: Recipe | None, checkpoint, problems: list[dict[str, str]]) -> dict:
    """Whether the training mix holds the problems, by looking at its text, or where that is not here by its name.

    Returns: contaminated: True, False or None (not known); verdict: in words; problems: the places of those that are in
        training, None where only the name was looked at.
    """
    if recipe is None:
        verdict = "no recipe beside the checkpoint, so it is not known whether it was trained on these problems"
        return {"contaminated": None, "verdict": verdict, "problems": None}
    try:
        for name in recipe.datasets.chosen():
            if not source_files(name, recipe, download=False):
                raise UserError(f"{name} is not on this machine")
        say("looking for these problems in the training mix")
        own = {"model_name": checkpoint.name, "trust_remote_code": checkpoint.trust_remote_code}
        mix = prepare_mix(recipe, load_tokenizer(recipe.model_copy(update=own)))
        mix = without_contamination(mix, recipe)
        found = contaminated_rows(mix.train, [problem["question"] for problem in problems])
    except UserError as error:
        suspect = WITH_TEST_PROBLEMS in recipe.datasets.chosen() and not recipe.drop_contaminated
        verdict = "not known whether the training mix holds these problems"
        if suspect:
            published = f"{WITH_TEST_PROBLEMS}, whose published file holds GSM8K's test problems"
            verdict = f"the checkpoint was trained on {published}"
        return {"contaminated": suspect or None, "verdict": f"{verdict} (could not look: {error})", "problems": None}
    places = sorted(set(found.others.tolist()))
    verdict = "no conversation of the training mix holds one of these problems"
    if places:
        held = f"{len(places):,} of these {len(problems):,} problems, in {counted(len(found), 'conversation')}"
        verdict = f"the training mix holds {held}: on them the score shows memory, not skill"
    return {"contaminated": bool(places), "verdict": verdict, "problems": places}


# ---- What they come to ----


def summarize(items: list[dict]) -> dict[str, dict]:
    """Exact match, that of the problems that are not in training where some are; and what the replies are like."""
    parts = {"exact_match": ("correct", "higher", {})}
    if 0 < sum(item["in_training"] for item in items) < len(items):
        parts["exact_match/not in training"] = ("correct", "higher", {"in_training": False})
    parts |= {"no_number": ("no_number", "lower", {}), "ended": ("ended", "higher", {})}
    results = {}
    for name, (field, better, where) in parts.items():
        chosen = [item[field] for item in items if where.items() <= item.items()]
        share, bounds = sum(chosen) / len(chosen), wilson(sum(chosen), len(chosen))
        results[name] = metric(share, bounds, better, len(chosen), ratio=[field, None], where=where)
    return results


def print_table(results: dict[str, dict]) -> None:
    says = {"no_number": "replies without a number", "ended": "replies that ended by themselves"}
    table = make_table("GSM8K", "", "problems", "share", "95 %")
    for name, result in results.items():
        bounds = f"{result['low']:.2%} to {result['high']:.2%}"
        table.add_row(says.get(name, name), f"{result['n']:,}", f"{result['value']:.2%}", bounds)
    show_table(table)


if __name__ == "__main__":
    with one_line_errors():
        main(OPTIONS, CHECKPOINT, RECIPE)
