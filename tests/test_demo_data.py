"""The demo's data, tokenizer and model config: made from a seed, in the five sources' formats, usable as they stand."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
DATA = ROOT / "recipes" / "demo_data"
FILES = [
    "oasst_trees.jsonl",
    "sharegpt.json",
    "dolly.jsonl",
    "grade_school_math.jsonl",
    "code_alpaca.json",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    "model/config.json",
]
CHAT_TOKENS = ["<|prompter|>", "<|assistant|>", "<|system|>", "<|prefix_begin|>", "<|prefix_end|>"]
FLAT = {
    "dolly.jsonl": ("instruction", "context", "response"),
    "grade_school_math.jsonl": ("INSTRUCTION", "RESPONSE"),
    "code_alpaca.json": ("instruction", "input", "output"),
}


def load(name):
    text = (DATA / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if name.endswith(".jsonl") else json.loads(text)


def walk(message):
    yield message
    for reply in message["replies"]:
        yield from walk(reply)


def all_texts():
    for tree in load("oasst_trees.jsonl"):
        yield from (message["text"] for message in walk(tree["prompt"]))
    for row in load("sharegpt.json"):
        yield from (message["value"] for message in row["conversations"])
    for name, keys in FLAT.items():
        yield from (row[key] for row in load(name) for key in keys)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DATA / "model")


def test_script_writes_the_committed_bytes(tmp_path):
    subprocess.run([sys.executable, ROOT / "scripts" / "make_demo_data.py", tmp_path], check=True, capture_output=True)
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == set(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


def test_files_stay_small():
    sizes = [(DATA / name).stat().st_size for name in FILES]
    assert max(sizes) < 700_000
    assert sum(sizes) < 2_000_000


def test_trees_have_the_export_format_and_something_for_every_rule():
    trees = load("oasst_trees.jsonl")
    messages = [message for tree in trees for message in walk(tree["prompt"])]
    keys = {
        "message_id",
        "parent_id",
        "text",
        "role",
        "lang",
        "review_result",
        "deleted",
        "rank",
        "synthetic",
        "replies",
    }
    assert all(set(message) == keys for message in messages)
    assert len({message["message_id"] for message in messages}) == len(messages)
    for message in messages:
        assert message["role"] in ("prompter", "assistant")
        for reply in message["replies"]:
            assert reply["parent_id"] == message["message_id"]
            assert reply["role"] != message["role"]

    assert all(tree["message_tree_id"] == tree["prompt"]["message_id"] for tree in trees)
    assert {tree["tree_state"] for tree in trees} == {"ready_for_export", "growing", "aborted_low_grade"}
    assert Counter(tree["prompt"]["lang"] for tree in trees).keys() == {"en", "de", "eo"}
    assert any(not tree["prompt"]["review_result"] for tree in trees)
    assert any(message["deleted"] for message in messages)
    assert any(message["synthetic"] for message in messages)
    assert {message["rank"] for message in messages if message["role"] == "assistant"} == {0, 1, 2}
    leaves = [message for message in messages if not message["replies"]]
    assert any(message["role"] == "prompter" for message in leaves)


def test_sharegpt_has_the_format_and_the_quirks():
    rows = load("sharegpt.json")
    assert len({row["id"] for row in rows}) == len(rows)
    conversations = [row["conversations"] for row in rows]
    messages = [message for conversation in conversations for message in conversation]
    assert all(set(message) == {"from", "value"} and message["from"] in ("human", "gpt") for message in messages)
    assert any(conversation[0]["from"] == "gpt" for conversation in conversations)
    assert any(message["from"] == "gpt" and not message["value"] for message in messages)
    assert any("[1]" in message["value"] for message in messages)
    assert any([message["from"] for message in conversation[:2]] == ["human"] * 2 for conversation in conversations)


def test_flat_files_have_their_fields():
    for name, keys in FLAT.items():
        assert all(isinstance(row[key], str) for row in load(name) for key in keys), name
    assert {row["category"] for row in load("dolly.jsonl")} >= {"open_qa", "closed_qa", "classification"}
    assert any(row["input"] for row in load("code_alpaca.json"))


def test_word_problems_are_worked_out_right():
    for row in load("grade_school_math.jsonl")[:-1]:  # the last has a blank answer, which the rules drop
        *steps, sentence, last = row["RESPONSE"].split("\n")
        for step in steps:
            left, right = step.split(" = ")
            assert eval(left) == int(right)
        assert last == f"#### {right}"
        assert f" {right} " in sentence


def test_no_prompt_occurs_twice_in_a_file():
    # So that a held-out prompt is never, word for word, one of the training split. Follow-up questions do recur.
    prompts = {
        "oasst_trees.jsonl": [tree["prompt"]["text"] for tree in load("oasst_trees.jsonl")[:-4]]
    }  # 4 are dropped
    prompts["sharegpt.json"] = [
        next(message["value"] for message in row["conversations"] if message["value"] != "Good morning!")
        for row in load("sharegpt.json")
    ]
    prompts["dolly.jsonl"] = [row["instruction"] for row in load("dolly.jsonl")]
    prompts["grade_school_math.jsonl"] = [row["INSTRUCTION"] for row in load("grade_school_math.jsonl")]
    prompts["code_alpaca.json"] = [(row["instruction"], row["input"]) for row in load("code_alpaca.json")]
    for name, texts in prompts.items():
        assert len(set(texts)) == len(texts), name


def test_tokenizer_gives_every_text_back(tokenizer):
    texts = sorted(set(all_texts()))
    assert len(texts) > 2000
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    assert tokenizer.batch_decode(encoded) == texts
    unseen = "Zażółć 漢字 🙂\t\n"  # byte-level: what it was not trained on encodes as well
    assert tokenizer.decode(tokenizer(unseen).input_ids) == unseen


def test_tokenizer_knows_the_special_tokens(tokenizer):
    names = ["<|endoftext|>", "<|padding|>", *CHAT_TOKENS]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(7))
    assert [tokenizer(name).input_ids for name in names] == [[i] for i in range(7)]
    assert tokenizer("Hi<|endoftext|>").input_ids == [*tokenizer("Hi").input_ids, 0]
    assert tokenizer.decode(range(7), skip_special_tokens=True) == ""
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.unk_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|padding|>"


def test_model_is_built_from_its_config(tokenizer):
    config = AutoConfig.from_pretrained(DATA / "model")
    assert config.model_type == "gpt_neox"
    assert config.vocab_size == len(tokenizer)
    assert config.rope_parameters["partial_rotary_factor"] == 0.25
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    model = AutoModelForCausalLM.from_config(config)
    assert 500_000 < model.num_parameters() < 2_000_000
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
