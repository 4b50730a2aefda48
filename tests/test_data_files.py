"""Locating data files and reading records, whole and damaged."""

import gzip
import json
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils import data_files
from utils.data_files import HubSource, find_data_file, locate_data_file, read_records, required_field
from utils.errors import UserError

HUB = HubSource("someone/some-data", ("train.json", "data/train-*.parquet"), hint="try the twin")
ROWS = [
    {"a": 1, "text": "eins\u2028zwei [1], {x}"},
    {"a": None, "text": 'quote " and \\ and \n'},
    {"ü": [1, {"b": "]"}]},
]


def refuse(*parts):
    """A one-line UserError with every part in it."""
    pattern = "".join(f"(?=.*(?:{part}))" for part in parts)
    return pytest.raises(UserError, match=rf"(?s)\A{pattern}[^\n]*\Z")


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = data if isinstance(data, bytes) else data.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# ---- Reading ----


@pytest.mark.parametrize("ending", ["jsonl", "json", "jsonl.gz", "json.gz"])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("layout", ["lines", "array", "pretty"])
def test_text_layouts(tmp_path, ending, ascii_only, layout):
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in ROWS)
    array = json.dumps(ROWS, ensure_ascii=ascii_only, indent=2 if layout == "pretty" else None)
    path = write(tmp_path / f"x.{ending}", lines if layout == "lines" else "\ufeff \n" * ascii_only + array)
    assert list(read_records(path)) == list(enumerate(ROWS, start=1))


def test_line_numbers_count_blank_lines(tmp_path):
    assert [number for number, _ in read_records(write(tmp_path / "x.jsonl", '{"a": 1}\n\n  \r\n{"a": 2}\r\n'))] == [
        1,
        4,
    ]


def test_gzip_without_its_ending(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(gzip.compress(b'[{"a": 1}]'))
    assert list(read_records(path)) == [(1, {"a": 1})]


def test_parquet(tmp_path):
    rows = [{"a": number, "METADATA": {"CONTEXT": "x"}} for number in range(2500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert list(read_records(tmp_path / "x.parquet")) == list(enumerate(rows, start=1))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), values, max_size=4), min_size=1, max_size=6),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
)
def test_array_in_chunks_of_any_size(tmp_path, monkeypatch, rows, chunk, indent, ascii_only):
    monkeypatch.setattr(data_files, "CHUNK_BYTES", chunk)
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path = write(tmp_path / "x.json", text.encode())
    assert list(read_records(path)) == list(enumerate(rows, start=1))
    for end in range(1, len(text), 7):  # cut off anywhere
        write(path, text[:end].encode())
        with refuse("x.json", "cut off|not valid JSON|holds no records"):
            list(read_records(path))


def test_array_is_streamed(tmp_path):
    with open(tmp_path / "x.json", "w") as file:
        file.write("[" + ",".join(json.dumps({"text": "x" * 100_000}) for _ in range(300)) + "]")
    tracemalloc.start()
    assert sum(1 for _ in read_records(tmp_path / "x.json")) == 300
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6  # of a file of 30 MB


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [
        ("x.jsonl", "", ["empty"]),
        ("x.jsonl", " \n \n", ["empty"]),
        ("x.json", "[]", ["no records"]),
        ("x.jsonl", '{"a": 1}\n{"a": ', ["line 2", "cut off"]),
        ("x.jsonl", '{"a": 1}\n{"a": }\n{"a": 3}\n', ["line 2", "not valid JSON", "column 7"]),
        ("x.jsonl", '{"a": 1}\n3\n', ["record 2", "not an object but a number"]),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', ["line 2", "UTF-8"]),
        ("x.json", '[{"a": 1},\n{"a": 2}', ["cut off", "line 2"]),
        ("x.json", '[{"a": 1},\n{"a": "abc', ["cut off", "record 2", "line 2"]),
        ("x.json", '[{"a": 1},', ["cut off", "record 2"]),
        ("x.json", "[", ["cut off"]),
        ("x.json", '[{"a": 1},\n{"a": tru, "long": "' + "x" * 50 + '"}]', ["not valid JSON", "record 2", "line 2"]),
        ("x.json", '[{"a": 1}\n{"a": 2}]', ["expected ','", "line 2"]),
        ("x.json", '[{"a": 1}]\n[{"a": 2}]', ["more text after the end", "line 2"]),
        ("x.json", '[{"a": 1}, [2]]', ["record 2", "not an object but a list"]),
        ("x.json", b'[{"a": 1},\n{"a": "\xc3"}]', ["UTF-8"]),
        ("x.json", "[" * 200_000, ["nested too deeply"]),
        ("x.parquet", "not parquet at all", ["parquet"]),
    ],
)
def test_damaged_files(tmp_path, name, data, parts):
    with refuse(name, *parts):
        list(read_records(write(tmp_path / name, data)))


