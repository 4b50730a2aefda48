"""Prepared data that were damaged: made anew, with one line that says so, and the same as before."""

import json
import os
import random
import shutil

import numpy as np
import pytest
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from data import prepared
from data.mix import prepare_mix
from data.prepared import EXAMPLES, REPORT, SPLIT, open_prepared
from recipe.keys import Recipe
from training.model import load_tokenizer
from utils.errors import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A recipe of two data sets, its tokenizer, and the folder of their prepared data, which stays as it is."""
    root = tmp_path_factory.mktemp("whole")
    demo = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())
    chosen = [entry for entry in demo["datasets"] if set(entry) & {"dolly15k", "code_alpaca"}]
    for entry in chosen:
        (own,) = entry.values()
        own["input_file_path"] = str(ROOT / own["input_file_path"])
    model = {"model_name": str(ROOT / demo["model_name"]), "cache_dir": str(root), "datasets": chosen}
    recipe = Recipe.model_validate(demo | model)
    tokenizer = load_tokenizer(recipe)
    return recipe, tokenizer, contents(prepare_mix(recipe, tokenizer)), root / "prepared"


def contents(mix) -> list:
    return [mix.fingerprints, mix.reports] + [
        (*(part.tolist() for part in split.tokens(row)), split.messages(row), split.lengths[row], split.targets[row])
        for split in (mix.train, mix.validation)
        for row in range(len(split))
    ]


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def flip(path, share):
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 1
    path.write_bytes(content)


def edit_report(change):
    def damage(own, other):
        report = json.loads((own / REPORT).read_text())
        change(report)
        (own / REPORT).write_text(json.dumps(report))

    return damage


def save_split(change):
    return lambda own, other: np.save(own / SPLIT, change(np.load(own / SPLIT)))


def sealed_anew(change):
    """A split that is not of these examples, with checksums that fit."""

    def damage(own, other):
        report = json.loads((own / REPORT).read_text())["report"]
        np.save(own / SPLIT, change(np.load(own / SPLIT)))
        prepared.seal(own, own, report)

    return damage


def replaced(name, make):
    def damage(own, other):
        (own / name).unlink()
        make(own / name)

    return damage


def in_place_of_the_folder(make):
    def damage(own, other):
        shutil.rmtree(own)
        make(own, other)

    return damage


DAMAGES = {
    **{f"no {name}": lambda own, other, name=name: (own / name).unlink() for name in (EXAMPLES, SPLIT, REPORT)},
    **{f"empty {name}": lambda own, other, name=name: cut(own / name, 0) for name in (EXAMPLES, SPLIT, REPORT)},
    **{f"cut {name}": lambda own, other, name=name: cut(own / name, 0.9) for name in (EXAMPLES, SPLIT, REPORT)},
    **{f"one bit of {name}": lambda own, other, name=name: flip(own / name, 0.7) for name in (EXAMPLES, SPLIT, REPORT)},
    **{
        f"another's {name}": lambda own, other, name=name: shutil.copy(other / name, own / name)
        for name in (EXAMPLES, SPLIT, REPORT)
    },
    **{f"a folder {name}": replaced(name, lambda path: path.mkdir()) for name in (EXAMPLES, SPLIT, REPORT)},
    **{f"a pipe {name}": replaced(name, os.mkfifo) for name in (EXAMPLES, SPLIT, REPORT)},
    "10 of the split": save_split(lambda codes: codes[:10]),
    "all trained on": save_split(np.zeros_like),
    "reversed": save_split(lambda codes: codes[::-1]),
    "wide": save_split(lambda codes: codes.astype(np.int64)),
    "10, sealed": sealed_anew(lambda codes: codes[:10]),
    "3, sealed": sealed_anew(lambda codes: codes + 3),
    "no code, sealed": sealed_anew(lambda codes: codes.astype(float)),
    "pickled, sealed": sealed_anew(lambda codes: np.array([{}], dtype=object)),
    "another fingerprint": edit_report(lambda report: report["report"].update(fingerprint="0" * 20)),
    "a text for a count": edit_report(lambda report: report["report"].update(rows_read="5")),
    "less than none": edit_report(lambda report: report["report"].update(conversations=-5)),
    "no fields": edit_report(lambda report: report.clear()),
    "one more field": edit_report(lambda report: report.update(more=1)),
    "other files": edit_report(lambda report: report.update(files={})),
    "a list": lambda own, other: (own / REPORT).write_text("[]"),
    "brackets": lambda own, other: (own / REPORT).write_text("[" * 100_000),
    "no UTF-8": lambda own, other: (own / REPORT).write_bytes(b"\xff\xfe"),
    "another's folder": in_place_of_the_folder(lambda own, other: shutil.copytree(other, own)),
    "a file": in_place_of_the_folder(lambda own, other: own.write_text("")),
    "an empty folder": in_place_of_the_folder(lambda own, other: own.mkdir()),
    "a link to nothing": in_place_of_the_folder(lambda own, other: own.symlink_to("nothing")),
    "leftovers, too": lambda own, other: [cut(own / SPLIT, 0.5), own.with_name(f".{own.name}").write_text("")],
}


@pytest.fixture
def copy(whole, tmp_path):
    """Copies of the folders of two prepared data sets."""
    shutil.copytree(whole[3], tmp_path / "prepared")
    return [next((tmp_path / "prepared").glob(f"{name}-*[0-9a-f]")) for name in ("dolly15k", "code_alpaca")]


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_is_damaged_is_not_opened(copy, kind):
    DAMAGES[kind](*copy)
    with pytest.raises(UserError, match=rf"\A{copy[0]}[^\n]*\Z"):
        open_prepared(copy[0])


@pytest.mark.parametrize("kind", ["reversed", "another's folder", "a file", "a link to nothing", "leftovers, too"])
def test_what_is_damaged_is_made_anew_with_a_line(whole, copy, tmp_path, capsys, kind):
    recipe, tokenizer, expected, _ = whole
    DAMAGES[kind](*copy)
    recipe = recipe.model_copy(update={"cache_dir": tmp_path})
    assert contents(prepare_mix(recipe, tokenizer)) == expected
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["prepared", "prepared"]
    assert said[0].startswith(f"prepared data of dolly15k: {copy[0]}")
    assert said[0].endswith(": made anew")
    assert contents(prepare_mix(recipe, tokenizer)) == expected
    assert capsys.readouterr().out == ""


def test_what_cannot_be_removed_is_the_users_error(whole, copy, tmp_path, monkeypatch):
    recipe, tokenizer, *_ = whole
    cut(copy[0] / SPLIT, 0.5)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("data.mix.remove_tree", refuse)
    with pytest.raises(
        UserError, match=r"dolly15k-\w+: cannot be made anew: Permission denied: give another cache_dir"
    ):
        prepare_mix(recipe.model_copy(update={"cache_dir": tmp_path}), tokenizer)


def test_a_lock_that_cannot_be_had_is_the_users_error(whole, copy, tmp_path):
    recipe, tokenizer, *_ = whole
    cut(copy[0] / SPLIT, 0.5)
    lock = copy[0].with_name(f"{copy[0].name}.lock")
    lock.unlink()
    lock.mkdir()
    with pytest.raises(
        UserError,
        match=rf"\A{lock}: IsADirectoryError: [^\n]*: give a cache_dir on another "
        r"file system\Z",
    ):
        prepare_mix(recipe.model_copy(update={"cache_dir": tmp_path}), tokenizer)


# ---- any damage at all ----


def damaged(content: bytes, dice: random.Random) -> bytes:
    """Some of the bytes changed, gone, or put elsewhere."""
    first, last = sorted(dice.randrange(len(content) + 1) for _ in range(2))
    part = content[first:last]
    kinds = (
        lambda: content[:first],
        lambda: content[:first] + content[last:],
        lambda: content[:first] + bytes(len(part)) + content[last:],
        lambda: content[:first] + part[::-1] + content[last:],
        lambda: content[:first] + part * 2 + content[last:],
        lambda: content[:first] + bytes([dice.randrange(256)]) + content[first + 1 :],
        lambda: content[:first] + dice.randbytes(len(part)) + content[last:],
    )
    return dice.choice(kinds)()


def damage_and_open(folder, whole_files, expected, seed) -> None:
    """As undamaged, or one line."""
    dice = random.Random(seed)
    name = dice.choice([EXAMPLES, SPLIT, REPORT, REPORT])
    (folder / name).write_bytes(damaged(whole_files[name], dice))
    try:
        found = open_prepared(folder)
        outcome = found.table, found.codes.tolist(), found.report
    except UserError as error:
        outcome = str(error)
    assert outcome == expected or (isinstance(outcome, str) and "\n" not in outcome)
    (folder / name).write_bytes(whole_files[name])


@pytest.fixture
def opened(whole, tmp_path):
    """A folder of prepared data, the bytes of its files, and what they hold."""
    own = next(whole[3].glob("dolly15k-*[0-9a-f]"))
    folder = tmp_path / own.name
    shutil.copytree(own, folder)
    found = open_prepared(own)
    return (
        folder,
        {path.name: path.read_bytes() for path in own.iterdir()},
        (found.table, found.codes.tolist(), found.report),
    )


def test_any_damage_is_seen(opened):
    @settings(max_examples=150)
    @given(st.integers(0, 2**32))
    def one(seed):
        damage_and_open(*opened, seed)

    one()


@pytest.mark.fuzz
def test_any_damage_is_seen_in_thousands(opened):
    for seed in range(20_000):
        damage_and_open(*opened, seed)
