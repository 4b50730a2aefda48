"""What a dry run finds of a model without loading it: the line of the real run, or what it could not look at."""

import importlib.util
import json
import shutil
import socketserver
import sys
import threading
import time

import psutil
import pytest
import torch
from conftest import ROOT
from families import family_config
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from recipe.load import load_recipe
from run.dry_run import describe_model, dry_run
from run.model_files import check_savable
from training.family import tiny_config
from training.model import count_parameters, load_config, load_model, load_tokenizer
from training.weight_files import hub_is_reachable
from utils.errors import UserError

DEMO = ROOT / "recipes" / "demo.yaml"
TOKENIZER = ROOT / "recipes" / "demo_data" / "model"


def recipe_of(model, **keys):
    return load_recipe(DEMO, {"model_name": str(model), "from_scratch": "false", "max_length": "64", **keys})


@pytest.fixture
def base(tmp_path):
    """Call it with a family's name: a folder as of a base model, with the demo's tokenizer."""

    def make(name: str = "Llama, SmolLM2", **saving):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(family_config(name)).save_pretrained(tmp_path / "base", **saving)
        for path in TOKENIZER.glob("tokenizer*"):
            shutil.copy(path, tmp_path / "base")
        return tmp_path / "base"

    return make


def change(folder, file: str = "config.json", **values) -> None:
    values = json.loads((folder / file).read_text() if (folder / file).exists() else "{}") | values
    (folder / file).write_text(json.dumps(values))


def cut_in_half(folder) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_weights(folder, function) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {key: each for key, tensor in weights.items() for key, each in function(key, tensor)},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def in_integers(folder) -> None:
    change_weights(folder, lambda key, tensor: [(key, tensor.to(torch.int8) if "proj" in key else tensor)])


def without_a_norm(folder) -> None:
    change_weights(folder, lambda key, tensor: [(key, tensor)] * (key != "model.norm.weight"))


def without_a_shard(folder) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


