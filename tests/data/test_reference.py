"""Every conversation, split, token and scored position against what the original code made of the shared data."""

import gzip
import json

import pytest
from conftest import SHARED, SHARED_DATA
from transformers import PreTrainedTokenizerFast

from data.dialogue import encode, prepare_tokenizer
from data.reading import TRAIN, VALIDATION, Reading
from data.text_encoder import fast_text_encoder
from recipe.dataset_keys import Datasets
from sources.source import Conversation, Message
from sources.vicuna import FILLERS

REFERENCE = SHARED / "reference" / "original_examples.jsonl.gz"
OPTIONS = {"oasst_export": {"lang": "bg,ca,cs,da,de,en,es,fr,hr,hu,it,nl,pl,pt,ro,ru,sl,sr,sv,uk"}}
MAX_LENGTH = 1024

pytestmark = pytest.mark.skipif(not REFERENCE.is_file(), reason=f"{REFERENCE} is not here")


def normal(messages):
    """Hashable, with any random filler of an empty prompt as "..."."""
    return tuple((role, "..." if role == "user" and content in FILLERS else content) for role, content in messages)


@pytest.fixture(scope="module")
def reference():
    """{data set: {(split, messages): [original examples]}}; the originals' order, which was random, is not kept."""
    found = {name: {} for name in SHARED_DATA}
    with gzip.open(REFERENCE, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            messages = [(message["role"], message["content"]) for message in row["messages"]]
            found[row["dataset"]].setdefault((row["split"], normal(messages)), []).append(row)
    return found


@pytest.fixture(scope="module")
def tokenizer():
    file = SHARED / "data" / "gpt_neox_20b_tokenizer.json"
    return prepare_tokenizer(PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>"))


def test_tokenizer_ids(tokenizer):
    assert len(tokenizer) == 50_282
    assert (tokenizer.convert_tokens_to_ids("<|prompter|>"), tokenizer.pad_token_id) == (50_277, 1)


@pytest.fixture(scope="module")
def encode_texts(tokenizer):
    """What preparation encodes with."""
    return fast_text_encoder(tokenizer)


@pytest.mark.parametrize("name", SHARED_DATA)
def test_same_as_the_original(reference, tokenizer, encode_texts, name):
    expected = {key: list(rows) for key, rows in reference[name].items()}
    (options,) = Datasets.model_validate([{name: {"val_split": 0.05, **OPTIONS.get(name, {})}}]).chosen().values()
    reading = Reading(name, options, [SHARED / "data" / SHARED_DATA[name]], rng_seed=1)
    originals, conversations = [], []
    found = list(reading)
    for conversation, code in zip(found, reading.split(), strict=True):
        part = {TRAIN: "train", VALIDATION: "validation"}[code]
        key = part, normal((message.role, message.content) for message in conversation.messages)
        assert expected.get(key), f"not in the original's {part} split: {key[1][0]}"
        row = expected[key].pop()
        if row["random_filler"]:  # the same but for the filler: encode what the original drew
            conversation = Conversation([Message(m["role"], m["content"]) for m in row["messages"]])
        else:
            assert conversation.as_dicts() == row["messages"]
        originals.append(row)
        conversations.append(conversation)
    assert not any(expected.values()), "conversations of the original that are missing here"
    for row, (ids, scored) in zip(originals, encode(tokenizer, conversations, encode_texts=encode_texts), strict=True):
        assert tokenizer.convert_ids_to_tokens(ids[:MAX_LENGTH].tolist()) == row["tokens"]
        assert scored[:MAX_LENGTH].astype(int).tolist() == row["scored"]
