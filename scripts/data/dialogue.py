r"""The dialogue format: chat tokens, chat template, and conversations to token ids with the scored positions.

    <|system|>{text}<|endoftext|><|prompter|>{text}<|endoftext|><|assistant|>{text}<|endoftext|>...

The end of a turn is the tokenizer's eos token, `<|endoftext|>` for GPT-NeoX. With system tags, each prompter message is
followed by what is known of the reply to it: `<|system|>lang: en\nquality: 0.7\n<|endoftext|>`.

Facts from Open-Assistant's model_training (custom_datasets/formatting.py, dialogue_collator.py), April 2023. One thing
differs on purpose: control tokens are only ever ours. There, a literal `<|endoftext|>` in a user's text became the
control token; here it is spelled out in ordinary tokens, in training as in evaluation and chat.
"""

import itertools
import random
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from data.text_encoder import TextEncoder, text_encoder
from sources.source import Conversation, Message
from utils.errors import UserError

# In this order, which fixes their ids: 50277 to 50281 after GPT-NeoX-20B's 50,277 tokens. (The original added them in
# the order of a Python set, so its ids changed from run to run.)
CHAT_TOKENS = ("<|prompter|>", "<|assistant|>", "<|system|>", "<|prefix_begin|>", "<|prefix_end|>")
PROMPTER, ASSISTANT, SYSTEM = CHAT_TOKENS[:3]
ROLE_TOKENS = {"user": PROMPTER, "assistant": ASSISTANT, "system": SYSTEM}

# {% generation %} marks what the model writes, for return_assistant_tokens_mask. (transformers 5.23 loses that mask
# from a reply on that starts with a blank, as GPT-NeoX's offsets leave blanks out; `encode` does not use it.)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|prompter|>' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'system' and loop.first %}{{ '<|system|>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('roles are user and assistant, and system for the first message only; message '"
    " + loop.index|string + ' is ' + message['role']|string) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# ---- Tokenizer ----


def prepare_tokenizer(tokenizer: Any) -> Any:
    """Make a fast tokenizer speak the dialogue format: chat tokens, pad token and chat template, changed in place.

    Chat tokens that it has keep their ids, the missing ones are added in the order of CHAT_TOKENS. The pad token
    becomes `<|padding|>` where that is in the vocabulary (GPT-NeoX), else its own stays, else it is eos. Control tokens
    are found in a text as they are written, and take nothing of the text along. Doing it twice changes nothing.

    Returns: the tokenizer.  Raises: UserError for one without eos or without the fast backend.
    """
    from tokenizers import AddedToken

    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"tokenizer {tokenizer.name_or_path!r} is not a fast one; convert it to tokenizer.json first")
    if tokenizer.eos_token is None:
        raise UserError(f"tokenizer {tokenizer.name_or_path!r} has no eos token, which ends each turn")
    # normalized=False: matched in the text as written, before NFC or lower-casing could change it.
    tokens = [AddedToken(token, special=True, normalized=False) for token in CHAT_TOKENS]
    tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    if "<|padding|>" in tokenizer.get_vocab():
        tokenizer.pad_token = "<|padding|>"
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = CHAT_TEMPLATE
    _cut_as_written(tokenizer, (tokenizer.eos_token, *CHAT_TOKENS))
    return tokenizer


def _cut_as_written(tokenizer: Any, tokens: Iterable[str]) -> None:
    """Take from control tokens, and from the tokenizer, what would make the template's text another one than was meant.

    `normalized` where there is a normalizer: "a</s>" holds no `</s>` in Llamas of early 2023, as both get a blank in
    front first. `single_word`: nor does it there. `lstrip`, `rstrip` (Phi-3's `<|assistant|>`): blanks and newlines
    beside the token are lost. Dropout: the same text has other ids each time. What is right already is left alone, so
    that the tokenizers of data that were prepared earlier stay as they were.
    """
    from tokenizers import AddedToken

    backend = tokenizer.backend_tokenizer
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for token in tokens:
        own = known.get(token)  # None for an eos token that was named later
        plain = own and own.special and not (own.single_word or own.lstrip or own.rstrip)
        if not plain or (own.normalized and backend.normalizer):  # without a normalizer it does nothing: GPT-2's
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None
    if tokenizer.split_special_tokens:
        tokenizer.split_special_tokens = backend.encode_special_tokens = False


# ---- Encoding ----


