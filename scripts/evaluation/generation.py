"""Replies of a chat model to many prompts: batches of similar lengths, greedy or sampled.

In fp32 the replies do not depend on the batch size, the order of the prompts or the number of processes: padding is on
the left and masked, positions count real tokens, and each sampled reply draws from a random stream of its own.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from jinja2 import TemplateError
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from data.dialogue import ASSISTANT, CHAT_TEMPLATE, encode
from data.text_encoder import text_encoder
from sources.source import Conversation, Message
from training.replies import Reply, reply_to
from utils.errors import UserError

# Sampling settings by their names in transformers, applied in its order. None has a default: transformers' own top_k
# of 50 is not applied unless it is given.
WARPERS = {
    "temperature": transformers.TemperatureLogitsWarper,
    "top_k": transformers.TopKLogitsWarper,
    "top_p": transformers.TopPLogitsWarper,
    "min_p": transformers.MinPLogitsWarper,
    "typical_p": transformers.TypicalLogitsWarper,
    "epsilon_cutoff": transformers.EpsilonLogitsWarper,
}
# Those that also a greedy reply may have; transformers applies them.
OTHER_SETTINGS = ("min_new_tokens", "repetition_penalty", "no_repeat_ngram_size")


def encode_chat(tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation, [{"role", "content"}], up to where the model's reply begins.

    The contents are plain text, as in this collection's training: a control token written out in a message stays text.
    Other templates are applied as transformers does it, which would make a control token of it.

    Raises: UserError where the template refuses the conversation.
    """
    if tokenizer.chat_template != CHAT_TEMPLATE:
        try:
            controls = control_tokens(tokenizer)
            if any(token in message["content"] for token in controls for message in messages):
                return _encode_in_parts(tokenizer, messages, controls)
            return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        except TemplateError as error:  # some refuse a system message, or a reply that comes first
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"the model's chat template refuses a conversation of {roles}: {error}") from error
    conversation = Conversation([Message(message["role"], message["content"]) for message in messages])
    ((ids, _),) = encode(tokenizer, [conversation])
    return [*ids.tolist(), tokenizer.convert_tokens_to_ids(ASSISTANT)]


def control_tokens(tokenizer) -> dict[str, Any]:
    """The tokens that are no text, by what is written for them, as `AddedToken`s with their rules for blanks.

    The special ones, and of the others that were added to the vocabulary those that the chat template writes: some
    models' `<|im_start|>` is not marked as special.
    """
    added = tokenizer.added_tokens_decoder.values()
    return {token.content: token for token in added if token.special or token.content in str(tokenizer.chat_template)}


def _encode_in_parts(tokenizer, messages: list[dict[str, str]], controls: dict[str, Any]) -> list[int]:
    """As `apply_chat_template`, but what is written in a message is text: the template's control tokens apart.

    A mark is put into those of the messages, so that in what the template writes only its own are whole.
    """
    written = "".join(message["content"] for message in messages)
    mark = next(mark for mark in map(chr, range(0xE000, 0xF8FF)) if mark not in written)  # no letter has these codes
    found = re.compile("|".join(map(re.escape, sorted(controls, key=len, reverse=True))))

    def marked(text: str) -> str:
        while found.search(text):
            text = found.sub(lambda token: f"{token[0][0]}{mark}{token[0][1:]}", text)
        return text

    messages = [message | {"content": marked(message["content"])} for message in messages]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    own = [match[0] for match in found.finditer(text)]
    parts = found.split(text)
    for place, token in enumerate(own):  # Phi-3's take the blanks and newlines beside them along
        if controls[token].lstrip:
            parts[place] = parts[place].rstrip()
        if controls[token].rstrip:
            parts[place + 1] = parts[place + 1].lstrip()
    encode_texts, numbers = text_encoder(tokenizer), {*tokenizer.convert_tokens_to_ids([*controls])}
    ids = []
    for place, part in enumerate(parts):
        (encoded,) = encode_texts([part.replace(mark, "")])
        if not numbers.isdisjoint(encoded.tolist()):  # of one that is not marked as special: cut within it
            encoded = [number for piece in encode_texts(part.split(mark)) for number in piece.tolist()]
        ids += map(int, encoded)
        ids += tokenizer.convert_tokens_to_ids(own[place : place + 1])
    return ids


