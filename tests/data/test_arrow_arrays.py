"""Arrow arrays from buffers: what pyarrow itself makes of the same values, and back, from any slice."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from data.arrow_arrays import booleans, integers, numbers, starts_of, texts

slices = st.tuples(st.integers(0, 40), st.integers(0, 40))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_texts(values):
    assert texts(values).equals(pa.array(values, pa.string()))


@given(st.lists(st.integers(-(2**31), 2**31 - 1)), st.sampled_from([np.int32, np.int64]), slices)
def test_integers_there_and_back(values, dtype, part):
    array = numbers(np.array(values, dtype=dtype))
    assert array.equals(pa.array(values, pa.from_numpy_dtype(dtype)))
    found = integers(array.slice(*part))
    assert found.dtype == dtype
    assert found.tolist() == values[part[0] :][: part[1]]


@given(st.lists(st.booleans()), slices)
def test_booleans_there_and_back(values, part):
    array = numbers(np.array(values, dtype=bool))
    assert array.equals(pa.array(values, pa.bool_()))
    found = booleans(array.slice(*part))
    assert found.dtype == bool
    assert found.tolist() == values[part[0] :][: part[1]]


def test_what_does_not_fit_is_an_error_not_another_number():
    assert starts_of([3, 4], np.int32).tolist() == [0, 3, 7]
    with pytest.raises(OverflowError):
        starts_of([2**30, 2**30], np.int32)


def test_preparing_and_reading_import_no_pandas(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'scripts')\n"
        "from recipe.load import load_recipe\n"
        "from data.mix import prepare_mix\n"
        "from training.model import load_tokenizer\n"
        f"recipe = load_recipe('recipes/demo.yaml', {{'cache_dir': {str(tmp_path)!r}}})\n"
        "for _ in range(2):\n"
        "    mix = prepare_mix(recipe, load_tokenizer(recipe))\n"
        "    assert len(mix.train.tokens(5)[0]) == mix.train.lengths[5]\n"
        "assert 'pandas' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
