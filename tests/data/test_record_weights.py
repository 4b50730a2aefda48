"""Weights and `train_on` of data of one's own, from the file to the mix, its report and its export."""

import gzip
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import ROOT, run_script
from transformers import AutoTokenizer

from data.dialogue import prepare_tokenizer
from data.mix import prepare_mix
from data.prepared import EXAMPLES, REPORT, SPLIT, WEIGHTS, open_prepared, seal
from recipe.keys import Recipe
from recipe.load import load_recipe
from utils.errors import UserError

MODEL = ROOT / "recipes" / "demo_data" / "model"


@pytest.fixture(scope="module")
def tokenizer():
    return prepare_tokenizer(AutoTokenizer.from_pretrained(MODEL))


@pytest.fixture
def prepare(tmp_path, monkeypatch, tokenizer):
    """The mix of these data sets, each {name: options}, and the folder that each is prepared in."""
    monkeypatch.chdir(tmp_path)

    def run(*datasets):
        mix = [
            {name: {"source": "messages", "val_split": 0} | options}
            for each in datasets
            for name, options in each.items()
        ]
        keys = {"model_name": "none", "output_dir": "out", "cache_dir": tmp_path / "cache", "datasets": mix}
        found = prepare_mix(Recipe.model_validate(keys), tokenizer)
        return found, {name: next((tmp_path / "cache" / "prepared").glob(f"{name}-*[0-9a-f]")) for name in found.names}

    return run


def chats(count: int, **of_record) -> list[dict]:
    """Two turns each; `of_record` has a value for each, `...` where it has none."""
    rows = []
    for n in range(count):
        texts = f"question {n}", f"reply {n}", "and then?", f"another {n}"
        messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
        own = {name: values[n] for name, values in of_record.items() if values[n] is not ...}
        rows.append({"messages": messages} | own)
    return rows


def write(path, rows) -> dict:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"input_file_path": path.name}


# ---- what is kept ----


def test_a_record_and_its_data_set_are_multiplied_and_nothing_is_prepared_anew(tmp_path, prepare, capsys):
    weights = [1, 0.25, ..., 3, 1e-3]
    options = write(tmp_path / "a.jsonl", chats(5, weight=weights))
    plain = write(tmp_path / "b.jsonl", chats(3))
    mix, before = prepare({"a": options, "b": plain})
    said = capsys.readouterr().out
    assert "5 training and 0 validation conversations of weights from 0.001 to 3 (dropped: nothing)" in said
    assert "3 training and 0 validation conversations (dropped: nothing)" in said
    assert mix.train.weights.tolist() == [1, 0.25, 1, 3, 1e-3, 1, 1, 1]
    mix, after = prepare({"a": options | {"weight": 4}, "b": plain | {"weight": 0.5}})
    assert mix.train.weights.tolist() == [4, 1, 4, 12, 4e-3, 0.5, 0.5, 0.5]
    assert mix.train.select(np.array([3, 0])).weights.tolist() == [12, 4]
    assert before == after
    assert capsys.readouterr().out == ""
    assert sorted(path.name for path in before["a"].iterdir()) == sorted([EXAMPLES, SPLIT, WEIGHTS, REPORT])


def test_weights_change_nothing_else_and_take_no_room_where_there_are_none(tmp_path, prepare):
    rows = chats(40)
    options = {"val_split": 0.3}
    mixes = [
        prepare({name: write(tmp_path / f"{name}.jsonl", own) | options})
        for name, own in {
            "plain": rows,
            "ones": [row | {"weight": 1} for row in rows],
            "nulls": [row | {"weight": None} for row in rows],
            "weighted": [row | {"weight": 2} for row in rows],
        }.items()
    ]
    (plain, folder), *others = [(mix, next(iter(folders.values()))) for mix, folders in mixes]
    assert plain.train.weights is plain.validation.weights is None
    for mix, own in others[:2]:
        assert mix.train.weights is None
        assert [*mix.fingerprints.values()] == [*plain.fingerprints.values()]
        for name in (EXAMPLES, SPLIT):
            assert (own / name).read_bytes() == (folder / name).read_bytes()
        assert not (own / WEIGHTS).exists()
    weighted, own = others[2]
    assert (own / EXAMPLES).read_bytes() == (folder / EXAMPLES).read_bytes()
    assert [*weighted.fingerprints.values()] != [*plain.fingerprints.values()]
    assert set(weighted.train.weights) == set(weighted.validation.weights) == {2}


