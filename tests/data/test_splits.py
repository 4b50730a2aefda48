"""Configurations, splits and slices: exactly the rows that `datasets` has, from the hub, its caches and folders."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT
from fake_hub import COMMIT, hub_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.files import find_data_file
from data.reading import Reading
from data.splits import slices
from sources.messages import MessagesOptions
from sources.registry import find_source
from utils.errors import UserError


def parquet(name: str, count: int) -> bytes:
    rows = [{"prompt": f"{name} {number}", "response": f"reply {number}"} for number in range(count)]
    stream = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue().to_pybytes()


def lines(name: str, count: int) -> bytes:
    rows = [{"prompt": f"{name} {number}", "response": f"reply {number}"} for number in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def card(said: str) -> bytes:
    return f"configs:\n- config_name: default\n  {said}\n".encode()


# Two configurations of three splits each, and a test file whose name holds "train".
README = b"""---
configs:
- config_name: chat
  default: true
  data_files:
  - {split: train, path: chat/train-*}
  - {split: validation, path: chat/held_out.parquet}
  - {split: test, path: chat/test_of_the_train_set.parquet}
- config_name: code
  data_files:
  - {split: train_sft, path: code/train_sft.parquet}
  - {split: train_gen, path: code/train_gen.parquet}
  - {split: test_sft, path: code/test_sft.parquet}
---
# Chats
"""
CHATS = {
    "README.md": README,
    "chat/train-00000-of-00002.parquet": parquet("train a", 30),
    "chat/train-00001-of-00002.parquet": parquet("train b", 10),
    "chat/held_out.parquet": parquet("validation", 5),
    "chat/test_of_the_train_set.parquet": parquet("test", 6),
    **{f"code/{name}.parquet": parquet(name, 4) for name in ("train_sft", "train_gen", "test_sft")},
}
# Without a README: by its files' names, of which a folder's comes first.
PLAIN = {"data/train-00000-of-00001.parquet": parquet("train", 7), "data/test-00000-of-00001.parquet": parquet("t", 3)}
ASKED = [  # config, split, data_files, revision; how many rows
    ({}, 40),
    ({"split": "train"}, 40),
    ({"config": "chat", "split": "test"}, 6),
    ({"split": "train+validation"}, 45),
    ({"split": "train[:5%]"}, 2),
    ({"split": "train[25:35]", "revision": "v1"}, 10),
    ({"split": "train[-20%:]+train[:3]"}, 11),
    ({"split": "test[:50%]+train[:5%]+test[2:]"}, 9),
    ({"config": "code", "split": "train_sft"}, 4),
    ({"config": "code", "split": "test_sft[1:]"}, 3),
    ({"data_files": "code/*_gen.parquet"}, 4),
    ({"data_files": {"mine": ["chat/held_out.parquet", "chat/test*"]}, "split": "mine"}, 11),
]
REFUSED = [
    ({"config": "cod"}, "has no configuration 'cod': did you mean code?"),
    ({"config": "code"}, "has no split 'train': give one by `split`: train_sft, train_gen, test_sft"),
    ({"split": "tests"}, "has no split 'tests': did you mean test?"),
]
# A script is not run; its files can be named.
SCRIPT = PLAIN | {"script.py": b"raise SystemExit"}

# For each question: what is read here; and, where it is asked for, what `datasets` has by itself.
READ = """
import json, sys
sys.path.insert(0, "scripts")
from pathlib import Path
from data.files import find_data_file
from data.reading import Reading
from sources.messages import MessagesOptions
from sources.registry import find_source
from utils.errors import UserError
asked = json.load(sys.stdin)
for repo, options in asked["ours"]:
    options = MessagesOptions(source="messages", hub_name=repo, **options)
    try:
        for download in (True, False):
            hub = find_source("d", options).hub
            paths = find_data_file("d", None, Path("none"), options.revision, hub, download=download)
        texts = [one.messages[0].content for one in Reading("d", options, paths, 0)]
    except UserError as error:
        texts = str(error)
    print(json.dumps(texts))
