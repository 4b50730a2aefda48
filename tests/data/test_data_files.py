"""Locating data files and reading records, whole and damaged."""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import os
import pickle
import random
import re
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from data import json_text
from data.files import find_data_file
from data.records import read_records
from sources.messages import MessagesOptions
from sources.registry import SOURCES, find_source
from sources.source import HubSource, Record
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


ROW = b'{"a": 1}\n'
PARQUET = pyarrow.BufferOutputStream()
pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"a": 1}]), PARQUET)


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.jsonl.gz", "x", "x.txt.gz"])
@pytest.mark.parametrize(
    "content",
    [
        ROW,
        b"[" + ROW + b"]",
        gzip.compress(ROW),
        gzip.compress(ROW) + gzip.compress(b""),
        codecs.BOM_UTF8 + ROW,
        gzip.compress(codecs.BOM_UTF8 + ROW),
        PARQUET.getvalue().to_pybytes(),
    ],
    ids=["text", "array", "gzip", "gzip in parts", "byte order mark", "gzip of one", "parquet"],
)
def test_a_file_is_what_it_begins_with(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert list(read_records(tmp_path / name)) == [(1, {"a": 1})]


def test_a_byte_order_mark_where_files_were_put_together(tmp_path):
    (tmp_path / "x.jsonl").write_bytes((codecs.BOM_UTF8 + ROW) * 2)
    assert list(read_records(tmp_path / "x.jsonl")) == [(1, {"a": 1}), (2, {"a": 1})]


def archive(kind) -> bytes:
    content = io.BytesIO()
    if kind is tarfile:
        with tarfile.open(fileobj=content, mode="w") as file:
            member = tarfile.TarInfo("x.jsonl")
            member.size = len(ROW)
            file.addfile(member, io.BytesIO(ROW))
    else:
        with zipfile.ZipFile(content, "w") as file:
            file.writestr("x.jsonl", ROW)
    return content.getvalue()


def zstd(data: bytes, codec: str = "zstd") -> bytes:
    stream = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(stream, codec) as file:
        file.write(data)
    return stream.getvalue().to_pybytes()


OTHER_KINDS = {
    "a zip archive": archive(zipfile),
    "a tar archive": archive(tarfile),
    "a spreadsheet": archive(zipfile),
    "a document of Microsoft Office": bytes.fromhex("d0cf11e0a1b11ae1") + bytes(500),
    "a pickle": pickle.dumps([{"a": 1}]),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + ROW,
    "XML": b"<?xml version='1.0'?>\n<a/>\n",
    "text in UTF-16": ROW.decode().encode("utf-16"),
    "text in UTF-16, no mark": ROW.decode().encode("utf-16-be"),
    "text in UTF-16 without a mark": ROW.decode().encode("utf-16-le"),
    "text in UTF-32": ROW.decode().encode("utf-32"),
    "zero bytes": bytes(5000),
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "a web page": b"<!DOCTYPE html>\n<html></html>\n",
}


@pytest.mark.parametrize("name", ["x.jsonl", "x.json.gz", "x.parquet"])
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_what_is_none_of_them_is_named(tmp_path, name, kind):
    name = "x.xlsx" if kind == "a spreadsheet" else name
    (tmp_path / name).write_bytes(OTHER_KINDS[kind])
    said = re.split(",| without", kind)[0]
    with refuse(name, f"is {said}", "not read", "what is read: JSON Lines, JSON, CSV and TSV, .*parquet"):
        list(read_records(tmp_path / name))
    for compress, named in ((gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz"), (zstd, "zstd")):
        (tmp_path / name).write_bytes(compress(OTHER_KINDS[kind]))
        with refuse(name, "is no parquet file" if name == "x.parquet" else f"is {said}.* in {named} data"):
            list(read_records(tmp_path / name))


def test_gzipped_twice_and_gzipped_parquet(tmp_path):
    for content, said in ((gzip.compress(ROW), "gzip data"), (PARQUET.getvalue().to_pybytes(), "parquet")):
        (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(content))
        with refuse("x.jsonl.gz", f"is {said} in gzip data"):
            list(read_records(tmp_path / "x.jsonl.gz"))


TEXTS = pyarrow.struct({"role": pyarrow.string(), "at": pyarrow.timestamp("ns")})
LATE = pyarrow.array([2**62 + 1], pyarrow.timestamp("us"))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"used": ["x"], "at": LATE}, {"used": "x", "at": None}),
        ({"USED": ["x"], "more": [[1]]}, {"USED": "x", "more": None}),
        ({"used": pyarrow.array([[{"role": "x", "at": 2**62 + 1}]], pyarrow.list_(TEXTS))}, {"used": [{"role": "x"}]}),
        ({"used": pyarrow.array(["x"]).dictionary_encode()}, {"used": "x"}),
        ({"used": pyarrow.array(["x"], pyarrow.large_string())}, {"used": "x"}),
        ({"used": pyarrow.array([["x"]], pyarrow.large_list(pyarrow.large_string()))}, {"used": ["x"]}),
        ({"used": pyarrow.nulls(1)}, {"used": None}),
        ({"other": ["x"]}, {"other": None}),
        ({"a.b": ["x"], "used": [True]}, {"a.b": None, "used": True}),
        ({"used": LATE}, "record 1: cannot be read: OverflowError"),
        ({"used": pyarrow.array([], pyarrow.string())}, "holds no records"),
        ({}, "holds no records"),
    ],
)
def test_of_parquet_only_what_is_used_is_read(tmp_path, columns, expected):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    if isinstance(expected, str):
        with refuse("x.parquet", expected):
            list(read_records(tmp_path / "x.parquet", fields=("used",)))
    else:
        assert list(read_records(tmp_path / "x.parquet", fields=("used",))) == [(1, expected)]


