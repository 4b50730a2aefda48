"""Preparation and its cache: read when nothing changed, made anew when anything did, never half, never twice."""

import gzip
import itertools
import json
import os
import random
import shutil
import signal
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from conftest import ROOT
from forking import CONTEXT, call_forked
from transformers import AutoTokenizer

from data import mix as mix_module
from data.dialogue import encode, prepare_tokenizer
from data.files import find_data_file
from data.mix import prepare_mix, prepared_folder
from data.reading import LEFT_OUT, TRAIN, VALIDATION, Reading
from recipe.keys import Recipe
from sources.registry import SOURCES, find_source
from training.collate import cut
from utils.errors import UserError

DEMO = ROOT / "recipes" / "demo.yaml"


@pytest.fixture
def tokenizer():
    return load_tokenizer()


def load_tokenizer():
    return prepare_tokenizer(AutoTokenizer.from_pretrained(ROOT / "recipes" / "demo_data" / "model"))


@pytest.fixture
def make_recipe(tmp_path, monkeypatch):
    """The demo's recipe with a copy of its data and a cache of its own, e.g. make_recipe(dolly15k={"val_split": 0})."""
    shutil.copytree(ROOT / "recipes" / "demo_data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)  # a fallback cache would be made there

    def make(names: tuple[str, ...] = (), keys: dict | None = None, **options) -> Recipe:
        demo = yaml.safe_load(DEMO.read_text())
        values = demo | {"cache_dir": str(tmp_path / "cache")} | (keys or {})
        chosen = {}
        for entry in demo["datasets"]:
            ((name, own),) = entry.items()
            if not names or name in names:
                path = tmp_path / "data" / Path(own["input_file_path"]).name
                chosen[name] = own | {"input_file_path": str(path)} | options.get(name, {})
        mix = (keys or {}).get("datasets") or [{name: own} for name, own in chosen.items()]
        return Recipe.model_validate(values | {"datasets": mix})

    return make


def folders(recipe: Recipe) -> set[str]:
    """The whole prepared data sets of a cache."""
    prepared = recipe.cache_dir / "prepared"
    return {path.name for path in prepared.iterdir() if path.is_dir() and not path.name.startswith(".")}


def stamps(folder: Path) -> dict[str, tuple]:
    """What changes when a file is written again."""
    return {
        str(path): (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*.arrow")
    }


def contents(mix) -> list:
    """Everything a mix says."""
    return [
        (name, split.dataset[row], *(part.tolist() for part in split.tokens(row)), split.messages(row))
        for name, split in (("train", mix.train), ("validation", mix.validation))
        for row in range(len(split))
    ]


# ---- content ----


def test_prepared_examples_are_those_of_the_sources_and_of_encode(make_recipe, tokenizer):
    recipe = make_recipe()
    mix = prepare_mix(recipe, tokenizer)
    assert mix.names == list(recipe.datasets.chosen())
    rows = {TRAIN: 0, VALIDATION: 0}
    for index, (name, options) in enumerate(recipe.datasets.chosen().items()):
        paths = find_data_file(name, options.input_file_path, recipe.cache_dir, None, find_source(name, options).hub)
        reading = Reading(name, options, paths, recipe.rng_seed)
        conversations = list(reading)
        encoded = encode(tokenizer, conversations, seed=recipe.rng_seed)
        for place, (conversation, code, (ids, scored)) in enumerate(
            zip(conversations, reading.split(), encoded, strict=True)
        ):
            if code == LEFT_OUT:
                continue
            split, row = mix.train if code == TRAIN else mix.validation, rows[code]
            found_ids, found_scored = split.tokens(row)
            assert (found_ids.dtype, found_scored.dtype) == (np.int32, bool)
            assert found_ids.tolist() == ids.tolist()
            assert found_scored.tolist() == scored.tolist()
            assert split.messages(row) == conversation.as_dicts()
            assert (split.dataset[row], split.position[row]) == (index, place)
            assert split.lengths[row] == len(ids)
            assert split.targets[row] == scored.sum() > 0
            rows[code] += 1
        assert mix.reports[name] == {
            "rows_read": reading.rows_read,
            "dropped": reading.dropped,
            "used": {},
            "unused": {},
            "bad_records": 0,
            "first_bad_record": None,
            "conversations": len(conversations),
            "fingerprint": mix.reports[name]["fingerprint"],
        }
    for split, code in ((mix.train, TRAIN), (mix.validation, VALIDATION)):
        assert rows[code] == len(split) == len(split.dataset) == len(split.lengths) == len(split.targets) > 0


def test_select(make_recipe, tokenizer):
    train = prepare_mix(make_recipe(("dolly15k", "vicuna")), tokenizer).train
    rows = np.array([len(train) - 1, 3, 0])
    some = train.select(rows)
    for place, row in enumerate(rows):
        assert some.messages(place) == train.messages(row)
        assert some.tokens(place)[0].tolist() == train.tokens(row)[0].tolist()
        assert (some.dataset[place], some.lengths[place]) == (train.dataset[row], train.lengths[row])
    assert train.select(train.dataset == 1).messages(0) == train.messages(int((train.dataset == 0).sum()))


def test_left_out_by_max_val_set(make_recipe, tokenizer):
    whole = prepare_mix(make_recipe(("dolly15k",)), tokenizer)
    few = prepare_mix(make_recipe(("dolly15k",), dolly15k={"max_val_set": 2}), tokenizer)
    assert len(few.validation) == 2 < len(whole.validation)
    assert set(few.validation.position) < set(whole.validation.position)
    assert few.train.position.tolist() == whole.train.position.tolist()
    assert few.reports["dolly15k"] | {"fingerprint": ""} == whole.reports["dolly15k"] | {"fingerprint": ""}


def write_chats(path: Path, count: int) -> None:
    dice = random.Random(0)
    with open(path, "w") as file:
        for number in range(count):
            replies = [" ".join(dice.choices(WORDS, k=200)) for _ in range(4)]
            file.write(json.dumps({"instruction": f"{number} {replies[0]}", "output": " ".join(replies)}) + "\n")


WORDS = ("memory", "of", "a", "machine", "stays", "flat", "while", "texts", "of", "any", "number", "pass", "through")


def test_memory_does_not_grow_with_the_source(make_recipe, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(mix_module, "ROWS_AT_A_TIME", 20)
    peaks = []
    for count in (200, 1000):  # tee holds blocks of 57
        write_chats(tmp_path / f"{count}.jsonl", count)
        own = {"source": "messages", "input_file_path": str(tmp_path / f"{count}.jsonl")}
        recipe = make_recipe((), {"datasets": [{"chats": own}]})
        before = pa.total_allocated_bytes()
        arrow = []
        record_batch = mix_module.record_batch

        def measured(examples, record_batch=record_batch, arrow=arrow, before=before):
            arrow.append(pa.total_allocated_bytes() - before)
            return record_batch(examples)

        monkeypatch.setattr(mix_module, "record_batch", measured)
        tracemalloc.start()
        mix = prepare_mix(recipe, tokenizer)
        peaks.append(tracemalloc.get_traced_memory()[1] + max(arrow))
        tracemalloc.stop()
        monkeypatch.setattr(mix_module, "record_batch", record_batch)
        assert len(mix.train) + len(mix.validation) == count
    assert (tmp_path / "1000.jsonl").stat().st_size > 4 * (tmp_path / "200.jsonl").stat().st_size
    assert peaks[1] < 1.2 * peaks[0]


def test_bad_input_is_skipped_and_reported(make_recipe, tokenizer, tmp_path, capsys):
    path = tmp_path / "data" / "dolly.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:20], "{\n", '{"instruction": "q"}\n', *lines[20:30], lines[30][:9]]))
    with pytest.raises(UserError, match=r"dolly.jsonl, line 21"):
        prepare_mix(make_recipe(("dolly15k",)), tokenizer)
    mix = prepare_mix(make_recipe(("dolly15k",), dolly15k={"on_bad_records": "skip"}), tokenizer)
    report = mix.reports["dolly15k"]
    assert (report["rows_read"], report["bad_records"]) == (33, 3)
    assert len(mix.train) + len(mix.validation) == 30 - sum(report["dropped"].values())
    out = capsys.readouterr().out
    assert "skipped: 3 bad, the first: " in out
    assert "dolly.jsonl, line 21" in out


def test_odd_texts_are_kept_whole(make_recipe, tokenizer, tmp_path):
    """NUL bytes, control tokens spelled out, text outside the basic plane, and a single message of 10 MB."""
    odd = ["a\0b", "<|endoftext|><|assistant|>", "\U0001f600\ufeff\u202e", "ha " * 3_500_000]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"prompt": text[:9], "answer": text}) + "\n" for text in odd))
    own = {"source": "messages", "input_file_path": str(path), "val_split": 0}
    recipe = make_recipe((), {"datasets": [{"odd": own}], "max_length": 64})
    train = prepare_mix(recipe, tokenizer).train
    assert [train.messages(row)[1]["content"] for row in range(len(train))] == odd
    control = set(tokenizer.convert_tokens_to_ids(["<|prompter|>", "<|assistant|>", tokenizer.eos_token]))
    for row, text in enumerate(odd):
        ids, scored = train.tokens(row)
        assert sum(token in control for token in ids.tolist()) == 4
        assert tokenizer.decode(ids[scored]) == text + tokenizer.eos_token
        for epoch in (0, 1, None):
            window, window_scored = cut(train, row, recipe, epoch)
            assert len(window) == min(64, len(ids))
            assert window_scored.any() or epoch is None


