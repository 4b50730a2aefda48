"""Models, configs and tokenizers from a folder or the hub; whatever is wrong with one is a line that names it."""

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from utils.errors import UserError, reason

KINDS = {AutoConfig: "config", AutoTokenizer: "tokenizer", AutoModelForCausalLM: "weights"}


def load_pretrained(auto_class: Any, name: str, who: str = "", trust_remote_code: bool = False, **kwargs: Any) -> Any:
    """What `auto_class.from_pretrained` makes of a folder or hub name.

    Args:
        who: how a message names the model, such as `model_name = org/name`; else its name.
        trust_remote_code: run code that comes with it; transformers is never left to ask.

    Raises:
        UserError: it is not there, or damaged; or a model's weights or a tokenizer's files are not there.
    """
    who = who or name
    if auto_class is AutoModelForCausalLM:
        kwargs["output_loading_info"] = True
    try:
        found = auto_class.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs)
    except Exception as error:  # what transformers makes of a bad file ranges from OSError to AttributeError
        raise UserError(f"{who}: no usable {KINDS[auto_class]}: {_where(name)}: {reason(error)}") from error
    if auto_class is AutoModelForCausalLM:
        found, info = found
        if missing := sorted(info["missing_keys"]):  # transformers would go on with random numbers in their place
            names = ", ".join(missing[:3]) + f" and {len(missing) - 3} more" * (len(missing) > 3)
            raise UserError(f"{who}: its weights lack {names}, which its config.json calls for")
    if auto_class is AutoTokenizer and set(found.encode("a b c", add_special_tokens=False)) <= {found.unk_token_id}:
        # Where there are no files, transformers makes an empty tokenizer of the model's kind and says nothing.
        raise UserError(f"{who}: no tokenizer: {_where(name)}")
    return found


def _where(name: str) -> str:
    """What there is under a name, for a message."""
    if os.path.isdir(name):
        return f"the folder holds {', '.join(sorted(os.listdir(name))[:8]) or 'nothing'}"
    return f"no such folder under {Path.cwd()}, and the hub did not give it"
