"""Every source through the whole of the preparation: a record of its file, and the conversation that it is.

A new source wants one more line in CASES.
"""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT

from data.mix import prepare_mix
from data.records import read_records
from recipe.command_line import describe_keys
from recipe.load import load_recipe
from sources.messages import MessagesOptions
from sources.registry import SEED_MIX, SOURCES, find_source
from training.model import load_tokenizer

TREE = {
    "tree_state": "ready_for_export",
    "prompt": {
        "role": "prompter",
        "text": "Hi?",
        "lang": "en",
        "review_result": True,
        "replies": [{"role": "assistant", "text": "Ho.", "replies": []}],
    },
}
CHAT = [{"from": "human", "value": " Hi? "}, {"from": "gpt", "value": "Ho\\_ho [1]."}]
QUESTION_AND_ANSWER = [("user", "Hi?"), ("assistant", "Ho.")]
CASES = {
    "oasst_export": (TREE, QUESTION_AND_ANSWER),
    "vicuna": ({"conversations": CHAT}, [("user", "Hi?"), ("assistant", "Ho_ho .")]),
    "dolly15k": ({"instruction": "Hi?", "context": "A [3]", "response": "Ho."}, QUESTION_AND_ANSWER),
    "grade_school_math_instructions": ({"INSTRUCTION": "Hi?", "RESPONSE": "Ho."}, QUESTION_AND_ANSWER),
    "code_alpaca": ({"instruction": "Hi", "input": "?", "output": "Ho."}, [("user", "Hi\n?"), ("assistant", "Ho.")]),
    "messages": ({"messages": [{"role": role, "content": text} for role, text in QUESTION_AND_ANSWER]}, None),
}


def test_each_has_a_case_and_says_what_it_is():
    assert CASES.keys() == SOURCES.keys()
    assert tuple(SOURCES)[:5] == SEED_MIX
    for name, source in SOURCES.items():
        assert source.about
        assert source.licence
        assert f"    {name:<32}{source.about}" in describe_keys()


@pytest.mark.parametrize("name", SOURCES)
def test_a_record_becomes_its_conversation(tmp_path, name):
    record, turns = CASES[name]
    (tmp_path / "data.jsonl").write_text((json.dumps(record) + "\n") * 3)
    values = {
        "model_name": str(ROOT / "recipes" / "demo_data" / "model"),
        "datasets": [{name: {"input_file_path": str(tmp_path / "data.jsonl"), "val_split": 0}}],
        "cache_dir": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    mix = prepare_mix(recipe, load_tokenizer(recipe))
    expected = [{"role": role, "content": text} for role, text in turns or QUESTION_AND_ANSWER]
    assert [mix.train.messages(row) for row in range(3)] == [expected] * 3
    assert (mix.train.targets > 0).all()


@pytest.mark.parametrize("name", SOURCES)
def test_of_a_parquet_file_only_what_it_uses_is_read(tmp_path, name):
    record, _ = CASES[name]
    table = pa.Table.from_pylist([record])
    late = pa.array([2**62], pa.timestamp("us"))  # in the year 148,107, which no datetime of Python's holds
    pq.write_table(table.append_column("created", late), tmp_path / "data.parquet")
    options = MessagesOptions(source="messages", input_file_path="data.parquet")
    ((number, read),) = read_records(tmp_path / "data.parquet", fields=find_source(name, options).fields)
    assert (number, read) == (1, table.to_pylist()[0] | {"created": None})
