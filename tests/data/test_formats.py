"""Every kind of file that is read: the same rows from each, in flat memory, and what is wrong with one in a line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest
import yaml
from conftest import ROOT, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from data.files import find_data_file
from data.reading import Reading
from data.records import read_records
from sources.messages import MessagesOptions
from sources.registry import find_source
from utils.errors import UserError

FIELDS = ("prompt", "response", "messages")
ROWS = [{"prompt": f'Frage {n}, "zwei"\nZeilen', "response": f"Antwort {n}; ä\u2028|\tNA"} for n in range(40)]


def as_csv(rows: list[dict], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def packed(codec: str, data: bytes) -> bytes:
    stream = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(stream, codec) as file:
        file.write(data)
    return stream.getvalue().to_pybytes()


def table(write, rows: list[dict] = ROWS) -> bytes:
    stream = pyarrow.BufferOutputStream()
    write(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue().to_pybytes()


def arrow_stream(rows, stream):
    with pyarrow.ipc.new_stream(stream, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=7)


JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FILES = {
    "x.jsonl": JSONL,
    "x.json": json.dumps(ROWS).encode(),
    "key.json": json.dumps({"version": 1, "about": [1, [{"a": 2}]], "data": ROWS, "n": None}).encode(),
    "laid_out.json": json.dumps({"n": 1, "rows": ROWS}, indent=1).encode(),
    "by_hand.json": b'{"data": [\n' + b",\n".join(json.dumps(row).encode() for row in ROWS) + b"\n]}\n",
    "x.ndjson.gz": gzip.compress(JSONL),
    "x.jsonl.bz2": bz2.compress(JSONL),
    "x.jsonl.xz": lzma.compress(JSONL),
    "x.jsonl.zst": packed("zstd", JSONL),
    "parts.jsonl.zst": packed("zstd", JSONL[:700]) + packed("zstd", JSONL[700:]),
    "x.json.lz4": packed("lz4", json.dumps({"data": ROWS}).encode()),
    "x.csv": as_csv(ROWS),
    "mark.csv": b"\xef\xbb\xbf" + as_csv(ROWS),
    "semicolons.csv": as_csv(ROWS, ";"),
    "x.tsv": as_csv(ROWS, "\t"),
    "x.csv.zst": packed("zstd", as_csv(ROWS)),
    "x.tsv.bz2": bz2.compress(as_csv(ROWS, "\t")),
    "x.parquet": table(pyarrow.parquet.write_table),
    "x.arrow": table(arrow_stream),
    "x.feather": table(pyarrow.feather.write_feather),
}


def read(*places, **options):
    """The conversations of what a recipe names, as pairs of texts."""
    options = MessagesOptions(source="messages", input_file_path=[str(place) for place in places], **options)
    paths = find_data_file("d", options.input_file_path, Path("none"), None, find_source("d", options).hub)
    return [tuple(message.content for message in one.messages) for one in Reading("d", options, paths, 0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_from_every_kind_of_file(folder, name):
    assert [(number, record) for number, (_, record) in enumerate(read_records(folder / name, fields=FIELDS))] == list(
        enumerate(ROWS)
    )


def test_all_of_them_at_once(folder, tmp_path, tiny_model):
    """The whole of prepare_data.py, and two steps of training: each kind of file, a list, a pattern and a folder."""
    own = {"source": "messages", "val_split": 0}
    places = {f"file{place}": str(folder / name) for place, name in enumerate(FILES)}
    places |= {"several": [str(folder / "x.csv"), str(folder / "x.arrow")], "pattern": str(folder / "x.json*")}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.csv").write_bytes(FILES["x.csv"])
    (tmp_path / "folder" / "test.csv").write_bytes(FILES["x.csv"])
    places["folder"] = str(tmp_path / "folder")
    recipe = {
        "model_name": str(tiny_model),
        "datasets": [{name: {**own, "input_file_path": place}} for name, place in places.items()],
        "cache_dir": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "out"),
        "max_length": 64,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "dtype": "fp32",
        "log_wandb": False,
        "eval_steps": 100,
        "logging_steps": 1,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    script = {"script": "scripts/prepare_data.py", "output_dir": tmp_path}
    shown = run_script(tmp_path / "recipe.yaml", "--export", tmp_path / "all.jsonl", **script).stdout
    counts = {name: len(ROWS) for name in places} | {"several": 80, "pattern": 40 * 6}
    for name, count in counts.items():
        assert re.search(rf"│ {name} +│ +{count} │ +0 │", shown), name
    exported = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().split("\n")[:-1]]
    first = [row["messages"] for row in exported if row["dataset"] == "file0"]
    for name in places:
        if name not in ("several", "pattern"):
            assert [row["messages"] for row in exported if row["dataset"] == name] == first
    assert shown.count(" 40 made of prompt, response") == len(FILES) + 1
    run = run_script(tmp_path / "recipe.yaml", output_dir=tmp_path / "out")
    assert len(run.curve("loss")) == 2


# ---- JSON under a key ----


@pytest.mark.parametrize(
    ("text", "records"),
    [
        ('{"data": [{"prompt": "q"}]}', [{"prompt": "q"}]),
        ('{"data": [{"prompt": "q"}, {"response": "a"}]}\n', [{"prompt": "q"}, {"response": "a"}]),
        ('{"n": 1, "data": [\n{"prompt": "q"}\n]}', [{"prompt": "q"}]),
        ('{\n "prompt": "q",\n "response": "a"\n}', [{"prompt": "q", "response": "a"}]),
        ('{"messages": [{"role": "user", "content": "q"}]}', [{"messages": [{"role": "user", "content": "q"}]}]),
        (
            '{"conversations": [{"messages": ["q", "a"]}, {"messages": ["r", "b"]}]}',
            [{"messages": ["q", "a"]}, {"messages": ["r", "b"]}],
        ),
        ('{"prompt": "q", "tools": [{"prompt": "x"}]}', [{"prompt": "q", "tools": [{"prompt": "x"}]}]),
        ('{"prompt": "q"}\n{"data": [{"prompt": "x"}]}', [{"prompt": "q"}, {"data": [{"prompt": "x"}]}]),
        ('{"other": [{"a": 1}]}', [{"other": [{"a": 1}]}]),
        ('{"data": []}', [{"data": []}]),
        ('{"n": 1,\n"data": [{"prompt": "q"},\n{"prompt": "r"}]}', [{"prompt": "q"}, {"prompt": "r"}]),
    ],
)
def test_records_under_a_key(tmp_path, text, records):
    (tmp_path / "x.json").write_text(text)
    assert [record for _, record in read_records(tmp_path / "x.json", fields=FIELDS)] == records


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": [{"prompt": 1}], "b": [{"prompt": 2}]}', "holds records under 'a' and under 'b'"),
        ('{\n"system": "s", "prompt": "p", "a": [{"prompt": 1}]}', "has 'prompt', as a record has, beside the records"),
        ('{"data": [{"prompt": 1}, {"prompt"', "cut off"),
        ('{"data": [{"prompt": 1}', "cut off"),
        ('{"data": [{"prompt": 1}]', "line 1: cut off"),
        ('{"data": [\n{"prompt": 1},\n{"prompt": }\n]}', "record 2, line 3: cut off or not valid JSON"),
        ('{"data": [\n{"prompt": 1},\n3]}', "record 2: not an object but a number"),
        ('{"data": [{"prompt": 1}]} {"data": 2}', "not valid JSON|more text after the end"),
        ('{\n"data": {"prompt": 1}\n}\n{\n"data": 2}', "more text after the end of the object"),
        ('{\n"data" [{"prompt": 1}]}', "expected ':' after the key 'data'"),
    ],
)
def test_damage_under_a_key(tmp_path, text, said):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=rf"\A{re.escape(str(tmp_path))}/x.json[^\n]*(?:{said})[^\n]*\Z"):
        list(read_records(tmp_path / "x.json", fields=FIELDS))


def test_a_damaged_first_line_does_not_make_one_object_of_lines(tmp_path):
    """Whatever token a newline was put behind, or the first line was cut off at."""
    first, *rest = JSONL.split(b"\n")[:5]
    for place in (place for place in range(1, len(first)) if first[place - 1] in b"{,:["):
        for damaged in (first[:place], first[:place] + b"\n" + first[place:]):
            (tmp_path / "x.jsonl").write_bytes(b"\n".join([damaged, *rest]))
            with pytest.raises(UserError, match=r"x\.jsonl, line 1: not valid JSON"):
                list(read_records(tmp_path / "x.jsonl", fields=FIELDS))
            kept = [record for _, record in read_records(tmp_path / "x.jsonl", lambda _: None, FIELDS)]
            assert kept == ROWS[1:5]


def test_a_long_list_under_a_key_is_streamed(tmp_path):
    """Longer in one line than what is looked at first."""
    rows = [{"prompt": "x" * 1000, "response": str(number)} for number in range(3000)]
    (tmp_path / "x.json").write_text(json.dumps({"version": "1", "data": rows}))
    assert [record for _, record in read_records(tmp_path / "x.json", fields=FIELDS)] == rows


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "p", "prompt": "q"}\n{"prompt": "r"}\n', "x.json, line 1: the key 'prompt' is given twice"),
        ('[{"prompt": "p"}, {"a": {"b": 1, "b": 2}}]', "x.json, record 2, line 1: the key 'b' is given twice"),
        ('{\n"prompt": "p",\n"prompt": "q"\n}', "x.json, record 1, line 3: the key 'prompt' is given twice"),
        ('{\n"prompt": "p",\n"a": [{"b": 1, "b": 2}]\n}', "x.json, record 1, line 3: the key 'b' is given twice"),
        ('{\n"data": [{"prompt": "p"}],\n"data": []\n}', "line 3: the key 'data' is given twice"),
        (
            '{\n"data": [{"prompt": "p", "prompt": "q"}, {"prompt": "r"}]}',
            "record 1, line 2: the key 'prompt' is given twice",
        ),
    ],
)
def test_a_key_given_twice(tmp_path, text, said):
    """Of which JSON would take the last without a word."""
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=said):
        list(read_records(tmp_path / "x.json", fields=FIELDS))


@pytest.mark.parametrize(
    "bad", ['{"prompt": "p", "prompt": "q"}', '{"prompt": {"a": 1, "a": 2}}', f'{{"prompt": {"9" * 4301}}}']
)
@pytest.mark.parametrize("layout", ["[%s]", '{"data": [%s]}', '{\n"version": 1, "data":\n[%s]}'])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_records_behind_a_refused_one_are_kept(tmp_path, bad, layout, place, monkeypatch):
    """Also where it goes on in the next chunk of the file."""
    monkeypatch.setattr("data.json_text.CHUNK_BYTES", 40)
    texts = [json.dumps({"prompt": str(number), "response": "x" * 30}) for number in range(2)]
    (tmp_path / "x.json").write_text(layout % ", ".join([*texts[:place], bad, *texts[place:]]))
    skipped = []
    kept = [record["prompt"] for _, record in read_records(tmp_path / "x.json", skipped.append, FIELDS)]
    assert (kept, len(skipped)) == (["0", "1"], 1)
    assert f"record {place + 1}, line" in str(skipped[0])


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_rows_beside_one_that_python_cannot_hold_are_kept(tmp_path, name):
    """A map with a key twice, of which the last would count without a word."""
    turns = [[("prompt", str(number)), ("prompt" if number == 2 else "response", "a")] for number in range(5)]
    table = pyarrow.table({"prompt": pyarrow.array(turns, pyarrow.map_(pyarrow.string(), pyarrow.string()))})
    if name == "x.parquet":
        pyarrow.parquet.write_table(table, tmp_path / name)
    else:
        with pyarrow.ipc.new_file(tmp_path / name, table.schema) as file:
            file.write_table(table)
    with pytest.raises(UserError, match=rf"\A[^\n]*{name}, record 3: cannot be read: [^\n]*'prompt'[^\n]*\Z"):
        list(read_records(tmp_path / name, fields=FIELDS))
    skipped = []
    kept = [
        (number, record["prompt"]["prompt"]) for number, record in read_records(tmp_path / name, skipped.append, FIELDS)
    ]
    assert kept == [(number + 1, str(number)) for number in (0, 1, 3, 4)]
    assert len(skipped) == 1


# ---- CSV ----

cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=8)


@settings(max_examples=60)
@given(rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=5), delimiter=st.sampled_from(",;\t|"))
def test_csv_gives_back_every_text(tmp_path, rows, delimiter):
    rows = [{"prompt": prompt, "response": response} for prompt, response in rows]
    (tmp_path / "x.csv").write_bytes(as_csv(rows, delimiter))
    assert [record for _, record in read_records(tmp_path / "x.csv")] == rows


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("prompt,response\na,b\nc\n", "record 2, line 3: has 1 cells, the first line 2"),
        ("prompt,response\na,b,c\n", "record 1, line 2: has 3 cells"),
        ('prompt,response\n"a,b\nc,d\n', "record 1, line 3: not valid CSV: unexpected end"),
        ('prompt,response\n"a"b,c\n', "record 1, line 2: not valid CSV"),
        (b"prompt,response\na,b\xff\n", "record 1, line 2: not UTF-8"),
        ("prompt,prompt\na,b\n", "column 'prompt' twice"),
        ("prompt,response\n", "holds no records"),
        (" \n\n", "the file is empty"),
    ],
)
def test_damaged_csv(tmp_path, data, said):
    (tmp_path / "x.csv").write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(UserError, match=rf"\A[^\n]*x.csv[^\n]*{said}[^\n]*\Z"):
        list(read_records(tmp_path / "x.csv"))


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ('"prompt","response","from; to; of"', ["prompt", "response", "from; to; of"]),
        ('prompt;response;"a, b, c"', ["prompt", "response", "a, b, c"]),
        ('"the\nprompt",response', ["the\nprompt", "response"]),
        ('"a ""b"", c;"|response', ['a "b", c;', "response"]),
    ],
)
def test_the_first_line_of_csv(tmp_path, header, names):
    """Its delimiter is not looked for in what stands in quotes, which may hold newlines."""
    cells = [str(number) for number in range(len(names))]
    delimiter = next(letter for letter in ";|," if letter in re.sub('"[^"]*"', "", header))
    (tmp_path / "x.csv").write_text(f"{header}\n{delimiter.join(cells)}\nbad\n")
    skipped = []
    kept = [record for _, record in read_records(tmp_path / "x.csv", skipped.append)]
    assert kept == [dict(zip(names, cells, strict=True))]
    assert f"record 2, line {3 + header.count(chr(10))}: has 1 cells" in str(skipped[0])


def test_bad_rows_of_csv_are_skipped_when_asked(tmp_path):
    (tmp_path / "x.csv").write_bytes(b'prompt,response\na,b\nc\n"d"e,f\ng,\xff\nh,i\n')
    skipped = []
    kept = [record for _, record in read_records(tmp_path / "x.csv", skipped.append)]
    assert kept == [{"prompt": "a", "response": "b"}, {"prompt": "h", "response": "i"}]
    assert [re.search(r"line \d", str(error))[0] for error in skipped] == ["line 3", "line 4", "line 5"]


def test_a_cell_of_any_length_and_json_in_one(tmp_path):
    """Longer than the 131,072 characters that Python's reader takes by itself."""
    chat = [{"role": "user", "content": "q, " * 100_000}, {"role": "assistant", "content": "None"}]
    rows = [{"": "0", "messages": json.dumps(chat)}, {"": "1", "messages": str(chat)}]  # as pandas writes it
    (tmp_path / "x.csv").write_bytes(as_csv(rows))
    assert read(tmp_path / "x.csv") == [(chat[0]["content"], "None")] * 2


