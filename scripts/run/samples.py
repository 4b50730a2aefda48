"""Greedy replies to a few prompts while a run trains and at its end: on the screen, and in samples.jsonl."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel

from data.dialogue import ASSISTANT, encode
from data.prompts import read_prompts
from recipe.keys import Recipe
from run.lines import append_lines
from run.progress import Progress
from sources.source import Conversation, Message
from training.engine import Engine
from training.replies import Reply, reply_to
from utils.errors import UserError
from utils.launch import say

SAMPLES = "samples.jsonl"  # in output_dir
LONGEST_REPLY = 256  # tokens
MANY = 100  # prompts: a 7B makes the replies to as many in minutes


class Prompt(NamedTuple):
    """A conversation that the model is to reply to, and its token ids with `<|assistant|>` last."""

    messages: list[dict[str, str]]
    ids: list[int]


def room_for_reply(recipe: Recipe) -> int:
    """Tokens of a reply at most, so that a prompt of the same length fits beside it into max_length."""
    return min(LONGEST_REPLY, recipe.max_length // 2)


def check_prompts(recipe: Recipe) -> list[list[dict[str, str]]]:
    """The conversations of sample_prompts; none without sample_every.

    Raises: UserError where one key is given without the other, or the file holds no prompts.
    """
    if bool(recipe.sample_every) != bool(recipe.sample_prompts):
        given, missing = ("sample_every", "sample_prompts")[:: 1 if recipe.sample_every else -1]
        raise UserError(f"{given} does nothing without {missing}: give both, or none")
    try:
        return read_prompts(Path(recipe.sample_prompts)) if recipe.sample_prompts else []
    except UserError as problem:
        raise UserError(f"sample_prompts: {problem}") from None


def load_prompts(recipe: Recipe, tokenizer) -> list[Prompt]:
    """The prompts of a run as its model reads them.

    Raises: UserError as `check_prompts`, or for a prompt that leaves no room for its reply within max_length.
    """
    chats, room = check_prompts(recipe), recipe.max_length - room_for_reply(recipe)
    conversations = [Conversation([Message(turn["role"], turn["content"]) for turn in chat]) for chat in chats]
    assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
    prompts = []
    for number, (chat, (ids, _)) in enumerate(zip(chats, encode(tokenizer, conversations), strict=True), 1):
        if len(ids) + 1 > room:
            raise UserError(
                f"sample_prompts = {recipe.sample_prompts}: prompt {number} has {len(ids) + 1:,} tokens: max_length = "
                f"{recipe.max_length} leaves {room:,} beside a reply: shorten it"
            )
        prompts.append(Prompt(chat, [*ids.tolist(), assistant]))
    return prompts


# ---- Generating ----


@torch.no_grad()  # not inference_mode: what a layer keeps of a forward pass has to be of use in training
def greedy_replies(
    model: PreTrainedModel, tokenizer, prompts: list[list[int]], room: int, batch_size: int, together: bool = False
) -> list[Reply]:
    """The likeliest reply to each prompt, by transformers' `generate`; no random number is drawn.

    Args:
        prompts: token ids, of which `<|assistant|>` is the last.
        room: tokens of a reply at most.
        together: every process calls this with the same prompts, and all make the same number of forward passes: until
            each has every reply of a batch, which they tell each other after each token. So a forward pass may be
            collective, as it is where the weights are shared among the processes (ZeRO-3, FSDP2).
    """
    ends = model.generation_config.eos_token_id
    ends = sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})
    config = GenerationConfig(
        max_new_tokens=room, do_sample=False, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    with _generating(model, config):
        replies = [reply_to(model, tokenizer, batch, config, synced_gpus=together) for batch in batches]
    return [reply for batch in replies for reply in batch]


@contextmanager
def _generating(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Around the replies of a model that is being trained: without dropout, layers not compiled (each length would be
    compiled anew), by an attention that knows padding, and with no default of its own for a reply."""
    was_training, attention, own = model.training, model.config._attn_implementation, model.generation_config
    model.eval()
    model.generation_config = config
    switched = attention not in ("sdpa", "eager")  # training/attention.py's make no mask; flash-attn takes no fp32
    if switched:
        model.set_attn_implementation("sdpa")
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        if switched:
            model.set_attn_implementation(attention)
        model.generation_config = own
        model.train(was_training)