def room_for_reply(model: PreTrainedModel, prompts: list[list[int]], wanted: int) -> int:
    """Tokens that each reply can have: as wanted, or what the model's positions leave beside the longest prompt.

    All prompts together decide, not those of a batch or a process, so that a reply does not depend on these.
    Raises: UserError when the longest prompt leaves no room.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if positions and longest >= positions:
        raise UserError(
            f"a prompt of {longest:,} tokens leaves no room for a reply in the model's {positions:,} positions"
        )
    return min(wanted, positions - longest) if positions else wanted


def generate(
    model: PreTrainedModel,
    tokenizer,
    prompts: list[list[int]],
    settings: dict[str, Any],
    batch_size: int,
    seeds: list[int] | None = None,
    streamer: BaseStreamer | None = None,
) -> Iterator[tuple[int, Reply]]:
    """Reply to each prompt, the longest first, so that memory runs out at once; then the batch is halved.

    Args:
        model, tokenizer: as `load_chat_model` returns them.
        prompts: token ids, as `encode_chat` returns them.
        settings: max_new_tokens; `do_sample: true` with any of WARPERS; any of OTHER_SETTINGS.
        seeds: one for each prompt, of its random stream; needed when sampling.
        streamer: of transformers, is given the tokens of a single prompt's reply as they come.

    Yields: (place in `prompts`, reply), batch by batch.
    Raises: UserError for a setting that does not exist or has an impossible value, a prompt that leaves no room for
        max_new_tokens in the model's positions, or no memory for a single prompt.
    """
    config, warpers = _read_settings(settings, model.generation_config)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    if positions and order and len(prompts[order[0]]) + config.max_new_tokens > positions:
        together = f"a prompt of {len(prompts[order[0]]):,} tokens and max_new_tokens = {config.max_new_tokens:,}"
        raise UserError(f"{together} are over the model's {positions:,} positions")
    while order:
        batch = order[:batch_size]
        streams = [seeds[place] for place in batch] if settings.get("do_sample") else None
        asked, replies = [prompts[place] for place in batch], None
        try:
            replies = _generate_batch(model, tokenizer, asked, config, warpers, streams, streamer)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        if replies is None:  # here, where the error no longer holds on to the batch's tensors
            clear_device_cache(garbage_collection=True)
            if len(batch) == 1:
                raise UserError(f"not enough memory for one prompt of {len(prompts[batch[0]]):,} tokens")
            batch_size = len(batch) // 2
            continue
        yield from zip(batch, replies, strict=True)
        order = order[len(batch) :]


def _read_settings(settings: dict[str, Any], ends: GenerationConfig) -> tuple[GenerationConfig, list[LogitsProcessor]]:
    known = ("max_new_tokens", "do_sample", *OTHER_SETTINGS, *WARPERS)
    if unknown := sorted(settings.keys() - set(known)):
        raise UserError(f"unknown sampling setting {unknown[0]} (known: {', '.join(known)})")
    if not isinstance(settings.get("max_new_tokens"), int) or settings["max_new_tokens"] < 1:
        raise UserError(f"max_new_tokens = {settings.get('max_new_tokens')}: give a whole number of at least 1")
    warpers = {name: settings[name] for name in WARPERS if name in settings}
    if warpers and not settings.get("do_sample"):
        raise UserError(f"{', '.join(warpers)}: only with do_sample: true; without it the reply is greedy")
    chosen = {name: settings[name] for name in ("max_new_tokens", *OTHER_SETTINGS) if name in settings}
    chosen |= {"eos_token_id": ends.eos_token_id, "pad_token_id": ends.pad_token_id}
    try:
        # Sampling is `OwnStreams`, which finds the likeliest after adding noise.
        config = GenerationConfig(**chosen, do_sample=False)
        return config, [WARPERS[name](value) for name, value in warpers.items()]
    except (ValueError, TypeError) as error:
        raise UserError(f"sampling settings: {' '.join(str(error).split())}") from error


@torch.inference_mode()
def _generate_batch(model, tokenizer, prompts, config, warpers, seeds, streamer) -> list[Reply]:
    processors = LogitsProcessorList(warpers + ([OwnStreams(seeds, model.device)] if seeds is not None else []))
    return reply_to(model, tokenizer, prompts, config, logits_processor=processors, streamer=streamer)


class OwnStreams(LogitsProcessor):
    """Makes the likeliest token a sample from the distribution, each row from a random stream of its own.

    The Gumbel-max trick: argmax(logits + Gumbel noise) is distributed as softmax(logits).
    """

    def __init__(self, seeds: list[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.clamp_(min=1e-30).log()  # a 0 would make NaN of a token that a warper has ruled out
