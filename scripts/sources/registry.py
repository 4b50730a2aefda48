"""All sources: each file of this room that defines `SOURCE`, by the file's name."""

import importlib
import pkgutil
from dataclasses import replace
from typing import Any

import sources
from sources.messages import fields_of
from sources.source import HubSource, Source

# The seed's mix. The order of data sets decides the order of training: another file never changes an old recipe's.
SEED_MIX = ("oasst_export", "vicuna", "dolly15k", "grade_school_math_instructions", "code_alpaca")


def _all_sources() -> dict[str, Source]:
    modules = [importlib.import_module(f"sources.{module.name}") for module in pkgutil.iter_modules(sources.__path__)]
    found = {module.__name__.rpartition(".")[2]: module.SOURCE for module in modules if hasattr(module, "SOURCE")}
    others = sorted(found.keys() - {*SEED_MIX, "messages"})
    return {name: found[name] for name in (*SEED_MIX, *others, "messages")}


SOURCES = _all_sources()


def find_source(name: str, options: Any) -> Source:
    """The source of a data set of the mix: the one of its name, or messages for a data set of any other name."""
    if name in SOURCES and name != "messages":
        return SOURCES[name]
    own = {"config": options.config, "split": options.split, "data_files": options.data_files}
    return replace(SOURCES["messages"], hub=HubSource(options.hub_name, **own), fields=fields_of(options.columns))
