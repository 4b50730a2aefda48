"""What a reply is sampled with, and how a value is read from the command line, `/set` or the page. Light imports."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recipe.load import nearest
from utils.errors import UserError

NONE = ("off", "none", "null", "")  # a setting that is not applied


class Settings(BaseModel):
    """Sampling settings by their names in transformers, as `evaluation/generation.py` takes them, and the seed.

    The defaults are nucleus9 of scripts/sampling/default.json, the report's settings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    temperature: float = Field(0.8, ge=0, le=100, description="flattens the distribution; 0: the likeliest token")
    top_p: float | None = Field(0.9, gt=0, le=1, description="the likeliest tokens that have this share together")
    top_k: int | None = Field(None, ge=1, description="only this many of the likeliest tokens")
    min_p: float | None = Field(None, ge=0, le=1, description="only tokens of this share of the likeliest's or more")
    typical_p: float | None = Field(
        None, gt=0, lt=1, description="the most typical tokens that have this share together"
    )
    epsilon_cutoff: float | None = Field(None, gt=0, lt=1, description="only tokens at least as likely as this")
    repetition_penalty: float | None = Field(None, gt=0, description="over 1: what was said before is less likely")
    no_repeat_ngram_size: int | None = Field(None, ge=1, description="no run of this many tokens comes twice")
    min_new_tokens: int | None = Field(None, ge=1, description="a reply's least tokens")
    max_new_tokens: int = Field(512, ge=1, description="a reply's most tokens")
    seed: int = Field(42, ge=0, lt=2**63, description="of the next reply; each one after it counts on from there")

    def changed(self, **values: Any) -> "Settings":
        """These, with other values, each a text or of its type.  Raises: UserError for a name or value that is none."""
        for name in values:
            if name not in type(self).model_fields:
                raise UserError(f"{name} is no setting{nearest(name, type(self).model_fields)}")
        values = {name: None if str(value).lower() in NONE else value for name, value in values.items()}
        try:
            return type(self)(**(self.model_dump() | values))
        except ValidationError as error:
            detail = error.errors()[0]
            name, message = detail["loc"][0], detail["msg"][0].lower() + detail["msg"][1:]
            given = "off" if detail["input"] is None else detail["input"]
            raise UserError(f"{name} = {given}: {message}") from None

    def next_seed(self) -> "Settings":
        """These for the next reply, which is another one, even to the same message."""
        return self.model_copy(update={"seed": (self.seed + 1) % 2**63})

    def as_lines(self) -> list[str]:
        """Each with its value and what it does."""
        fields = type(self).model_fields
        return [f"{name:<22}{shown_value(value):<8}{fields[name].description}" for name, value in self]

    def for_generate(self) -> dict[str, Any]:
        """The settings of a reply, as `generate` takes them: at temperature 0 none of those that only sampling has."""
        from evaluation.generation import WARPERS

        chosen = self.model_dump(exclude_none=True, exclude={"seed"})
        if self.temperature == 0:
            return {name: value for name, value in chosen.items() if name not in WARPERS}
        return chosen | {"do_sample": True}


def shown_value(value: float | None) -> str:
    """A setting's value as it is shown, and read again."""
    return NONE[0] if value is None else f"{value:g}" if isinstance(value, float) else str(value)