def test_parquet_columns_with_a_dot_in_their_names(tmp_path):
    row = {"data.messages": [{"role": "user", "content.text": "q"}], "data": {"other": "x"}, "a.bytes": b"x"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "x.parquet")
    assert list(read_records(tmp_path / "x.parquet")) == [(1, row)]
    ((_, found),) = read_records(tmp_path / "x.parquet", fields={"data.messages", "a.bytes"})
    assert found == row | {"data": None}


@pytest.mark.parametrize("name", ["export", "export.txt"])
def test_csv_without_its_name_is_told_that_it_goes_by_it(tmp_path, name):
    with refuse(name, r"a name that ends in \.csv"):
        list(read_records(write(tmp_path / name, "prompt,response\nq,a\n")))


def test_a_column_given_twice(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 3, names=["used", "other", "other"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert list(read_records(tmp_path / "x.parquet", fields=("used",))) == [(1, {"used": "x", "other": None})]
    with refuse("x.parquet", "column 'other' twice"):
        list(read_records(tmp_path / "x.parquet"))


def test_damaged_parquet(tmp_path):
    """Whatever pyarrow makes of it is one line, and never another number of rows."""
    rows = [{"used": f"text {number}", "more": number} for number in range(3000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=500)
    whole, dice = (tmp_path / "x.parquet").read_bytes(), random.Random(0)
    for damage in range(60):
        place = dice.randrange(4, len(whole))
        part = b"" if damage % 3 == 0 else bytes(20) if damage % 3 == 1 else dice.randbytes(1)
        rest = b"" if damage % 3 == 0 else whole[place + len(part) :]
        (tmp_path / "x.parquet").write_bytes(whole[:place] + part + rest)
        try:
            outcome = len(list(read_records(tmp_path / "x.parquet", fields=("used",))))
        except UserError as error:
            outcome = str(error)
        assert outcome == 3000 or ("x.parquet" in outcome and "\n" not in outcome)


def test_parquet(tmp_path):
    rows = [{"a": number, "METADATA": {"CONTEXT": "x"}} for number in range(2500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert list(read_records(tmp_path / "x.parquet")) == list(enumerate(rows, start=1))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=25)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), values, max_size=4), min_size=1, max_size=6),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
)
def test_array_in_chunks_of_any_size(tmp_path, monkeypatch, rows, chunk, indent, ascii_only):
    monkeypatch.setattr(json_text, "CHUNK_BYTES", chunk)
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
        ("x.jsonl", '{"a": 1}\nnull\n', ["record 2", "not an object but null"]),
        ("x.jsonl", '{"a": 1}\n{"a": "\0"}\n', ["line 2", "control character"]),
        ("x.jsonl", '{"a": ' + "1" * 5000 + "}", ["line 1", "digits"]),
        ("x.json", '[{"a": ' + "1" * 5000 + "}]", ["record 1", "digits"]),
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
        ("x.arrow", "not Arrow at all", ["is no Arrow file"]),
        ("x.txt", "not JSON at all", ["of no kind that is read", "what is read: JSON Lines"]),
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
        (b"plain text\n", "not valid JSON"),
        (whole[:-8] + b"\0" * 8, "gzip"),
        (whole[:10] + b"\xff" * 20, "gzip|cut off"),
    ):
        path.write_bytes(damaged)
        with refuse("x.jsonl.gz", part):
            list(read_records(path))


def kept_and_skipped(path):
    skipped = []
    return [values for _, values in read_records(path, lambda error: skipped.append(str(error)))], skipped


