"""Ways to start a run: what the files of accelerate_configs/ ask for, as `StateLayout` knows it, and the command."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planning.cards import PER_MACHINE
from recipe.keys import Recipe
from recipe.strict_yaml import parse_yaml
from training.state_layout import StateLayout, deepspeed_layout, fsdp2_layout, replicated
from utils.errors import UserError, reason
from utils.files import read_json, read_text

ROOT = Path(__file__).parents[2]
FOLDER = "accelerate_configs"


@dataclass(frozen=True)
class Launcher:
    """An accelerate config with a number of processes.

    Attributes:
        config: its file, from the folder of the collection.
        layout: how its engine lays out the state.
        options: for `accelerate launch`.
        keys: for the recipe, which it needs to be run so.
    """

    config: str
    layout: StateLayout
    options: dict[str, str]
    keys: dict[str, str]

    @property
    def cards(self) -> int:
        return self.layout.processes

    @property
    def machines(self) -> int:
        return -(-self.cards // PER_MACHINE)

    def command(self, recipe_file: str, keys: Mapping[str, str]) -> str:
        """To be typed in the collection's folder, on each machine."""
        parts = ["accelerate launch", "--config_file", self.config]
        parts += [word for option in self.options.items() for word in option]
        parts += ["scripts/sft.py", shlex.quote(recipe_file)]
        parts += [f"--{key} {shlex.quote(value)}" for key, value in (dict(keys) | self.keys).items()]
        return " ".join(parts)


def launchers(recipe: Recipe, cards: int) -> Iterator[Launcher]:
    """What there is for a recipe on so many cards: every file of accelerate_configs/ whose engine takes it.

    Raises: UserError for a file that cannot be read, and numbers of cards of which machines of eight cannot be made.
    """
    machines = -(-cards // PER_MACHINE)
    if machines > 1 and cards % PER_MACHINE:
        raise UserError(f"command line: --gpus {cards}: more than {PER_MACHINE} are machines of {PER_MACHINE} each")
    for path in sorted((ROOT / FOLDER).glob("*.yaml")):
        name = f"{FOLDER}/{path.name}"
        settings = parse_yaml(read_text(path, "accelerate config"), name)[0]
        try:
            layout = _layout(settings, cards, machines)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{name}: not an accelerate config that can be planned with: {reason(error)}") from None
        if layout is None or not _takes(layout, recipe):
            continue
        options = {"--num_processes": str(cards)} if cards > 1 or layout.is_deepspeed else {}
        if machines > 1:
            options |= {"--num_machines": str(machines), "--machine_rank": "RANK", "--main_process_ip": "ADDRESS"}
            if layout.is_deepspeed:  # else accelerate starts the other machines by pdsh, from a host file
                options["--deepspeed_multinode_launcher"] = "standard"
        if layout.engine == "fsdp2" and layout.replicas > 1:
            option = "--parallelism_config_dp"
            options |= {f"{option}_replicate_size": str(layout.replicas), f"{option}_shard_size": str(layout.shards)}
        without = recipe.deepspeed_config and layout.engine == "plain"
        yield Launcher(name, layout, options, {"deepspeed_config": "null"} if without else {})


def _layout(settings: Mapping[str, Any], cards: int, machines: int) -> StateLayout | None:
    """Of the engine that an accelerate config asks for; None where it is not for GPUs, or not for so many."""
    kind = settings.get("distributed_type")
    if settings.get("use_cpu") == "true" or int(settings.get("num_machines", 1)) > 1:
        return None
    if kind == "NO":
        return replicated(1) if cards == 1 else None
    if kind == "MULTI_GPU":
        return replicated(cards) if cards > 1 else None
    if kind == "DEEPSPEED":
        return deepspeed_layout(_zero_section(settings["deepspeed_config"]), cards)
    fsdp = settings.get("fsdp_config") or {}
    if kind == "FSDP" and cards > 1 and fsdp.get("fsdp_version") == "2":
        hybrid = "parallelism_config" in settings  # a replica for each machine, so that weights travel within it
        if hybrid and machines == 1:
            return None
        offload = fsdp.get("fsdp_offload_params") == "true"
        reshard = fsdp.get("fsdp_reshard_after_forward", "true") == "true"
        return fsdp2_layout(cards, machines if hybrid else 1, reshard, offload)
    return None


def _zero_section(plugin: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of DeepSpeed's config in a file, or spelled out in the accelerate config."""
    if file := plugin.get("deepspeed_config_file"):
        return read_json(ROOT / file, "deepspeed_config_file")["zero_optimization"]
    offloads = {
        name: {"device": plugin.get(f"{name}_device", "none")} for name in ("offload_optimizer", "offload_param")
    }
    return {"stage": int(plugin["zero_stage"]), **offloads}


def _takes(layout: StateLayout, recipe: Recipe) -> bool:
    """Whether `sft.py` trains the recipe so, by what training/deepspeed_config.py and fsdp_config.py refuse."""
    if layout.is_deepspeed and recipe.optimizer_state_dtype != "fp32":
        return False
    if layout.engine == "zero3" and (recipe.use_peft or recipe.torch_compile):
        return False
    if layout.engine == "fsdp2" and (recipe.use_peft or (layout.optimizer_on_host and recipe.dtype == "fp16")):
        return False
    return layout.engine == "plain" or not recipe.load_in_4bit