def test_damaged_gzip(tmp_path):
    path, whole = tmp_path / "x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000 + b'{"b": 2}\n', mtime=0)
    for damaged, part in (
        (whole[: len(whole) // 2], "cut off"),
        (whole[:-3], "cut off"),
        (b"plain text\n", "gzip"),
        (whole[:-8] + b"\0" * 8, "gzip"),
        (whole[:10] + b"\xff" * 20, "gzip|cut off"),
    ):
        path.write_bytes(damaged)
        with refuse("x.jsonl.gz", part):
            list(read_records(path))


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "x.jsonl", tmp_path):
        with refuse("cannot be read"):
            list(read_records(path))


# ---- Fields ----


def test_required_field():
    record, where = {"a": "x", "b": None, "c": 1, "d": "\ud83d"}, ("file.jsonl", 7)
    assert required_field(record, "a", str, *where) == "x"
    assert required_field(record, "b", str, *where, nullable=True) is None
    with refuse("file.jsonl", "record 7", "no field 'in.e'", "a, b, c, d"):
        required_field(record, "e", str, *where, inside="in")
    with refuse("file.jsonl", "record 7", "'b' is null, not a string"):
        required_field(record, "b", str, *where)
    with refuse("'c' is a number, not a list"):
        required_field(record, "c", list, *where)
    with refuse("'d'", "surrogate"):
        required_field(record, "d", str, *where)


# ---- Finding ----


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose one repository holds `files`, unreachable while `down`; `calls` are the downloads asked for."""

    class Hub:
        files, calls, down = (), [], False

    def snapshot_download(repo, *, repo_type, allow_patterns, revision, local_files_only):
        Hub.calls.append((repo, repo_type, allow_patterns, revision, local_files_only))
        if Hub.down:
            raise ConnectionError("no route\nto host")
        for name in Hub.files:
            write(tmp_path / "hub" / name, "{}")
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub").mkdir()
    return Hub


def test_named_file_as_given_then_cache_dir_then_hub(tmp_path, hub):
    def find():
        return find_data_file("d", "sub/x.jsonl", tmp_path / "cache", "abc", HUB)

    hub.files = ["x.jsonl", "train.json"]
    assert find() == [tmp_path / "hub/x.jsonl"]
    assert hub.calls == [("someone/some-data", "dataset", ["sub/x.jsonl", "x.jsonl"], "abc", False)]
    in_cache = write(tmp_path / "cache/sub/x.jsonl", "{}")
    assert find() == [in_cache]
    write(tmp_path / "sub/x.jsonl", "{}")
    assert [path.resolve() for path in find()] == [tmp_path / "sub/x.jsonl"]
    assert len(hub.calls) == 1


def test_default_file(tmp_path, hub):
    hub.files = ["data/train-1.parquet", "data/train-0.parquet", "README.md"]
    assert find_data_file("d", None, tmp_path / "cache", None, HUB) == [
        tmp_path / "hub/data/train-0.parquet",
        tmp_path / "hub/data/train-1.parquet",
    ]
    assert hub.calls[0][2] == ["train.json", "data/train-*.parquet"]
    by_dataset = write(tmp_path / "cache/d.jsonl.gz", "{}")
    assert find_data_file("d", None, tmp_path / "cache", None, HUB) == [by_dataset]
    by_hub_name = write(tmp_path / "cache/train.json", "{}")
    assert find_data_file("d", None, tmp_path / "cache", None, HUB) == [by_hub_name]


def test_nothing_found(tmp_path, hub):
    with refuse("data set d", "x.jsonl", "cache/x.jsonl", "someone/some-data at revision v1", "no such file", "twin"):
        find_data_file("d", "x.jsonl", tmp_path / "cache", "v1", HUB)
    hub.down = True
    with refuse("data set d", "train.json or data/train", "cache/d.jsonl", "could not be reached: .*no route", "twin"):
        find_data_file("d", None, tmp_path / "cache", None, HUB)
    calls = len(hub.calls)
    with refuse("data set d", "/nowhere/x.jsonl"):
        find_data_file("d", "/nowhere/x.jsonl", tmp_path / "cache", None, HUB)
    assert len(hub.calls) == calls  # an absolute path is this machine's


def test_locate_stays_off_the_network(tmp_path, hub):
    hub.down = True
    assert locate_data_file("d", None, tmp_path, None, HUB) is None
    assert locate_data_file("d", "/nowhere/x", tmp_path, None, HUB) is None
    assert all(local_only for *_, local_only in hub.calls)
    hub.down, hub.files = False, ["train.json"]
    assert locate_data_file("d", None, tmp_path, None, HUB) == [tmp_path / "hub/train.json"]
    path = write(tmp_path / "d.json", "[]")
    assert locate_data_file("d", None, tmp_path, None, HUB) == [path]