if asked["datasets"]:
    import datasets
    for repo, options in asked["datasets"]:
        name = options.pop("config", None)
        rows = datasets.load_dataset(repo, name, **{"split": "train", **options})
        print(json.dumps(rows["prompt"][:]))
"""


def ask(questions: list, by_datasets: list = (), **environment) -> list:
    process = subprocess.run(
        [sys.executable, "-c", READ],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_DISABLE_XET": "1", **{name: str(value) for name, value in environment.items()}},
        input=json.dumps({"ours": questions, "datasets": by_datasets}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return [json.loads(line) for line in process.stdout.splitlines() if not line.startswith("files of ")]


def test_the_rows_of_a_hub_data_set_are_those_of_datasets(tmp_path):
    """From the hub, then offline: from its cache, and from the cache of `datasets` where that is all there is."""
    asked = [("me/chats", one) for one, _ in ASKED]
    refused = [("me/chats", one) for one, _ in REFUSED]
    held_out, plain = ("me/partial", {"split": "validation"}), ("me/plain", {})
    laid_out_else = [("me/script", {}), ("me/script", {"data_files": "data/train-*"}), ("me/yaml", {})]
    of_datasets = [(f"me/{repo}", {"config": "chat", "split": "test"}) for repo in ("chats", "arrow")]
    caches = {"HF_HUB_CACHE": tmp_path / "hub", "HF_DATASETS_CACHE": tmp_path / "datasets"}
    repositories = {"me/chats": CHATS, "me/plain": PLAIN, "me/partial": CHATS, "me/arrow": CHATS}
    repositories |= {"me/script": SCRIPT, "me/yaml": {".huggingface.yaml": card("data_files: data/test-*"), **PLAIN}}
    with hub_of(repositories) as (address, fetched):
        environment = {"HF_ENDPOINT": address, **caches}
        questions = [*laid_out_else, held_out, plain, *asked, *refused]
        answers = ask(questions, [*asked, *of_datasets], **environment, HF_HUB_OFFLINE="0")
    of_script, of_its_files, of_yaml, *answers = answers
    assert "me/script: is a script (script.py), which is not run: name its files by `data_files`" in of_script
    assert of_its_files == [f"train {number}" for number in range(7)]
    assert of_yaml == [f"t {number}" for number in range(3)]
    fetched = fetched[3:]
    assert answers[0] == [f"validation {number}" for number in range(5)]
    assert fetched[:2] == ["README.md", "chat/held_out.parquet"]  # nothing else is downloaded
    assert "data/train-00000-of-00001.parquet" in fetched[:3]
    assert answers[1] == [f"train {number}" for number in range(7)]
    rows, rest = answers[2 : 2 + len(asked)], answers[2 + len(asked) :]
    assert [len(own) for own in rows] == [count for _, count in ASKED]
    for (_, said), answer in zip(REFUSED, rest, strict=False):
        assert said in answer
    assert rest[len(refused) : len(refused) + len(asked)] == rows

    (tmp_path / "hub" / "datasets--me--arrow").rename(tmp_path / "elsewhere")
    # Cached by `datasets` when it still ran scripts.
    write(tmp_path / "hub" / "datasets--me--arrow", {"refs/main": COMMIT.encode(), f"snapshots/{COMMIT}/arrow.py": b""})
    torn = tmp_path / "hub" / "datasets--me--torn"
    laid_out = {"refs/main": COMMIT.encode(), f"snapshots/{COMMIT}/data/train-1-of-3.parquet": parquet("b", 2)}
    write(torn, laid_out)
    arrow = ("me/arrow", {"config": "chat", "split": "test[1:]"})
    absent = [
        ("me/partial", {"split": "train"}),
        ("me/arrow", {"config": "chat", "revision": "d" * 40}),
        ("me/torn", {}),
    ]
    yaml, *answers = ask([laid_out_else[-1], held_out, *asked, arrow, *absent], **environment, HF_HUB_OFFLINE="1")
    assert yaml == of_yaml
    assert answers[0] == [f"validation {number}" for number in range(5)]
    assert answers[1 : 1 + len(asked)] == rows
    of_arrow, partial, of_another, of_three = answers[1 + len(asked) :]
    assert of_arrow == [f"test {number}" for number in range(1, 6)]
    assert "files of its split train not found" in partial
    assert "could not be reached" in of_another
    assert "the hub's me/torn, in its cache: only 1 of 3 parts of data/train are here: download the rest" in of_three


# ---- Folders ----


def read(place, **options):
    """The prompts of what a recipe names by input_file_path."""
    options = MessagesOptions(source="messages", input_file_path=str(place), **options)
    paths = find_data_file("d", options.input_file_path, Path("none"), None, find_source("d", options).hub)
    return [one.messages[0].content for one in Reading("d", options, paths, 0)]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("files", "options"),
    [
        (CHATS, {}),
        (CHATS, {"config": "code", "split": "train_gen"}),
        (CHATS, {"split": "train[10%:20%]"}),
        (PLAIN, {"split": "test"}),
        ({"a.jsonl": lines("a", 2), "b.jsonl": lines("b", 3)}, {}),
        ({"train.jsonl": lines("a", 2), "test.jsonl": lines("b", 3), "train_test.md": b"#"}, {}),
        ({"train/1.jsonl": lines("a", 2), "test/train.jsonl": lines("b", 3)}, {"split": "test"}),
        ({"main/train.jsonl": lines("a", 2), "socratic/train.jsonl": lines("b", 3)}, {"split": "train"}),
        ({"x.csv": b"prompt,response\np 0,r\n", "x.json": lines("p", 1)}, {}),
        (
            {
                ".huggingface.yaml": b"dataset_info: {config_name: b}\nconfigs:\n"
                b"- {config_name: a, data_files: a.jsonl}\n- {config_name: b, data_files: b.jsonl}\n",
                **{f"{name}.jsonl": lines(name, 2) for name in "ab"},
            },
            {},
        ),
        ({".huggingface.yaml": card("data_files: b.jsonl"), "a.jsonl": lines("a", 2), "b.jsonl": lines("b", 3)}, {}),
        (
            {
                "README.md": b"---\n" + card("data_files: a.jsonl") + b"---\n",
                ".huggingface.yaml": card("data_files: b.jsonl"),
                **{f"{name}.jsonl": lines(name, 2) for name in "ab"},
            },
            {},
        ),
        (
            {
                ".huggingface.yaml": card("data_files: [{split: a, path: [a*, a.jsonl]}, {split: b, path: a.jsonl}]"),
                **{f"{name}.jsonl": lines(name, 2) for name in ("a", "ab")},
            },
            {"split": "a+b+a[1:5]"},
        ),
        (
            {".huggingface.yaml": card("data_files: a.csv\n  sep: ';'"), "a.csv": b"prompt;response\np, 0;r\n"},
            {},
        ),
    ],
)  # fmt: skip
def test_the_rows_of_a_folder_are_those_of_datasets(tmp_path, files, options):
    datasets = pytest.importorskip("datasets")
    folder = write(tmp_path / "data", files)
    own = {"split": "train", **options}
    rows = datasets.load_dataset(str(folder), own.pop("config", None), cache_dir=str(tmp_path / "cache"), **own)
    if rows.num_rows:
        assert read(folder, **options) == rows["prompt"][:]
    else:
        with pytest.raises(UserError, match=r"no conversation|no record"):
            read(folder, **options)


@pytest.mark.parametrize(
    ("files", "options", "said"),
    [
        (CHATS, {"config": "cod"}, "has no configuration 'cod': did you mean code?"),
        (PLAIN, {"config": "code"}, "has no configuration 'code': it has no README.md"),
        (PLAIN, {"split": "validation"}, "has no split 'validation' (known: train, test)"),
        ({"test.jsonl": b"{}"}, {}, "has no split 'train': give one by `split`: test"),
        ({"main/train.jsonl": b"{}", "socratic/train.jsonl": b"{}"}, {}, "2: main/train, socratic/train: take one"),
        ({"train_de.jsonl": b"{}", "train_en.jsonl": b"{}"}, {}, "2: train-de, train-en: take one by a pattern in"),
        ({"a.txt": b"x"}, {}, "the split train is of no kind that is read: a.txt"),
        ({"picture.png": b"x"}, {}, "of no kind that is read: picture.png"),
        ({"x.zip": b"x"}, {}, "x.zip"),
        ({"x.py": b"raise SystemExit"}, {}, "has no data file"),
        ({"X.JSONL": b"{}", ".a": b""}, {}, "none of its files has an ending of what is read (.a, X.JSONL): name them"),
        ({"data/train-00001-of-00003.jsonl": b"{}"}, {}, "only 1 of 3 parts of data/train are here"),
        (
            {".huggingface.yaml": card("data_files: a.csv\n  names: [prompt, response]"), "a.csv": b"q,r\n"},
            {},
            "its .huggingface.yaml says that its files are to be read with names: ['prompt', 'response'], which they",
        ),
        (
            {"README.md": b"---\n" + card("data_files: a.csv\n  skiprows: 1") + b"---\n", "a.csv": b"q,r\n"},
            {},
            "its README.md says that its files are to be read with skiprows: 1, which they are not here: name them "
            "themselves, by a pattern in input_file_path, and their fields by `columns`",
        ),
        *(
            ({".huggingface.yaml": card(f"data_files: a.csv\n  {said}"), "a.csv": b"q,r\n"}, {}, f"with {shown}, which")
            for said, shown in [
                ("sep: 1", "sep: 1"),
                ("sep: ''", "sep: ''"),
                ("sep: ';|'", "sep: ';|'"),
                ("delimiter: [a]", "delimiter: ['a']"),
                ("header: false", "header: False"),
                ("header: 1", "header: 1"),
                ("encoding: latin-1", "encoding: 'latin-1'"),
            ]
        ),
        ({".huggingface.yaml": card("data_files: a.csv\n  sep: '::'"), "a.csv": b"q::r\n"}, {}, "with sep: '::'"),
        ({".huggingface.yaml": card("data_files: b.csv"), "a.csv": b"q,r\n"}, {}, "Unable to find 'b.csv'"),
        ({}, {}, "has no data file of this split: it holds no file"),
        ({"README.md": b"---\nconfigs: [{config_name: 3\n---\n"}, {}, "its README.md cannot be made sense of"),
    ],
)
def test_folders_refused(tmp_path, files, options, said):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError) as error:
        read(write(tmp_path / "data", files), **options)
    assert str(error.value).startswith(f"data set d: {tmp_path}/data")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("said", ["sep: null", "encoding: utf-8", "header: 0", "quotechar: '\"'", "delimiter: '|'"])
def test_what_a_card_says_of_what_is_done_anyway(tmp_path, said):
    files = {
        "README.md": b"---\n" + card(f"data_files: a.csv\n  {said}") + b"---\n",
        "a.csv": b"prompt|response\np|r\n",
    }
    assert read(write(tmp_path, files)) == ["p"]


def test_files_of_another_kind_are_named(tmp_path, capsys):
    folder = write(tmp_path / "d", {"a.jsonl": lines("a", 2), "b.jsonl": lines("b", 1), "c.csv": b"prompt,response\n"})
    assert read(folder) == ["a 0", "a 1", "b 0"]
    assert "d: a.jsonl, b.jsonl; left out, as they are of another kind: c.csv\n" in capsys.readouterr().out


def test_a_pattern_that_matches_folders(tmp_path):
    write(tmp_path / "d", {"p=1/a.jsonl": lines("a", 2), "p=2/a.jsonl": lines("b", 1)})
    with pytest.raises(UserError, match=r"matches only folders .*/p=1, .*/p=2\): name their files, .*/p=\*/\*\.jsonl"):
        read(tmp_path / "d" / "p=*")
    assert read(tmp_path / "d" / "p=*" / "*") == ["a 0", "a 1", "b 0"]


def test_a_slice_that_holds_no_row(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(lines("p", 5))
    options = MessagesOptions(source="messages", input_file_path=str(tmp_path / "x.jsonl"), split="train[10:20]")
    reading = Reading("d", options, [tmp_path / "x.jsonl"], 0)
    assert list(reading) == []
    with pytest.raises(UserError, match=r"data set d: split train\[10:20\]: none of the rows of .*x\.jsonl\Z"):
        reading.split()


def test_what_save_to_disk_wrote(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": f"p {number}", "response": "r"} for number in range(2500)])
    rows.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict(train=rows.select(range(5)), test=rows.select([7, 3])).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "one") == rows["prompt"][:]
    assert read(tmp_path / "one", split="train[-2:]") == ["p 2498", "p 2499"]
    assert read(tmp_path / "two") == [f"p {number}" for number in range(5)]
    assert read(tmp_path / "two", split="test") == ["p 7", "p 3"]
    with pytest.raises(UserError, match=r"two: has no split 'tset': did you mean test\?"):
        read(tmp_path / "two", split="tset")
    with pytest.raises(UserError, match=r"split test: .*one is a file, whose rows are the split train"):
        read(tmp_path / "one", split="test")
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00003\.arrow: is missing"):
        read(tmp_path / "one")


@pytest.mark.parametrize("damage", [b'{"prompt": \n', b"\xff\n"])
def test_damage_behind_a_slice_is_an_error_unless_it_is_skipped(tmp_path, damage):
    """A percentage is of all rows, so that a file that is cut off would silently give fewer."""
    (tmp_path / "x.jsonl").write_bytes(lines("p", 50) + damage)
    with pytest.raises(UserError, match=r"x\.jsonl[^\n]* 51\b"):
        read(tmp_path / "x.jsonl", split="train[:10%]")
    options = {"split": "train[:10%]", "on_bad_records": "skip"}
    assert read(tmp_path / "x.jsonl", **options) == [f"p {number}" for number in range(5)]


SIZES = {"train": 123, "test": 60, "dev.x": 1}


@st.composite
def splits(draw) -> str:
    """What may be written for a split: slices in rows and percent, with and without bounds, of one split or several."""
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        name, percent = draw(st.sampled_from([*SIZES])), draw(st.booleans())
        low, high = (draw(st.none() | st.integers(*(-100, 100) if percent else (-150, 150))) for _ in range(2))
        # A % of one bound makes a percentage of the other.
        marks = draw(st.sampled_from([("%", "%"), ("%", ""), ("", "%")])) if percent else ("", "")
        bounds = ["" if bound is None else f"{bound}{mark}" for bound, mark in zip((low, high), marks, strict=True)]
        is_percent = any("%" in bound for bound in bounds)
        rounding = draw(st.sampled_from(["", "(closest)", "(pct1_dropremainder)"])) if is_percent else ""
        parts.append(f"{name}[{bounds[0]}:{bounds[1]}]{rounding}" if draw(st.integers(0, 3)) else name)
    return "+".join(parts)


@pytest.fixture(scope="module")
def three_splits(tmp_path_factory):
    """A folder of three splits, of which one has two files; and `datasets` with them built."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("three")
    files = {"train-0.jsonl": lines("a", 100), "train-1.jsonl": lines("b", 23), "test.jsonl": lines("t", 60)}
    said = "".join(f"\n  - {{split: {name}, path: {name.split('.')[0]}*}}" for name in SIZES)
    write(folder / "data", {".huggingface.yaml": card(f"data_files:{said}"), "dev.jsonl": lines("d", 1), **files})
    builder = datasets.load_dataset_builder(str(folder / "data"), cache_dir=str(folder / "cache"))
    builder.download_and_prepare()
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == SIZES
    return folder / "data", builder