def encode(
    tokenizer: Any,
    conversations: Iterable[Conversation],
    label_masking: bool = True,
    use_system_tag: bool = False,
    system_property_dropout: float = 0.5,
    system_add_length: bool = False,
    train_on: str = "all",
    seed: int = 0,
    batch_size: int = 1000,
    encode_texts: TextEncoder | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encode conversations whole (windows of max_length are cut when a batch is made).

    Contents are encoded apart from the scaffold and with special tokens not recognised, so no text in a message can
    become a control token. (The original encoded the joined string; the ids are the same for every other text, as
    tokenizers split at special tokens first, and each content is read as standing behind one. `load_tokenizer` checks
    it for each tokenizer.)

    A token is scored when it is a target: `labels = where(scored, input_ids, -100)`, the model shifts. These are the
    tokens of a reply, the eos after it and the `<|prompter|>` of a turn that follows it; `<|assistant|>` never is, nor
    anything of a prompter or system message, of a system tag, or of a reply whose `train` is false. With
    `label_masking` off every token is scored but the first, which nothing predicts.

    Args:
        tokenizer: as `prepare_tokenizer` leaves it.
        use_system_tag: put the properties of each reply after the prompter message before it.
        system_property_dropout: probability with which each property is left out of a tag, each on its own.
        system_add_length: add the reply's length (words // 5 + 1) to its properties.
        train_on: all replies are scored, or under "last" no other than the last of each conversation.
        seed: of the tags' order and dropout; these depend on it and the place of a conversation in `conversations`.
        batch_size: conversations whose texts are encoded at once.
        encode_texts: the tokenizer's `fast_text_encoder`, worth loading for many conversations; else its own is used.
    Yields: (input_ids: int32 (length,), scored: bool (length,)) for each conversation, in order.
    Raises: UserError for a role that is unknown, or system anywhere but first.
    """
    encode_texts = encode_texts or text_encoder(tokenizer)
    eos = np.array([tokenizer.eos_token_id], dtype=np.int32)
    opener_of = {
        role: np.array([tokenizer.convert_tokens_to_ids(token)], dtype=np.int32) for role, token in ROLE_TOKENS.items()
    }
    indexed = enumerate(conversations)
    while batch := list(itertools.islice(indexed, batch_size)):
        turns = []  # of each conversation, (role, text, train) with the tags as turns of role "system"
        for index, conversation in batch:
            dice = random.Random(f"{seed} system tag {index}") if use_system_tag else None
            turns.append(list(_turns(conversation, dice, system_property_dropout, system_add_length, train_on)))
        # Each text once: the threads of one Open-Assistant tree repeat their first messages.
        texts = list(dict.fromkeys(text for conversation in turns for _, text, _ in conversation))
        ids_of = dict(zip(texts, encode_texts(texts), strict=True))
        for conversation in turns:
            parts, length = [np.empty(0, dtype=np.int32)], 0
            spans, after_scored = [], False  # [start, end) of what is scored
            for role, text, train in conversation:
                if after_scored and role == "user":
                    spans.append((length, length + 1))
                content = ids_of[text]
                parts += (opener_of[role], content, eos)
                start, length = length + 1, length + 1 + len(content) + 1
                after_scored = role == "assistant" and train
                if after_scored:
                    spans.append((start, length))
            mask = np.zeros(length, dtype=bool)
            for start, end in spans if label_masking else [(1, length)]:
                mask[start:end] = True
            yield np.concatenate(parts), mask


def _turns(
    conversation: Conversation, dice: random.Random | None, dropout: float, add_length: bool, train_on: str
) -> Iterator[tuple[str, str, bool]]:
    messages = conversation.messages
    first = 0  # of what is learnt
    if train_on == "last":
        first = max((place for place, message in enumerate(messages) if message.role == "assistant"), default=0)
    for place, message in enumerate(messages):
        if message.role not in ROLE_TOKENS or (message.role == "system" and place > 0):
            raise UserError(f"message {place + 1} of a conversation: role {message.role!r} is not allowed there")
        yield message.role, message.content, message.train and place >= first
        if dice and message.role == "user" and place + 1 < len(messages) and messages[place + 1].role == "assistant":
            yield "system", system_tag(messages[place + 1], dice, dropout, add_length), False


def system_tag(reply: Message, dice: random.Random, dropout: float = 0.5, add_length: bool = False) -> str:
    r"""The text of the tag for a reply: `key: value` lines and a last newline, e.g. "quality: 0.7\nlang: en\n".

    lang, quality, humor, creativity and length come in random order, then context, which may have several lines; each
    is left out with probability `dropout`, blank ones always. Numbers have one decimal, length none.
    """
    known = reply.properties
    lines = [(key, known[key]) for key in ("lang", "quality", "humor", "creativity") if known.get(key) is not None]
    if add_length:
        lines.append(("length", str(len(re.findall(r"\w+", reply.content)) // 5 + 1)))
    dice.shuffle(lines)
    if known.get("context"):
        lines.append(("context", known["context"]))
    kept = [(key, value) for key, value in lines if dice.random() >= dropout]
    kept = [(key, f"{value:.1f}" if isinstance(value, float) else value) for key, value in kept]
    return "\n".join(f"{key}: {value}" for key, value in kept if not value.isspace()) + "\n"


def render_scored(tokenizer: Any, input_ids: Any, scored: Any) -> str:
    """The text of one example with each scored stretch between `[[` and `]]`, for a look at what is learnt.

    Args: input_ids, scored: sequences of one length (lists, arrays or tensors), padding included if it is there.
    """
    pieces = []
    pairs = zip(map(int, input_ids), map(bool, scored), strict=True)
    for is_scored, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        pieces.append(f"[[{text}]]" if is_scored else text)
    return "".join(pieces)