# ---- What a run keeps of it ----


class Samples:
    """The replies of a run to the prompts of sample_prompts."""

    def __init__(self, recipe: Recipe, tokenizer):
        """Raises: UserError as `load_prompts`."""
        self.recipe, self.tokenizer = recipe, tokenizer
        self.path = recipe.output_dir / SAMPLES
        self.prompts = load_prompts(recipe, tokenizer)
        if len(self.prompts) > MANY:
            count = f"{len(self.prompts):,} prompts, to all of which the model replies each time"
            say(f"warning: sample_prompts = {recipe.sample_prompts}: {count}: give fewer")
        self.passes = 0  # of the model, forward

    def due(self, progress: Progress) -> bool:
        """Whether the evaluation just made is the first since a multiple of sample_every, or the run's last."""
        every, evaluations = self.recipe.sample_every, self.recipe.eval_steps
        if not every:
            return False
        before = (progress.step - 1) // evaluations * evaluations  # the evaluation before this one
        return progress.step // every > before // every or not progress.steps_left

    def take(self, engine: Engine) -> list[Reply]:
        """The model's replies as it is now, each prompt's own. Every process calls this.

        Raises: UserError where the memory is too small.
        """
        return self._replies(engine, [prompt.ids for prompt in self.prompts], room_for_reply(self.recipe))

    def rehearse(self, engine: Engine) -> None:
        """Take the memory of the largest batch of replies at its fullest, in one forward pass: over prompts that are as
        long as with all of a reply but its last token. Every process calls this.

        Raises: UserError where the memory is too small.
        """
        if not self.prompts:
            return
        size, more = self.recipe.per_device_eval_batch_size, room_for_reply(self.recipe) - 1
        ids = [[*prompt.ids, *prompt.ids[-1:] * more] for prompt in self.prompts]
        batches = [ids[start : start + size] for start in range(0, len(ids), size)]
        largest = max(batches, key=lambda batch: len(batch) * max(map(len, batch)))
        self._replies(engine, largest, room=1)

    def _replies(self, engine: Engine, prompts: list[list[int]], room: int) -> list[Reply]:
        size, together = self.recipe.per_device_eval_batch_size, engine.accelerator.num_processes > 1
        try:
            with engine.outside_of_the_loss(), self._counted(engine.language_model):
                return greedy_replies(engine.language_model, self.tokenizer, prompts, room, size, together)
        except torch.OutOfMemoryError as error:
            remedy = "give a smaller per_device_eval_batch_size, or fewer or shorter prompts"
            raise UserError(f"the GPU's memory is too small for the replies to sample_prompts: {remedy}") from error

    @contextmanager
    def _counted(self, model: PreTrainedModel) -> Iterator[None]:
        def count(*_) -> None:
            self.passes += 1

        handle = model.register_forward_pre_hook(count)
        try:
            yield
        finally:
            handle.remove()

    def write(self, step: int, replies: list[Reply]) -> None:
        """Add a line for each reply to samples.jsonl.  Raises: UserError where the disk is full."""
        lines = [
            {"step": step, "prompt": number, "messages": prompt.messages, "reply": reply.text}
            | {"tokens": reply.tokens, "ended": reply.ended}
            for number, (prompt, reply) in enumerate(zip(self.prompts, replies, strict=True), 1)
        ]
        append_lines(self.path, [json.dumps(line, ensure_ascii=False) for line in lines])

    def table(self, step: int, replies: list[Reply]) -> list[list]:
        """Rows for a tracker: step, prompt, reply, and whether that ended by itself."""
        pairs = zip(self.prompts, replies, strict=True)
        return [[step, prompt.messages[-1]["content"], reply.text, reply.ended] for prompt, reply in pairs]