@pytest.mark.parametrize(
    ("name", "data", "kept", "parts"),
    [
        (
            "x.jsonl",
            b'{"a": 1}\n{"a": }\n3\n{"a": "\xff"}\n{"a": 2}\n{"a"',
            [1, 2],
            ["line 2", "record 3", "line 4", "line 6"],
        ),
        ("x.json", b'[{"a": 1}, {"a": 2}, {"a": 3', [1, 2], ["record 3.* cut off"]),
        (
            "x.json",
            b'[{"a": 1},\n{"a": "\xff"}, 5, {"a": 2}]',
            [1, 2],
            ["record 2, line 2: not UTF-8", "record 3: not an"],
        ),
        ("x.json", b'[{"a": 1}, {"a" 2}, {"a": 3}, {"a": "long enough"}]', [1], ["record 2"]),
        ("x.json", b'[{"a": 1}]\n[{"a": 2}]', [1], ["more text after the end"]),
    ],
)
def test_bad_records_are_skipped_when_asked(tmp_path, name, data, kept, parts):
    path = write(tmp_path / name, data)
    values, skipped = kept_and_skipped(path)
    assert [row["a"] for row in values] == kept
    assert len(skipped) == len(parts)
    assert all(re.search(part, line) for part, line in zip(parts, skipped, strict=True))
    with refuse(name, parts[0]):
        list(read_records(path))


@pytest.mark.parametrize("ending", ["jsonl.gz", "json.gz"])
def test_everything_whole_of_a_cut_off_gzip_is_kept(tmp_path, ending):
    dice = random.Random(1)
    rows = [{"a": "".join(dice.choices("abcdefgh", k=2000))} for _ in range(1500)]  # 3 MB, and 1 MB gzipped
    lines = [json.dumps(row) for row in rows]
    text = "\n".join(lines) if ending == "jsonl.gz" else f"[{','.join(lines)}]"
    path = write(tmp_path / f"x.{ending}", text)
    whole = path.read_bytes()
    path.write_bytes(whole[:800_000])
    there = b""
    with gzip.open(path) as file, contextlib.suppress(EOFError):
        while part := file.read1():
            there += part
    values, skipped = kept_and_skipped(path)
    assert values == rows[: len(values)]
    assert len(values) == there.count(b"}") > 500
    assert len(skipped) == 1
    assert "the gzip data ends in the middle" in skipped[0]
    # Damage in the middle is another thing: what was unpacked before it showed may be garbled already.
    path.write_bytes(whole[:700_000] + b"\0" * 100_000 + whole[800_000:])
    with refuse("damaged gzip"):
        kept_and_skipped(path)


def test_nothing_whole_is_an_error_all_the_same(tmp_path):
    for name, data in (("x.jsonl", ""), ("x.jsonl", "<p>\n<p>\n"), ("x.json", '[{"a": '), ("x.parquet", "none")):
        with refuse(name):
            kept_and_skipped(write(tmp_path / name, data))
    with refuse("cannot be read"):
        kept_and_skipped(tmp_path / "none.jsonl")


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "x.jsonl", tmp_path):
        with refuse("cannot be read"):
            list(read_records(path))


# ---- Fields ----


def test_fields():
    record = Record({"a": "x", "b": None, "c": 1, "d": "\ud83d"}, "file.jsonl", 7, 7)
    assert record.get("a") == "x"
    assert record.get("b", nullable=True) is None
    with refuse("file.jsonl", "record 7", "no field 'in.e'", "a, b, c, d"):
        record.inside(record.values, "in", "e")
    with refuse("file.jsonl", "record 7", "an entry of 'in' is not an object"):
        record.inside(["e"], "in", "e")
    with refuse("file.jsonl", "record 7", "'b' is null, not a string"):
        record.get("b")
    with refuse("'c' is a number, not a list"):
        record.get("c", list)
    with refuse("'d'", "surrogate"):
        record.get("d")


