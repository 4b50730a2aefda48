"""DeepSpeed's optimizer: torch's fused AdamW, for which nothing is compiled, also where it lies on the host."""

import json

import pytest
import torch
from conftest import ROOT, run_script
from mixes import make_recipe

from training import zero
from training.deepspeed_config import fill_config

# A process alone, as `python scripts/sft.py` is, with the recipe's config.
REAL_ENGINE = """
import json, sys
import torch
from mixes import make_recipe
from test_attention import make_model
from deepspeed.ops.op_builder.builder import OpBuilder
from training.deepspeed_config import deepspeed_config
from training.engine import prepare_engine, start_accelerator
from utils.launch import set_up_process

loaded, load = [], OpBuilder.jit_load
OpBuilder.jit_load = lambda self, *options: loaded.append(self.name) or load(self, *options)
set_up_process()
recipe = make_recipe(deepspeed_config="ds_configs/zero2.json", dtype="bf16", weight_decay=0.1, adam_beta2=0.97)
config = deepspeed_config(recipe, 10, torch.bfloat16)
accelerator = start_accelerator(recipe, torch.bfloat16, config)
prepared = prepare_engine(accelerator, make_model("gpt_neox").bfloat16(), recipe, 10)
adam = accelerator.deepspeed_engine_wrapped.engine.optimizer.optimizer
names = "fused", "betas", "eps", "weight_decay"
print(json.dumps({
    "kind": f"{type(adam).__module__}.{type(adam).__name__}",
    "groups": [{name: group[name] for name in names} for group in adam.param_groups],
    "compiled": loaded,
    "half_weights": prepared.half_weights,
}))
prepared.close()
"""


def test_the_real_engine_steps_by_torchs_fused_adamw(tmp_path):
    script = tmp_path / "engine.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT / 'tests' / 'training')!r})\n{REAL_ENGINE}")
    run = run_script(script=str(script), output_dir=tmp_path)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["kind"] == "torch.optim.adamw.AdamW"
    common = {"fused": True, "betas": [0.9, 0.97], "eps": 1e-12}
    assert found["groups"] == [common | {"weight_decay": 0.1}, common | {"weight_decay": 0.0}]
    assert found["compiled"] == []
    assert found["half_weights"] is None  # DeepSpeed's own are the weights in half precision


@pytest.fixture
def plugin_of(monkeypatch):
    """Call it with a zero_optimization section: what DeepSpeed would be given, on a GPU or not, and the operators that
    were compiled for it."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    given, loaded = {}, []
    monkeypatch.setattr(zero, "DeepSpeedPlugin", lambda **options: given.update(options))
    monkeypatch.setattr(OpBuilder, "load", lambda self, *_, **__: loaded.append(self.name))
    for name in ("_join_alone", "_quieten", "_prepare_cpu_engine"):
        monkeypatch.setattr(zero, name, lambda: None)

    def call(gpu: bool, **section) -> tuple[dict, list[str]]:
        monkeypatch.setattr(zero, "has_gpu", lambda: gpu)
        config = {"zero_optimization": {"stage": 2, **section}}
        zero.deepspeed_plugin(fill_config(config, "here", make_recipe(), 10, torch.bfloat16))
        return given["hf_ds_config"]["optimizer"], loaded

    return call


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("device", [None, "none", "cpu"])
def test_nothing_is_compiled_wherever_the_optimizer_is(plugin_of, gpu, device):
    """On a GPU and on the host, where DeepSpeed would have its CPUAdam."""
    optimizer, loaded = plugin_of(gpu, offload_optimizer=device and {"device": device})
    assert optimizer["type"] == "AdamW"
    assert optimizer["params"] | {"torch_adam": True, "fused": True} == optimizer["params"]
    assert loaded == []
