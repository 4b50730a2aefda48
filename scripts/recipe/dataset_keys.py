"""The keys of the mix: a list of data sets, each with what its source (`sources/`) can be given."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, Field, create_model, model_validator

from sources.messages import MessagesOptions
from sources.registry import SOURCES
from sources.source import DatasetOptions, Schema

DATASET_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")  # part of a folder's name, of metrics and of options


class _Mix(Schema):
    """The mix: in YAML a list, each entry a name or `name: {options}`; the sources are in scripts/sources/.

    A data set of any other name says `source: messages`, so that a misspelt name is not taken for one.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, MessagesOptions]

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        """Turn the recipe's list into a mapping, so that errors and overrides name `datasets.vicuna.fraction`."""
        if not isinstance(value, list):
            raise ValueError("should be a list of data sets, each `- name` or `- name:` with its options below")
        mix: dict[str, Any] = {}
        for entry in value:
            entries = {entry: None} if isinstance(entry, str) else entry
            if not isinstance(entries, Mapping) or len(entries) != 1:
                hint = ": indent the options further than the name" if isinstance(entry, Mapping) and entry else ""
                raise ValueError(f"each entry is a name or one `name: options`, got {entry}{hint}")
            ((name, options),) = entries.items()
            if name in mix:
                raise ValueError(f"{name} is listed twice")
            mix[name] = options = {} if options is None else options
            if isinstance(options, Mapping) and name == "messages":
                mix[name] = {"source": "messages", **options}
            elif isinstance(options, Mapping) and "source" in options and not DATASET_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name for a data set: use letters, digits, _ and -")
        if not mix:
            raise ValueError("the mix is empty: list at least one data set")
        return mix

    def chosen(self) -> dict[str, DatasetOptions]:
        """The data sets of the mix, in the order of SOURCES, those of other names after them in the recipe's."""
        known = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: options for name, options in (known | self.__pydantic_extra__).items() if options is not None}

    @staticmethod
    def options_of(name: str) -> type[DatasetOptions]:
        """What a data set of this name can be given."""
        return SOURCES[name].options if name in SOURCES else MessagesOptions


Datasets = create_model(
    "Datasets",
    __base__=_Mix,
    **{name: (source.options | None, Field(None, description=source.about)) for name, source in SOURCES.items()},
)