@settings(max_examples=60, deadline=None)
@given(split=splits())
@example(split="train+train")
@example(split="train[:5%]+test[:10]")
@example(split="train[:10]+train[-10:]+train[:10]")
@example(split="train[50:60]+test+train[55:]")
@example(split="test[:3]+train[:0]")
@example(split="train[20:19]")
def test_rows_of_joined_slices_are_those_of_datasets(three_splits, split):
    """In its order, with what two parts have coming twice; what it refuses, or reads backwards, is refused."""
    folder, builder = three_splits
    try:
        expected = builder.as_dataset(split=split)["prompt"][:]
        is_backwards = any(start > stop for _, start, stop in absolute(split))
    except (ValueError, IndexError) as error:
        expected, is_backwards = error, False
    if is_backwards or (isinstance(expected, Exception) and "corresponds to no data" not in str(expected)):
        with pytest.raises(UserError, match=r"\Asplit [^\n]*\Z"):
            read(folder, split=split)
    else:
        assert read(folder, split=split) == ([] if isinstance(expected, Exception) else expected)


def absolute(split):
    from datasets import ReadInstruction

    parts = ReadInstruction.from_spec(split).to_absolute(SIZES)
    return [(part.splitname, part.from_, part.to) for part in parts]


@pytest.mark.parametrize("split", ["all", "test + dev.x+train", "train[:2] +dev.x"])
def test_splits_joined_with_blanks_and_all_of_them(three_splits, split):
    folder, builder = three_splits
    assert read(folder, split=split) == builder.as_dataset(split=split.replace(" ", ""))["prompt"][:]


