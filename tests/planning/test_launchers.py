"""What accelerate_configs/ offers on so many cards, the commands, and files that a user has put there."""

import json
import shlex
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT
from transformers import GPTNeoXConfig

from planning import launchers as module
from planning.cards import find_card
from planning.launchers import launchers
from planning.mixes import find_mix
from planning.search import make_subject, plan_run
from recipe.load import load_recipe
from training.memory import check_memory
from training.state_layout import deepspeed_layout, fsdp2_layout, replicated
from utils.errors import UserError

SEED = ROOT / "recipes" / "stablelm7b_oasst.yaml"
ZERO2 = deepspeed_layout(json.loads((ROOT / "ds_configs" / "zero2.json").read_text())["zero_optimization"], 4)
FSDP = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": False}}
HYBRID = FSDP | {"parallelism_config": {"parallelism_config_dp_replicate_size": 2}}


def offered(cards: int, **keys) -> dict[str, object]:
    """The layouts by the names of the files, of those that this test knows."""
    found = launchers(load_recipe(SEED, {name: str(value) for name, value in keys.items()}), cards)
    return {each.config.split("/")[1].removesuffix(".yaml"): each.layout for each in found}


def test_what_ships():
    assert offered(1)["single_gpu"] == replicated(1)
    assert {"ddp": replicated(4), "zero2": ZERO2}.items() <= offered(4).items()
    assert not {"cpu", "ddp", "multi_node"} & offered(1).keys()
    assert "single_gpu" not in offered(2)


def test_adapters_and_moments_in_bf16_go_where_they_can():
    adapters = {"use_peft": "true", "fuse_gelu": "false"}
    assert offered(4, **adapters).keys() == {"ddp", "zero2", "zero2_offload"}
    assert offered(4, **adapters, load_in_4bit="true", deepspeed_config="null").keys() == {"ddp"}
    assert not any(each.is_deepspeed for each in offered(4, optimizer_state_dtype="bf16").values())
    compiled = offered(4, torch_compile="true", gradient_checkpointing="false").keys()
    assert "zero2" in compiled
    assert not {"zero3", "zero3_offload"} & compiled


@pytest.mark.parametrize("cards", [1, 2, 8, 16])
def test_a_command_is_what_accelerate_and_sft_take(cards):
    for launcher in launchers(load_recipe(SEED), cards):
        command = launcher.command("recipes/stablelm7b_oasst.yaml", {"micro_batch_tokens": "8192"})
        words = shlex.split(command)
        assert words[:2] == ["accelerate", "launch"]
        words = ["0" if word == "RANK" else word for word in words[2:]]
        options = launch_command_parser().parse_args(words)
        assert (ROOT / options.config_file).exists()
        assert options.training_script == "scripts/sft.py"
        assert cards == int(options.num_processes or 1)
        recipe, *keys = options.training_script_args
        changes = dict(zip([key.removeprefix("--") for key in keys[::2]], keys[1::2], strict=True))
        changed = load_recipe(ROOT / recipe, changes)
        assert changed.micro_batch_tokens == 8192
        assert (changed.deepspeed_config is None) == (launcher.layout.engine == "plain")
        if cards == 16:
            assert (options.num_machines, options.main_process_ip) == (2, "ADDRESS")
            by_itself = options.deepspeed_multinode_launcher == "standard"
            assert by_itself == launcher.layout.is_deepspeed  # and not by pdsh


def test_what_the_engine_needs_stands_over_what_was_asked():
    recipe = load_recipe(SEED, {"deepspeed_config": "ds_configs/zero2.json"})
    (alone,) = [launcher for launcher in launchers(recipe, 1) if launcher.layout.engine == "plain"]
    command = alone.command(str(SEED), {"deepspeed_config": "ds_configs/zero2.json"})
    assert "--deepspeed_config null" in command
    assert "zero2" not in command


