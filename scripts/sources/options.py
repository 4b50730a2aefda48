"""What a key of a recipe is, and the options that every data set of the mix can be given."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

CHANGES = ("data", "training", "step", "evaluation")


def key(default: Any, meaning: str, changes: str = "training", **limits: Any) -> Any:
    """A key of a recipe, for a pydantic schema.

    Args:
        default: `...` for a key that has to be given.
        meaning: the line that --help shows.
        changes: what another value changes, words of `CHANGES`:
            data        what is prepared of the data files, and so made anew;
            training    what is learnt or when, so that a run cannot go on with it;
            step        how the work of a step is cut up: it can, as long as the step itself stays the same;
            evaluation  the figures of an evaluation of the same weights.
        limits: pydantic's, such as `gt=0`.
    """
    assert set(changes.split()) <= set(CHANGES), changes
    return Field(default, description=meaning, json_schema_extra={"changes": changes.split()}, **limits)


def keys_that_change(what: str, schema: type[BaseModel]) -> set[str]:
    """The keys of a schema of which another value changes the data, the training, the step or the evaluation."""
    return {name for name, field in schema.model_fields.items() if what in field.json_schema_extra["changes"]}


def _hexadecimal_too(value: Any) -> Any:
    """0xa1221f97, which pydantic does not read by itself; what is no number is left for it to refuse."""
    try:
        return int(value, 0) if isinstance(value, str) else value
    except ValueError:
        return value


WholeNumber = Annotated[int, BeforeValidator(_hexadecimal_too)]
PositiveInt = Annotated[WholeNumber, Field(gt=0, lt=2**31)]
NonNegativeInt = Annotated[WholeNumber, Field(ge=0, lt=2**31)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


class Schema(BaseModel):
    """Keys that are checked: an unknown one is refused, and so is a text that no file could hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _writable_text(cls, value: Any) -> Any:
        """Every text ends in a file name or a file: refuse what neither can hold."""
        if isinstance(value, str) and ("\0" in value or value.encode(errors="replace").decode() != value):
            raise ValueError("holds a character that UTF-8 files and file names cannot hold")
        return value


PREPARED = "data training evaluation"  # what most options of a data set change


class DatasetOptions(Schema):
    """What every data set of the mix can be given. Where its files are changes nothing: what is in them counts."""

    input_file_path: str | None = key(None, "data file: as given, under cache_dir, or on the hub", "")
    revision: str | None = key(None, "commit, tag or branch of the hub data set; null: its newest", "")
    val_split: float = key(0.2, "share held out for validation", PREPARED, ge=0, lt=1)
    max_val_set: PositiveInt | None = key(None, "at most this many validation conversations", PREPARED)
    fraction: Share | None = key(None, "share of the training rows used, drawn anew each epoch")
    size: PositiveInt | None = key(None, "number of training rows used, drawn anew each epoch")
    on_bad_records: Literal["error", "skip"] = key(
        "error", "what to do at a damaged record: stop, or go on and report how many", PREPARED
    )

    @model_validator(mode="after")
    def _one_size(self):
        if self.fraction is not None and self.size is not None:
            raise ValueError("give fraction or size, not both")
        return self