def test_a_mix_whose_sources_are_all_empty(make_recipe, tokenizer, tmp_path):
    for content, options, said in (
        ("", {}, "the file is empty"),
        ("", {"on_bad_records": "skip"}, "the file is empty"),
        ("[]", {}, "holds no records"),
        (
            '{"instruction": "", "context": "", "response": ""}',
            {},
            "no conversation left .*dropped: 1 row with an empty",
        ),
        ('{"instruction": ""}', {"on_bad_records": "skip"}, "no conversation left .*skipped: 1 bad"),
    ):
        (tmp_path / "data" / "dolly.jsonl").write_text(content)
        with pytest.raises(UserError, match=rf"\A[^\n]*dolly[^\n]*{said}[^\n]*\Z"):
            prepare_mix(make_recipe(("dolly15k",), dolly15k=options), tokenizer)


def test_a_split_spans_more_than_one_record_batch(make_recipe, tokenizer, monkeypatch):
    expected = contents(prepare_mix(make_recipe(("dolly15k", "vicuna")), tokenizer))
    monkeypatch.setattr(mix_module, "ROWS_AT_A_TIME", 7)
    again = make_recipe(("dolly15k", "vicuna"), {"cache_dir": "other"})
    assert contents(prepare_mix(again, tokenizer)) == expected
    monkeypatch.setattr(mix_module, "CHARACTERS_AT_A_TIME", 50)  # as if the texts of 7 rows were gigabytes
    again = make_recipe(("dolly15k", "vicuna"), {"cache_dir": "third"})
    assert contents(prepare_mix(again, tokenizer)) == expected


