"""What `accelerate launch` hands on of an accelerate config: honoured, or refused by name."""

import os

import pytest
import torch
import yaml
from conftest import ROOT
from forking import launched_environments
from mixes import make_recipe

from training.deepspeed_config import deepspeed_config
from training.launcher_config import hide_plugins
from utils.errors import UserError
from utils.launch import launcher_plugin


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Stand in the environment of the first process, under one of our configs with some keys of it changed."""

    def launch(name: str, *options: str, **keys) -> None:
        config = yaml.safe_load((ROOT / "accelerate_configs" / f"{name}.yaml").read_text())
        for key, value in keys.items():
            config[key] = config.get(key, {}) | value if isinstance(value, dict) else value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config | {"num_processes": 2, "main_process_port": 29500}))
        for variable, value in launched_environments(["--config_file", str(path), *options], "sft.py")[0].items():
            monkeypatch.setenv(variable, value)
        monkeypatch.chdir(ROOT)

    return launch


def find(**keys):
    return deepspeed_config(make_recipe(max_grad_norm=2.0, gradient_accumulation_steps=3, **keys), 10, torch.float32)


REFUSED = [
    ("ddp", {"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "dynamo_backend: remove it: the recipe's torch_compile"),
    ("fsdp2", {"dynamo_config": {"dynamo_backend": "EAGER"}}, "dynamo_backend: remove it"),
    ("ddp", {"parallelism_config": {"parallelism_config_dp_shard_size": 2}}, "dp_shard_size = 2: remove it"),
    ("zero2", {"parallelism_config": {"parallelism_config_sp_size": 2}}, "sp_size = 2: remove it"),
    ("zero2", {"deepspeed_config": {"zero_stages": 3}}, "unknown key zero_stages: did you mean zero_stage?"),
    ("zero3", {"deepspeed_config": {"deepspeed_moe_layer_cls_names": "Expert"}}, "cls_names: remove it"),
    ("zero2", {"deepspeed_config": {"zero_stage": 3}}, "zero_stage = 3 contradicts ds_configs/zero2.json, by which "),
    ("zero2", {"deepspeed_config": {"gradient_clipping": 0.5}}, "by which gradient_clipping = 2.0: remove it"),
    ("zero3", {"deepspeed_config": {"gradient_accumulation_steps": 8}}, "gradient_accumulation_steps = 3: remove it"),
    ("zero2", {"deepspeed_config": {"offload_optimizer_device": "cpu"}}, "offload_optimizer.device = none: remove it"),
    ("zero3_offload", {"deepspeed_config": {"offload_param_device": "none"}}, "offload_param.device = cpu: remove it"),
]


@pytest.mark.parametrize(("config", "changes", "message"), REFUSED)
def test_what_would_be_passed_over_is_refused(launched, config, changes, message):
    launched(config, **changes)
    with pytest.raises(UserError) as told:
        find()
    assert str(told.value).startswith("the accelerate config: ")
    assert message in str(told.value)


def test_a_flag_of_the_launcher_counts_as_a_key_of_its_config(launched):
    launched("zero2", "--zero_stage", "3")
    with pytest.raises(UserError, match="zero_stage = 3 contradicts"):
        find()


def test_megatron_is_refused_where_it_would_be_started(monkeypatch):
    """On GPUs: without one `accelerate launch` starts one process, and says nothing of it."""
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(UserError, match="Megatron-LM is not supported"):
        find()


SAME = [
    ("zero2", {"deepspeed_config": {"zero_stage": 2, "gradient_clipping": 2, "gradient_accumulation_steps": 3}}),
    ("zero2", {"deepspeed_config": {"offload_optimizer_device": "none", "zero3_save_16bit_model": True}}),
    ("zero3_offload", {"deepspeed_config": {"offload_optimizer_device": "cpu", "zero3_init_flag": True}}),
    ("zero2", {"dynamo_config": {"dynamo_backend": "NO"}, "mixed_precision": "bf16"}),
    ("fsdp2", {"parallelism_config": {"parallelism_config_dp_shard_size": 2}}),
    ("ddp", {"parallelism_config": {"parallelism_config_tp_size": 1}}),
]


@pytest.mark.parametrize(("config", "changes"), SAME)
def test_what_says_the_same_or_nothing_is_taken(launched, config, changes):
    launched(config, **changes)
    assert (find() is None) == config.startswith(("fsdp", "ddp"))


def test_nothing_is_left_for_accelerate_of_a_plugin_that_is_hidden(launched):
    launched("hsdp", parallelism_config={"parallelism_config_dp_replicate_size": 1})
    assert launcher_plugin() == "fsdp"
    hide_plugins("deepspeed", "fsdp")
    assert launcher_plugin() is None
    assert not [name for name in os.environ if name.startswith("ACCELERATE_USE_") and os.environ[name] == "true"]