def test_bad_records_of_joined_slices_are_counted_where_they_are_read(tmp_path):
    """What is bad before a slice, or behind it, is none of its rows."""
    rows = lines("p", 6).splitlines(keepends=True)
    (tmp_path / "x.jsonl").write_bytes(b"".join([b"{\n", *rows[:3], b"{\n", *rows[3:], b"{\n"]))
    options = MessagesOptions(
        source="messages", input_file_path="x", split="train[2:4]+train[:1]+train[3:5]", on_bad_records="skip"
    )
    reading = Reading("d", options, [tmp_path / "x.jsonl"], 0)
    assert [one.messages[0].content for one in reading] == ["p 2", "p 3", "p 0", "p 3", "p 4"]
    assert (reading.rows_read, reading.bad_records) == (8, 3)


@pytest.mark.parametrize("split", ["train[:5%]", "train[7:]", "train[-3:]", "train[:2000]", "train[:3]+train[1:2]"])
def test_slices_of_a_file(tmp_path, split):
    (tmp_path / "x.jsonl").write_bytes(lines("p", 50))
    everything = [f"p {number}" for number in range(50)]
    parts = slices(split, {"train": 50})
    expected = [row for _, start, stop in parts for row in everything[start:stop]]
    assert read(tmp_path / "x.jsonl", split=split) == expected


