"""Intervals against other computations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.intervals import interval, item_columns, paired_differences, resampled_sums, wilson
from evaluation.result_files import ResultFile


def ratio_interval(items, seed=0):
    drawn = resampled_sums(items, item_columns(items, ["loss", "targets"], {}), seed)
    return interval(drawn[:, 0] / drawn[:, 1])


def make_items(count, seed=0, **more):
    rng = np.random.default_rng(seed)
    return [{"loss": float(rng.gamma(2.0) * 9), "targets": 9, **more} for _ in range(count)]


def test_bootstrap_is_near_the_normal_interval():
    items = make_items(400)
    means = np.array([item["loss"] / 9 for item in items])
    half = 1.96 * means.std(ddof=1) / np.sqrt(len(means))
    low, high = ratio_interval(items)
    assert low == pytest.approx(means.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(means.mean() + half, abs=0.15 * half)
    assert ratio_interval(items) == (low, high)  # seeded


def test_items_of_one_group_are_drawn_together():
    """Each item four times over says no more than once, when it is said that they belong together."""
    items = [{**item, "group": f"tree {place}"} for place, item in enumerate(make_items(100))]
    once, together, apart = (
        np.subtract(*ratio_interval(chosen)[::-1])
        for chosen in (items, items * 4, [{**item, "group": str(n)} for n, item in enumerate(items * 4)])
    )
    assert together == pytest.approx(once, rel=0.1)
    assert apart == pytest.approx(once / 2, rel=0.15)
    weighted = [{**item, "times": 4} for item in items]
    assert np.subtract(*ratio_interval(weighted)[::-1]) == pytest.approx(once, rel=0.1)


def test_data_sets_are_resampled_each_by_itself():
    """Two data sets without spread inside have none together, however far apart they are."""
    items = [{"loss": 1.0, "targets": 1, "dataset": "a"}] * 20 + [{"loss": 5.0, "targets": 1, "dataset": "b"}] * 20
    assert ratio_interval(items) == (None, None)


@given(st.integers(1, 2000), st.floats(0, 1))
def test_wilson_holds_the_share(count, share):
    successes = round(count * share)
    low, high = wilson(successes, count)
    assert 0 <= low <= successes / count <= high <= 1
    assert low < high


def test_wilson_solves_its_equation():
    """Its ends are the shares p from which the observed one is 1.96 standard errors of p away."""
    for end in wilson(13, 40):
        assert abs(13 / 40 - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / 40))


def result(items, value, ratio=("loss", "targets"), where=None):
    entry = {"value": value, "ratio": list(ratio), "where": where or {}}
    items = {f"key {place}": item for place, item in enumerate(items)}
    return ResultFile(name="loss", checkpoint={"name": "x"}, results={"loss": entry}, items=items)


def test_paired_difference_of_equal_noise_is_sharp():
    first = make_items(200)
    other = [{**item, "loss": item["loss"] - 0.9} for item in first]  # 0.1 a token, exactly
    found = paired_differences(result(first, 2.0), result(other, 1.9))["loss"]
    assert found[0] == pytest.approx(-0.1)
    assert found[2] == 200
    bounds = [bound for bound in found[1] if bound is not None]
    assert bounds == pytest.approx([-0.1] * len(bounds), abs=1e-6)


def test_paired_difference_is_over_what_both_have():
    first, other = make_items(50), make_items(30, seed=1)
    difference, (low, high), items = paired_differences(result(first, 2.0), result(other, 2.0))["loss"]
    sums = [sum(item["loss"] for item in chosen[:30]) / 270 for chosen in (first, other)]
    assert difference == pytest.approx(sums[1] - sums[0])
    assert low < difference < high
    assert items == 30
    items = [{**item, "in_training": place % 2 == 0} for place, item in enumerate(first)]
    half = result(items, 2.0, where={"in_training": False})
    assert paired_differences(half, half)["loss"][2] == 25
    assert paired_differences(result(items, 2.0), half) == {}  # of other items
    assert paired_differences(result(first, 2.0), result([], 2.0)) == {}


def test_what_is_no_number_is_paired_with_nothing():
    """As the loss of a model that diverged; and numbers of which the sum is none."""
    for value in (None, 1e308):
        found = paired_differences(result(make_items(9), 2.0), result([{"loss": value, "targets": 9}] * 9, 2.0))
        assert not np.isfinite(found["loss"][0])
        assert found["loss"][1] == (None, None)
