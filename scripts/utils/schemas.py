"""Files of JSON that are read back, each by its pydantic schema: what does not fit is one line with file and field."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from utils.errors import UserError
from utils.files import parse_json, read_text

MOST_PLACES = 6  # of a field's path, and
MOST_CHARACTERS = 200  # of all that a message says of it: a key or a value can be of any length


class Schema(BaseModel):
    """A mapping in a file: each value is of the very type (no text or true for a number), each number is finite.

    Keys without a field are left out, as later versions write some.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True)


SchemaType = TypeVar("SchemaType", bound=BaseModel)


def read_as(schema: type[SchemaType], path: Path, what: str) -> SchemaType:
    """The JSON of a file by its schema; `what` it is, such as "a sampling report", stands in messages.

    Raises: UserError with the field that does not fit; as `read_text` and `parse_json`, for a key that is given twice.
    """
    return checked(schema, parse_json(read_text(path), path, keys_once=True), path, what)


def checked(schema: type[SchemaType], value: Any, where: str | Path, what: str) -> SchemaType:
    """A value by its schema.  Raises: UserError, `WHERE: not WHAT: FIELD: what is wrong`."""
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{where}: not {what}: {problem_of(error)}") from None


def problem_of(error: ValidationError) -> str:
    """The first thing that a schema finds wrong, as `FIELD what is wrong`."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in problem["loc"][:MOST_PLACES])
    message = {"missing": "is missing", "extra_forbidden": "is not known here"}.get(problem["type"])
    message = message or problem["msg"].removeprefix("Value error, ").replace("Input should", "should")
    said = f"{place} {message.split(' or instance of ')[0]}".strip()
    said = "".join(character if character.isprintable() else "?" for character in said)
    return said[:MOST_CHARACTERS] + "..." * (len(said) > MOST_CHARACTERS)
