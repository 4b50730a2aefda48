"""What engines keep of a run's state: by the papers' sums, against real processes, and that more of them need less."""

import json
import sys

import pytest
import torch
from conftest import ROOT, run_script
from mixes import make_recipe
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from training.memory import estimate_memory, peak_of
from training.state_layout import (
    deepspeed_layout,
    replicated,
)

CONFIG = GPTNeoXConfig(
    vocab_size=8192,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=6,
    intermediate_size=1536,
    hidden_act="gelu_pytorch_tanh",
    tie_word_embeddings=False,
)
SMALL = GPTNeoXConfig(**CONFIG.to_dict() | {"num_hidden_layers": 1, "hidden_size": 48, "intermediate_size": 192})
KEYS = {"padding_free": True, "max_length": 512, "warmup_steps": 0, "gradient_accumulation_steps": 2}
TOKENS = 256
ZERO2 = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())["zero_optimization"]
# How a test starts an engine (tests/conftest.py), and its layout: a line for each engine.
ENGINES = {
    "python": replicated(1),
    "ddp2": replicated(2),
    "zero2x2": deepspeed_layout(ZERO2, 2),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("launch", ENGINES)
def test_estimate_against_the_processes_of_an_engine(launch, tmp_path):
    """Two steps by the real engine, of two micro-batches, in fp32: within 20 %."""
    worker = "tests/training/memory_worker.py"
    run_script(tmp_path / "found.json", launch=launch, script=worker, output_dir=tmp_path)
    found, layout = json.loads((tmp_path / "found.json").read_text()), ENGINES[launch]
    assert found["processes"] == layout.processes
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(CONFIG).parameters())
    parts = estimate_memory(make_recipe(**KEYS), CONFIG, count, layout, torch.float32, (1, TOKENS), gpu=False)
    print(
        launch, found["measured"] / 2**20, {name: size / 2**20 for name, size in parts.items()}, peak_of(parts) / 2**20
    )
    assert peak_of(parts) == pytest.approx(found["measured"], rel=0.2)
