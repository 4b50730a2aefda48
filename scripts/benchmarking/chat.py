"""`benchmark.py chat`: a reply of chat.py next to a bare call of transformers' `generate`, for the same prompt."""

import time
from statistics import median

from benchmarking.measuring import in_a_process
from utils.errors import UserError

REPLY_TOKENS = 64
# About as many tokens as a question, and as a conversation of some turns.
PROMPTS = {"a question": 1, "a conversation": 30}
SENTENCE = "A fish swims in the sea, a bird flies in the sky, and a horse runs in the field. Why? "


def measure_chat(checkpoint: str, rounds: int, trust_remote_code: bool = False) -> dict:
    """Seconds to the first token, and tokens a second after it, of both in turn: the medians, and of their ratios.

    A bare call gives its tokens together: its first token comes after the seconds of a call for one token.
    """
    import torch

    from chatting.conversation import Chat
    from chatting.replies import load_talker
    from chatting.settings import Settings
    from evaluation.model import find_model
    from utils.launch import set_up_process

    set_up_process()
    talker = load_talker(find_model(checkpoint, trust_remote_code), None)
    settings = Settings(temperature=0, max_new_tokens=REPLY_TOKENS, min_new_tokens=REPLY_TOKENS)
    figures = {}
    for name, sentences in PROMPTS.items():
        chat = Chat()
        chat.ask(SENTENCE * sentences)
        prompt = talker.prompt(chat, settings)
        if prompt.max_new_tokens < REPLY_TOKENS:
            raise UserError(
                f"{checkpoint}: {talker.positions} positions are too few for {name} of {len(prompt.ids)} tokens"
            )

        @torch.inference_mode()
        def bare(count: int, prompt=prompt) -> float:
            ids = torch.tensor([prompt.ids], device=talker.model.device)
            how = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}
            begun = time.perf_counter()
            talker.model.generate(ids, attention_mask=torch.ones_like(ids), **how).tolist()
            return time.perf_counter() - begun

        def chatted(chat=chat) -> tuple[float, float]:
            begun = time.perf_counter()
            replies = talker.answer(chat, talker.prompt(chat, settings), settings)
            next(replies)
            first = time.perf_counter() - begun
            for _ in replies:
                pass
            chat.retry()
            return first, time.perf_counter() - begun

        bare(2)
        chatted()
        measured = []
        for _ in range(rounds):
            bare_first, bare_all = bare(1), bare(REPLY_TOKENS)
            chat_first, chat_all = chatted()
            rates = [
                (REPLY_TOKENS - 1) / (whole - first)
                for first, whole in [(bare_first, bare_all), (chat_first, chat_all)]
            ]
            measured.append((bare_first, chat_first, chat_first / bare_first, *rates, rates[1] / rates[0]))
        medians = map(median, zip(*measured, strict=True))
        keys = ["bare_first", "chat_first", "first_ratio", "bare_rate", "chat_rate", "rate_ratio"]
        figures[name] = {"prompt_tokens": len(prompt.ids), **dict(zip(keys, medians, strict=True))}
    return figures


def benchmark_chat(checkpoint: str, rounds: int, trust_remote_code: bool = False) -> dict:
    """`measure_chat` in a process of its own.  Raises: UserError where the checkpoint cannot be talked to."""
    return in_a_process(measure_chat, checkpoint, rounds, trust_remote_code)


def chat_table(figures: dict) -> str:
    """As Markdown."""
    lines = [
        "| prompt | first token, bare | chat.py | ratio | tokens a second, bare | chat.py | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in figures.items():
        first = (
            f"{found['bare_first'] * 1000:.0f} ms | {found['chat_first'] * 1000:.0f} ms | {found['first_ratio']:.2f}"
        )
        rate = f"{found['bare_rate']:.1f} | {found['chat_rate']:.1f} | {found['rate_ratio']:.2f}"
        lines.append(f"| {name}, {found['prompt_tokens']:,} tokens | {first} | {rate} |")
    return "\n".join(lines)
