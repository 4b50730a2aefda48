"""DeepSpeed's config: what the engine would stumble over, or pass over in silence, is refused in one line before it
starts; what is let through starts it."""

import json
import os
import random
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import yaml
from conftest import ROOT, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.load import load_recipe
from training.deepspeed_config import fill_config, find_config
from training.deepspeed_keys import NAMES, NOT_HERE, SUPPORTED, VALUES, fill_by_hidden_size
from utils.errors import UserError

RECIPE = load_recipe(ROOT / "recipes" / "demo.yaml")
ZERO2, ZERO3 = (json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text()) for stage in (2, 3))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def fill(config: dict, dtype: str = "bf16") -> dict:
    return fill_config(config, "zero.json", RECIPE, 10, DTYPES[dtype])


def changed(key: str, value, config: dict = ZERO2) -> dict:
    """A shipped config with another value under a dotted key."""
    config = json.loads(json.dumps(config))
    *parents, name = key.split(".")
    section = config
    for parent in parents:
        section = section.setdefault(parent, {})
    section[name] = value
    return config


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "zero_optimization.reduce_bucket_size",
            "x",
            'zero_optimization.reduce_bucket_size = "x": should be a valid int',
        ),
        ("zero_optimization.reduce_bucket_size", -1, "reduce_bucket_size = -1: should be greater than 0"),
        ("zero_optimization.reduce_bucket_size", "5", '= "5": should be a number'),
        ("zero_optimization.reduce_bucket_size", 1.5, "reduce_bucket_size = 1.5: should be a valid integer"),
        ("zero_optimization.reduce_bucket_size", 1e15, "over 2,147,483,648 elements"),
        ("zero_optimization.reduce_bucket_size", ["auto"], "reduce_bucket_size = ["),
        ("zero_optimization.allgather_bucket_size", 3, "allgather_bucket_size = 3: has to be even"),
        ("zero_optimization.stage", True, "zero_optimization.stage = true: stages 1, 2 and 3 are supported"),
        ("zero_optimization.stage", "2", 'zero_optimization.stage = "2": stages 1, 2 and 3'),
        ("zero_optimization.stage", 4, "zero_optimization.stage = 4: stages 1, 2 and 3"),
        ("zero_optimization.stage", [2], "zero_optimization.stage = [2]: stages 1, 2 and 3"),
        ("zero_optimization.stag", 2, "unknown key zero_optimization.stag: did you mean stage?"),
        (
            "zero_optimization.overlap_com",
            True,
            "unknown key zero_optimization.overlap_com: did you mean overlap_comm?",
        ),
        ("zero_optimization.overlap_comm", "no", 'overlap_comm = "no": should be true or false'),
        ("zero_optimization.overlap_comm", 1, "overlap_comm = 1: should be true or false"),
        ("zero_optimization.compute_grad_norm", False, "zero_optimization.compute_grad_norm = false: sft.py does not"),
        ("zero_optimization.zenflow", {"topk_ratio": 0.1}, "zero_optimization.zenflow = "),
        ("zero_optimization.cpu_offload", True, "zero_optimization.cpu_offload = true: sft.py does not"),
        ("zero_optimization.stage3_max_live_parameters", 7, "stage3_max_live_parameters = 7: is for stage 3 only"),
        (
            "zero_optimization.stage3_prefetch_bucket_size",
            "auto",
            'bucket_size = "auto": is for stage 3 only: remove it',
        ),
        ("zero_optimization.sub_group_size", 5, "zero_optimization.sub_group_size = 5: is for stage 3 only"),
        ("zero_optimization.offload_optimizer", {"device": "nvme", "nvme_path": "/x"}, 'device = "nvme"'),
        ("zero_optimization.offload_optimizer.device", "nvme", 'device = "nvme": sft.py does not run with this'),
        ("zero_optimization.offload_optimizer.device", "gpu", "device = \"gpu\": should be 'none', 'cpu' or 'nvme'"),
        ("zero_optimization.offload_optimizer.devise", "cpu", "offload_optimizer.devise: did you mean device?"),
        (
            "zero_optimization.offload_optimizer",
            "cpu",
            'zero_optimization.offload_optimizer = "cpu": not a JSON object',
        ),
        (
            "zero_optimization.offload_param.device",
            "cpu",
            'zero_optimization.offload_param = {"device": "cpu"}: is for stage 3 only: remove it',
        ),
        ("fp16.loss_scale_window", "x", 'fp16.loss_scale_window = "x"'),
        ("fp16.loss_scale", True, "fp16.loss_scale = true"),
        ("fp16.initial_scale_power", 10**9, "fp16.initial_scale_power = 1000000000: should be 0 to 127"),
        ("fp16.hysteresis", "auto", 'fp16.hysteresis = "auto": no key of the recipe says this: give a value'),
        ("zero_optimization.allgather_bucket_size", "auto", "no key of the recipe says this: give a value"),
        ("fp16.hysteresis", 0, "fp16.hysteresis = 0: should be at least 1"),
        ("fp16.fp16_master_weights_and_grads", True, "fp16.fp16_master_weights_and_grads = true: sft.py does not run"),
        ("fp16.loss_scal", 0, "unknown key fp16.loss_scal: did you mean loss_scale?"),
        ("bf16.bf16_optimizer_states", True, "bf16.bf16_optimizer_states = true: sft.py does not run"),
        ("bf16.enable", True, "unknown key bf16.enable: did you mean enabled?"),
        ("optimizer.type", "OneBitAdam", "optimizer.type = OneBitAdam contradicts the recipe"),
        ("optimizer.params.betas", ["auto", 0.9], "optimizer.params.betas"),
        ("optimizer.params.beta", [0.9, 0.9], "unknown key optimizer.params.beta: did you mean betas?"),
        ("optimizer.legacy_fusion", True, "unknown key optimizer.legacy_fusion"),
        ("scheduler.params.warmup_type", "linear", "scheduler.params.warmup_type = linear contradicts the recipe"),
        ("scheduler.params.warmup_step", 2, "unknown key scheduler.params.warmup_step"),
        ("gradient_cliping", 1.0, "unknown key gradient_cliping: did you mean gradient_clipping?"),
        ("zero_optimisation", {"stage": 1}, "unknown key zero_optimisation: did you mean zero_optimization?"),
        (
            "train_micro_batch_size",
            1,
            "unknown key train_micro_batch_size: did you mean train_micro_batch_size_per_gpu?",
        ),
        ("something", 1, "zero.json: unknown key something: remove it"),
        ("zero_optimization", {"stgae": 2}, "unknown key zero_optimization.stgae: did you mean stage?"),
        ("zero_optimization", {"Stage": 2}, "unknown key zero_optimization.Stage: did you mean stage?"),
        (
            "zero_optimization",
            {"stage": 4, "overlap-com": 1},
            "zero_optimization.overlap-com: did you mean overlap_comm?",
        ),
        (
            "zero_optimization.offload_optimizer",
            {"device": "nvme", "pin_memry": True},
            "zero_optimization.offload_optimizer.pin_memry: did you mean pin_memory?",
        ),
        ("zero_optimization", {"overlap_comm": True}, "zero_optimization.stage is missing: give 1, 2 or 3"),
        ("stage", 2, "unknown key stage: its place is in zero_optimization"),
        (
            "zero_optimization.gradient_clipping",
            1,
            "unknown key zero_optimization.gradient_clipping: its place is at the top",
        ),
        ("FP16", {"enabled": True}, "unknown key FP16: did you mean fp16?"),
        ("steps_per_print", "often", 'steps_per_print = "often": should be a number of at least 1'),
        ("steps_per_print", 0, "steps_per_print = 0: should be a number"),
        ("steps_per_print", True, "steps_per_print = true: should be a number"),
        ("wall_clock_breakdown", "no", 'wall_clock_breakdown = "no": should be true or false'),
        ("communication_data_type", "fp8", 'communication_data_type = "fp8": should be fp32, fp16 or bf16'),
        ("communication_data_type", ["fp16"], 'communication_data_type = ["fp16"]: should be'),
        ("data_types.grad_accum_dtype", "int8", 'data_types.grad_accum_dtype = "int8": should be'),
        (
            "data_types.grad_accum_dtyp",
            "fp32",
            "unknown key data_types.grad_accum_dtyp: did you mean grad_accum_dtype?",
        ),
        ("data_types", "fp32", 'data_types = "fp32": not a JSON object'),
        ("gradient_predivide_factor", 0, "gradient_predivide_factor = 0: should be a number over 0"),
        (
            "gradient_predivide_factor",
            2,
            "gradient_predivide_factor = 2: needs zero_optimization.reduce_scatter = false",
        ),
        ("prescale_gradients", True, "prescale_gradients = true: needs zero_optimization.reduce_scatter = false"),
        ("bfloat16", {"enabled": True}, "bfloat16: sft.py does not run with this of DeepSpeed's: write bf16"),
        ("activation_checkpointing", {"cpu_checkpointing": True}, "the recipe's gradient_checkpointing does that"),
        ("hybrid_engine", {"enabled": True}, "hybrid_engine: sft.py does not run with this of DeepSpeed's"),
        ("curriculum_learning", {"enabled": True, "min_difficulty": 8}, "curriculum_learning: sft.py does not run"),
        ("progressive_layer_drop", {"enabled": True}, "progressive_layer_drop: sft.py does not run"),
        ("data_efficiency", {"enabled": True}, "data_efficiency: sft.py does not run"),
        ("compression_training", {"weight_quantization": {"x": 1}}, "compression_training: sft.py does not run"),
        ("pipeline", {"stages": 2}, "pipeline: sft.py does not run"),
    ],
)
def test_refused_in_one_line_that_names_the_key(key, value, said):
    with pytest.raises(UserError) as refused:
        fill(changed(key, value))
    (line,) = str(refused.value).splitlines()
    assert line.startswith("zero.json: ")
    assert said in line


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("offload_param.device", "nvme", 'zero_optimization.offload_param.device = "nvme": sft.py does not run with'),
        ("offload_param.device", "gpu", "should be 'none', 'cpu' or 'nvme'"),
        ("offload_param", "cpu", 'zero_optimization.offload_param = "cpu": not a JSON object'),
        (
            "offload_param.max_in_cpu",
            5,
            "zero_optimization.offload_param.max_in_cpu = 5: sft.py does not run with this",
        ),
        ("offload_optimizer.ratio", 0.5, "zero_optimization.offload_optimizer.ratio = 0.5: sft.py does not run"),
        ("offload_optimizer.super_offload", True, "offload_optimizer.super_offload = true: sft.py does not run with"),
        ("stage3_prefetch_bucket_siz", 5, "did you mean stage3_prefetch_bucket_size?"),
        ("stage3_prefetch_bucket_size", "x", 'zero_optimization.stage3_prefetch_bucket_size = "x": should be a valid'),
        ("stage3_param_persistence_threshold", -1, "stage3_param_persistence_threshold = -1: should be greater than"),
        ("stage3_max_live_parameters", "auto", "no key of the recipe says this: give a value"),
        ("stage3_max_reuse_distance", 1.5, "stage3_max_reuse_distance = 1.5: should be a valid integer"),
        ("stage3_module_granularity_threshold", 5, "stage3_module_granularity_threshold = 5: sft.py does not run with"),
        ("stage3_gather_16bit_weights_on_model_save", "yes", "should be true or false"),
        ("sub_group_size", True, "sub_group_size = true: should be a number"),
        ("memory_efficient_linear", 1, "memory_efficient_linear = 1: should be true or false"),
        ("zero_hpz_partition_size", 2, "zero_hpz_partition_size = 2: sft.py does not run with this"),
        ("zero_quantized_weights", True, "zero_quantized_weights = true: sft.py does not run with this"),
        ("zero_quantized_gradients", True, "zero_quantized_gradients = true: sft.py does not run with this"),
        ("leaf_module", {"classes": ["x"]}, "zero_optimization.leaf_module = "),
    ],
)
def test_refused_in_stage_3(key, value, said):
    with pytest.raises(UserError) as refused:
        fill(changed(f"zero_optimization.{key}", value, ZERO3))
    (line,) = str(refused.value).splitlines()
    assert line.startswith("zero.json: ")
    assert said in line


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"use_peft": True}, "use_peft = true: zero.json: zero_optimization.stage = 3 shards what is trained"),
        (
            {"torch_compile": True, "gradient_checkpointing": False},
            "torch_compile = true: zero.json: zero_optimization",
        ),
        ({"optimizer_state_dtype": "bf16"}, "optimizer_state_dtype = bf16: zero.json: DeepSpeed's optimizer keeps"),
        ({"use_peft": True, "load_in_4bit": True}, "load_in_4bit = true: zero.json: DeepSpeed would make half"),
    ],
)
@pytest.mark.parametrize("name", ["zero3", "zero3_offload"])
def test_what_a_recipe_asks_and_stage_3_cannot_do(name, keys, said):
    config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    with pytest.raises(UserError) as refused:
        fill_config(config, "zero.json", RECIPE.model_copy(update=keys), 10, torch.bfloat16)
    (line,) = str(refused.value).splitlines()
    assert line.startswith(said)


