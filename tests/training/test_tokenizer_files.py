"""Of every kind of tokenizer: the ids of training are those of its saved chat template; or it is refused.

What it is compared with is none of our code: transformers' `apply_chat_template` of what was read back.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, SHARED, TRANSFORMERS_4, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.dialogue import CHAT_TOKENS, encode, prepare_tokenizer
from data.text_encoder import fast_text_encoder
from evaluation.generation import encode_chat
from sources.source import Conversation, Message
from training.tokenizer_files import PROBES, check_tokenizer, save_tokenizer
from utils.errors import UserError

DEMO = ROOT / "recipes" / "demo_data" / "model"
FIXTURES = ROOT / "tests" / "fixtures" / "tokenizers"
NEOX_FILE = SHARED / "data" / "gpt_neox_20b_tokenizer.json"
EOS = "</s>"
TEXTS = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "docs" / "training.md")]
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
GPT_4 = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated")


def build(splitter=None, normalizer=None, model="bpe", processor=None, added=(), control=(), names=None, **options):
    """A tokenizer of 800 tokens.

    Args:
        added: tokens that are added as they are.
        control: AddedTokens that come before transformers has a say, of EOS or the chat tokens, with rules of theirs.
        options: of the trainer.
    """
    kinds = {
        "bpe": (models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True), trainers.BpeTrainer),
        "bytes": (models.BPE(), trainers.BpeTrainer),
        "unigram": (models.Unigram(), trainers.UnigramTrainer),
        "wordpiece": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer),
    }
    empty, trainer = kinds[model]
    backend = Tokenizer(empty)
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter
    special = ["<unk>", "<s>", EOS]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if model == "bpe" else []
    alphabet = pre_tokenizers.ByteLevel.alphabet() if model == "bytes" else []
    options |= {"unk_token": "<unk>"} if model == "unigram" else {}
    trained = trainer(
        vocab_size=800,
        special_tokens=special + fallback,
        initial_alphabet=alphabet,
        show_progress=False,
        **options,
    )
    backend.train_from_iterator(TEXTS, trained)
    if fallback:  # a model's own bytes, not tokens that are looked for in the text
        settings_ = json.loads(backend.to_str())
        settings_["added_tokens"] = [one for one in settings_["added_tokens"] if one["content"] in special]
        backend = Tokenizer.from_str(json.dumps(settings_))
    backend.decoder = decoders.ByteLevel() if model == "bytes" else decoders.Metaspace()
    backend.post_processor = processor
    backend.add_special_tokens(list(control))
    backend.add_tokens(list(added))
    names = {"eos_token": EOS, "bos_token": "<s>", "unk_token": "<unk>"} | (names or {})
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def metaspace(scheme: str, split: bool = False):
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)


def around(*content, **rules) -> list[AddedToken]:
    return [AddedToken(one, special=True, **({"normalized": False} | rules)) for one in content or (EOS, *CHAT_TOKENS)]


BOS_EOS = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
LEGACY_LLAMA = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
T5 = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace("always", split=True)])
NESTED = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), metaspace("first", split=True)])
KINDS = {
    "Metaspace, first": lambda: build(metaspace("first")),
    "Metaspace, first, split": lambda: build(metaspace("first", split=True)),
    "Metaspace, always": lambda: build(metaspace("always")),
    "Metaspace, never": lambda: build(metaspace("never")),
    "Metaspace in a Sequence": lambda: build(NESTED),
    "Metaspace, bos and eos of a post-processor": lambda: build(metaspace("first"), processor=BOS_EOS),
    "Unigram": lambda: build(metaspace("first"), normalizers.NFKC(), "unigram"),
    "Unigram like T5's": lambda: build(T5, normalizers.Nmt(), "unigram", processor=BOS_EOS),
    "Llama of early 2023": lambda: build(None, LEGACY_LLAMA, control=around(EOS, normalized=True)),
    "Llama of early 2023, all normalized": lambda: build(None, LEGACY_LLAMA, control=around(normalized=True)),
    "Prepend": lambda: build(BYTE_LEVEL, normalizers.Prepend("_"), "bytes"),
    "Strip": lambda: build(BYTE_LEVEL, normalizers.Strip(), "bytes"),
    "BERT's": lambda: build(pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer(), "wordpiece"),
    "lower case, normalized": lambda: build(
        BYTE_LEVEL, normalizers.Lowercase(), "bytes", control=around(normalized=True)
    ),
    "NFC, normalized": lambda: build(BYTE_LEVEL, normalizers.NFC(), "bytes", control=around(normalized=True)),
    "ByteLevel": lambda: build(BYTE_LEVEL, model="bytes"),
    "ByteLevel, a blank in front": lambda: build(pre_tokenizers.ByteLevel(add_prefix_space=True), model="bytes"),
    "Split like GPT-4's": lambda: build(
        pre_tokenizers.Sequence([GPT_4, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
        model="bytes",
    ),
    "rstrip": lambda: build(metaspace("first"), control=around(rstrip=True)),
    "lstrip": lambda: build(metaspace("first"), control=around(lstrip=True)),
    "lstrip and rstrip": lambda: build(BYTE_LEVEL, model="bytes", control=around(lstrip=True, rstrip=True)),
    "rstrip, Phi-3's": lambda: build(metaspace("first"), control=around("<|assistant|>", "<|system|>", rstrip=True)),
    "lstrip, kept by transformers": lambda: build(
        metaspace("first"),
        names={"eos_token": AddedToken(EOS, lstrip=True, rstrip=True, normalized=True, special=True)},
    ),
    "rules in its tokenizer_config.json": lambda: with_added_tokens_decoder(build(metaspace("first"))),
    "an eos that is not special": lambda: build(metaspace("first"), added=["<eos>"], names={"eos_token": "<eos>"}),
    "an eos that was named later": lambda: with_eos(build(metaspace("first")), "<eos>"),
    "single_word": lambda: build(BYTE_LEVEL, model="bytes", control=around(single_word=True)),
    "added words": lambda: build(metaspace("first"), added=["colour", AddedToken("wor", lstrip=True), "\n\n", "  "]),
    "dropout": lambda: with_dropout(build(BYTE_LEVEL, model="bytes")),
    "special tokens split": lambda: build(metaspace("first"), names={"split_special_tokens": True}),
    "the demo's": lambda: AutoTokenizer.from_pretrained(DEMO),
    "the shared case": lambda: AutoTokenizer.from_pretrained(FIXTURES / "metaspace_first"),
    "the shared case, legacy": lambda: AutoTokenizer.from_pretrained(FIXTURES / "metaspace_first", legacy=True),
}
if NEOX_FILE.is_file():
    KINDS["GPT-NeoX's"] = lambda: PreTrainedTokenizerFast(tokenizer_file=str(NEOX_FILE), eos_token="<|endoftext|>")


def with_dropout(tokenizer):
    tokenizer.backend_tokenizer.model.dropout = 0.5
    return tokenizer


def with_eos(tokenizer, token: str):
    tokenizer.eos_token = token
    return tokenizer


def with_added_tokens_decoder(tokenizer):
    """As transformers 4 saved it."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder) / "tokenizer_config.json"
        rules = {
            "content": EOS,
            "lstrip": True,
            "rstrip": True,
            "normalized": True,
            "single_word": True,
            "special": True,
        }
        values = json.loads(path.read_text()) | {
            "added_tokens_decoder": {"2": rules},
            "eos_token": rules | {"__type": "AddedToken"},
        }
        path.write_text(json.dumps(values))
        return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A tokenizer as training has it, with its fast encoder where it has one, and as whoever serves the model does."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = prepare_tokenizer(KINDS[request.param]())
    save_tokenizer(tokenizer, folder)
    fast = fast_text_encoder(tokenizer)  # of GPT-NeoX's half a second
    return SimpleNamespace(trained=tokenizer, fast=fast, served=AutoTokenizer.from_pretrained(folder), folder=folder)