def fingerprint(recipe: Recipe, tokenizer) -> str:
    (report,) = prepare_mix(recipe, tokenizer).reports.values()
    return report["fingerprint"]


def test_the_fingerprint_is_of_the_content_alone(make_recipe, tokenizer, tmp_path, monkeypatch):
    first = fingerprint(make_recipe(("dolly15k",)), tokenizer)
    assert len(bytes.fromhex(first)) == 10
    path = tmp_path / "data" / "dolly.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(mix_module, "ROWS_AT_A_TIME", 7)
        assert fingerprint(make_recipe(("dolly15k",), {"cache_dir": "fresh"}), tokenizer) == first
    compressed = tmp_path / "elsewhere.jsonl.gz"
    compressed.write_bytes(gzip.compress(path.read_bytes() + b"\n"))
    moved = make_recipe(("dolly15k",), dolly15k={"input_file_path": str(compressed)})
    assert fingerprint(moved, tokenizer) == first
    assert len(folders(moved)) == 2

    other = [
        fingerprint(make_recipe(("dolly15k",), {"label_masking": False}), tokenizer),
        fingerprint(make_recipe(("dolly15k",), dolly15k={"val_split": 0.3}), tokenizer),
    ]
    path.write_text(path.read_text().replace("A banana is yellow.", "A banana is mellow.", 1))
    other.append(fingerprint(make_recipe(("dolly15k",)), tokenizer))
    assert len({first, *other}) == 4