def test_a_record_of_weight_0_is_left_out_and_moves_no_other(tmp_path, prepare):
    rows = chats(30)
    first, _ = prepare({"a": write(tmp_path / "a.jsonl", rows) | {"val_split": 0.3}})
    for n in (2, 11, 12):
        rows[n]["weight"] = 0.0
    second, _ = prepare({"b": write(tmp_path / "b.jsonl", rows) | {"val_split": 0.3}})
    assert second.reports["b"]["dropped"] == {"record of weight 0": 3}
    assert second.train.weights is None
    left_out = [rows[n]["messages"] for n in (2, 11, 12)]
    for before, after in ((first.train, second.train), (first.validation, second.validation)):
        kept = [before.messages(row) for row in range(len(before)) if before.messages(row) not in left_out]
        assert [after.messages(row) for row in range(len(after))] == kept


def test_a_tree_gives_its_weight_to_all_of_its_threads(tmp_path, prepare):
    """In any source, in upper or lower case, from a parquet file whose other columns are not read."""
    table = pa.table({"instruction": ["q", "r"], "response": ["a", "b"], "context": ["", ""], "WEIGHT": [0.5, None]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    mix, _ = prepare({"mine": {"input_file_path": "d.parquet"}})
    assert mix.train.weights.tolist() == [0.5, 1]
    lines = (ROOT / "recipes" / "demo_data" / "oasst_trees.jsonl").read_text().splitlines()
    trees = [json.loads(line) | {"weight": 0.125} for line in lines[:20]]
    (tmp_path / "trees.jsonl").write_text("".join(json.dumps(tree) + "\n" for tree in trees))
    values = {"input_file_path": "trees.jsonl", "val_split": 0}
    keys = {"model_name": "none", "output_dir": "out", "cache_dir": tmp_path, "datasets": [{"oasst_export": values}]}
    trees = prepare_mix(Recipe.model_validate(keys), prepare_tokenizer(AutoTokenizer.from_pretrained(MODEL))).train
    assert len(trees) > 5
    assert set(trees.weights) == {0.125}


def test_the_last_reply_or_those_that_are_not_left_out(tmp_path, prepare, tokenizer):
    rows = chats(2)
    rows[1]["messages"][3]["weight"] = 0
    last, _ = prepare({"last": write(tmp_path / "a.jsonl", rows) | {"train_on": "last"}})
    every, _ = prepare({"all": write(tmp_path / "a.jsonl", rows)})

    def learnt(split):
        return [tokenizer.decode(ids[scored]) for ids, scored in map(split.tokens, range(len(split)))]

    assert learnt(last.train) == ["another 0<|endoftext|>"]
    assert last.reports["last"]["dropped"] == {"conversation with no scored token": 1}
    prompt = "<|endoftext|><|prompter|>"
    assert learnt(every.train) == [f"reply 0{prompt}another 0<|endoftext|>", f"reply 1{prompt}"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda weights: weights[:-1],
        lambda weights: -weights,
        lambda weights: weights * math.nan,
        lambda weights: weights * math.inf,
        lambda weights: weights.astype(np.float32),
        lambda weights: weights[None],
    ],
)
def test_kept_weights_that_are_none(tmp_path, prepare, wrong):
    _, folders = prepare({"a": write(tmp_path / "a.jsonl", chats(3, weight=[2, 1, 3]))})
    folder = folders["a"]
    np.save(folder / WEIGHTS, wrong(np.load(folder / WEIGHTS)))
    with pytest.raises(UserError, match=rf"{WEIGHTS}: is not as it was written"):
        open_prepared(folder)
    seal(folder, folder, json.loads((folder / REPORT).read_text())["report"])
    with pytest.raises(UserError, match="its files are not of one data set"):
        open_prepared(folder)


def test_kept_weights_that_are_gone(tmp_path, prepare):
    _, folders = prepare({"a": write(tmp_path / "a.jsonl", chats(3, weight=[2, 1, 3]))})
    (folders["a"] / WEIGHTS).unlink()
    with pytest.raises(UserError, match=rf"{WEIGHTS}: is missing"):
        open_prepared(folders["a"])


# ---- what is refused ----

NO_WEIGHTS = {
    "NaN": "is nan",
    "Infinity": "is inf",
    "-Infinity": "is -inf",
    "1e999": "is inf",
    "-1": "is -1",
    "-1e-9": "is -1e-09",
    "1" + "0" * 400: "is 1000",
    "true": "is true or false",
    "false": "is true or false",
    '"0.5"': "is a string",
    '""': "is a string",
    "[1]": "is a list",
    "{}": "is an object",
}


@pytest.mark.parametrize("text", NO_WEIGHTS)
@pytest.mark.parametrize("kind", ["lines", "array"])
def test_no_weight_of_a_record(tmp_path, prepare, text, kind):
    rows = [json.dumps(row) for row in chats(4)]
    rows[2] = rows[2][:-1] + f', "weight": {text}}}'
    path = tmp_path / "a.json"
    path.write_text("\n".join(rows) if kind == "lines" else f"[{','.join(rows)}]")
    with pytest.raises(UserError) as error:
        prepare({"a": {"input_file_path": path.name}})
    assert "\n" not in str(error.value)
    assert f"a.json, record 3: field 'weight' {NO_WEIGHTS[text]}" in str(error.value)
    mix, _ = prepare({"a": {"input_file_path": path.name, "on_bad_records": "skip"}})
    assert len(mix.train) == mix.reports["a"]["bad_records"] + 2 == 3
    assert "record 3" in mix.reports["a"]["first_bad_record"]


@pytest.mark.parametrize("column", [[True, False], ["1", "2"], [math.nan, 1.0], [-1, 1]])
def test_no_weights_of_a_table(tmp_path, prepare, column):
    pyarrow.parquet.write_table(
        pa.table({"prompt": ["q", "r"], "output": ["a", "b"], "weight": column}), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match=r"\A[^\n]*a\.parquet, record 1: field 'weight' is [^\n]*\Z"):
        prepare({"a": {"input_file_path": "a.parquet"}})


def test_a_weight_given_twice(tmp_path, prepare):
    rows = [row | {"weight": 2, "Weight": None} for row in chats(2)]
    with pytest.raises(UserError, match=r"record 1: fields 'weight' and 'Weight' have one name: rename one"):
        prepare({"a": write(tmp_path / "a.jsonl", rows)})


def test_weights_of_a_table_in_text(tmp_path, prepare):
    """Whose cells are all text."""
    lines = ["prompt,output,Weight", "q,a,0.5", "r,b,", "s,c,2e0", "t,d,0"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    mix, _ = prepare({"a": {"input_file_path": "a.csv"}})
    assert mix.train.weights.tolist() == [0.5, 1, 2]
    assert mix.reports["a"]["dropped"] == {"record of weight 0": 1}
    for cell, said in {"heavy": "is a string", "nan": "is nan", "-1": "is -1", "1_0": "is a string"}.items():
        (tmp_path / "a.csv").write_text("\n".join([*lines, f"u,e,{cell}"]))
        with pytest.raises(UserError, match=rf"a\.csv, record 5: field 'Weight' {said}"):
            prepare({"a": {"input_file_path": "a.csv"}})


@pytest.mark.parametrize("weight", [0.5, -1, 2, "1", math.nan, [0]])
def test_no_weight_of_a_message(tmp_path, prepare, weight):
    rows = chats(3)
    rows[1]["messages"][1]["weight"] = weight
    with pytest.raises(UserError, match=r"a\.jsonl, record 2: field 'messages.weight' is [^\n]*, not 0 or 1\Z"):
        prepare({"a": write(tmp_path / "a.jsonl", rows)})


@pytest.mark.parametrize("weight", [0, 0.0, 1, 1.0, None])
def test_a_weight_of_a_message(tmp_path, prepare, weight):
    rows = chats(1)
    rows[0]["messages"][1]["weight"] = rows[0]["messages"][0]["weight"] = weight
    mix, _ = prepare({"a": write(tmp_path / "a.jsonl", rows)})
    ids, scored = mix.train.tokens(0)
    assert (scored.sum() < len(ids) / 2) == (weight == 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("weight: -1", "datasets.a.weight = -1"),
        ("weight: .nan", "datasets.a.weight = .nan"),
        ("weight: nan", "datasets.a.weight = nan"),
        ("weight: .inf", "datasets.a.weight = .inf"),
        ("weight: inf", "datasets.a.weight = inf"),
        ("weight: true", "datasets.a.weight = true"),
        ("weight: heavy", "datasets.a.weight = heavy"),
        ("weight: [1]", "datasets.a.weight"),
        ("weight: 0", "every data set of the mix has weight: 0"),
        ("train_on: first", "datasets.a.train_on = first"),
        ("train_on: null", "datasets.a.train_on = null"),
    ],
)
def test_refused_of_a_recipe(tmp_path, options, words):
    path = tmp_path / "r.yaml"
    path.write_text(
        f"model_name: m\noutput_dir: o\ndatasets:\n- a: {{source: messages, input_file_path: x, {options}}}\n"
    )
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("label_smoothing: 1", "label_smoothing = 1"),
        ("label_smoothing: -0.1", "label_smoothing = -0.1"),
        ("label_smoothing: nan", "label_smoothing = nan"),
        ("z_loss: -1e-4", "z_loss = -1e-4"),
        ("z_loss: inf", "z_loss = inf"),
        ("neftune_noise_alpha: -5", "neftune_noise_alpha = -5"),
        ("neftune_noise_alpha: nan", "neftune_noise_alpha = nan"),
        ("label_masking: false", "train_on: last scores one reply, label_masking: false every token"),
    ],
)
def test_refused_keys(tmp_path, keys, words):
    path = tmp_path / "r.yaml"
    mix = "datasets:\n- a: {source: messages, input_file_path: x, train_on: last}\n"
    path.write_text(f"model_name: m\noutput_dir: o\n{keys}\n{mix}")
    with pytest.raises(UserError, match=words):
        load_recipe(path)


