"""GGUF files, read by llama.cpp itself (the `xllamacpp` wheel) beside transformers: tokens, probabilities, replies."""

import json
import urllib.request
from pathlib import Path

import pytest
import torch
from by_heart import CHATS, SHAPE, learn, neox, user
from conftest import ROOT, SHARED, run_script
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from data.dialogue import prepare_tokenizer
from publishing.gguf_file import check_gguf, write_gguf
from publishing.gguf_tokenizer import PRE_TOKENIZERS, WORDS, read_tokenizer
from run.model_files import save_model
from utils.errors import UserError

xllamacpp = pytest.importorskip("xllamacpp")

TEXTS = [
    *CHATS,
    "don't you'll WE'RE he's",
    "  two  blanks\tand\ttabs \n\n\n  lines  \r\n end  ",
    "1234567 12.5e-3 ½ ٣٤ x2y",
    "naïve café ﬁ Ω ñandú — “quotes” … §5 €",
    "日本語のテキスト 한국어 עברית العربية हिन्दी ไทย",
    "👩‍👩‍👧 🇩🇪 e\u0301",
    "def f(x):\n    if x:\n        return [x ** 2, 'a']  # !?\n",
]


class LlamaCpp:
    """A GGUF file in llama.cpp's server."""

    def __init__(self, file: Path):
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
        parameters.cpuparams.n_threads, parameters.verbosity = 1, 0
        self.server = xllamacpp.Server(parameters)

    def tokenize(self, text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        address = f"{self.server.listening_address}/tokenize"
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            return json.load(response)["tokens"]

    def reply(self, messages: list[dict]) -> str:
        body = {"messages": messages, "temperature": 0, "max_tokens": 40}
        (choice,) = self.server.handle_chat_completions(body)["choices"]
        assert choice["finish_reason"] == "stop"
        return choice["message"]["content"]

    def log_probabilities(self, ids: list[int]) -> dict[int, float]:
        """Of the ten likeliest next tokens."""
        body = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 10}
        (choice,) = self.server.handle_completions(body)["choices"]
        return {token["id"]: token["logprob"] for token in choice["logprobs"]["content"][0]["top_logprobs"]}


def check(model, tokenizer, folder: Path, dtype: str = "f16", nearness: float = 0.02) -> None:
    """Save, convert, and compare what llama.cpp makes of it with what transformers does.

    Args:
        nearness: of log-probabilities, in nats: fp16 weights, a table for GELU and an fp16 cache are in between.
    """
    save_model(model, tokenizer, folder)
    write_gguf(folder, folder / "model.gguf", dtype)
    llama_cpp = LlamaCpp(folder / "model.gguf")
    for question, answer in CHATS.items():
        assert llama_cpp.reply(user(question)) == answer
        ids = tokenizer.apply_chat_template(user(question), add_generation_prompt=True)["input_ids"]
        generated = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=40)[0, len(ids) :]
        assert tokenizer.decode(generated, skip_special_tokens=True) == answer
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        for token, found in llama_cpp.log_probabilities(ids).items():
            # Far from the likeliest, differences are larger and mean nothing.
            assert found == pytest.approx(float(expected[token]), abs=nearness, rel=nearness)
    for text in TEXTS:
        text = text.replace("e\u0301", "é") if tokenizer.backend_tokenizer.normalizer else text
        assert llama_cpp.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


@pytest.fixture(scope="module")
def demo_tokenizer():
    return prepare_tokenizer(AutoTokenizer.from_pretrained(ROOT / "recipes" / "demo_data" / "model"))


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_gpt_neox(tmp_path, demo_tokenizer, dtype):
    model = learn(neox(demo_tokenizer), demo_tokenizer)
    check(model, demo_tokenizer, tmp_path, dtype, nearness=0.02 if dtype == "f16" else 0.3)


def test_gpt_neox_with_sequential_residuals_and_a_tied_output_layer(tmp_path, demo_tokenizer):
    config = neox(demo_tokenizer, use_parallel_residual=False, tie_word_embeddings=True)
    check(learn(config, demo_tokenizer), demo_tokenizer, tmp_path)


