"""FSDP2 and hybrid shards on real processes over gloo, beside plain training in one; and what launchers ask for."""

import json

import pytest
import torch
import yaml
from conftest import ROOT, run_script
from forking import launched_environments
from mixes import make_recipe
from test_loss import make_model

from planning.work import traffic_of
from training.fsdp_config import Sharding, find_sharding, sharded_layers
from training.memory import model_size
from training.state_layout import fsdp2_layout
from utils.errors import UserError

MICRO_BATCHES = 2  # of each process in a step
UNITS = 3  # that are gathered one by one: two layers, and the rest of the model


@pytest.fixture(scope="module", params=[("fsdp2x2", "bf16"), ("hsdp2x2", "fp32")], ids=lambda each: each[0])
def measured(request, tmp_path_factory):
    """What fsdp_worker.py found, and how."""
    launch, dtype = request.param
    folder = tmp_path_factory.mktemp(launch)
    worker = "tests/training/fsdp_worker.py"
    run_script(folder / "found.json", dtype, launch=launch, script=worker, output_dir=folder)
    return launch, dtype, json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize(
    "case", ["gpt_neox", "llama_tied", "phi_bias", "narrow", "gathered once", "on the host", "fp16"]
)
def test_steps_are_those_of_plain_training(measured, case):
    """Also where one process alone has something to train on; measured in fp32: 2e-7, in bf16: norms 1e-3."""
    _, dtype, found = measured
    found, exact = found[case], dtype == "fp32" and case != "fp16"
    assert found["sharded"]
    assert found["norms"] == pytest.approx(found["expected_norms"], rel=1e-5 if exact else 1e-2)
    assert found["evaluated"] == pytest.approx(found["expected_evaluated"], rel=1e-5 if exact else 1e-2)
    assert found["reply"] == found["expected_reply"] or not exact
    assert found["weights"] < (1e-5 if exact else 2e-3)  # rates come to 1e-3: where Adam sees noise, its sign decides


@pytest.mark.parametrize("case", ["gpt_neox", "llama_tied", "phi_bias", "narrow"])
def test_each_process_holds_rows_and_every_element_is_written_once(measured, case):
    _, dtype, found = measured
    rows = list(zip(*found[case]["rows"], strict=True))
    assert len(rows) > 10
    assert any(set(own) == {0, 1} for own in rows) == (case == "narrow")
    for own in rows:
        assert len(set(own)) <= 2
        assert max(own) - min(own) <= 1
    assert found[case]["covered"] == [1, 1]
    assert found[case]["file_dtype"] == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[dtype]


def test_nothing_is_sent_that_need_not_be(measured):
    """Two micro-batches: weights for the forward pass and, but for those that are needed last and first, for the
    backward pass; gradients of each as rows; between replicas once a step. And the counts of targets, and the norm."""
    launch, _, found = measured
    replicas = UNITS * (launch == "hsdp2x2")
    expected = {"_reduce_scatter_base_": 2 * UNITS, "allreduce_": 2 + replicas}
    assert found["gpt_neox"]["traffic"] == {**expected, "_allgather_base_": 2 * (2 * UNITS - 1)}
    assert found["gathered once"]["traffic"] == {**expected, "_allgather_base_": UNITS}


@pytest.mark.parametrize("case", ["gpt_neox", "llama_tied", "gathered once"])
def test_as_many_bytes_travel_as_are_planned(measured, case):
    """On rings: of what is gathered or scattered each process sends all but its own share. (But for the counts of
    targets and the norm, and the last norm of the model, which the plan takes for a part of the layers.)"""
    launch, _, found = measured
    replicas, element = (2, 4) if launch == "hsdp2x2" else (1, 2)
    layout = fsdp2_layout(2 * replicas, replicas, reshard=case != "gathered once")
    config = make_model("llama_tied" if case == "llama_tied" else "gpt_neox").config
    traffic = traffic_of(layout, model_size(config, found[case]["parameters"]), element)
    sent = found[case]["bytes"]
    shared = (sent["_allgather_base_"] + sent["_reduce_scatter_base_"]) / 2
    assert shared == pytest.approx(MICRO_BATCHES * traffic.micro_batch + traffic.step, rel=0.005)
    assert sent["allreduce_"] * (replicas > 1) == pytest.approx(traffic.replicas, rel=0.005)


def test_where_one_process_overflows_all_leave_the_step_out(measured):
    _, _, found = measured
    assert set(found["overflow"]["scales"]) == {2.0**15}
    assert all(weights == [1.0] * 4 for weights in found["overflow"]["weights"])