# ---- Finding ----


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose one repository holds `files`, unreachable while `down`; `calls` are the downloads asked for."""

    class Hub:
        files, calls, down, cached = (), [], False, False

    def snapshot_download(repo, *, repo_type, allow_patterns, revision, local_files_only):
        Hub.calls.append((repo, repo_type, allow_patterns, revision, local_files_only))
        if Hub.down and not (Hub.cached and local_files_only):
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


def test_a_named_file_of_the_hub_has_no_other_split_or_configuration(tmp_path, hub):
    hub.files = ["x.jsonl"]
    for options, part in (({"split": "test"}, "split test"), ({"config": "code"}, "config code")):
        with refuse("data set d", part, r"x\.jsonl is a file"):
            find_data_file("d", "x.jsonl", tmp_path / "cache", None, HubSource("someone/some-data", **options))
    train = HubSource("someone/some-data", split="train[:5%]")
    assert find_data_file("d", "x.jsonl", tmp_path / "cache", None, train) == [tmp_path / "hub/x.jsonl"]


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
    assert find_data_file("d", None, tmp_path, None, HUB, download=False) is None
    assert find_data_file("d", "/nowhere/x", tmp_path, None, HUB, download=False) is None
    assert all(local_only for *_, local_only in hub.calls)
    hub.down, hub.files = False, ["train.json"]
    assert find_data_file("d", None, tmp_path, None, HUB, download=False) == [tmp_path / "hub/train.json"]
    path = write(tmp_path / "d.json", "[]")
    assert find_data_file("d", None, tmp_path, None, HUB, download=False) == [path]


def test_no_repository_no_hub(tmp_path, hub):
    with refuse("data set d", "x.jsonl not found"):
        find_data_file("d", "x.jsonl", tmp_path, None, HubSource(None))
    assert find_data_file("d", "x.jsonl", tmp_path, None, HubSource(None), download=False) is None
    assert not hub.calls


# ---- The hub's cache ----

# Finds every source's files, and says so, in a process of its own: huggingface_hub reads its settings when imported.
FIND = """
import json, sys
sys.path.insert(0, "scripts")
from pathlib import Path
from data.files import find_data_file
from sources.messages import MessagesOptions
from utils.errors import UserError
from sources.registry import find_source
for name, hub_name, files, path, revision in json.load(sys.stdin):
    hub = find_source(name, MessagesOptions(source="messages", hub_name=hub_name or "a/b", data_files=files)).hub
    try:
        found = find_data_file(name, path, Path("none"), revision, hub)
        assert find_data_file(name, path, Path("none"), revision, hub, download=False) == found
        print(json.dumps([str(path) for path in found]))
    except UserError as error:
        print(json.dumps(str(error)))
"""
HUB_FILES = {
    "oasst_export": ["2023-04-12_oasst_ready.trees.jsonl.gz"],
    "vicuna": ["ShareGPT_V4.3_unfiltered_cleaned_split.json"],
    "dolly15k": ["data/train-00000-of-00001.parquet"],
    "grade_school_math_instructions": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
    "code_alpaca": ["code_alpaca_20k.json"],
    "my_chats": ["data/train-00000-of-00001.parquet"],
}
OWN = MessagesOptions(source="messages", hub_name="someone/chats")


def test_every_source_is_found_in_the_hubs_cache(tmp_path):
    """Offline, in folders as the hub's client leaves them: blobs, refs, and a snapshot of links for each commit."""
    commits = "1" * 40, "2" * 40  # main is the second, a tag is the first
    for name, files in HUB_FILES.items():
        repo = tmp_path / f"datasets--{find_source(name, OWN).hub.repo.replace('/', '--')}"
        for ref, commit in (("v1", commits[0]), ("main", commits[1])):
            write(repo / "refs" / ref, commit)
            for file in [*files, "README.md", "data/test-00000-of-00001.parquet"]:
                blob = write(repo / "blobs" / f"{commit}{file.replace('/', '')}", "x")
                link = repo / "snapshots" / commit / file
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(blob)

    asked, expected = [], []
    for name, files in HUB_FILES.items():
        folder = tmp_path / f"datasets--{find_source(name, OWN).hub.repo.replace('/', '--')}" / "snapshots"
        for revision, commit in ((None, 1), ("main", 1), ("v1", 0), (commits[0], 0), (commits[1], 1)):
            asked.append([name, OWN.hub_name, None, None, revision])
            expected.append([str(folder / commits[commit] / file) for file in files])
        asked.append([name, OWN.hub_name, None, files[0], "v1"])  # a file named in the recipe
        expected.append([str(folder / commits[0] / files[0])])
    asked.append(["my_chats", OWN.hub_name, "data/test-*", None, "v1"])
    expected.append([str(folder / commits[0] / "data/test-00000-of-00001.parquet")])
    asked += [
        ["vicuna", None, None, None, "v2"],
        ["vicuna", None, None, "other.json", "v1"],
        ["my_chats", OWN.hub_name, "*.csv", None, None],
    ]
    process = subprocess.run(
        [sys.executable, "-c", FIND],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    said = process.stdout.splitlines()
    taken = [line for line in said if line.startswith("files of ")]
    *answers, unknown, missing, other = [json.loads(line) for line in said if line not in taken]
    assert set(HUB_FILES) - {"my_chats"} == set(SOURCES) - {"messages"}
    assert answers == expected
    assert "files of the hub's someone/chats, in its cache: data/train-00000-of-00001.parquet" in taken
    assert re.search(r"Aeala/ShareGPT_Vicuna_unfiltered at revision v2 \(could not be reached", unknown)
    assert re.search(r"other.json not found.* at revision v1 \(no such file there\)", missing)
    assert re.search(r"files of \*\.csv not found; looked at the hub's someone/chats", other)