def chat(*texts: str) -> Conversation:
    return Conversation([Message(("user", "assistant")[place % 2], text) for place, text in enumerate(texts)])


def same_ids(pair, conversations: list[Conversation]) -> None:
    expected = [pair.served.apply_chat_template(one.as_dicts(), tokenize=True)["input_ids"] for one in conversations]
    for encode_texts in (None, pair.fast):
        found = [ids.tolist() for ids, _ in encode(pair.trained, conversations, encode_texts=encode_texts)]
        for conversation, ours, theirs in zip(conversations, found, expected, strict=True):
            assert ours == theirs, (conversation, *map(pair.trained.convert_ids_to_tokens, (ours, theirs)))


PIECES = [
    "",
    " ",
    "  ",
    "\n",
    "\t",
    "\r",
    "\xa0",
    "\u3000",
    "\u2581",
    "a",
    "Zz",
    "1",
    "23",
    "\u0663",
    "!",
    "'s",
    "_",
    "<",
    ">",
]
PIECES += [
    "e\u0301",
    "\u0338",
    "\u4e2d\u6587",
    "\ud55c",
    "\U0001f44d\U0001f3fd",
    "\u200d",
    "\ufb01",
    "colour",
    "world",
    "\0",
]
texts = st.text(max_size=20) | st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


