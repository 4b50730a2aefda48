#!/usr/bin/env python3
"""What a checkpoint replies to a list of prompts under several sampling settings; a page to read and vote on reports.

    python scripts/sampling_report.py stablelm_7b/checkpoint-12000
    accelerate launch scripts/sampling_report.py stablelm_7b --prompts my_prompts.txt --config my_settings.json
    python scripts/sampling_report.py stablelm_7b --html page.html other_report.json      # a page of both reports
    python scripts/sampling_report.py --html page.html a.json b.json c.json               # only the page

The report is CHECKPOINT/eval/sampling_report.json, in the format of Open-Assistant's (its model_eval/manual), so that
the reports which it published can stand beside one's own. A reply that the model ended has the end token at its end.
The page is one file, and needs no network.

--prompts: a .txt file has one prompt a line. JSON Lines or a JSON list has texts, and for prompts of several turns
{"messages": [{"role", "content"}, ...]}, or another form of chat data. scripts/sampling/prompts.jsonl is the
collection's own, in eight languages.
--config: a file of sampling settings, as Open-Assistant's without prefix texts and beams. scripts/sampling/ has
default.json, greedy.json, and open_assistant.json, the settings of its published reports, with the top_k of 50 that
transformers added to them unasked. Here, what a file does not name is off.

Greedy settings give one reply to a prompt, others --num_samples. A sample depends on --seed, the name of its settings,
its prompt and its number, not on the batch size or the processes. An interrupted report goes on where it stopped.
"""

import sys
from pathlib import Path

from data.prompts import read_prompts
from evaluation.model import evaluation_parser, find_model, trust_option
from evaluation.report_files import SamplingReport, read_configs, read_report
from evaluation.report_page import check_can_write, write_page
from utils.command_line import positive
from utils.errors import UserError, one_line_errors

SHIPPED = Path(__file__).parent / "sampling"


def arguments():
    parser = evaluation_parser(__doc__)
    trust_option(parser)
    parser.add_argument("--prompts", metavar="FILE", default=str(SHIPPED / "prompts.jsonl"), help="what is asked")
    parser.add_argument("--config", metavar="FILE", default=str(SHIPPED / "default.json"), help="sampling settings")
    parser.add_argument("--num_samples", type=positive, default=2, metavar="N", help="of each prompt and setting (2)")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="of the samples (42)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N prompts")
    page_help = "write a page of these and the new report"
    parser.add_argument("--html", nargs="+", metavar=("FILE", "REPORT"), help=page_help)
    no_checkpoint = [""] if sys.argv[1:2] == ["--html"] else []  # a page of reports that exist
    return parser.parse_args([*no_checkpoint, *sys.argv[1:]])


if __name__ == "__main__":
    with one_line_errors():
        OPTIONS = arguments()
        PAGE, *FILES = OPTIONS.html or [None]
        REPORTS = [read_report(Path(file)) for file in FILES]
        if PAGE:
            check_can_write(Path(PAGE), FILES)
        if not OPTIONS.checkpoint:
            if not REPORTS:
                raise UserError(f"command line: --html {PAGE}: give reports after it, or a CHECKPOINT before it")
            write_page(Path(PAGE), REPORTS)
            sys.exit()
        CHECKPOINT = find_model(OPTIONS.checkpoint, OPTIONS.trust_remote_code)
        PROMPTS = read_prompts(Path(OPTIONS.prompts))[: OPTIONS.limit]
        CONFIGS = read_configs(Path(OPTIONS.config))

from collections import defaultdict
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

from data.dialogue import CHAT_TEMPLATE
from evaluation.chat_model import load_chat_model
from evaluation.generation import WARPERS, encode_chat, generate, room_for_reply
from evaluation.results import Evaluation, device_name, digest, start_processes, versions
from utils.launch import say
from utils.tables import make_table, progress_bar, show_table

BATCH_SIZE = 16