def test_a_stablelm_with_its_tokenizer(tmp_path):
    """The NeoX tokenizer has runs of blanks among its tokens, rows without a token, and NFC before all."""
    file = SHARED / "data" / "gpt_neox_20b_tokenizer.json"
    if not file.exists():
        pytest.skip("no shared files")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>", pad_token="<|padding|>")
    tokenizer = prepare_tokenizer(tokenizer)
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
    check(learn(neox(tokenizer, rope_parameters=rope, hidden_act="gelu"), tokenizer), tokenizer, tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_llama(tmp_path, demo_tokenizer, tied):
    rope = {"rope_type": "default", "rope_theta": 20_000.0}
    settings = {"vocab_size": len(demo_tokenizer), "num_key_value_heads": 2, "head_dim": 32, "rope_parameters": rope}
    config = LlamaConfig(**SHAPE | settings, tie_word_embeddings=tied, max_position_embeddings=256, eos_token_id=0)
    check(learn(config, demo_tokenizer), demo_tokenizer, tmp_path)


def trained_tokenizer(pre: str, whole: bool):
    """A tokenizer that splits text as llama.cpp's pre-tokenizer of this name."""
    steps = []
    for step in PRE_TOKENIZERS[pre][0]:
        if isinstance(step, str):
            steps.append(pre_tokenizers.Split(Regex(step), "isolated"))
        elif step["type"] == "Digits":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step["use_regex"]))
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([(ROOT / "README.md").read_text(encoding="utf-8"), *TEXTS], trainer)
    return prepare_tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|padding|>")
    )


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_llama_cpp_splits_text_as_the_tokenizer_does(tmp_path, pre):
    tokenizer = trained_tokenizer(pre, PRE_TOKENIZERS[pre][1])
    model = AutoModelForCausalLM.from_config(neox(tokenizer))
    save_model(model, tokenizer, tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf", "f16")
    llama_cpp = LlamaCpp(tmp_path / "model.gguf")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for text in [*TEXTS, readme, "<|prompter|>Hi 12 <|endoftext|><|assistant|>"]:
        assert llama_cpp.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_rows_without_a_token_are_unused(tmp_path, demo_tokenizer):
    demo_tokenizer.save_pretrained(tmp_path)
    rows = len(demo_tokenizer) + 6
    tokenizer = read_tokenizer(tmp_path / "tokenizer.json", rows)
    assert len(tokenizer.tokens) == len(set(tokenizer.tokens)) == rows
    assert [kind.name for kind in tokenizer.types[-6:]] == ["UNUSED"] * 6
    assert tokenizer.types[demo_tokenizer.eos_token_id].name == "CONTROL"
    assert tokenizer.types[demo_tokenizer.convert_tokens_to_ids("a")].name == "NORMAL"


def metaspace(tokenizer: dict) -> None:
    tokenizer["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def other_expression(tokenizer: dict) -> None:
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, tokenizer["pre_tokenizer"]]}


def prefix(tokenizer: dict) -> None:
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True


def lower(tokenizer: dict) -> None:
    tokenizer["normalizer"] = {"type": "Lowercase"}


def word_piece(tokenizer: dict) -> None:
    tokenizer["model"]["type"] = "WordPiece"


@pytest.mark.parametrize("change", [metaspace, other_expression, prefix, lower, word_piece])
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(tmp_path, demo_tokenizer, change):
    demo_tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer.json: .*convert_hf_to_gguf.py"):
        read_tokenizer(file, len(demo_tokenizer))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hidden_act": "relu"}, "hidden_act = relu"),
        ({"attention_bias": False}, "attention_bias = false"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type = linear"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(tmp_path, demo_tokenizer, changes, problem):
    save_model(AutoModelForCausalLM.from_config(neox(demo_tokenizer, **changes)), demo_tokenizer, tmp_path)
    with pytest.raises(UserError, match=f"{problem} cannot be written as GGUF here; .*convert_hf_to_gguf.py"):
        write_gguf(tmp_path, tmp_path / "model.gguf", "f16")
    assert not list(tmp_path.glob("*gguf*"))


def test_weights_beyond_fp16_are_refused_and_nothing_is_left(tmp_path, demo_tokenizer):
    model = AutoModelForCausalLM.from_config(neox(demo_tokenizer))
    model.gpt_neox.layers[1].mlp.dense_h_to_4h.weight.data[3, 5] = 1e5
    save_model(model, demo_tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"dense_h_to_4h.weight holds numbers beyond fp16's range"):
        write_gguf(tmp_path, tmp_path / "model.gguf", "f16")
    assert not list(tmp_path.glob("*gguf*")) + list(tmp_path.glob(".*gguf*"))


def test_what_llama_cpp_computes_otherwise_is_said(tmp_path, demo_tokenizer, capsys):
    demo_tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    try:
        save_model(AutoModelForCausalLM.from_config(neox(demo_tokenizer, hidden_act="gelu")), demo_tokenizer, tmp_path)
    finally:
        demo_tokenizer.backend_tokenizer.normalizer = None
    write_gguf(tmp_path, tmp_path / "model.gguf", "f16")
    said = capsys.readouterr().out
    assert "exact GELU" in said
    assert "NFC" in said


def test_export_writes_it_beside_the_folder(tmp_path, demo_tokenizer):
    """Rows without a token are gone, and a file that is there already stays."""
    save_model(learn(neox(demo_tokenizer), demo_tokenizer), demo_tokenizer, tmp_path / "model")
    arguments = [tmp_path / "model", tmp_path / "out", "--gguf", tmp_path / "model.gguf", "--gguf_dtype", "q8_0"]
    run = run_script(*arguments, script="scripts/export.py", output_dir=tmp_path)
    assert f"in {tmp_path / 'model.gguf'}: " in run.stdout
    llama_cpp = LlamaCpp(tmp_path / "model.gguf")
    assert {question: llama_cpp.reply(user(question)) for question in CHATS} == CHATS
    arguments[1] = tmp_path / "again"
    again = run_script(*arguments, script="scripts/export.py", output_dir=tmp_path, check=False)
    assert again.errors == [f"error: {tmp_path / 'model.gguf'}: is there already: give a new name"]
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("file", ["/proc/model.gguf", "x" * 250 + ".gguf"])
def test_where_no_file_can_be_written_is_found_before_the_weights_are_read(tmp_path, file):
    with pytest.raises(UserError, match="cannot write there: "):
        check_gguf(tmp_path / file, tmp_path, rows=1)
    assert [*tmp_path.iterdir()] == []
