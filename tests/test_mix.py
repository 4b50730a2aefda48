"""Preparation and its cache: read when nothing changed, made anew when anything did, never half, never twice."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT
from transformers import AutoTokenizer

from utils import mix as mix_module
from utils.data_files import find_data_file
from utils.dialogue import encode, prepare_tokenizer
from utils.errors import UserError
from utils.mix import prepare_mix, prepared_folder
from utils.recipe import Recipe
from utils.sources import SOURCES, load_source

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
        values = yaml.safe_load(DEMO.read_text()) | {"cache_dir": str(tmp_path / "cache")} | (keys or {})
        chosen = {}
        for entry in values["datasets"]:
            ((name, own),) = entry.items()
            if not names or name in names:
                path = tmp_path / "data" / Path(own["input_file_path"]).name
                chosen[name] = own | {"input_file_path": str(path)} | options.get(name, {})
        return Recipe.model_validate(values | {"datasets": [{name: own} for name, own in chosen.items()]})

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
    for split_name, split in (("train", mix.train), ("validation", mix.validation)):
        row = 0
        for index, (name, options) in enumerate(recipe.datasets.chosen().items()):
            paths = find_data_file(name, options.input_file_path, recipe.cache_dir, None, SOURCES[name].hub)
            conversations = getattr(load_source(name, options, paths, recipe.rng_seed), split_name)
            assert conversations
            for conversation, (ids, scored) in zip(
                conversations, encode(tokenizer, conversations, seed=recipe.rng_seed), strict=True
            ):
                found_ids, found_scored = split.tokens(row)
                assert (found_ids.dtype, found_scored.dtype) == (np.int32, bool)
                assert found_ids.tolist() == ids.tolist()
                assert found_scored.tolist() == scored.tolist()
                assert split.messages(row) == conversation.as_dicts()
                assert split.dataset[row] == index
                assert split.lengths[row] == len(ids)
                assert split.targets[row] == scored.sum() > 0
                row += 1
        assert row == len(split) == len(split.dataset) == len(split.lengths) == len(split.targets)


def test_a_split_spans_more_than_one_record_batch(make_recipe, tokenizer, monkeypatch):
    expected = contents(prepare_mix(make_recipe(("dolly15k", "vicuna")), tokenizer))
    monkeypatch.setattr(mix_module, "ROWS_AT_A_TIME", 7)
    again = make_recipe(("dolly15k", "vicuna"), {"cache_dir": "other"})
    assert contents(prepare_mix(again, tokenizer)) == expected


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
    assert len(written) == 10  # five data sets, two splits

    monkeypatch.setattr(mix_module, "load_source", None)  # nobody reads the sources again
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
    for module in (mix_module, mix_module.sources, mix_module.dialogue, mix_module.data_files):
        copy = tmp_path / Path(module.__file__).name
        copy.write_text(Path(module.__file__).read_text() + "\n# changed\n")
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(copy))
            count = len(folders(recipe))
            prepare_mix(recipe, tokenizer)
            assert len(folders(recipe)) == count + 1, module.__name__


# ---- interrupted, at once, read-only ----


def fail_in_the_second_split(monkeypatch, action) -> None:
    """Run `action` when the training split is written and the validation split is begun."""
    calls, record_batch = itertools.count(), mix_module._record_batch

    def interrupted(examples):
        if next(calls):
            action()
        return record_batch(examples)

    monkeypatch.setattr(mix_module, "_record_batch", interrupted)


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_an_interrupted_preparation_leaves_nothing(make_recipe, tokenizer, monkeypatch, error):
    recipe = make_recipe(("dolly15k",))

    def fail():
        raise error

    with monkeypatch.context() as patch:
        fail_in_the_second_split(patch, fail)
        with pytest.raises(type(error)):
            prepare_mix(recipe, tokenizer)
    assert not [path for path in (recipe.cache_dir / "prepared").iterdir() if path.is_dir()]

    mix = prepare_mix(recipe, tokenizer)
    assert contents(mix) == contents(prepare_mix(make_recipe(("dolly15k",), {"cache_dir": "fresh"}), tokenizer))


def prepare_and_be_killed(recipe: Recipe) -> None:
    """For a process of its own."""
    fail_in_the_second_split(pytest.MonkeyPatch(), lambda: os.kill(os.getpid(), signal.SIGKILL))
    prepare_mix(recipe, load_tokenizer())


def test_a_killed_preparation_is_not_taken_for_whole(make_recipe, tokenizer):
    recipe = make_recipe(("dolly15k",))
    process = multiprocessing.get_context("spawn").Process(target=prepare_and_be_killed, args=(recipe,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (leftover,) = (path for path in (recipe.cache_dir / "prepared").iterdir() if path.is_dir())
    assert (leftover / "train.arrow").exists()
    assert folders(recipe) == set()

    mix = prepare_mix(recipe, tokenizer)
    assert len(folders(recipe)) == 1
    assert not leftover.exists()
    assert contents(mix) == contents(prepare_mix(make_recipe(("dolly15k",), {"cache_dir": "fresh"}), tokenizer))


def prepare_together(recipe: Recipe, barrier, answers) -> None:
    """For one of several processes: report what was prepared here and what the mix holds."""
    prepared, prepare = [], mix_module._prepare

    def counted(folder, name, *rest):
        prepared.append(name)
        prepare(folder, name, *rest)

    mix_module._prepare = counted
    tokenizer = load_tokenizer()
    barrier.wait()
    answers.put((prepared, contents(prepare_mix(recipe, tokenizer))))


def test_two_starts_at_once_prepare_once_and_read_the_same(make_recipe, tokenizer):
    recipe = make_recipe()
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.Queue()
    processes = [context.Process(target=prepare_together, args=(recipe, barrier, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    (prepared, mine), (also_prepared, theirs) = answers.get(timeout=120), answers.get(timeout=120)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
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