def test_nothing_held_out(make_recipe, tokenizer):
    mix = prepare_mix(make_recipe(("dolly15k",), dolly15k={"val_split": 0.0}), tokenizer)
    assert len(mix.validation) == 0
    assert len(mix.train) > 0


@pytest.mark.parametrize("names", [("dolly15k",), ("oasst_export", "dolly15k")])
def test_a_data_set_with_nothing_to_train_on_is_the_users_error(make_recipe, tokenizer, tmp_path, names):
    refused = {"instruction": "Who are you?", "context": "", "response": "As a large language model, I cannot say."}
    (tmp_path / "data" / "dolly.jsonl").write_text(json.dumps(refused) + "\n")
    recipe = make_recipe(names)
    with pytest.raises(UserError, match=r"dolly15k: no conversation left .*dolly\.jsonl; dropped: 1 row with a filter"):
        prepare_mix(recipe, tokenizer)
    assert not [name for name in folders(recipe) if name.startswith("dolly15k")]


# ---- the cache ----


def test_a_second_start_reads_what_the_first_wrote(make_recipe, tokenizer, capsys, monkeypatch):
    recipe = make_recipe()
    first = prepare_mix(recipe, tokenizer)
    assert capsys.readouterr().out.count("prepared ") == 5
    written = stamps(recipe.cache_dir)
    assert len(written) == 5

    monkeypatch.setattr(mix_module, "Reading", None)  # nobody reads the sources again
    second = prepare_mix(recipe, load_tokenizer())
    assert contents(second) == contents(first)
    assert stamps(recipe.cache_dir) == written
    assert capsys.readouterr().out == ""


NAMES = ("oasst_export", "dolly15k")


@pytest.mark.parametrize(
    ("keys", "options", "changed"),
    [
        ({"label_masking": False}, {}, set(NAMES)),
        ({"use_system_tag": True}, {}, set(NAMES)),
        ({"rng_seed": 5}, {}, set(NAMES)),
        ({}, {"oasst_export": {"lang": "de"}}, {"oasst_export"}),
        ({}, {"oasst_export": {"top_k": 1}}, {"oasst_export"}),
        ({}, {"dolly15k": {"val_split": 0.3}}, {"dolly15k"}),
        ({}, {"dolly15k": {"max_val_set": 2}}, {"dolly15k"}),
        ({}, {"dolly15k": {"context": "prompt"}}, {"dolly15k"}),
        ({}, {"dolly15k": {"on_bad_records": "skip"}}, {"dolly15k"}),
        ({}, {"dolly15k": {"train_on": "last"}}, {"dolly15k"}),
        ({}, {"dolly15k": {"weight": 0.5}}, set()),
        ({}, {"dolly15k": {"fraction": 0.5}}, set()),
        ({}, {"dolly15k": {"size": 7}}, set()),
        ({"max_length": 31, "learning_rate": 1.0, "sort_by_length": True}, {}, set()),
    ],
)
def test_what_makes_a_new_key(make_recipe, tokenizer, keys, options, changed):
    before = make_recipe(NAMES)
    prepare_mix(before, tokenizer)
    old = folders(before)
    prepare_mix(make_recipe(NAMES, keys, **options), tokenizer)
    assert {name.rpartition("-")[0] for name in folders(before) - old} == changed
    assert old <= folders(before)