@pytest.mark.parametrize(("key", "value"), [("prescale_gradients", True), ("gradient_predivide_factor", 2)])
@pytest.mark.parametrize("reduce_scatter", [True, False])
def test_factors_of_the_gradients_are_not_for_stage_3(key, value, reduce_scatter):
    """With 2 processes, a factor of 2 and no reduce_scatter it would halve every gradient (DeepSpeed 0.19.8)."""
    config = changed("zero_optimization.reduce_scatter", reduce_scatter, ZERO3)
    with pytest.raises(UserError, match=f"{key} = .*: is not for stage 3: remove it"):
        fill(config | {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("offload_optimizer", {"device": "cpu", "pin_memory": False}),
        ("offload_param", {"device": "cpu"}),
        ("offload_param", {"device": "none"}),
        ("stage3_gather_16bit_weights_on_model_save", True),
        ("stage3_param_persistence_threshold", 0),
        ("sub_group_size", 1e9),
        ("memory_efficient_linear", False),
        ("allgather_bucket_size", 5e8),  # which stage 3 passes over
    ],
)
def test_let_through_in_stage_3(key, value):
    filled = fill(changed(f"zero_optimization.{key}", value, ZERO3))
    assert filled["zero_optimization"][key] == value


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_the_shipped_configs_are_filled(name):
    """Every "auto" but the sizes that the model's width gives."""
    config = fill(json.loads((ROOT / "ds_configs" / f"{name}.json").read_text()))
    zero = config["zero_optimization"]
    fill_by_hidden_size(zero, 6144)
    assert '"auto"' not in json.dumps(config)
    if zero["stage"] == 3:  # transformers/integrations/deepspeed.py: trainer_config_finalize
        assert zero["reduce_bucket_size"] == 6144 * 6144
        assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 6144 * 6144)
        assert zero["stage3_param_persistence_threshold"] == 10 * 6144
    launched = yaml.safe_load((ROOT / "accelerate_configs" / f"{name}.yaml").read_text())
    assert launched["deepspeed_config"]["deepspeed_config_file"] == f"ds_configs/{name}.json"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zero_optimization.stage", 1),
        ("zero_optimization.reduce_bucket_size", "auto"),
        ("zero_optimization.offload_optimizer", None),
        ("zero_optimization.offload_optimizer", {"device": "none", "nvme_path": None}),
        ("zero_optimization.offload_param", {"device": "none"}),
        ("zero_optimization.offload_optimizer.device", "cpu"),
        ("zero_optimization.elastic_checkpoint", False),
        ("fp16.loss_scale", 128),
        ("steps_per_print", float("inf")),  # as Accelerate writes it
        ("data_types.grad_accum_dtype", None),
        ("optimizer.params.betas", [RECIPE.adam_beta1, RECIPE.adam_beta2]),
        *[(name, {"enabled": False}) for name in NOT_HERE],
        ("activation_checkpointing", {"partition_activations": False, "number_checkpoints": None}),
    ],
)
def test_let_through(key, value):
    filled = fill(changed(key, value))
    assert not NOT_HERE.keys() & filled.keys()  # of which some end DeepSpeed even where they are switched off
    assert filled["zero_optimization"]["allgather_bucket_size"] == 10**9
    assert isinstance(filled["zero_optimization"]["allgather_bucket_size"], int)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulated", DTYPES)
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_ways_to_add_up_gradients_that_the_engine_cannot(stage, dtype, accumulated, offload):
    """Without a loss scaler in stage 1 (DeepSpeed takes its BF16_Optimizer); from offloaded ones of another dtype every
    norm came out as no finite number, so that no step changed a weight."""
    zero = {"stage": stage, "offload_optimizer": {"device": offload}}
    config = {"zero_optimization": zero, "data_types": {"grad_accum_dtype": accumulated}}
    said = None
    if offload == "cpu" and accumulated != dtype:
        said = "does not go with offload_optimizer and torch"
    elif (stage, dtype, accumulated) == (1, "bf16", "fp32"):
        said = "does not go with stage 1 and bf16: take stage 2"
    with pytest.raises(UserError, match=f'grad_accum_dtype = "{accumulated}": {said}') if said else nullcontext():
        fill(config, dtype)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"zero_optimization": {"stage": 2, "stage": 1}}', "the key 'stage' is given twice"),
        ('{"zero_optimization": {"stage": 2}, "zero_optimization": {}}', "the key 'zero_optimization' is given twice"),
        ('{"zero_optimization": {"stage": 2', "JSON does not parse"),
    ],
)
def test_a_key_given_twice(tmp_path, text, said):
    (tmp_path / "zero.json").write_text(text)
    with pytest.raises(UserError, match=said):
        find_config(RECIPE.model_copy(update={"deepspeed_config": str(tmp_path / "zero.json")}))


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, None),
        ({"DEEPSPEED_ZERO_STAGE": "0"}, "zero_optimization.stage = 0: stages 1, 2 and 3 are supported"),
        ({"DEEPSPEED_ZERO_STAGE": "two"}, "its deepspeed_config: ValueError: "),
        ({"GRADIENT_CLIPPING": "x"}, "its deepspeed_config: ValueError: "),
        ({"GRADIENT_CLIPPING": "1.5"}, "gradient_clipping = 1.5 contradicts the recipe"),
        ({"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme", "DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": "/x"}, "nvme"),
        ({"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "disk"}, 'offload_optimizer.device = "disk"'),
        ({"DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "offload_param = {"),
    ],
)
def test_keys_spelled_out_in_an_accelerate_config(monkeypatch, variables, said):
    """As `accelerate launch` hands them on."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name, value in variables.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)

    def filled():
        return fill_config(*find_config(RECIPE), RECIPE, 10, torch.bfloat16)

    if said is None:
        assert filled()["zero_optimization"]["stage"] == 2
        return
    with pytest.raises(UserError) as refused:
        filled()
    (line,) = str(refused.value).splitlines()
    assert line.startswith("the accelerate config: ")
    assert said in line


# ---- any config at all ----

KEYS = [
    *NAMES[""],
    *(f"{section}.{name}" for section, names in {**NAMES, **SUPPORTED}.items() if section for name in names),
    *VALUES,
    *NOT_HERE,
    *("zero_optimization.zero_hpz_partition_size", "zero_optimization.legacy_stage1", "fp16.x", "x", "bf16.stage"),
    *("zero_optimization.cpu_offload", "zero_optimization.offload_param.max_in_cpu"),
]
ODD = [None, True, False, "auto", "x", "", "fp32", "cpu", "none", -1, 0, 1, 2, 3, 0.5, 2.0, 1e9, 1e300, 10**30]
ODD += [float("nan"), float("inf"), [], ["auto"], [0.9], {}, {"enabled": True}, {"device": "cpu"}, {"x": {"y": 1}}]


def random_config(dice: random.Random, keys: list[str] = KEYS) -> dict:
    config = (
        json.loads(json.dumps(dice.choice([ZERO2, ZERO3])))
        if dice.random() < 0.5
        else {"zero_optimization": {"stage": dice.choice([1, 2, 3])}}
    )
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        *parents, name = dice.choice(keys).split(".")
        section = config
        for parent in parents:
            section = section.setdefault(parent, {}) if isinstance(section, dict) else {}
        if isinstance(section, dict):
            section[name + dice.choice(["", "", "", "", "s"])] = dice.choice(ODD)
    return config


def outcome(config: dict, dtype: str) -> dict | str:
    """What the engine would be given, or the one line."""
    try:
        return fill(config, dtype)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017, it is not the error that is tested here
        return str(error)


def test_any_config_is_filled_or_refused_in_a_line():
    @settings(max_examples=300)
    @given(st.integers(0, 2**32))
    def one(seed):
        dice = random.Random(seed)
        outcome(random_config(dice), dice.choice(list(DTYPES)))

    one()


@pytest.mark.fuzz
def test_any_config_is_filled_or_refused_in_thousands():
    for seed in range(20_000):
        dice = random.Random(seed)
        outcome(random_config(dice), dice.choice(list(DTYPES)))


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(int(os.environ.get("FUZZ_ENGINES", "40"))))
def test_what_is_let_through_starts_the_engine_and_is_saved(tmp_path, tiny_model, seed):
    """Four steps and a checkpoint of the real engine, by a config of which several keys were changed at random."""
    dice, make = random.Random(seed), None
    keys = [key for key in KEYS if key not in NAMES[""] or key in VALUES]
    make = partial(random_config, dice, keys)
    dtype = dice.choice(["bf16", "fp32"])  # fp16 needs a GPU
    config = next(
        one for one in iter(make, None) if one not in (ZERO2, ZERO3) and isinstance(outcome(one, dtype), dict)
    )
    (tmp_path / "zero.json").write_text(json.dumps(config))
    run = run_script(
        *("recipes/demo.yaml", "--deepspeed_config", tmp_path / "zero.json", "--dtype", dtype, "--max_steps", 4),
        *("--model_name", tiny_model, "--from_scratch", "false", "--sample_replies", 0, "--warmup_steps", 0),
        *(
            "--save_strategy",
            "steps",
            "--save_steps",
            2,
            "--logging_steps",
            1,
            "--cache_dir",
            tmp_path.parent / "cache",
        ),
        output_dir=tmp_path / "out",
        check=False,
    )
    assert run.returncode == 0, (config, run.errors, run.stderr[-1000:])
    assert len(run.curve("loss")) == 4, config  # which a step that is left out has none of
    assert (tmp_path / "out" / "checkpoint-2" / "trainer_state").is_dir()