def test_every_probe_is_as_the_template_has_it(pair):
    same_ids(pair, [chat(text, text, text) for text in PROBES])
    system = [Conversation([Message("system", text), *chat("a", "b").messages]) for text in PROBES]
    same_ids(pair, system)


@settings(max_examples=60)
@given(st.lists(st.lists(texts, min_size=1, max_size=4), min_size=1, max_size=4))
def test_any_text_is_as_the_template_has_it(pair, conversations):
    special = pair.trained.all_special_tokens
    same_ids(pair, [chat(*one) for one in conversations if not any(token in "".join(one) for token in special)])


def test_the_probe_lets_it_pass(pair):
    check_tokenizer(pair.trained, str(pair.folder))


def test_prompts_of_the_evaluations_are_as_the_template_has_them(pair):
    for text in PROBES:
        messages = chat(text, text, text).as_dicts()
        expected = pair.served.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert encode_chat(pair.served, messages) == expected


def test_literal_control_tokens_stay_text(pair):
    """Whatever stands around them, for each role, and of a model that knows them as words."""
    control = pair.trained.convert_tokens_to_ids([*CHAT_TOKENS[:3], pair.trained.eos_token])
    prompter, assistant, _, eos = control
    for token in (*CHAT_TOKENS, pair.trained.eos_token):
        for text in (token, f"a{token}b", f" {token}\n", token * 3, f"a {token} b"):
            ((ids, _),) = encode(pair.trained, [chat(text, text)])
            assert [one for one in ids.tolist() if one in control] == [prompter, eos, assistant, eos], text
            assert len(ids) > 4


def test_a_thousand_control_tokens_in_a_text_that_the_model_knows_as_words():
    tokenizer = prepare_tokenizer(KINDS["Unigram"]())
    ((ids, _),) = encode(tokenizer, [chat(EOS * 5000)])
    assert ids.tolist().count(tokenizer.eos_token_id) == 1


