"""The recipe: one flat YAML file that says everything about a run.

`load_recipe(path, overrides)` reads it; every key has a type, a default and a one-line meaning, shown by `--help`.
Whatever is wrong (YAML that does not parse, a misspelt key, an impossible value) becomes one line that names the file,
the line and the key. Only light imports here, so that this answers before torch is loaded.

Defaults come from the `defaults` block of the original trainer, LAION-AI/Open-Assistant
model/model_training/configs/config.yaml (April 2023), where it has the key.
"""

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from utils.errors import UserError
from utils.strict_yaml import StrictLoader, key_lines

Share = Annotated[float, Field(gt=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, protected_namespaces=())


class DatasetOptions(_Schema):
    """What every data set of the mix can be given."""

    input_file_path: str | None = Field(None, description="data file: as given, under cache_dir, or on the hub")
    revision: str | None = Field(None, description="commit, tag or branch of the hub data set; null: its newest")
    val_split: Annotated[float, Field(ge=0, lt=1)] = Field(0.2, description="share held out for validation")
    max_val_set: PositiveInt | None = Field(None, description="at most this many validation conversations")
    fraction: Share | None = Field(None, description="share of the training rows used, drawn anew each epoch")
    size: PositiveInt | None = Field(None, description="number of training rows used, drawn anew each epoch")

    @model_validator(mode="after")
    def _one_size(self):
        if self.fraction is not None and self.size is not None:
            raise ValueError("give fraction or size, not both")
        return self


class OasstOptions(DatasetOptions):
    """Keys of `oasst_export` alone."""

    lang: str = Field("en", description="languages of the prompts to use, comma-separated codes")
    top_k: PositiveInt | None = Field(None, description="use replies of rank below this; null: all")


class Datasets(_Schema):
    """The mix: in YAML a list, each entry a name or `name: {options}`; the sources are in scripts/utils/sources.py."""

    oasst_export: OasstOptions | None = Field(None, description="Open-Assistant message trees")
    vicuna: DatasetOptions | None = Field(None, description="ShareGPT conversations")
    dolly15k: DatasetOptions | None = Field(None, description="databricks-dolly-15k")
    grade_school_math_instructions: DatasetOptions | None = Field(None, description="GSM8K as instructions")
    code_alpaca: DatasetOptions | None = Field(None, description="Code Alpaca")

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        """Turn the recipe's list into a mapping, so that errors and overrides name `datasets.vicuna.fraction`."""
        if not isinstance(value, list):
            return value
        mix: dict[str, Any] = {}
        for entry in value:
            entries = {entry: None} if isinstance(entry, str) else entry
            if not isinstance(entries, Mapping) or len(entries) != 1:
                raise ValueError(f"each entry is a name or one `name: options`, got {entry!r}")
            ((name, options),) = entries.items()
            if name in mix:
                raise ValueError(f"{name} is listed twice")
            mix[name] = {} if options is None else options
        return mix

    @model_validator(mode="after")
    def _not_empty(self):
        if not self.chosen():
            raise ValueError("the mix is empty: list at least one data set")
        return self

    def chosen(self) -> dict[str, DatasetOptions]:
        """The data sets of the mix, in the schema's order."""
        return {name: options for name in type(self).model_fields if (options := getattr(self, name)) is not None}


class Recipe(_Schema):
    """Every key of a recipe."""

    model_name: str = Field(description="folder or hub name of the base model (any causal LM)")
    from_scratch: bool = Field(False, description="random weights, built from the config.json of model_name")
    trust_remote_code: bool = Field(False, description="run model code that comes with the checkpoint")
    max_length: Annotated[int, Field(ge=2)] = Field(512, description="longest training example, tokens")
    fuse_gelu: bool = Field(True, description="tanh approximation in place of exact GELU, as the original trained")
    use_flash_attention: bool = Field(False, description="flash-attn kernels if they can run here, else PyTorch's SDPA")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, about 1/3 more work")

    datasets: Datasets = Field(description="the mix")
    cache_dir: Path = Field(Path(".cache"), description="where data files are looked up and prepared data are kept")
    label_masking: bool = Field(True, description="score the replies only; false: every token")
    random_offset_probability: Annotated[float, Field(ge=0, le=1)] = Field(
        0.8, description="chance that a conversation over max_length is cut at a random place, not at its start"
    )
    use_system_tag: bool = Field(False, description="tell the properties of the reply in a system tag after the prompt")
    system_property_dropout: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="chance that a property is left out of the system tag"
    )
    system_add_length: bool = Field(False, description="put the length of the reply into the system tag")
    samples_mixing: Literal[False] = Field(
        False, description="the original's mixing of samples; only false is supported"
    )
    use_custom_sampler: bool = Field(
        False, description="accepted for the original's recipes: fraction, size and sort_by_length work either way"
    )
    sort_by_length: bool = Field(False, description="batches of similar lengths, the batches shuffled")

    dtype: Literal["fp32", "fp16", "bf16"] = Field("fp16", description="precision of the forward and backward pass")
    num_train_epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(3, description="passes over the mix")
    max_steps: PositiveInt | None = Field(None, description="stop after this many optimizer steps; null: by epochs")
    per_device_train_batch_size: PositiveInt = Field(2, description="conversations per process and micro-batch")
    per_device_eval_batch_size: PositiveInt = Field(2, description="the same in evaluation")
    gradient_accumulation_steps: PositiveInt = Field(32, description="micro-batches per process and optimizer step")
    learning_rate: NonNegativeFloat = Field(1e-5, description="peak rate, reached after warm-up")
    warmup_steps: NonNegativeInt = Field(600, description="optimizer steps of warm-up, along DeepSpeed's logarithm")
    weight_decay: NonNegativeFloat = Field(0.0, description="AdamW's decoupled weight decay")
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="AdamW's beta 1")
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.95, description="AdamW's beta 2")
    adam_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(1e-12, description="AdamW's epsilon")
    max_grad_norm: NonNegativeFloat = Field(2.0, description="clip the global gradient norm to this; 0: do not clip")
    loss_normalization: Literal["tokens", "micro_batch"] = Field(
        "tokens", description="mean over all scored tokens of a step, or the original's mean of micro-batch means"
    )
    rng_seed: NonNegativeInt = Field(0xA1221F97, description="everything random follows from it")
    deepspeed_config: str | None = Field(None, description="DeepSpeed JSON; null: plain Accelerate")

    output_dir: Path = Field(description="folder of the run: checkpoints, metrics, final model")
    log_dir: str = Field("base", description="folder of the wandb files, under output_dir")
    logging_steps: PositiveInt = Field(10, description="a line in metrics.jsonl every so many steps")
    eval_steps: PositiveInt = Field(200, description="evaluate every so many steps, and at the end")
    save_strategy: Literal["epoch", "steps", "no"] = Field("steps", description="when to write a checkpoint")
    save_steps: PositiveInt = Field(1000, description="a checkpoint every so many steps under save_strategy: steps")
    save_total_limit: PositiveInt | None = Field(4, description="keep the newest so many checkpoints; null: all")
    sample_replies: NonNegativeInt = Field(
        0, description="at the end, print replies to so many held-out prompts of each data set"
    )
    log_wandb: bool = Field(True, description="log to Weights & Biases, offline when nobody is logged in")
    wandb_project: str = Field("supervised-finetuning", description="its project")

    @model_validator(mode="after")
    def _keep_the_base_model(self):
        if self.output_dir.resolve() == Path(self.model_name).resolve():
            raise ValueError("output_dir is the folder of model_name: the run would overwrite its base model")
        return self

    def to_yaml(self) -> str:
        """The resolved recipe, every key written out; loading it again gives an equal recipe."""
        values = self.model_dump(mode="json")
        values["datasets"] = [
            {name: options.model_dump(mode="json")} for name, options in self.datasets.chosen().items()
        ]
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