def test_a_path_with_a_space_is_quoted():
    launcher = next(launchers(load_recipe(SEED), 1))
    assert shlex.split(launcher.command("my recipe.yaml", {"output_dir": "a b"}))[-4:-2] != ["my", "recipe.yaml"]
    assert "'my recipe.yaml'" in launcher.command("my recipe.yaml", {})


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """Call it with the settings of an accelerate config: the one that there is."""
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "accelerate_configs").mkdir()

    def write(settings) -> None:
        text = settings if isinstance(settings, str) else json.dumps({"num_processes": 4} | settings)
        (tmp_path / "accelerate_configs" / "mine.yaml").write_text(text)

    return write


@pytest.mark.parametrize(
    ("settings", "cards", "layout"),
    [
        (FSDP, 4, fsdp2_layout(4)),
        ({**FSDP, "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True}}, 4, fsdp2_layout(4, offload=True)),
        (
            {**FSDP, "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": False}},
            4,
            fsdp2_layout(4, 1, False),
        ),
        (HYBRID, 16, fsdp2_layout(16, replicas=2)),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3, "offload_param_device": "cpu"}},
            2,
            deepspeed_layout({"stage": 3, "offload_param": {"device": "cpu"}}, 2),
        ),
    ],
)
def test_a_config_of_ones_own(configs, settings, cards, layout):
    configs(settings)
    assert offered(cards, dtype="bf16") == {"mine": layout}
    refused = layout.engine == "fsdp2" and layout.optimizer_on_host  # in fp16
    assert offered(cards, dtype="fp16") == ({} if refused else {"mine": layout})


@pytest.mark.parametrize(
    ("settings", "cards"),
    [
        (FSDP, 1),
        (HYBRID, 4),
        ({**FSDP, "fsdp_config": {"fsdp_version": 1}}, 4),
        ({"distributed_type": "XLA"}, 4),
        ({"distributed_type": "MULTI_GPU", "num_machines": 2}, 4),
        ({"distributed_type": "NO", "use_cpu": True}, 1),
    ],
)
def test_a_config_for_something_else_is_passed_over(configs, settings, cards):
    configs(settings)
    assert offered(cards) == {}


@pytest.mark.parametrize(
    "settings",
    [
        "",
        "- a list",
        "not: [closed",
        {"distributed_type": "DEEPSPEED"},
        {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": "two"}},
        {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "gone.json"}},
        {"distributed_type": "MULTI_GPU", "num_machines": "many"},
    ],
)
def test_a_damaged_config_is_one_line(configs, settings):
    configs(settings)
    with pytest.raises(UserError, match=r"(mine\.yaml|gone\.json)") as problem:
        offered(4)
    assert "\n" not in str(problem.value)


# ---- As the run itself says ----


@pytest.mark.parametrize("cards", [1, 4])
def test_the_run_itself_says_the_same(cards, monkeypatch, capsys):
    """What `preflight` prints on such a GPU, with the keys of the plan."""
    config = GPTNeoXConfig(vocab_size=50432, hidden_size=2048, num_attention_heads=16, intermediate_size=8192)
    recipe, card = load_recipe(SEED), find_card("h100")
    subject = make_subject(recipe, config, find_mix(recipe)[0])
    monkeypatch.setattr("training.memory.has_gpu", lambda: True)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=2**40))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=card.memory))
    for launcher in launchers(recipe, cards):
        plan = plan_run(subject, launcher, card)
        assert plan.fits
        run = load_recipe(SEED, launcher.keys | plan.keys)
        shape = (1, run.micro_batch_tokens)
        check_memory(run, config, subject.parameters, launcher.layout, torch.float16, shape)
        said = capsys.readouterr().out.splitlines()[-1]
        assert f"memory, estimated: {plan.peak / 2**30:.3g} GiB of the 79.6 GiB" in said
        assert f"optimizer {plan.parts['optimizer'] / 2**30:.3g} GiB" in said or not plan.parts["optimizer"] >= 2**30
        assert "warning" not in said
