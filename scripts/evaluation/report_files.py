"""The files around a sampling report: sampling settings, and reports, read and checked. Only light imports.

Both are in the formats of Open-Assistant's model_eval/manual/sampling_report.py.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, JsonValue, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from typing_extensions import TypedDict  # pydantic reads typing's own from Python 3.12 on

from utils.errors import UserError
from utils.schemas import Schema, read_as

MOST_TOKENS = 2**31 - 1  # of a reply; 64 bits would hold as many, and their sum with the prompt's not


# ---- Sampling settings ----


class GenerateArgs(TypedDict, total=False):
    """The types of what `evaluation/generation.py` knows, which checks names and most values."""

    __pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")
    max_new_tokens: Annotated[PositiveInt, Field(le=MOST_TOKENS)]
    do_sample: bool
    temperature: NonNegativeFloat  # 0 is greedy
    top_k: PositiveInt
    top_p: float
    min_p: float
    typical_p: float
    epsilon_cutoff: float
    min_new_tokens: Annotated[NonNegativeInt, Field(le=MOST_TOKENS)]
    repetition_penalty: PositiveFloat
    no_repeat_ngram_size: Annotated[NonNegativeInt, Field(le=MOST_TOKENS)]


class _Settings(Schema):
    """Settings of one name, or the `default` of all. The chat template gives the texts around a prompt."""

    model_config = ConfigDict(extra="forbid")
    name: str = ""
    generate_args: GenerateArgs = Field({})
    pre_text: None = None
    add_prefix_tokens: bool = False  # about pre_text
    human_name: str | None = None  # these two: of a mode without chat tokens, without effect in the others
    bot_name: str | None = None


class _SettingsFile(Schema):
    model_config = ConfigDict(extra="forbid")
    default: _Settings = _Settings()
    configurations: list[_Settings] = Field(min_length=1)


def read_configs(path: Path) -> dict[str, dict[str, Any]]:
    """Sampling settings by name, those of `default` filled in; `generate` checks what they say.

    Raises: UserError for another format, a name that is missing or given twice, fewer tokens than the least.
    """
    file = read_as(_SettingsFile, path, "a file of sampling settings")
    configs: dict[str, dict[str, Any]] = {}
    for number, chosen in enumerate(file.configurations, 1):
        if not chosen.name or chosen.name in configs:
            problem = f"the name {chosen.name} is given twice" if chosen.name else "no name"
            raise UserError(f"{path}: configuration {number}: {problem}")
        args = configs[chosen.name] = file.default.generate_args | chosen.generate_args
        if args.get("min_new_tokens", 0) > args.get("max_new_tokens", MOST_TOKENS):
            raise UserError(f"{path}: configuration {number}: its min_new_tokens are over its max_new_tokens")
    return configs


# ---- Reports ----


class Result(Schema):
    sampling_config: str
    sampling_params: dict[str, JsonValue]
    outputs: list[str]


class PromptResults(Schema):
    prompt: str
    results: list[Result]


class SamplingReport(Schema):
    """Other keys are left out."""

    model_name: str
    date: str = ""
    args: dict[str, JsonValue] = Field({})
    prompts: list[PromptResults] = Field(min_length=1)


def read_report(path: Path) -> SamplingReport:
    """A report.  Raises: UserError for a file that is none."""
    return read_as(SamplingReport, path, "a sampling report")