# ---- Compressed and binary files that are damaged ----


@pytest.mark.parametrize("name", ["x.jsonl.bz2", "x.jsonl.xz", "x.jsonl.zst", "x.json.lz4", "x.csv.zst", "x.tsv.bz2"])
def test_damaged_compressed_text(tmp_path, name):
    dice = random.Random(1)
    rows = [{"prompt": "".join(dice.choices("abcdefgh", k=300)), "response": "a"} for _ in range(3000)]
    text = as_csv(rows, "\t" if "tsv" in name else ",") if "sv" in name else json.dumps(rows).encode()
    compress = {"bz2": bz2.compress, "xz": lzma.compress}.get(
        name.rpartition(".")[2], lambda data: packed({"zst": "zstd", "lz4": "lz4"}[name.rpartition(".")[2]], data)
    )
    whole = compress(text)
    for damaged, said in (
        (whole[: len(whole) // 2], "cut off: the .* data ends in the middle"),
        (
            whole[: len(whole) // 2] + bytes(2000) + whole[len(whole) // 2 + 2000 :],
            "damaged .* data|not valid|cells|UTF-8",
        ),
    ):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=rf"\A[^\n]*{name}[^\n]*(?:{said})[^\n]*\Z"):
            list(read_records(tmp_path / name))


@pytest.mark.parametrize("name", ["x.arrow", "x.feather", "x.parquet"])
def test_damaged_tables(tmp_path, name):
    """Whatever pyarrow makes of it is one line, and never another number of rows without one."""
    dice = random.Random(0)
    for damage in range(40):
        place = dice.randrange(4, len(FILES[name]))
        part = bytes(30) if damage % 2 else b""
        (tmp_path / name).write_bytes(
            FILES[name][:place] + part + FILES[name][place + len(part) :][: damage % 2 * 10**9]
        )
        try:
            outcome = len(list(read_records(tmp_path / name, fields=("prompt",))))
        except UserError as error:
            outcome = str(error)
        assert outcome == len(ROWS) or (name in str(outcome) and "\n" not in str(outcome)) or not damage % 2


def test_what_other_tools_write_into_tables(tmp_path):
    """Spark keeps messages as maps, DuckDB a number as a decimal."""
    turns = [[("role", "user"), ("content", "q")], [("role", "assistant"), ("content", "a")]]
    maps = pyarrow.array([turns], pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.string())))
    rows = pyarrow.table({"messages": maps, "weight": pyarrow.array([0.5]).cast(pyarrow.decimal128(3, 2))})
    pyarrow.parquet.write_table(rows, tmp_path / "x.parquet")
    pyarrow.feather.write_feather(rows, tmp_path / "x.feather")
    options = MessagesOptions(source="messages", input_file_path="x", val_split=0)
    for name in ("x.parquet", "x.feather"):
        (conversation,) = Reading("d", options, [tmp_path / name], 0)
        assert [message.content for message in conversation.messages] == ["q", "a"]
        assert conversation.weight == 0.5
    weight = pyarrow.array([0.0]).cast(pyarrow.decimal128(2, 1))
    reply = pyarrow.StructArray.from_arrays([["assistant"], ["a"], weight], ["role", "content", "weight"])
    prompts = pyarrow.array([[{"role": "user", "content": "q"}]])
    rows = pyarrow.table({"prompt": prompts, "response": pyarrow.ListArray.from_arrays([0, 1], reply)})
    pyarrow.parquet.write_table(rows, tmp_path / "x.parquet")
    (conversation,) = Reading("d", options, [tmp_path / "x.parquet"], 0)
    assert [message.train for message in conversation.messages] == [False, False]