def main(options, checkpoint, prompts: list[list[dict]], configs: dict[str, dict], page, reports) -> None:
    accelerator = start_processes()
    model, tokenizer = load_chat_model(checkpoint, accelerator.device, options.dtype)
    settings = {config: as_settings(params) for config, params in configs.items()}
    for config, chosen in settings.items():
        try:
            list(generate(model, tokenizer, [], chosen, 1))  # checked now, not when those before it are done
        except UserError as error:
            raise UserError(f"{options.config}: {config}: {error}") from None
    ids = [encode_chat(tokenizer, messages) for messages in prompts]
    fitted = {config: room_for_reply(model, ids, chosen["max_new_tokens"]) for config, chosen in settings.items()}
    shorter = {config: most for config, most in fitted.items() if most < settings[config]["max_new_tokens"]}
    for config, most in shorter.items():
        least = min(most, settings[config].get("min_new_tokens", 0))
        settings[config] |= {"max_new_tokens": most, "min_new_tokens": least}
    if shorter:  # all to the same: what the positions leave beside the longest prompt
        names, most = ", ".join(shorter), min(shorter.values())
        say(f"replies of up to {most} tokens ({names}): more have no room in the model's positions")
    depends_on = {
        "prompts": digest(prompts, 7),
        "settings": settings,
        "num_samples": options.num_samples,
        "seed": options.seed,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    evaluation = Evaluation(accelerator, checkpoint, "sampling_report", depends_on, options.output)

    # One item for each reply: the name of its settings, the place of its prompt, the number of the sample.
    items = {
        f"{config} {place} {number}": (config, place, number)
        for config, chosen in settings.items()
        for place in range(len(prompts))
        for number in range(options.num_samples if chosen.get("do_sample") else 1)
    }
    shares = {}
    for config in settings:
        keys = [key for key, item in items.items() if item[0] == config]
        shares[config] = evaluation.share(sorted(keys, key=lambda key: -len(ids[items[key][1]])))
    total = sum(map(len, shares.values()))
    with progress_bar(total=total, desc="sampling", unit="reply", disable=not accelerator.is_main_process) as progress:
        for config, mine in shares.items():
            asked = [ids[items[key][1]] for key in mine]
            chances = [[options.seed, config, prompts[items[key][1]], items[key][2]] for key in mine]
            seeds = [int(digest(value, 7), 16) for value in chances]  # 56 bits: a seed may have 63
            batch_size = options.batch_size or BATCH_SIZE
            for place, reply in generate(model, tokenizer, asked, settings[config], batch_size, seeds):
                evaluation.add(mine[place], asdict(reply))
                progress.update()

    replies = evaluation.gather()
    outputs = defaultdict(list)
    for key, (config, place, _) in items.items():
        outputs[config, place].append(replies[key]["text"] + tokenizer.eos_token * replies[key]["ended"])
    answered = []
    for place, messages in enumerate(prompts):
        results = [
            {"sampling_config": config, "sampling_params": params, "outputs": outputs[config, place]}
            for config, params in configs.items()
        ]
        answered.append({"prompt": as_text(messages), "results": results})
    report = {
        "model_name": checkpoint.name,
        "date": datetime.now(UTC).replace(tzinfo=None).isoformat(),
        "args": report_arguments(options, evaluation, model, tokenizer),
        "prompts": answered,
    }
    if accelerator.is_main_process:
        print_table({config: [replies[key] for key in items if items[key][0] == config] for config in configs})
    evaluation.write_file(report)
    if page and accelerator.is_main_process:
        write_page(Path(page), [*reports, SamplingReport(**report)])
    accelerator.end_training()


def as_settings(params: dict[str, Any]) -> dict[str, Any]:
    """A report's sampling_params as `generate` takes them.

    num_beams 1 is no beam search; a temperature of 0 is greedy; a temperature and the like do nothing to a greedy
    reply, in transformers too.
    """
    greedy = not params.get("do_sample") or params.get("temperature") == 0
    off = (*WARPERS, "do_sample") if greedy else ()
    return {name: value for name, value in params.items() if (name, value) != ("num_beams", 1) and name not in off}


def as_text(messages: list[dict]) -> str:
    """What stands in the report for a prompt, where only a text can stand."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def report_arguments(options, evaluation: Evaluation, model, tokenizer) -> dict[str, Any]:
    """`args` of the report: those of Open-Assistant's script, with what they come to here, and some more."""
    accelerator = evaluation.accelerator
    return {
        "device": accelerator.device.type,
        "device_index": accelerator.device.index or 0,
        "model_name": options.checkpoint,
        "mode": "v2_5" if tokenizer.chat_template == CHAT_TEMPLATE else "chat_template",  # its name of our format
        "prompts": options.prompts,
        "report": options.output,
        "seed": options.seed,
        "verbose": False,
        "n": options.limit,
        "num_samples": options.num_samples,
        "config": options.config,
        "half": model.dtype == torch.float16,
        "skip_special_tokens": False,
        "model_type": "CausalLM",
        "max_input_len": None,
        "num_threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device_name": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "fingerprint": evaluation.fingerprint,
        "versions": versions(),
    }


def print_table(replies: dict[str, list[dict]]) -> None:
    table = make_table("Sampling report", "settings", "replies", "tokens (mean)", "ended by the model")
    for config, chosen in replies.items():
        tokens, ended = (sum(reply[field] for reply in chosen) / len(chosen) for field in ("tokens", "ended"))
        table.add_row(config, f"{len(chosen):,}", f"{tokens:.1f}", f"{ended:.1%}")
    show_table(table)


if __name__ == "__main__":
    with one_line_errors():
        main(OPTIONS, CHECKPOINT, PROMPTS, CONFIGS, PAGE, REPORTS)
