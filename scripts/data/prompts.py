"""Files of prompts, for replies to look at: of the sampling report, and while a run trains. Only light imports."""

from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import parse_json, read_text


def read_prompts(path: Path) -> list[list[dict[str, str]]]:
    """Prompts as conversations, [{"role", "content"}], whose last message is a user's.

    A .txt file has one a line. In a JSON list, or JSON Lines, a prompt is a text or {"messages": [...]}.

    Raises: UserError with the line of what is no prompt, or where there is none.
    """
    text = read_text(path)
    if path.suffix == ".txt":
        values = [(str(path), line.strip()) for line in text.split("\n") if line.strip()]
    elif text.lstrip().startswith("["):
        prompts = parse_json(text, path)
        values = [(f"{path}, prompt {number}", prompt) for number, prompt in enumerate(prompts, 1)]
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        values = [(f"{path}, line {number}", parse_json(line, path, number)) for number, line in lines]
    if not values:
        raise UserError(f"{path}: it holds no prompts")
    return [_as_messages(value, where) for where, value in values]


def _as_messages(prompt: Any, where: str) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else None
    if isinstance(prompt, dict):
        messages = prompt.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where}: neither a text nor {{"messages": [{{"role": "user", "content": "..."}}, ...]}}')
    for number, message in enumerate(messages, 1):
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        roles = ("user", "assistant", "system")[: 3 if number == 1 else 2]
        if role not in roles:
            given = f"{role[:40]!r}" if isinstance(role, str) else "no text"
            raise UserError(f"{where}: message {number}: its role is {given}, not one of {', '.join(roles)}")
        if not isinstance(content, str) or not content.strip():
            raise UserError(f"{where}: message {number}: its content is empty or no text")
        if content.encode("utf-8", "replace").decode() != content:
            raise UserError(f"{where}: message {number}: its content holds half of a surrogate pair")
    if messages[-1]["role"] != "user":
        raise UserError(f"{where}: its last message is not the user's")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