def test_a_slice_that_ends_before_it_starts(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(lines("p", 50))
    with pytest.raises(
        UserError, match=r"\Asplit train\[-5:10\]: 45 to 10 of the 50 rows of train are none: give the "
    ):
        read(tmp_path / "x.jsonl", split="train[-5:10]")


def test_splits_of_two_folders_in_a_list(tmp_path):
    """A slice is of a split's rows in all of them."""
    for name in "ab":
        write(tmp_path / name, {"train.jsonl": lines(f"{name} train", 2), "test.jsonl": lines(f"{name} test", 2)})
    options = MessagesOptions(
        source="messages", input_file_path=[str(tmp_path / name) for name in "ab"], split="test[1:3]+train"
    )
    paths = find_data_file("d", options.input_file_path, Path("none"), None, find_source("d", options).hub)
    rows = [one.messages[0].content for one in Reading("d", options, paths, 0)]
    assert rows == ["a test 1", "b test 0", "a train 0", "a train 1", "b train 0", "b train 1"]


def test_a_file_that_two_splits_have_is_read_twice_with_a_word(tmp_path, capsys):
    said = card("data_files:\n  - split: train\n    path: ['*.jsonl', 'b*']\n  - split: test\n    path: c.jsonl\n")
    write(tmp_path / "data", {".huggingface.yaml": said, **{f"{name}.jsonl": lines(name, 1) for name in "abc"}})
    assert read(tmp_path / "data", split="train+test") == ["a 0", "b 0", "c 0", "b 0", "c 0"]
    assert "warning: data set d: read more than once: b.jsonl, c.jsonl: " in capsys.readouterr().out
    assert read(tmp_path / "data", split="test") == ["c 0"]
    assert "warning" not in capsys.readouterr().out