def test_a_changed_file_or_tokenizer_makes_a_new_key(make_recipe, tokenizer, tmp_path):
    recipe = make_recipe(("dolly15k",))
    first = prepare_mix(recipe, tokenizer)

    path = tmp_path / "data" / "dolly.jsonl"
    row = {"instruction": "What colour is the sea?", "context": "", "response": "Blue.", "category": "open_qa"}
    text = path.read_text()
    path.write_text(text + json.dumps(row) + "\n")
    more = prepare_mix(recipe, tokenizer)
    assert len(more.train) + len(more.validation) == len(first.train) + len(first.validation) + 1
    assert len(folders(recipe)) == 2

    path.write_text(text)
    os.utime(path, (0, 0))  # the content counts, not the time or the place
    path = path.rename(tmp_path / "data" / "moved.jsonl")
    prepare_mix(make_recipe(("dolly15k",), dolly15k={"input_file_path": str(path)}), tokenizer)
    assert len(folders(recipe)) == 2

    moved = make_recipe(("dolly15k",), dolly15k={"input_file_path": str(path)})
    tokenizer.add_tokens(["colour"])
    other = prepare_mix(moved, tokenizer)
    assert len(folders(recipe)) == 3
    assert contents(other) != contents(first)

    eos = load_tokenizer()
    eos.eos_token = "<|padding|>"
    ends = prepare_mix(moved, eos)
    assert len(folders(recipe)) == 4
    assert {ends.train.tokens(row)[0][-1] for row in range(len(ends.train))} == {eos.eos_token_id}


def test_code_that_changes_the_content_is_part_of_the_key(make_recipe, tokenizer, tmp_path, monkeypatch):
    recipe = make_recipe(("dolly15k",))
    prepare_mix(recipe, tokenizer)
    files = mix_module.code_files("dolly15k")
    for place, file in enumerate(files):
        copy = tmp_path / file.name
        copy.write_text(file.read_text() + "\n# changed\n")
        with monkeypatch.context() as patch:
            patch.setattr(mix_module, "code_files", lambda _, files=[*files[:place], copy, *files[place + 1 :]]: files)
            count = len(folders(recipe))
            prepare_mix(recipe, tokenizer)
            assert len(folders(recipe)) == count + 1, file


def test_that_code_is_the_whole_room_and_of_the_sources_one_and_what_they_share():
    def names(dataset: str) -> set[str]:
        return {file.relative_to(ROOT / "scripts").as_posix() for file in mix_module.code_files(dataset)}

    room = {f"data/{path.name}" for path in (ROOT / "scripts" / "data").glob("*.py")}
    assert len(room) > 6
    sources = {f"sources/{path.name}" for path in (ROOT / "scripts" / "sources").iterdir() if path.is_file()}
    others = {f"sources/{name}.py" for name in SOURCES}
    of_messages = {f"sources/messages_{part}.py" for part in ("columns", "forms", "hints", "records", "transcripts")}
    assert of_messages < sources
    for dataset in SOURCES:
        own = {f"sources/{dataset}.py"} | (of_messages if dataset == "messages" else set())
        assert names(dataset) == room | (sources - others - of_messages) | own
    assert "sources/filter_phrases.txt" in names("dolly15k")
    assert names("my_chats") == names("messages")


# ---- interrupted, at once, read-only ----