SECTIONS = {"model_name": "Model", "datasets": "Data", "dtype": "Training", "output_dir": "Output"}


def describe_keys() -> str:
    """Every key with its meaning and default, for --help."""

    def line(name: str, field: Any, indent: int) -> str:
        default = field.default if not isinstance(field.default, Path) else str(field.default)
        shown = "required" if field.is_required() else yaml.safe_dump(default).split("\n")[0]
        return f"{' ' * indent}{name:<{34 - indent}}{field.description} ({shown})"

    lines: list[str] = []
    for name, field in Recipe.model_fields.items():
        if name in SECTIONS:
            lines.append(f"\n{SECTIONS[name]}")
        lines.append(line(name, field, 2))
        if name == "datasets":
            lines += [f"    {source:<32}{entry.description}" for source, entry in Datasets.model_fields.items()]
            lines.append("    each with these options, e.g. --datasets.vicuna.fraction 0.5")
            own = {
                key: field for key, field in OasstOptions.model_fields.items() if key in OasstOptions.__annotations__
            }
            lines += [line(option, entry, 6) for option, entry in DatasetOptions.model_fields.items()]
            lines += [line(option, entry, 6) + " [oasst_export]" for option, entry in own.items()]
    return "\n".join(lines)


def load_recipe(path: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the YAML file.
        overrides: dotted key to YAML text, as on the command line: `{"datasets.vicuna.fraction": "0.5"}`.

    Raises:
        UserError: one line with the file, the line and the key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read this recipe: {error.strerror} (looked in {Path.cwd()})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 (byte {error.start})") from error
    try:
        tree = yaml.compose(text, StrictLoader)
        values = yaml.load(text, StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise UserError(f"{path}:{where} YAML does not parse: {getattr(error, 'problem', error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a list of `key: value` lines, this is {type(values).__name__}")

    places = {key: f"{path} line {line}" for key, line in key_lines(tree).items()}
    for key, override in (overrides or {}).items():
        parts = tuple(key.split("."))
        try:
            value = yaml.load(override, StrictLoader)
        except yaml.YAMLError:
            value = override
        _override(values, parts, value)
        places[parts] = "command line"
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(_explain(detail, places, path) for detail in error.errors())) from error


def _override(values: dict[str, Any], parts: tuple[str, ...], value: Any) -> None:
    """Set a dotted key. A data set's option is looked up in the recipe's list, so that a mix never grows unasked."""
    if len(parts) == 1:
        values[parts[0]] = value
        return
    if parts[0] == "datasets" and len(parts) == 3 and isinstance(values.get("datasets"), list):
        for position, entry in enumerate(values["datasets"]):
            name = entry if isinstance(entry, str) else next(iter(entry), None) if isinstance(entry, dict) else None
            if name == parts[1]:
                options = (entry[name] or {}) if isinstance(entry, dict) else {}
                values["datasets"][position] = {name: {**options, parts[2]: value}}
                return
        known = [next(iter(entry)) if isinstance(entry, dict) else entry for entry in values["datasets"]]
        raise UserError(
            f"command line: {'.'.join(parts)}: {parts[1]} is not in this recipe's mix{_nearest(parts[1], known)}"
        )
    raise UserError(f"command line: unknown key {'.'.join(parts)}{_nearest(parts[0], Recipe.model_fields)}")


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, [str(key) for key in known], n=1)
    return f": did you mean {close[0]}?" if close else f" (known: {', '.join(map(str, known))})"