# ---- What a launcher asks for ----


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Stand in the environment that `accelerate launch` gives to the first process, under one of our configs with some
    keys of it changed."""

    def launch(name: str, processes: int = 4, fsdp: dict | None = None, **keys) -> None:
        config = yaml.safe_load((ROOT / "accelerate_configs" / f"{name}.yaml").read_text())
        config["fsdp_config"] |= fsdp or {}
        config |= {"num_processes": processes, "main_process_port": 29500, **keys}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        for variable, value in launched_environments(["--config_file", str(tmp_path / "config.yaml")], "sft.py")[
            0
        ].items():
            monkeypatch.setenv(variable, value)

    return launch


LAYERS = ("GPTNeoXLayer", "Other")
ASKED = [
    ("fsdp2", 4, {}, Sharding(1, True, False)),
    ("fsdp2", 2, {"fsdp_reshard_after_forward": False}, Sharding(1, False, False)),
    ("fsdp2", 2, {"fsdp_offload_params": True}, Sharding(1, True, True)),
    # As `accelerate config` writes it.
    ("fsdp2", 4, {"fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}, Sharding(1, True, False)),
    (
        "fsdp2",
        4,
        {"fsdp_transformer_layer_cls_to_wrap": "GPTNeoXLayer", "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
        Sharding(1, True, False, ("GPTNeoXLayer",)),
    ),
    ("fsdp2", 4, {"fsdp_transformer_layer_cls_to_wrap": "GPTNeoXLayer, Other"}, Sharding(1, True, False, LAYERS)),
    ("fsdp2", 4, {"fsdp_cpu_ram_efficient_loading": False}, Sharding(1, True, False)),
    ("hsdp", 4, {}, Sharding(2, True, False)),
]


@pytest.mark.parametrize(("config", "processes", "changes", "expected"), ASKED)
def test_a_config_is_read(launched, config, processes, changes, expected):
    launched(config, processes, changes)
    sharding = find_sharding(make_recipe(), torch.bfloat16)
    assert sharding == expected
    assert sharding.shards * sharding.replicas == processes


REFUSED = [
    ({"fsdp_version": 1, "fsdp_reshard_after_forward": "FULL_SHARD"}, "fsdp_version = 1: give 2"),
    ({"fsdp_reshard_after_forward": "SHARD_GRAD_OP"}, "fsdp_reshard_after_forward = shard_grad_op: give true or false"),
    ({"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy = size_based_wrap: remove it"),
    ({"fsdp_auto_wrap_policy": "NO_WRAP"}, "fsdp_auto_wrap_policy = no_wrap: remove it"),
    ({"fsdp_sharding_strategy": "HYBRID_SHARD"}, "fsdp_sharding_strategy = hybrid_shard: remove it"),
    ({"fsdp_state_dict_type": "FULL_STATE_DICT"}, "fsdp_state_dict_type = full_state_dict: remove it"),
    ({"fsdp_activation_checkpointing": True}, "gradient_checkpointing says it"),
    ({"fsdp_forward_prefetch": True}, "fsdp_forward_prefetch = true: remove it"),
    ({"fsdp_ignored_modules": "lm_head"}, "fsdp_ignored_modules = lm_head: remove it"),
    ({"fsdp_offload_params": "perhaps"}, "fsdp_offload_params = perhaps: give true or false"),
]


def test_what_accelerate_config_writes_by_itself_is_taken(launched):
    own = {"fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    own |= {
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_offload_params": False,
        "fsdp_activation_checkpointing": False,
    }
    launched("fsdp2", 2, own)
    assert find_sharding(make_recipe(), torch.bfloat16).shards == 2


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_had_is_named(launched, changes, message):
    launched("fsdp2", 2, changes)
    with pytest.raises(UserError, match=message) as told:
        find_sharding(make_recipe(), torch.bfloat16)
    assert str(told.value).startswith("the accelerate config: ")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dp_replicate_size": 4, "dp_shard_size": 1}, "has to be the number of processes, 4"),
        ({"dp_replicate_size": 2, "dp_shard_size": 4}, "has to be the number of processes, 4"),
        ({"dp_replicate_size": 0, "dp_shard_size": 4}, "dp_replicate_size must be at least 1"),
        ({"dp_shard_size": 2, "tp_size": 2}, "parallelism_config_tp_size = 2: remove it"),
    ],
)
def test_processes_that_cannot_be_divided_so_are_refused(launched, sizes, message):
    launched("hsdp", 4, parallelism_config={f"parallelism_config_{key}": size for key, size in sizes.items()})
    with pytest.raises(UserError, match=message):
        find_sharding(make_recipe(), torch.bfloat16)


def test_what_fsdp_does_not_train_is_refused(launched, monkeypatch):
    launched("fsdp2", 1)
    with pytest.raises(UserError, match="and there is one"):
        find_sharding(make_recipe(), torch.bfloat16)
    launched("fsdp2", 2)
    with pytest.raises(UserError, match="use_peft = true"):
        find_sharding(make_recipe(use_peft=True), torch.bfloat16)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert find_sharding(make_recipe(use_peft=True), torch.bfloat16) is None


def test_a_layer_that_the_model_lacks_is_named():
    model = make_model("llama_tied")
    with pytest.raises(UserError, match="cls_to_wrap = BloomBlock: the model has no layer BloomBlock"):
        sharded_layers(model, Sharding(1, True, False, ("BloomBlock",)))
    with pytest.raises(UserError, match="the model has no layer BloomBlock"):
        sharded_layers(model, Sharding(1, True, False, ("LlamaDecoderLayer", "BloomBlock")))
    with pytest.raises(UserError, match=r"no layer LlamaDecoderlayer: did you mean LlamaDecoderLayer\?"):
        sharded_layers(model, Sharding(1, True, False, ("LlamaDecoderlayer",)))
    for name in ("Linear", "Embedding", "LlamaModel", "LlamaForCausalLM"):  # it is tied
        with pytest.raises(UserError, match=f"cls_to_wrap = {name}: {name} holds the output layer"):
            sharded_layers(model, Sharding(1, True, False, (name,)))
    assert sharded_layers(model, Sharding(1, True, False, ("LlamaMLP", "LlamaDecoderLayer")))
    model._no_split_modules = None
    with pytest.raises(UserError, match="give fsdp_transformer_layer_cls_to_wrap: transformers has none"):
        sharded_layers(model, Sharding(1, True, False))
