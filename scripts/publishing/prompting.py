"""How a chat model is prompted, told from its own chat template: which text stands before, between and behind turns."""

from dataclasses import dataclass
from typing import Any

from data.dialogue import CHAT_TEMPLATE
from utils.errors import UserError, reason

# For the hub's widget, and the first of them for the example of the card.
QUESTIONS = (
    "What is a meme, and where does the word come from?",
    "How many people live on Earth?",
    "Write a short story about a lighthouse keeper who learns to paint.",
)


@dataclass(frozen=True)
class Prompting:
    """What a card says of a model's chat template.

    Attributes:
        prompts: QUESTIONS as the model is asked them, special tokens as text.
        example: a longer one: a question, a reply and another question.
        before_reply, after_reply: the text between a user's message and the reply to it, and behind a reply.
        dialogue: whether it is the dialogue format of this collection.
        system: whether it takes a system message in front.
        special: the special tokens that stand in the example.
    """

    prompts: list[str]
    example: str
    before_reply: str
    after_reply: str
    dialogue: bool
    system: bool
    special: list[str]


def describe_prompting(tokenizer: Any) -> Prompting:
    """Of a tokenizer with a chat template.  Raises: UserError where it does not take a conversation."""

    def render(*texts: str) -> str:
        messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja's own, and whatever the template raises
            raise UserError(f"its chat template does not take user and assistant in turn: {reason(error)}") from error

    marked = render("QUESTION", "REPLY", "ANOTHER")
    behind = marked.partition("QUESTION")[2]
    before_reply, _, rest = behind.partition("REPLY")
    example = render("What is the capital of France?", "Paris.", "And of Spain?")
    added = tokenizer.added_tokens_decoder.values()
    return Prompting(
        prompts=[render(question) for question in QUESTIONS],
        example=example,
        before_reply=before_reply,
        after_reply=rest.partition("ANOTHER")[0],
        dialogue=tokenizer.chat_template == CHAT_TEMPLATE,
        system=_takes_system(tokenizer),
        special=sorted({token.content for token in added if token.content in example}, key=example.index),
    )


def _takes_system(tokenizer: Any) -> bool:
    """Whether the template takes a system message in front, and does not leave it out."""
    messages = [{"role": "system", "content": "SYSTEM"}, {"role": "user", "content": "QUESTION"}]
    try:
        return "SYSTEM" in tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # jinja's own, and whatever the template raises
        return False