def _explain(detail: Any, places: dict[tuple[str, ...], str], path: str | Path) -> str:
    """One error of pydantic's as `FILE line N: key = value: what is wrong`."""
    key = tuple(str(part) for part in detail["loc"])
    place = next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), str(path))
    name = ".".join(key)
    if detail["type"] == "missing":
        return f"{path}: {name} is missing: {Recipe.model_fields[name].description}"
    if detail["type"] == "extra_forbidden":
        known = {1: Recipe, 2: Datasets}.get(len(key)) or (OasstOptions if key[1] == "oasst_export" else DatasetOptions)
        return f"{place}: unknown key {name}{_nearest(key[-1], known.model_fields)}"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    value = "" if isinstance(detail["input"], (dict, list)) else f" = {detail['input']}"
    return f"{place}: {name}{value}: {message}" if name else f"{place}: {message}"


def recipe_from_command_line(usage: str, arguments: list[str]) -> tuple[Recipe, bool]:
    """Read `RECIPE [--key value ...] [--dry_run]`; prints every key and exits on --help.

    Returns:
        The recipe, and whether this is a dry run.

    Raises:
        UserError: as `load_recipe`, or for arguments that are not of that form.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(f"{usage.strip()}\n\nKeys of a recipe, each also an option (--learning_rate 2e-5):\n{describe_keys()}")
        sys.exit(0 if arguments else 2)
    path: str | None = None
    overrides: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            if path is not None:
                raise UserError(f"command line: {argument}: one recipe at a time, {path} is the recipe already")
            path = argument
            continue
        key, equals, value = argument.removeprefix("--").partition("=")
        if key != "dry_run" and not equals:
            value = next(rest, None)
            if value is None or value.startswith("--"):
                raise UserError(f"command line: --{key} needs a value")
        overrides[key] = value
    dry_run = overrides.pop("dry_run", None) is not None
    if path is None:
        raise UserError("command line: no recipe given; usage: scripts/sft.py RECIPE [--key value ...]")
    return load_recipe(path, overrides), dry_run