# ---- what is shown ----


def test_the_report_shows_weights_and_shares(tmp_path):
    write(tmp_path / "a.jsonl", chats(6, weight=[1, 2, 1, 2, 1, 2]))
    write(tmp_path / "b.jsonl", chats(6))
    mix = [
        {"a": {"source": "messages", "input_file_path": str(tmp_path / "a.jsonl"), "val_split": 0, "weight": 2}},
        {"b": {"source": "messages", "input_file_path": str(tmp_path / "b.jsonl"), "val_split": 0}},
    ]
    values = {"model_name": str(MODEL), "output_dir": "o", "cache_dir": str(tmp_path / "c"), "datasets": mix}
    (tmp_path / "r.yaml").write_text(json.dumps(values | {"log_wandb": False, "per_device_train_batch_size": 12}))
    file = tmp_path / "mix.jsonl.gz"
    run = run_script(
        *(tmp_path / "r.yaml", "--show", 2, "--show_batch", "--export", file),
        script="scripts/prepare_data.py",
        output_dir=tmp_path,
    )
    with gzip.open(file, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    assert [row["weight"] for row in rows] == [2, 4] * 3 + [1] * 6
    counted = [row["weight"] * sum(label != -100 for label in row["labels"]) for row in rows]
    expected = [f"{sum(own) / sum(counted):.1%}" for own in (counted[:6], counted[6:])]
    assert "of the loss" in run.stdout
    cells = [line.split()[-2] for line in run.stdout.splitlines() if line.startswith(("│ a ", "│ b "))]
    assert cells[:2] == expected
    assert "a, row 1: " in run.stdout
    assert run.stdout.count("scored, weight 4") == 1 + 3  # of the examples, and of the first batch