def test_saved_again_it_is_the_same(pair, tmp_path):
    """The second save of what was read back, as a run that goes on from a checkpoint makes it."""
    again = prepare_tokenizer(AutoTokenizer.from_pretrained(pair.folder))
    save_tokenizer(again, tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.loads(
        (pair.folder / "tokenizer.json").read_text()
    )
    conversations = [chat(text, text) for text in PROBES]
    ours, theirs = ([ids.tolist() for ids, _ in encode(one, conversations)] for one in (pair.trained, again))
    assert ours == theirs


# ---- what was right is left alone ----


def alone(tokenizer, text: str) -> list[int]:
    """As this project encoded a content before it looked at where it stands."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


GPT_2 = {"added": [], "control": around("<|endoftext|>", normalized=True), "names": {"eos_token": "<|endoftext|>"}}
UNCHANGED = {
    "the demo's": KINDS["the demo's"],
    "GPT-2's kind": lambda: build(BYTE_LEVEL, model="bytes", **GPT_2),
    **({"GPT-NeoX's": KINDS["GPT-NeoX's"]} if "GPT-NeoX's" in KINDS else {}),
}


@pytest.mark.parametrize("kind", UNCHANGED)
def test_tokenizers_of_gpt_2s_kind_stay_as_they_were(kind):
    """Their tokenizer.json, of which the names of prepared data are made, and each id."""
    tokenizer, before = UNCHANGED[kind](), UNCHANGED[kind]()
    tokens = [AddedToken(token, special=True, normalized=False) for token in CHAT_TOKENS]
    before.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    prepare_tokenizer(tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before.backend_tokenizer.to_str()
    for text in PROBES:
        ((ids, _),) = encode(tokenizer, [chat(text)])
        assert ids[1:-1].tolist() == alone(before, text)


# ---- read by transformers 4 ----

READ_BY_4 = """
import json, sys
import transformers
transformers.logging.set_verbosity_error()
texts, folders = json.load(sys.stdin)
found = {}
for folder in folders:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chats = [[{"role": role, "content": text} for role in ("user", "assistant")] for text in texts]
    found[folder] = [tokenizer.apply_chat_template(chat, tokenize=True) for chat in chats]
print(json.dumps([transformers.__version__, found]))
"""


@pytest.mark.skipif(not TRANSFORMERS_4.exists(), reason="make test-transformers4 installs it")
def test_transformers_4_has_the_same_ids(tmp_path):
    expected = {}
    for number, kind in enumerate(KINDS):
        tokenizer = prepare_tokenizer(KINDS[kind]())
        folder = tmp_path / str(number)
        save_tokenizer(tokenizer, folder)
        encoded = encode(tokenizer, [chat(text, text) for text in PROBES])
        expected[str(folder)] = kind, [ids.tolist() for ids, _ in encoded]
    run = subprocess.run(
        [sys.executable, "-c", READ_BY_4],
        input=json.dumps([PROBES, list(expected)]),
        env={**os.environ, "PYTHONPATH": str(TRANSFORMERS_4), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    version, found = json.loads(run.stdout.splitlines()[-1])
    assert version.startswith("4.")
    for folder, (kind, ids) in expected.items():
        for text, ours, theirs in zip(PROBES, ids, found[folder], strict=True):
            assert ours == theirs, (kind, text)


# ---- what cannot be made equal is refused ----

REFUSED = {
    "a word with the beginning of a control token": ("x<", "reads the message 'x' as"),
    "a control token with a word": ("<|assistant|>Sure", "reads the message 'Sure' as"),
    "two control tokens in one": (f"{EOS}<|assistant|>", "reads the message '"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_mended_is_refused(name):
    token, message = REFUSED[name]
    tokenizer = prepare_tokenizer(build(BYTE_LEVEL, model="bytes", added=[AddedToken(token, normalized=False)]))
    with pytest.raises(UserError, match=f"model_name = some/model: its tokenizer {message}") as caught:
        check_tokenizer(tokenizer, "some/model")
    assert "\n" not in str(caught.value)
    assert "take the added token or the normalizer that does this out of its tokenizer.json" in str(caught.value)


def test_a_reader_who_puts_a_blank_in_front_is_found_out(monkeypatch):
    """As a transformers would that has another default for what it reads."""
    read = AutoTokenizer.from_pretrained

    def read_otherwise(*arguments, **how):
        tokenizer = read(*arguments, **how)
        tokenizer.backend_tokenizer.pre_tokenizer = metaspace("always")
        return tokenizer

    tokenizer = prepare_tokenizer(KINDS["Metaspace, first"]())
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", read_otherwise)
    with pytest.raises(UserError, match=r"in its saved chat template and as .* in training"):
        check_tokenizer(tokenizer, "some/model")


def test_what_cannot_be_read_back_is_one_line(monkeypatch):
    tokenizer = prepare_tokenizer(KINDS["ByteLevel"]())
    monkeypatch.setattr(tokenizer, "chat_template", "{% nonsense %}")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="as a run saves it, could not be read back: ZeroDivisionError"):
        check_tokenizer(tokenizer, "some/model")


def test_the_probe_takes_a_second_at_most(tmp_path):
    tokenizer = prepare_tokenizer(KINDS["the demo's"]())
    start = time.process_time()
    check_tokenizer(tokenizer, str(DEMO))
    assert time.process_time() - start < 1


# ---- as a user meets it ----


def base_model(folder, kind: str, added: str | None = None):
    """A folder with a tokenizer and a config from which a model is built."""
    shutil.copytree(FIXTURES / "metaspace_first", folder)
    tokenizer = KINDS[kind]()
    if added:
        tokenizer.add_tokens([AddedToken(added, normalized=False)])
    tokenizer.save_pretrained(folder)
    return folder


COMMANDS = {
    "sft": ("scripts/sft.py", []),
    "dry run": ("scripts/sft.py", ["--dry_run"]),
    "prepare_data": ("scripts/prepare_data.py", []),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_start_refuses_it_before_any_data_are_prepared(tmp_path, command):
    script, options = COMMANDS[command]
    model = base_model(tmp_path / "model", "ByteLevel", added="x<")
    options = ["recipes/demo.yaml", "--model_name", model, "--cache_dir", tmp_path / "cache", *options]
    run = run_script(*options, script=script, output_dir=tmp_path / "out", check=False)
    assert run.returncode == 2
    assert len(run.errors) == 1
    assert "reads the message 'x' as" in run.errors[0]
    assert not list(tmp_path.glob("cache/prepared/*"))


def test_a_run_trains_on_what_its_own_checkpoint_is_served_with(tmp_path):
    """Prepared data, row by row, beside the template of the folder that the run leaves."""
    model = base_model(tmp_path / "model", "the shared case")
    options = ["recipes/demo.yaml", "--model_name", model, "--cache_dir", tmp_path / "cache", "--max_length", 128]
    short = ["--max_steps", 2, "--save_strategy", "no", "--sample_replies", 0]
    run_script(*options, *short, output_dir=tmp_path / "out")
    rows = tmp_path / "rows.jsonl"
    run_script(*options, "--export", rows, script="scripts/prepare_data.py", output_dir=None)
    served = AutoTokenizer.from_pretrained(tmp_path / "out")
    examples = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    whole = [example for example in examples if len(example["input_ids"]) < 128]
    assert len(whole) > 500
    for example in whole[::5]:
        assert example["input_ids"] == served.apply_chat_template(example["messages"], tokenize=True)["input_ids"]


def test_a_dry_run_looks_at_a_hub_models_tokenizer_where_it_is_here(tmp_path):
    model = base_model(tmp_path / "model", "ByteLevel", added="x<")
    cached = tmp_path / "hub" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(model, cached / "snapshots" / ("0" * 40))
    run = run_script(
        *["recipes/demo.yaml", "--model_name", "some/model", "--dry_run"],
        output_dir=tmp_path / "out",
        check=False,
        env={"HF_HUB_CACHE": str(tmp_path / "hub")},
    )
    assert (run.returncode, len(run.errors)) == (2, 1)
    assert "model_name = some/model: its tokenizer reads the message 'x' as" in run.errors[0]
