"""The benchmarks: every contender does the same work, which its losses show, and the tables say what was measured."""

import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from checkpoints import save_chat_model
from conftest import ROOT, run_script
from forking import measure_forked
from mixes import make_recipe

import benchmarking.data
from benchmarking.attention import attention_table, layer_outputs
from benchmarking.contenders import Work, train_ours
from benchmarking.scaling import plot_scaling, scaling_table
from benchmarking.train import CONTENDERS, NEOX, SMALL, random_conversations, save_data, train_table
from recipe.load import load_recipe

TINY = SMALL | {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def figures() -> dict[str, list[dict]]:
    """One round of every contender, each in its own process, on 4 steps of a tiny model.

    A process as the benchmark starts them is in tests/benchmarking/test_gpu.py.
    """
    lengths = np.random.default_rng(0).integers(5, 40, 16).tolist()
    work = Work(TINY, save_data(random_conversations(lengths, 500, 0.6)), 2, 2, 64)
    return {
        name: [measure_forked(measure, asdict(work), *arguments)] for name, (measure, *arguments) in CONTENDERS.items()
    }


def test_all_contenders_train_the_same(figures):
    """After four updates the losses still agree: same weights, order, normalization, clipping and optimizer."""
    ours = figures["this collection"][0]
    assert len(ours["losses"]) == 4
    assert ours["losses"][0] == pytest.approx(np.log(500), abs=0.1)
    for name, (figure,) in figures.items():
        assert figure["losses"] == pytest.approx(ours["losses"], rel=2e-5), name
        assert (figure["conversations"], figure["tokens"]) == (ours["conversations"], ours["tokens"]), name
        assert figure["seconds"] > 0
        assert figure["peak_memory"] > 2**27


def test_train_table(figures):
    table = train_table(figures)
    assert all(f"| {name} |" in table for name in CONTENDERS)
    assert "times TRL, padded, with" in table
    failed = figures | {"TRL, padded": [{"failed": "no TRL here"}]}
    assert "no TRL here" in train_table(failed)
    failed = train_table(figures | {"this collection": [{"failed": "out of memory"}]})
    assert "out of memory" in failed
    assert "| TRL, padded |" in failed


def test_ratios_and_mfu():
    def figure(seconds: float, memory: float) -> list[dict]:
        common = {"conversations": 10, "tokens": 100, "losses": [1.0], "settings": {}, "peak_flops": 1e3, "flops": 500}
        return [common | {"seconds": seconds, "peak_memory": memory * 2**30}]

    names = list(CONTENDERS)
    figures = dict(zip(names, [figure(1, 1), figure(8, 4), figure(4, 2), figure(6, 3)], strict=True))
    table = train_table(figures)
    assert "8.0 times TRL, padded, with 25% of its peak memory." in table
    assert "4.0 times TRL, padding-free, with 50% of its peak memory." in table
    assert "50.0%" in table.splitlines()[2]  # MFU: 500 FLOPs in a second of 1,000


def test_scaling_table_and_plot(tmp_path):
    def seen(tokens: int) -> list[dict]:
        return [{"tokens": tokens, "seconds": 2.0, "peak_memory": 2**30}] * 3

    figures = {"max_length": {512: seen(1000), 1024: seen(800)}, "conversations a micro-batch": {1: seen(10)}}
    assert "| 1,024 | 400 | 1.00 GiB |" in scaling_table(figures)
    plot_scaling(figures, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 5000


def test_layer_outputs_are_those_of_the_hidden_states():
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    model = AutoModelForCausalLM.from_config(GPTNeoXConfig(**TINY | {"hidden_dropout": 0.0})).eval()
    conversations = [torch.randint(500, (length,)) for length in (20, 7)]
    laid = layer_outputs(model.eval(), conversations, laid=False)
    with torch.no_grad():
        for which, ids in enumerate(conversations):
            hidden = model(input_ids=ids[None], output_hidden_states=True, use_cache=False).hidden_states
            part = slice(0, 20) if which == 0 else slice(20, 27)
            torch.testing.assert_close(laid[0][part], hidden[1][0])  # the last ones are after the final norm
    model.set_attn_implementation("sdpa_by_conversation")
    for ours, expected in zip(layer_outputs(model, conversations, laid=True), laid, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert "| x, y | 1.0e+00" in attention_table({"x, y": [1.0, 2.0], "z": "no GPU"})


def test_our_contender_under_bf16_and_gradient_checkpointing():
    conversations = random_conversations([30, 20, 10, 25], 500, 0.6)
    losses = []
    for options in ({}, {"gradient_checkpointing": True}, {"dtype": "bf16"}):
        work = Work(TINY, save_data(conversations), 1, 2, 64, **options)
        losses.append(measure_forked(train_ours, asdict(work))["losses"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[2] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--gpu", "9b"], "9b"),
        (["scaling", "recipes/demo.yaml"], "takes no recipes/demo.yaml"),
        (["chat"], "chat needs a CHECKPOINT"),
        (["chat", "no/such/folder"], "no/such/folder: no such folder"),
        (["attention", "--gpu", "3b"], "no GPU"),
        (["scaling", "--plot", "x.png", "--gpu", "7b"], "no GPU"),
        (["data", "--gpu", "3b", "recipes/demo.yaml"], "--gpu is for train, scaling, attention"),
        (["train", "recipes/demo.yaml", "--conversations", "9"], "give more"),
        (["scaling", "--conversations", "9"], "--conversations is for train"),
        (["attention", "--rounds", "2"], "--rounds is for data, train, scaling"),
        (["attention", "--json", "nowhere/x.json"], "no folder nowhere"),
        (["scaling", "--rounds", "0"], "--rounds: 0 is no whole number of at least 1"),
        (["train", "--gpu", "3b", "--conversations", "9"], "--gpu makes its own"),
        (["roofline"], "roofline needs --gpu 3b or 7b"),
        (["roofline", "--gpu", "3b", "--rounds", "2"], "--rounds is for data, train, scaling"),
        (["scaling", "--tokens", "9"], "--tokens is for roofline"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is no GPU")
def test_bad_command_lines(arguments, words, tmp_path):
    run = run_script(*arguments, script="scripts/benchmark.py", output_dir=tmp_path, check=False)
    assert run.returncode == 2
    assert words in run.stderr
    assert "Traceback" not in run.stderr


WITHOUT = """
import json, sys
missing = {"deepspeed", "datasets", "evaluate", "trl", "fastokens", "wandb"}
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda name: (_ for _ in ()).throw(
    importlib.metadata.PackageNotFoundError(name)) if name in missing else version(name)
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.partition(".")[0] in missing else find_spec(name)
sys.path.insert(0, "scripts")
from benchmarking.contenders import train_ours
print(json.dumps(train_ours(json.loads(sys.argv[1]))["losses"]))
"""


def test_ours_runs_without_packages_that_a_bare_gpu_machine_lacks():
    work = Work(TINY, save_data(random_conversations([30, 20, 10, 25], 500, 0.6)), 1, 2, 64)
    command = [sys.executable, "-c", WITHOUT, json.dumps(asdict(work))]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.splitlines()[-1]) == measure_forked(train_ours, asdict(work))["losses"]


def test_chat_next_to_a_bare_call(tiny_model, tmp_path):
    folder = save_chat_model(tiny_model, tmp_path / "chat")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    arguments = ["chat", folder, "--rounds", 1, "--json", tmp_path / "chat.json"]
    run = run_script(*arguments, script="scripts/benchmark.py", output_dir=None)
    figures = json.loads((tmp_path / "chat.json").read_text())["figures"]
    assert run.stdout.count("| a ") == len(figures) == 2
    for found in figures.values():
        assert found["first_ratio"] == pytest.approx(found["chat_first"] / found["bare_first"])
        assert found["rate_ratio"] == pytest.approx(found["chat_rate"] / found["bare_rate"])
    assert figures["a conversation"]["prompt_tokens"] > 500 > figures["a question"]["prompt_tokens"]


def test_balance_of_a_small_mix(tmp_path):
    """The demo's steps of 16, where each micro-batch of 8 conversations may have 2,048 tokens."""
    arguments = ["balance", "recipes/demo.yaml", "--global_batch_size", 16, "--json", tmp_path / "balance.json"]
    table = run_script(*arguments, script="scripts/benchmark.py", output_dir=tmp_path).stdout
    figures = json.loads((tmp_path / "balance.json").read_text())["figures"]
    assert list(figures) == ["1", "2", "4", "8"]
    for processes, cuts in figures.items():
        before, after, least = cuts["by conversations"], cuts["by 2,048 tokens"], cuts["at the least"]
        assert before["largest"] <= 8 * 256
        assert 1 == after["micro_batches"] <= before["micro_batches"]
        assert least["idle"] <= after["idle"] <= before["idle"] <= before["idle_by_micro_batch"]
        assert (before["idle"] > 0) == (processes != "1")
        assert f"| {processes} | by 2,048 tokens | 1.0 | " in table
    # All 16 conversations of a step together, on one process: the same tokens as of all micro-batches by conversations.
    alone = figures["1"]
    assert alone["by 2,048 tokens"]["tokens"] == pytest.approx(
        alone["by conversations"]["tokens"] * alone["by conversations"]["micro_batches"]
    )


def test_balance_by_hand():
    """One step of 4 conversations, two in a micro-batch: 100 and 20 tokens together, then 50 and 50."""
    from benchmarking.balance import figures_of

    figures = figures_of([np.array([100, 20, 50, 50])], make_recipe(max_length=120), 2, 120)
    assert figures["by conversations"] == {
        "micro_batches": 1.0,
        "tokens": 110.0,
        "largest": 120,
        "idle": pytest.approx(1 - 110 / 120),
        "idle_by_micro_batch": pytest.approx(1 - 110 / 120),
    }
    assert figures["by 120 tokens"]["idle"] == pytest.approx(1 - 110 / 120)
    alone = figures_of([np.array([100, 20, 50, 50])], make_recipe(max_length=120), 1, 240)
    assert alone["by 240 tokens"]["tokens"] == 220


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_balance_by_the_clock(tmp_path):
    """Two processes: the same losses by either cut, and a table of the figures that are written down."""
    arguments = ["balance", "recipes/demo.yaml", "--micro_batch_tokens", 1000, "--json", tmp_path / "balance.json"]
    run = run_script(*arguments, script="scripts/benchmark.py", output_dir=tmp_path, launch="ddp2")
    steps = json.loads((tmp_path / "balance.json").read_text())["figures"]
    assert len(steps) == 12
    for step in steps:
        before, after = step.values()
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
        assert len(before["work"]) == len(after["work"]) == 2
        assert (before["micro_batches"], after["micro_batches"]) == (2, 1)
    assert run.stdout.count("| by 1,000 tokens |") == run.stdout.count("| by conversations |") == 1


def test_measured_table_by_hand():
    from benchmarking.balance import measured_table

    before = {"seconds": 4.0, "work": [3.0, 1.0], "micro_batches": 2, "loss": 2.0}
    after = {"seconds": 3.0, "work": [2.0, 2.0], "micro_batches": 1, "loss": 2.0}
    table = measured_table([{"by conversations": before, "by 9 tokens": after}] * 3)
    assert "| by conversations | 4.00 | 2.0 | 3.00, 4.00 | 33.3% |" in table
    assert "| by 9 tokens | 3.00 | 1.0 | 2.00, 4.00 | 0.0% |" in table
    assert "By tokens a step takes 0.75 of the time (median of 3 steps, 0.75 to 0.75)" in table


def test_data_figures_of_a_small_mix(monkeypatch):
    """TRL included, on the demo's data, in processes that are forked; `make soak` runs the whole command."""
    monkeypatch.setattr(benchmarking.data, "in_a_process", measure_forked)
    figures = benchmarking.data.benchmark_data(load_recipe(str(ROOT / "recipes" / "demo.yaml")), rounds=1)
    check_data_figures(figures, benchmarking.data.data_table(figures))


@pytest.mark.soak
def test_the_data_command(tmp_path):
    arguments = ["data", "recipes/demo.yaml", "--rounds", "1", "--json", tmp_path / "data.json"]
    run_script(*arguments, script="scripts/benchmark.py", output_dir=tmp_path)
    result = json.loads((tmp_path / "data.json").read_text())
    check_data_figures(result["figures"], result["table"])


def check_data_figures(figures: dict, table: str) -> None:
    assert figures["cold"][0]["conversations"] == figures["trl"][0]["conversations"] > 1000
    assert "times TRL's best" in table
    assert NEOX["vocab_size"] == 50288
