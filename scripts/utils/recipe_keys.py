"""The keys of a recipe: each with its type, its default and a one-line meaning; `utils/recipe.py` reads the files.

Scalars arrive as text (`utils/strict_yaml.py`) and become numbers and booleans here, where the key asks for one.

Defaults come from the `defaults` block of the original trainer, LAION-AI/Open-Assistant
model/model_training/configs/config.yaml (April 2023), where it has the key.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from utils.languages import LANGUAGES


def _hexadecimal_too(value: Any) -> Any:
    """0xa1221f97, which pydantic does not read by itself; what is no number is left for it to refuse."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return int(value, 0)
    return value


DATASET_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")  # part of a folder's name, of metrics and of options

Share = Annotated[float, Field(gt=0, le=1)]
PositiveInt = Annotated[int, BeforeValidator(_hexadecimal_too), Field(gt=0, lt=2**31)]
NonNegativeInt = Annotated[int, BeforeValidator(_hexadecimal_too), Field(ge=0, lt=2**31)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _writable_text(cls, value: Any) -> Any:
        """Every text ends in a file name or a file: refuse what neither can hold."""
        if isinstance(value, str) and ("\0" in value or value.encode(errors="replace").decode() != value):
            raise ValueError("holds a character that UTF-8 files and file names cannot hold")
        return value


class DatasetOptions(_Schema):
    """What every data set of the mix can be given."""

    input_file_path: str | None = Field(None, description="data file: as given, under cache_dir, or on the hub")
    revision: str | None = Field(None, description="commit, tag or branch of the hub data set; null: its newest")
    val_split: Annotated[float, Field(ge=0, lt=1)] = Field(0.2, description="share held out for validation")
    max_val_set: PositiveInt | None = Field(None, description="at most this many validation conversations")
    fraction: Share | None = Field(None, description="share of the training rows used, drawn anew each epoch")
    size: PositiveInt | None = Field(None, description="number of training rows used, drawn anew each epoch")
    on_bad_records: Literal["error", "skip"] = Field(
        "error", description="what to do at a damaged record: stop, or go on and report how many"
    )

    @model_validator(mode="after")
    def _one_size(self):
        if self.fraction is not None and self.size is not None:
            raise ValueError("give fraction or size, not both")
        return self


class OasstOptions(DatasetOptions):
    """Keys of `oasst_export` alone."""

    lang: str = Field("en", description="languages of the prompts to use, comma-separated codes")
    top_k: PositiveInt | None = Field(None, description="use replies of rank below this; null: all")

    @field_validator("lang")
    @classmethod
    def _known_languages(cls, value: str) -> str:
        for code in map(str.strip, value.split(",")):
            if code not in LANGUAGES:
                close = [code.lower(), *difflib.get_close_matches(code, LANGUAGES, n=1), code[:2].lower()]
                hint = next((f": did you mean {other}?" for other in close if other in LANGUAGES), "")
                raise ValueError(f"{code!r} is not the code of a language{hint}")
        return value


class DollyOptions(DatasetOptions):
    """Keys of `dolly15k` alone."""

    context: Literal["drop", "prompt"] = Field(
        "drop", description="the passage that a question is about: left out, as the original did, or put below it"
    )


class MessagesOptions(DatasetOptions):
    """Keys of chat data of one's own (`utils/messages_source.py`)."""

    source: Literal["messages"] = Field(description="messages; it lets a data set have any name")
    hub_name: str | None = Field(None, description="data set on the hub, as org/name")
    files: str | None = Field(None, description="pattern of its data files; null: those named train")

    @model_validator(mode="after")
    def _one_place(self):
        if self.input_file_path is None and self.hub_name is None:
            raise ValueError("give input_file_path or hub_name, where its data are")
        if self.files is not None and (self.input_file_path is not None or self.hub_name is None):
            raise ValueError("files is a pattern for hub_name, in place of input_file_path")
        return self


class Datasets(_Schema):
    """The mix: in YAML a list, each entry a name or `name: {options}`; the sources are in scripts/utils/sources.py.

    A data set of any other name says `source: messages`, so that a misspelt name is not taken for one.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, MessagesOptions]

    oasst_export: OasstOptions | None = Field(None, description="Open-Assistant message trees")
    vicuna: DatasetOptions | None = Field(None, description="ShareGPT conversations")
    dolly15k: DollyOptions | None = Field(None, description="databricks-dolly-15k")
    grade_school_math_instructions: DatasetOptions | None = Field(None, description="GSM8K as instructions")
    code_alpaca: DatasetOptions | None = Field(None, description="Code Alpaca")
    messages: MessagesOptions | None = Field(
        None, description="chat data of your own; under any other name with `source: messages`"
    )

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
        return mix

    @model_validator(mode="after")
    def _not_empty(self):
        if not self.chosen():
            raise ValueError("the mix is empty: list at least one data set")
        return self

    def chosen(self) -> dict[str, DatasetOptions]:
        """The data sets of the mix, in the schema's order, those of other names after them in the recipe's."""
        known = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: options for name, options in (known | self.__pydantic_extra__).items() if options is not None}

    @staticmethod
    def options_of(name: str) -> type[DatasetOptions]:
        """What a data set of this name can be given."""
        own = {"oasst_export": OasstOptions, "dolly15k": DollyOptions}
        return own.get(name) or (DatasetOptions if name in SOURCE_NAMES else MessagesOptions)


SOURCE_NAMES = frozenset(Datasets.model_fields) - {"messages"}


class Recipe(_Schema):
    """Every key of a recipe."""

    model_name: Annotated[str, Field(min_length=1)] = Field(
        description="folder or hub name of the base model (a causal LM)"
    )
    from_scratch: bool = Field(False, description="random weights, built from the config.json of model_name")
    trust_remote_code: bool = Field(False, description="run model code that comes with the checkpoint")
    max_length: Annotated[PositiveInt, Field(ge=2)] = Field(512, description="longest training example, tokens")
    fuse_gelu: bool = Field(True, description="tanh approximation in place of exact GELU, as the original trained")
    use_flash_attention: bool = Field(
        False, description="the fastest exact attention here: flash-attn, PyTorch's varlen kernels, else SDPA"
    )
    attn_implementation: Literal["flash_attention_2", "varlen_attn", "sdpa"] | None = Field(
        None, description="this attention and no other; null: by use_flash_attention"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, about 1/3 more work")
    torch_compile: bool = Field(False, description="compile the model's layers (minutes at the start)")

    datasets: Datasets = Field(description="the mix")
    cache_dir: Path = Field(Path(".cache"), description="where data files are looked up and prepared data are kept")
    drop_contaminated: bool = Field(False, description="leave out training conversations with GSM8K test questions")
    padding_free: bool = Field(True, description="conversations end to end; false: padded to the batch's longest")
    packing: bool = Field(
        False, description="whole conversations fill up rows of max_length, which count as one: fewer, fuller steps"
    )
    label_masking: bool = Field(True, description="score the replies only; false: every token")
    random_offset_probability: Annotated[float, Field(ge=0, le=1)] = Field(
        0.8, description="chance that a conversation over max_length is cut at a random place, not at its start"
    )
    use_system_tag: bool = Field(False, description="tell the properties of the reply in a system tag after the prompt")
    system_property_dropout: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="chance that a property is left out of the system tag"
    )
    system_add_length: bool = Field(False, description="put the length of the reply into the system tag")
    samples_mixing: bool = Field(False, description="the original's mixing of samples; only false is supported")
    use_custom_sampler: bool = Field(
        False, description="accepted for the original's recipes: fraction, size and sort_by_length work either way"
    )
    sort_by_length: bool = Field(False, description="batches of similar lengths, the batches shuffled")

    dtype: Literal["fp32", "fp16", "bf16"] = Field("fp16", description="precision of the forward and backward pass")
    num_train_epochs: Annotated[float, Field(gt=0, lt=2**31)] = Field(3, description="passes over the mix")
    max_steps: PositiveInt | None = Field(None, description="stop after this many optimizer steps; null: by epochs")
    per_device_train_batch_size: PositiveInt = Field(2, description="conversations per process and micro-batch")
    per_device_eval_batch_size: PositiveInt = Field(2, description="the same in evaluation")
    gradient_accumulation_steps: PositiveInt = Field(32, description="micro-batches per process and optimizer step")
    global_batch_size: PositiveInt | None = Field(
        None,
        description="conversations a step over all processes: accumulation follows; null: the product of the three",
    )
    learning_rate: Annotated[float, Field(ge=0, le=1)] = Field(1e-5, description="peak rate, reached after warm-up")
    warmup_steps: NonNegativeInt = Field(600, description="optimizer steps of warm-up, along DeepSpeed's logarithm")
    weight_decay: NonNegativeFloat = Field(0.0, description="AdamW's decoupled weight decay")
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="AdamW's beta 1")
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.95, description="AdamW's beta 2")
    adam_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(1e-12, description="AdamW's epsilon")
    max_grad_norm: NonNegativeFloat = Field(2.0, description="clip the global gradient norm to this; 0: do not clip")
    loss_normalization: Literal["tokens", "micro_batch"] = Field(
        "tokens", description="mean over all scored tokens of a step, or the original's mean of micro-batch means"
    )
    rng_seed: Annotated[int, BeforeValidator(_hexadecimal_too), Field(ge=0, lt=2**32)] = Field(
        0xA1221F97, description="everything random follows from it"
    )
    deepspeed_config: str | None = Field(None, description="DeepSpeed JSON; null: plain Accelerate")
    max_bad_steps: PositiveInt = Field(
        10,
        description="stop after so many steps in a row whose loss or gradient was no finite number; each is left out",
    )
    resume_from_checkpoint: Annotated[str, Field(min_length=1)] = Field(
        "auto", description="auto: output_dir's newest whole checkpoint, if any; never; or a checkpoint's folder"
    )

    output_dir: Path = Field(description="folder of the run: checkpoints, metrics, final model")
    log_dir: str = Field("base", description="folder of the wandb files, under output_dir")
    logging_steps: PositiveInt = Field(10, description="a line in metrics.jsonl every so many steps")
    eval_steps: PositiveInt = Field(200, description="evaluate every so many steps, and at the end")
    save_strategy: Literal["epoch", "steps", "no"] = Field("steps", description="when to write a checkpoint")
    save_steps: PositiveInt = Field(1000, description="a checkpoint every so many steps under save_strategy: steps")
    save_total_limit: PositiveInt | None = Field(4, description="keep the newest so many checkpoints; null: all")
    keep_trainer_state: PositiveInt | None = Field(
        2, description="only the newest so many checkpoints keep what resuming needs, 8 to 12 bytes a weight; null: all"
    )
    save_only_model: bool = Field(False, description="checkpoints of the model alone, from which no run can go on")
    sample_replies: NonNegativeInt = Field(
        0, description="at the end, print replies to so many held-out prompts of each data set"
    )
    log_wandb: bool = Field(True, description="log to Weights & Biases, offline when nobody is logged in")
    wandb_project: str = Field("supervised-finetuning", description="its project")

    @model_validator(mode="after")
    def _go_together(self):
        if self.packing and not self.padding_free:
            raise ValueError("packing: true needs padding_free: true")
        if self.packing and self.sort_by_length:
            raise ValueError("packing: true orders conversations by itself: give sort_by_length: false")
        if self.torch_compile and self.gradient_checkpointing:
            # In transformers 5.23 a layer's checkpoint lies inside its forward: torch.compile would give up, silently.
            raise ValueError(
                "torch_compile: true compiles nothing under gradient_checkpointing: true: give one of them"
            )
        return self

    @field_validator("samples_mixing")
    @classmethod
    def _no_samples_mixing(cls, value: bool) -> bool:
        if value:
            raise ValueError("only false is supported")
        return value

    @model_validator(mode="after")
    def _keep_the_base_model(self):
        if os.path.realpath(self.output_dir) == os.path.realpath(self.model_name):
            raise ValueError("output_dir is the folder of model_name: the run would overwrite its base model")
        return self

    def values(self) -> dict[str, Any]:
        """The resolved recipe as its YAML holds it, every key written out."""
        mix = [{name: options.model_dump(mode="json")} for name, options in self.datasets.chosen().items()]
        return self.model_dump(mode="json") | {"datasets": mix}

    def to_yaml(self) -> str:
        """The resolved recipe; loading it again gives an equal recipe."""
        # Not allow_unicode: PyYAML would write U+0085 as it is and read it as a line break.
        return yaml.safe_dump(self.values(), sort_keys=False, width=120)
