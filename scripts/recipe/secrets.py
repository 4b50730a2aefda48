"""What looks like a secret: hidden in what is written of a run, refused in its recipe (`recipe/refusals.py`)."""

import re
from typing import NamedTuple

REDACTED = "[redacted]"

# Names whose values are secret, as options (--hub_token X), as keys of JSON, and as environment variables.
SECRET_NAME = re.compile(r"(key|token|password|passwd|secret)$", re.IGNORECASE)
# A commit is 40 hexadecimal digits too: one stays under these names and in the hub's cache (snapshots/<commit>/).
COMMIT_NAME = re.compile(r"(commit|revision)$")
WANDB_KEY_OR_COMMIT = re.compile(r"(?<!snapshots/)(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])", re.IGNORECASE)

SHORT_TOKEN = re.compile(r"token[\"']?\s*[=:]\s*[^\s,}&]{1,7}(?![^\s,}&])", re.IGNORECASE)  # runs/max_token=512


class Secret(NamedTuple):
    """A kind of secret: its form, what is left of it when it is hidden, its name, and where it belongs."""

    pattern: re.Pattern
    replacement: str
    what: str
    belongs: str


SECRETS = (
    Secret(  # a user's, an organization's
        re.compile(r"(hf|api_org)_[A-Za-z0-9]{20,}"), REDACTED, "a Hugging Face token", "HF_TOKEN, or `hf auth login`"
    ),
    Secret(re.compile(r"wandb_v\d_\w{20,}"), REDACTED, "a Weights & Biases key", "WANDB_API_KEY, or `wandb login`"),
    Secret(re.compile(r"(gh[opsu]|github_pat)_\w{20,}"), REDACTED, "a GitHub token", "git's own credentials"),
    Secret(re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"), REDACTED, "an AWS access key", "AWS_ACCESS_KEY_ID, or ~/.aws"),
    Secret(
        re.compile(r"(?<![A-Za-z0-9])sk-(proj-|ant-)?[A-Za-z0-9_]{20,}"),
        REDACTED,
        "an API key",
        "the environment variable of the program that asks for it",
    ),
    Secret(  # one slash left of it as a path
        re.compile(r"(?<=:/)(/?)[^\s/]+@"),
        rf"\1{REDACTED}@",
        "a URL with a user or a password",
        "the program that fetches the file: give the file's path",
    ),
    Secret(  # ...token=X within a text, as in a signed URL: S3's X-Amz-, Google's X-Goog-, Azure's sig=
        re.compile(
            r"((?:(?:api|access|secret|auth)[_-]?key|token|password|passwd|secret|x-(?:amz|goog)-(?:signature|credential)"
            r"|(?<=[?&])(?:sig|signature))[\"']?\s*[=:]\s*)[^\s,}&]+",
            re.IGNORECASE,
        ),
        rf"\1{REDACTED}",
        "a password, a token or a signed URL",
        "an environment variable, or the program that fetches the file",
    ),
)


def redact_text(text: str, name: str = "") -> str:
    """The text with what looks like a secret in it replaced; all of it where its name says that it is one."""
    if SECRET_NAME.search(name):
        return REDACTED
    for secret in SECRETS:
        text = secret.pattern.sub(secret.replacement, text)
    return text if COMMIT_NAME.search(name) else WANDB_KEY_OR_COMMIT.sub(REDACTED, text)


def secret_in(text: str, name: str = "") -> Secret | None:
    """The first kind of secret that a value of a recipe holds.

    Less than what is hidden: 40 hexadecimal digits, which a commit in a folder's name has too, are taken for a key in a
    wandb_project only, and token=X for one where X has 8 characters.
    """
    text = SHORT_TOKEN.sub("", text)
    if name == "wandb_project" and WANDB_KEY_OR_COMMIT.search(text):
        return SECRETS[1]
    return next((secret for secret in SECRETS if secret.pattern.sub(secret.replacement, text) != text), None)
