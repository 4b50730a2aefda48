"""The keys of a recipe: each with its type, its default, a one-line meaning and what another value changes.

Scalars arrive as text (`recipe/strict_yaml.py`) and become numbers and booleans here, where the key asks for one. What
the mix can be given stands in `recipe/dataset_keys.py`.

Defaults come from the `defaults` block of the original trainer, LAION-AI/Open-Assistant
model/model_training/configs/config.yaml (April 2023), where it has the key.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, model_validator

from recipe.dataset_keys import Datasets
from sources.source import NonNegativeFloat, NonNegativeInt, PositiveInt, Schema, WholeNumber, key

# Keys of the original's recipes that are accepted and do nothing here, each with the values of which that is true; of
# those with None, any.
IGNORED: dict[str, tuple[str, ...] | None] = {
    "datasets_extra": ("[]", "null"),
    "eval_accumulation_steps": None,
    "eval_size": ("null",),
    "freeze_layer": ("null",),
    "is_reward_model": ("false",),
    "loss_fn": ("CrossEntropyLoss",),
    "per_digit_tokens": ("false",),
    "poly_eps": None,  # of another loss_fn
    "quantization": ("false",),
    "samples_mixing": ("false",),
    "seq2seqmodel": ("false",),
    "system_prefix": None,  # of use_system_prefix
    "use_custom_sampler": None,  # fraction, size and sort_by_length work either way
    "use_system_prefix": ("false",),
    "verbose": None,
}


def problem_of_ignored(name: str, value: Any) -> str | None:
    """What is wrong with the value of a key of IGNORED; None where it does nothing, as promised."""
    given = "null" if value is None else str(value)
    spelled = {"none": "null", "~": "null", "": "null", "no": "false", "off": "false", "0": "false", "n": "false"}
    text = spelled.get(given.lower(), given if name == "loss_fn" else given.lower())
    allowed = IGNORED[name]
    return None if allowed is None or text in allowed else f"only {' or '.join(allowed)} is supported"


def expand_home(value: Any) -> Any:
    """A path with its ~ replaced, as a shell does it where it sees one: not in --output_dir=~/x or in a file.

    `./~`, which means a folder of that name, becomes absolute: written down it would lose its first two characters.
    """
    if not isinstance(value, str | os.PathLike):
        return value
    text = os.fspath(value)
    expanded = os.path.expanduser(text)
    return os.path.abspath(text) if str(Path(text)).startswith("~") and not text.startswith("~") else expanded


def as_list(value: Any) -> Any:
    """A name in place of a list of one, and null of an empty one."""
    return [value] if isinstance(value, str) else [] if value is None else value


def target_modules(value: Any) -> Any:
    """lora_target_modules as `as_list`; null for `all-linear`, as peft and TRL call all linear layers of the body."""
    return None if value in (None, "all-linear", ["all-linear"]) else as_list(value)


FolderPath = Annotated[Path, BeforeValidator(expand_home)]
PathText = Annotated[str, BeforeValidator(expand_home)]
ModuleName = Annotated[str, Field(min_length=1)]


class Recipe(Schema):
    """Every key of a recipe."""

    model_name: PathText = key(..., "folder or hub name of the base model (a causal LM)", "training", min_length=1)
    from_scratch: bool = key(False, "random weights, built from the config.json of model_name", "training")
    trust_remote_code: bool = key(False, "run model code that comes with the checkpoint", "")
    max_length: Annotated[PositiveInt, Field(ge=2)] = key(
        512, "longest training example, tokens", "training evaluation"
    )
    fuse_gelu: bool = key(
        True, "tanh approximation in place of exact GELU, as the original trained", "training evaluation"
    )
    use_flash_attention: bool = key(
        False, "the fastest exact attention here: PyTorch's varlen kernels, flash-attn, else SDPA", ""
    )
    attn_implementation: Literal["flash_attention_2", "varlen_attn", "sdpa"] | None = key(
        None, "this attention and no other; null: by use_flash_attention", ""
    )
    gradient_checkpointing: bool = key(False, "recompute activations: less memory, about 1/3 more work", "")
    torch_compile: bool = key(False, "compile the model's layers (minutes at the start)", "")

    use_peft: bool = key(False, "train low-rank adapters (LoRA) on the frozen model, by peft", "training")
    lora_r: PositiveInt = key(16, "rank of the adapters", "training")
    lora_alpha: PositiveInt = key(32, "adapters are scaled by lora_alpha / lora_r", "training")
    lora_dropout: float = key(0.05, "dropout of what goes into an adapter", "training", ge=0, lt=1)
    lora_target_modules: Annotated[list[ModuleName] | None, BeforeValidator(target_modules)] = key(
        None, "names of linear layers that get one; null or all-linear: all of the body", "training", min_length=1
    )
    use_rslora: bool = key(False, "scale by lora_alpha / sqrt(lora_r) (rank-stabilized LoRA)", "training")
    use_dora: bool = key(False, "train the lengths of the weights' columns, too (DoRA)", "training")
    load_in_4bit: bool = key(False, "hold the frozen model in 4 bits a weight (QLoRA), by bitsandbytes", "training")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = key("nf4", "the kind of these 4 bits", "training")
    merge_adapter: bool = key(False, "the final model with the adapters merged into its weights", "")

    datasets: Datasets = key(..., "the mix", "")  # of its options each says what it changes
    cache_dir: FolderPath = key(Path(".cache"), "where data files are looked up and prepared data are kept", "")
    drop_contaminated: bool = key(False, "leave out training conversations with GSM8K test questions", "training")
    padding_free: bool = key(True, "conversations end to end; false: padded to the batch's longest", "")
    packing: bool = key(
        False, "whole conversations fill up rows of max_length, which count as one: fewer, fuller steps", "training"
    )
    label_masking: bool = key(True, "score the replies only; false: every token", "data training evaluation")
    random_offset_probability: float = key(
        0.8,
        "chance that a conversation over max_length is cut at a random place, not at its start",
        "training",
        ge=0,
        le=1,
    )
    use_system_tag: bool = key(
        False, "tell the properties of the reply in a system tag after the prompt", "data training evaluation"
    )
    system_property_dropout: float = key(
        0.5, "chance that a property is left out of the system tag", "data training evaluation", ge=0, le=1
    )
    system_add_length: bool = key(False, "put the length of the reply into the system tag", "data training evaluation")
    sort_by_length: bool = key(False, "batches of similar lengths, the batches shuffled", "training")

    dtype: Literal["fp32", "fp16", "bf16"] = key(
        "fp16", "precision of the forward and backward pass", "training evaluation"
    )
    num_train_epochs: float = key(3, "passes over the mix", "training", gt=0, lt=2**31)
    max_steps: PositiveInt | None = key(None, "stop after this many optimizer steps; null: by epochs", "training")
    per_device_train_batch_size: PositiveInt = key(2, "conversations per process and micro-batch", "step")
    per_device_eval_batch_size: PositiveInt = key(2, "the same in evaluation", "")
    gradient_accumulation_steps: PositiveInt = key(32, "micro-batches per process and optimizer step", "step")
    global_batch_size: PositiveInt | None = key(
        None, "conversations a step over all processes: accumulation follows; null: the product of the three", "step"
    )
    micro_batch_tokens: PositiveInt | None = key(
        None, "cut micro-batches, of evaluation too, by tokens, at most so many in each; null: by the batch sizes", ""
    )
    learning_rate: float = key(1e-5, "peak rate, reached after warm-up", "training", ge=0, le=1)
    warmup_steps: NonNegativeInt = key(600, "optimizer steps of warm-up, along DeepSpeed's logarithm", "training")
    weight_decay: NonNegativeFloat = key(0.0, "AdamW's decoupled weight decay", "training")
    adam_beta1: float = key(0.9, "AdamW's beta 1", "training", ge=0, lt=1)
    adam_beta2: float = key(0.95, "AdamW's beta 2", "training", ge=0, lt=1)
    adam_epsilon: float = key(1e-12, "AdamW's epsilon", "training", gt=0, allow_inf_nan=False)
    optimizer_state_dtype: Literal["fp32", "bf16"] = key(
        "fp32", "dtype of Adam's moments; bf16, rounded at random: 4 bytes a weight in place of 8", "training"
    )
    max_grad_norm: NonNegativeFloat = key(2.0, "clip the global gradient norm to this; 0: do not clip", "training")
    loss_normalization: Literal["tokens", "micro_batch"] = key(
        "tokens", "mean over all scored tokens of a step, or the original's mean of micro-batch means", "training"
    )
    label_smoothing: float = key(
        0.0, "share of each target that goes to all of the vocabulary evenly; 0: off", "training", ge=0, lt=1
    )
    z_loss: NonNegativeFloat = key(0.0, "factor of log(Z)^2 in a token's loss, Z its softmax's sum; 0: off", "training")
    neftune_noise_alpha: NonNegativeFloat = key(
        0.0, "NEFTune's noise on the embeddings, 5 to 15 in its paper; 0: off", "training"
    )
    rng_seed: Annotated[WholeNumber, Field(ge=0, lt=2**32)] = key(
        0xA1221F97, "everything random follows from it", "data training evaluation"
    )
    deepspeed_config: PathText | None = key(None, "DeepSpeed JSON; null: plain Accelerate", "")
    max_bad_steps: PositiveInt = key(
        10, "stop after so many steps in a row whose loss or gradient was no finite number; each is left out", ""
    )
    stall_minutes: float | None = key(
        None, "end the run when no process has come further for so many minutes; null: never", "", ge=0.05, le=10_000
    )
    resume_from_checkpoint: PathText = key(
        "auto", "auto: output_dir's newest whole checkpoint, if any; never; or a checkpoint's folder", "", min_length=1
    )

    output_dir: FolderPath = key(..., "folder of the run: checkpoints, metrics, final model", "")
    log_dir: str = key("base", "folder of the files of wandb and TensorBoard, under output_dir", "")
    logging_steps: PositiveInt = key(10, "a line in metrics.jsonl every so many steps", "")
    eval_steps: PositiveInt = key(200, "evaluate every so many steps, and at the end", "")
    sample_every: PositiveInt | None = key(
        None, "greedy replies at the first evaluation after each so many steps, and at the end; null: none", ""
    )
    sample_prompts: PathText | None = key(
        None, "to these prompts: .txt, one a line, or .json or .jsonl of chat data", ""
    )
    early_stopping_metric: str = key(
        "eval_loss", "of the evaluation's, what the best is by: eval_loss, eval_<dataset>_accuracy, ...", "training"
    )
    early_stopping_patience: PositiveInt | None = key(
        None, "end after so many evaluations in a row that are not the best; null: by steps and epochs", "training"
    )
    save_strategy: Literal["epoch", "steps", "no"] = key("steps", "when to write a checkpoint", "")
    save_steps: PositiveInt = key(1000, "a checkpoint every so many steps under save_strategy: steps", "")
    save_in_background: bool = key(True, "go on training while a checkpoint is written, from a copy in memory", "")
    save_total_limit: PositiveInt | None = key(4, "keep the newest so many checkpoints; null: all", "")
    keep_best: bool = key(False, "save at each evaluation that is the best so far, and keep the newest of these", "")
    keep_trainer_state: PositiveInt | None = key(
        2, "only the newest so many checkpoints keep what resuming needs, 4 to 12 bytes a weight; null: all", ""
    )
    save_only_model: bool = key(False, "checkpoints of the model alone, from which no run can go on", "")
    sample_replies: NonNegativeInt = key(
        0, "at the end, print replies to so many held-out prompts of each data set", ""
    )
    log_wandb: bool = key(True, "log to Weights & Biases, offline when nobody is logged in", "")
    log_with: Annotated[list[Literal["wandb", "tensorboard", "trackio", "mlflow"]], BeforeValidator(as_list)] = key(
        [], "trackers to log to beside it", ""
    )
    wandb_project: str = key("supervised-finetuning", "its project, trackio's too, and MLflow's experiment", "")

    @model_validator(mode="before")
    @classmethod
    def _leave_out_ignored(cls, values: Any) -> Any:
        if not isinstance(values, dict):  # which pydantic refuses
            return values
        return {name: value for name, value in values.items() if name not in IGNORED}

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
        self._check_adapters()
        self._check_what_is_learnt()
        if self.micro_batch_tokens is not None:
            self._check_micro_batch_tokens(self.micro_batch_tokens)
        if os.path.realpath(self.output_dir) == os.path.realpath(self.model_name):
            raise ValueError("output_dir is the folder of model_name: the run would overwrite its base model")
        return self

    def _check_adapters(self) -> None:
        of_adapters = ("load_in_4bit", "use_rslora", "use_dora", "lora_target_modules", "merge_adapter")
        for name in () if self.use_peft else of_adapters:
            if getattr(self, name):
                raise ValueError(f"{name} says how adapters are trained: give use_peft: true too")
        if self.use_peft and self.from_scratch:
            raise ValueError("use_peft: true trains adapters on a model that is kept: give from_scratch: false")
        if self.use_peft and self.torch_compile:
            raise ValueError("torch_compile: true does not compile layers with adapters: give it or use_peft: true")
        if self.load_in_4bit and self.deepspeed_config:
            raise ValueError(
                "load_in_4bit: true is not for DeepSpeed, which would make half precision of what is packed: give "
                "deepspeed_config: null"
            )

    def _check_what_is_learnt(self) -> None:
        mix = self.datasets.chosen()
        if not any(options.weight for options in mix.values()):
            raise ValueError("every data set of the mix has weight: 0, so that nothing is learnt: give one another")
        for name, options in mix.items():
            if options.train_on == "last" and not self.label_masking:
                raise ValueError(f"datasets.{name}.train_on: last scores one reply, label_masking: false every token")

    def _check_micro_batch_tokens(self, tokens: int) -> None:
        if tokens < self.max_length:
            raise ValueError(
                f"micro_batch_tokens = {tokens}: a conversation of max_length = {self.max_length} tokens has to fit "
                "into a micro-batch: give at least that, or a smaller max_length"
            )
        if self.loss_normalization == "micro_batch":
            raise ValueError(
                f"micro_batch_tokens = {tokens} changes what is averaged under loss_normalization: micro_batch: give "
                "loss_normalization: tokens, or micro_batch_tokens: null"
            )

    def values(self) -> dict[str, Any]:
        """The resolved recipe as its YAML holds it, every key written out."""
        mix = [{name: options.model_dump(mode="json")} for name, options in self.datasets.chosen().items()]
        return self.model_dump(mode="json") | {"datasets": mix}

    def to_yaml(self) -> str:
        """The resolved recipe; loading it again gives an equal recipe."""
        # Not allow_unicode: PyYAML would write U+0085 as it is and read it as a line break.
        return yaml.safe_dump(self.values(), sort_keys=False, width=120)