# ---- Memory ----

FLAT = """
import json, sys
sys.path.insert(0, "scripts")
from pathlib import Path
from data.reading import Reading
from sources.messages import MessagesOptions
options = MessagesOptions(source="messages", input_file_path="x")
most = []
for path in sys.argv[1:]:
    rows = sum(1 for _ in Reading("d", options, [Path(path)], 0))
    # Not ru_maxrss, which begins at that of the process that started this one.
    most += [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(json.dumps([rows, *most]))
"""


def write_texts(path: Path, count: int) -> Path:
    """A table of so many rows, with 5 KB of text that cannot be compressed in each; of parquet in one row group."""
    texts, dice = [str(number) for number in range(count)], random.Random(0)
    replies = [dice.randbytes(2500).hex() for _ in range(100)] * (count // 100)
    if path.suffix == ".csv":
        path.write_text("prompt,response\n" + "".join(map("{},{}\n".format, texts, replies)))
    else:
        schema = pyarrow.schema({"prompt": pyarrow.string(), "response": pyarrow.string()})
        with pyarrow.parquet.ParquetWriter(path, schema, use_dictionary=False, compression="none") as writer:
            writer.write_table(pyarrow.table([texts, replies], schema=schema), row_group_size=count)
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_memory_stays_flat(tmp_path, kind):
    """Of 150 MB of text little more is in memory than of 50, which allocators take to come to their size."""
    paths = [write_texts(tmp_path / f"{count}.{kind}", count) for count in (10_000, 30_000)]
    process = subprocess.run(
        [sys.executable, "-c", FLAT, *map(str, paths)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    rows, first, most = json.loads(process.stdout)
    assert rows == 30_000
    assert most - first < 40_000, (first, most)  # KiB, of the 100,000 that there are more; parquet took 15,000