def fail_in_the_second_batch(monkeypatch, action) -> None:
    """Run `action` when one batch is written and the next is begun."""
    monkeypatch.setattr(mix_module, "ROWS_AT_A_TIME", 20)
    calls, record_batch = itertools.count(), mix_module.record_batch

    def interrupted(examples):
        if next(calls):
            action()
        return record_batch(examples)

    monkeypatch.setattr(mix_module, "record_batch", interrupted)


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_an_interrupted_preparation_leaves_nothing(make_recipe, tokenizer, monkeypatch, error):
    recipe = make_recipe(("dolly15k",))

    def fail():
        raise error

    with monkeypatch.context() as patch:
        fail_in_the_second_batch(patch, fail)
        with pytest.raises(type(error)):
            prepare_mix(recipe, tokenizer)
    assert not [path for path in (recipe.cache_dir / "prepared").iterdir() if path.is_dir()]

    mix = prepare_mix(recipe, tokenizer)
    assert contents(mix) == contents(prepare_mix(make_recipe(("dolly15k",), {"cache_dir": "fresh"}), tokenizer))


def prepare_and_be_killed(recipe: Recipe) -> None:
    """In a process of its own."""
    fail_in_the_second_batch(pytest.MonkeyPatch(), lambda: os.kill(os.getpid(), signal.SIGKILL))
    prepare_mix(recipe, load_tokenizer())


def test_a_killed_preparation_is_not_taken_for_whole(make_recipe, tokenizer):
    recipe = make_recipe(("dolly15k",))
    with pytest.raises(RuntimeError, match=f"it died with {-signal.SIGKILL}$"):
        call_forked(prepare_and_be_killed, recipe)
    (leftover,) = (path for path in (recipe.cache_dir / "prepared").iterdir() if path.is_dir())
    assert (leftover / "examples.arrow").exists()
    assert folders(recipe) == set()

    mix = prepare_mix(recipe, tokenizer)
    assert len(folders(recipe)) == 1
    assert not leftover.exists()
    assert contents(mix) == contents(prepare_mix(make_recipe(("dolly15k",), {"cache_dir": "fresh"}), tokenizer))


def prepare_together(recipe: Recipe, barrier) -> tuple[list[str], Any]:
    """In one of several processes: what was prepared here, and what the mix holds."""
    prepared, prepare = [], mix_module._prepare

    def counted(folder, name, *rest):
        prepared.append(name)
        prepare(folder, name, *rest)

    mix_module._prepare = counted
    tokenizer = load_tokenizer()
    barrier.wait(120)
    return prepared, contents(prepare_mix(recipe, tokenizer))


def test_two_starts_at_once_prepare_once_and_read_the_same(make_recipe, tokenizer):
    recipe = make_recipe()
    barrier = CONTEXT.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        starts = [pool.submit(call_forked, prepare_together, recipe, barrier) for _ in range(2)]
    (prepared, mine), (also_prepared, theirs) = (start.result() for start in starts)
    assert sorted(prepared + also_prepared) == sorted(recipe.datasets.chosen())
    assert mine == theirs == contents(prepare_mix(recipe, tokenizer))


@pytest.mark.parametrize("read_only", ["", "prepared"])
def test_a_read_only_cache_dir_falls_back_to_the_working_directory(make_recipe, tokenizer, tmp_path, read_only):
    recipe = make_recipe(("dolly15k",))
    folder = recipe.cache_dir / read_only
    folder.mkdir(parents=True)
    folder.chmod(0o555)
    try:
        assert prepared_folder(recipe) == Path(".cache") / "prepared"
        mix = prepare_mix(recipe, tokenizer)
    finally:
        folder.chmod(0o755)
    assert len(mix.train) > 0
    assert stamps(tmp_path / ".cache")
    assert not stamps(recipe.cache_dir)


def test_a_cache_dir_that_is_a_file_is_the_users_error(make_recipe, tokenizer, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match="cache_dir"):
        prepare_mix(make_recipe(("dolly15k",)), tokenizer)


def test_others_may_read_the_cache(make_recipe, tokenizer):
    recipe = make_recipe(("dolly15k",))
    before = os.umask(0o022)
    try:
        prepare_mix(recipe, tokenizer)
    finally:
        os.umask(before)
    (folder,) = (recipe.cache_dir / "prepared" / name for name in folders(recipe))
    assert folder.stat().st_mode & 0o777 == 0o755