SHARDS = {"max_shard_size": "30KB"}
# The family, how it is saved, what is done to it, the recipe's keys, and a part of the line.
REFUSED = {
    "a layer too many": ("Llama, SmolLM2", {}, lambda f: change(f, num_hidden_layers=3), {}, "lack model.layers.2"),
    "another width": (
        "Llama, SmolLM2",
        {},
        lambda f: change(f, intermediate_size=72),
        {},
        "config.json calls as [32, 72]",
    ),
    "a vocabulary too large": (
        "Llama, SmolLM2",
        {},
        lambda f: change(f, vocab_size=2048),
        {},
        "lm_head.weight as [1024, 32], for which its config.json calls as [2048, 32]",
    ),
    "a tensor missing": ("Llama, SmolLM2", {}, without_a_norm, {}, "lack model.norm.weight"),
    "a shard missing": ("Llama, SmolLM2", SHARDS, without_a_shard, {}, "no usable weights"),
    "cut off": ("Llama, SmolLM2", {}, cut_in_half, {}, "cut off or damaged"),
    "integers": ("Llama, SmolLM2", {}, in_integers, {}, "proj.weight is quantized (I8)"),
    "quantized": (
        "Llama, SmolLM2",
        {},
        lambda f: change(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        {},
        "quantized (gptq)",
    ),
    "padding out of range": ("Llama, SmolLM2", {}, lambda f: change(f, pad_token_id=5000), {}, "adding_idx"),
    "no weights": ("Llama, SmolLM2", {}, lambda f: (f / "model.safetensors").unlink(), {}, "no usable weights"),
    "states": ("Mamba", {}, None, {}, "it has states in place of attention: give padding_free: false"),
    "an attention of its own": ("Bloom", {}, None, {}, "see each other: give padding_free: false"),
    "a cap": ("Gemma 2", {}, None, {}, "final_logit_softcapping"),
    "weights that change": ("RWKV-4", {}, None, {"padding_free": "false"}, "rescale_every: 0"),
    "not causal": ("XLM", {}, None, {"padding_free": "false"}, "tokens see those that come after them"),
    "an auxiliary loss": (
        "Mixtral",
        {},
        lambda f: change(f, output_router_logits=True),
        {},
        "output_router_logits: false there",
    ),
    "no gradient checkpointing": (
        "CTRL",
        {},
        None,
        {"gradient_checkpointing": "true"},
        "gradient_checkpointing = true",
    ),
    "what cannot be saved": (
        "Llama, SmolLM2",
        {},
        lambda f: change(f, "generation_config.json", cache_implementation="none such"),
        {},
        "could not be read back",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_what_the_run_refuses_in_the_same_line(base, name):
    family, saving, damage, keys, part = REFUSED[name]
    folder = base(family, **saving)
    if damage:
        damage(folder)
    recipe, lines = recipe_of(folder, **keys), []

    def real_run() -> None:
        config, tokenizer = load_config(recipe), load_tokenizer(recipe)
        count_parameters(recipe, config)
        if name == "what cannot be saved":  # in which a model's weights have no part
            check_savable(recipe, config, tokenizer)
        load_model(recipe, config, tokenizer, torch.float32)

    for run in (lambda: describe_model(recipe), real_run):
        with pytest.raises(UserError) as caught:
            run()
        lines.append(str(caught.value))
    assert lines[0] == lines[1]
    assert part in lines[0]
    assert "\n" not in lines[0]


@pytest.mark.parametrize(
    ("name", "saving"),
    [("GPT-NeoX, StableLM-alpha, Pythia", {}), ("Mixtral", SHARDS), ("Gemma 3, multimodal", SHARDS)],
)
def test_a_whole_model_passes(base, capsys, name, saving):
    assert "not looked at" not in describe_model(recipe_of(base(name, **saving)))
    assert capsys.readouterr().out == ""


def test_what_is_odd_is_a_warning(base, capsys):
    folder = base()
    change(folder, num_hidden_layers=1)
    describe_model(recipe_of(folder))
    assert "no place for model.layers.1.input_layernorm.weight" in capsys.readouterr().out
    shutil.rmtree(folder)
    folder = base()
    config = AutoConfig.from_pretrained(folder, vocab_size=900)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    describe_model(recipe_of(folder))
    assert "124 tokens of its tokenizer" in capsys.readouterr().out


def test_weights_in_a_pickle_are_looked_at_too(base):
    folder = base()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    describe_model(recipe_of(folder))
    del weights["model.norm.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"lack model\.norm\.weight"):
        describe_model(recipe_of(folder))


@pytest.fixture
def in_the_cache(base, tmp_path, monkeypatch):
    """Folder of a base model, and where the hub's cache has it as some/model: nothing of it is there yet."""
    folder = base(**SHARDS)
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / ("0" * 40)
    (snapshot.parent.parent / "refs").mkdir(parents=True)
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder, snapshot


def test_a_hub_that_does_not_answer_is_asked_for_no_file(in_the_cache, monkeypatch):
    folder, snapshot = in_the_cache
    shutil.copytree(folder, snapshot, dirs_exist_ok=True)
    asked = []

    class HangUp(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked.append(self.request.recv(1000))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), HangUp) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{hub.server_address[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        hub_is_reachable.cache_clear()
        try:
            assert "not looked at" not in describe_model(recipe_of("some/model"))
        finally:
            hub_is_reachable.cache_clear()
            hub.shutdown()
    paths = [request.split()[1] for request in asked]
    assert paths.count(b"/") == 1
    assert not [path for path in paths if b"model" in path]


def test_of_the_hub_it_says_what_is_not_here(in_the_cache):
    folder, snapshot = in_the_cache
    recipe = recipe_of("some/model")
    assert describe_model(recipe) == "not here, would be fetched from the hub"
    snapshot.mkdir(parents=True)
    shutil.copy(folder / "config.json", snapshot)
    for name in ("tokenizer", "weights"):
        assert f"its {name}, which would be fetched from the hub" in describe_model(recipe)
    shutil.copytree(folder, snapshot, dirs_exist_ok=True)
    without_a_shard(snapshot)
    assert "not looked at: its weights" in describe_model(recipe)
    shutil.copytree(folder, snapshot, dirs_exist_ok=True)
    assert "not looked at" not in describe_model(recipe)
    change(snapshot, num_hidden_layers=3)
    with pytest.raises(UserError, match=r"model_name = some/model: its weights lack model\.layers\.2"):
        describe_model(recipe)


# ---- the whole of it ----


def test_an_error_stands_alone(base, tmp_path, capsys):
    recipe = recipe_of(base(), output_dir=str(tmp_path / "out"))
    without_a_norm(tmp_path / "base")
    capsys.readouterr()
    with pytest.raises(UserError, match=r"lack model\.norm\.weight"):
        dry_run(recipe, allow_changes=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("known", ["max_steps", "num_train_epochs"])
def test_what_comes_at_which_step_is_foretold(tmp_path, capsys, known):
    """An epoch of the demo's 2,135 conversations has 134 steps of 16."""
    keys = {"max_steps": "null", "num_train_epochs": "1", "eval_steps": "36", "save_steps": "35", "warmup_steps": "136"}
    keys |= {"max_steps": "134"} if known == "max_steps" else {}
    dry_run(load_recipe(DEMO, {**keys, "output_dir": str(tmp_path / "out")}), allow_changes=False)
    found = capsys.readouterr().out.partition("# ---- what was found of it ----")[2].splitlines()
    assert "warning: warmup_steps = 136: as long as the run (134 steps): give fewer" in found
    assert any(line.startswith("warning: save_steps = 35, eval_steps = 36: no checkpoint will be of") for line in found)
    assert found[-1].startswith("nothing wrong was found")


# ---- the tiny model that stands for a large one ----


LARGE = ["llama", "gpt_neox", "gpt2", "gptj", "opt", "gemma3_text", "mistral", "mixtral", "qwen3_moe", "phi3", "falcon"]
LARGE += ["bloom", "stablelm", "deepseek_v3", "mamba", "mamba2", "jamba", "gpt_oss", "lfm3", "qwen3_next", "smollm3"]


@pytest.mark.parametrize("kind", LARGE)
def test_a_tiny_model_has_the_layers_of_a_large_one(kind):
    """Of transformers' default sizes, which are mostly those of the first published model."""
    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(config)
        tiny = AutoModelForCausalLM.from_config(tiny_config(config))
    kinds, own = ({type(module) for module in model.modules()} for model in (large, tiny))
    assert own == kinds
    assert sum(parameter.numel() for parameter in tiny.parameters()) < 60e6
    assert config.num_hidden_layers == large.config.num_hidden_layers  # which is left as it was


@pytest.mark.soak
def test_seven_billion_parameters_are_looked_at_in_seconds(base):
    """Nothing of their size is allocated: the file of the weights is a hole, and the process takes less memory."""
    folder = base()
    config = AutoConfig.for_model("llama", eos_token_id=0, bos_token_id=None)
    config.save_pretrained(folder)
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).state_dict()
    header, end = {}, 0
    for name, weight in weights.items():
        start, end = end, end + 2 * weight.numel()
        header[name] = {"dtype": "BF16", "shape": [*weight.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    before, started = psutil.Process().memory_info().rss, time.process_time()
    assert "llama, 6,738,415,616 parameters" in describe_model(recipe_of(folder))
    assert time.process_time() - started < 10
    assert psutil.Process().memory_info().rss - before < 2**30


@pytest.mark.parametrize(("recipe", "package"), [("lora", "peft"), ("qlora", "bitsandbytes")])
def test_what_adapters_need_is_missed_though_the_model_is_not_here(tmp_path, monkeypatch, recipe, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: found(name, *more) if name != package else None
    )
    keys = {"output_dir": str(tmp_path / "out"), "model_name": "nobody/nothing", "log_wandb": "false"}
    loaded = load_recipe(ROOT / "recipes" / f"stablelm7b_oasst_{recipe}.yaml", keys)
    with pytest.raises(UserError, match=f"^{package} is not installed: pip install -r requirements-lora.txt"):
        dry_run(loaded, allow_changes=False)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/x.jsonl", "s3fs"),
        ("s4://bucket/x.jsonl", "Protocol not known: s4"),
        ("https://host/x.jsonl", None),
    ],
)
def test_a_url_that_nothing_here_can_read(tmp_path, capsys, monkeypatch, url, message):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    mix = [{"mine": {"source": "messages", "input_file_path": ["https://host/y.jsonl", url]}}]
    values = {"model_name": "nobody/nothing", "output_dir": str(tmp_path / "out"), "datasets": mix, "log_wandb": False}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    loaded = load_recipe(tmp_path / "recipe.yaml", {})
    if message:
        with pytest.raises(UserError, match=f"^{url}: .*{message}"):
            dry_run(loaded, allow_changes=False)
    else:
        dry_run(loaded, allow_changes=False)
        assert "mine: not here, would be fetched from its URL" in capsys.readouterr().out
