"""Matrices of arms and comparisons: what they stand for, through the recipe that users write."""

from __future__ import annotations

from typing import Any

import pytest

from medssl.errors import RecipeError
from medssl.matrix import written_out
from medssl.recipe_file import load

OBJECTIVE = {"name": "barlow_twins", "projector": [32, 32]}


def recipe(**changes: Any) -> dict[str, Any]:
    matrix = {
        "start": {"random": {}, "sl": {"initial_weights": "timm"}},
        "data": {"i": {"mix": []}, "iu": {"mix": [{"times": 2}, {"dataset": "datasets/{data}"}]}},
        "batch_size": [16, 32],
    }
    arm = {
        "matrix": matrix, "except": [{"start": "random", "data": "iu"}], "name": "{start}_{data}_b{batch_size}",
        "objective": OBJECTIVE, "epochs": 2, "batch_size": "{batch_size}",
    }  # fmt: skip
    claim = {"matrix": {"b": [16, 32]}, "better": "sl_iu_b{b}", "than": "none", "protocol": "probe"}
    return {
        "study": "matrix", "dataset": "datasets/d", "arms": [arm, {"name": "none"}],
        "protocols": [{"name": "probe", "kind": "linear_probe"}], "comparisons": [claim],
    } | changes  # fmt: skip


def test_a_matrix_is_every_combination_but_the_excepted_ones() -> None:
    found = load(recipe())
    names = [f"{start}_b{size}" for start in ("random_i", "sl_i", "sl_iu") for size in (16, 32)]
    assert [arm.name for arm in found.arms] == [*names, "none"]
    by_name = {arm.name: arm for arm in found.arms}
    assert by_name["sl_iu_b32"].batch_size == 32 and by_name["random_i_b16"].batch_size == 16
    assert {arm.initial_weights for arm in found.arms if arm.name.startswith("sl")} == {"timm"}
    assert [(part.dataset, part.times) for part in by_name["sl_iu_b16"].mix] == [(None, 2), ("datasets/iu", 1)]
    assert [(c.better, c.than) for c in found.comparisons] == [("sl_iu_b16", "none"), ("sl_iu_b32", "none")]


def test_a_matrix_is_what_its_arms_are_when_written_out() -> None:
    """The same recipe, so the same artifacts."""
    whole = load(recipe())
    plain = recipe(arms=[arm.canonical() for arm in whole.arms], comparisons=[c.canonical() for c in whole.comparisons])
    assert load(plain) == whole


def test_nested_fields_of_an_axis_join_those_of_the_entry() -> None:
    arm = {
        "matrix": {"tau": {"cold": {"objective": {"temperature": 0.1}}, "warm": {"objective": {"temperature": 0.5}}}},
        "name": "simclr_{tau}", "objective": {"name": "simclr", "projector": [32, 16]}, "epochs": 1,
    }  # fmt: skip
    found = load(recipe(arms=[arm], comparisons=[]))
    assert [(a.name, a.objective.temperature, a.objective.projector) for a in found.arms] == [  # type: ignore[union-attr]
        ("simclr_cold", 0.1, (32, 16)), ("simclr_warm", 0.5, (32, 16)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matrix": {}}, "arms.0.matrix is {}: give an axis or more"),
        ({"matrix": {"batch_size": []}}, "axis 'batch_size' is []: give a list of different values"),
        ({"matrix": {"batch_size": [16, 16]}}, "axis 'batch_size' is [16, 16]: give a list of different values"),
        ({"matrix": {"start": {"sl": "timm"}}}, "'sl' of axis 'start' is 'timm': give the fields that it sets"),
        ({"matrix": {"b": [1]}, "except": [{"c": 1}]}, "except names axis 'c'"),
        ({"matrix": {"b": [1, 2]}, "except": [{"b": 3}]}, "except names '3' of axis 'b'"),
        ({"matrix": {"b": [1]}, "except": [{"b": 1}]}, "every combination is left out"),
        ({"matrix": {"b": [1, 2]}}, "two arms are named 'a'"),
        ({"except": [{"b": 1}]}, "arms.0.matrix is None: give an axis or more"),
    ],
)
def test_what_no_matrix_is_says_so_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as failed:
        load(recipe(arms=[{"name": "a"} | changes], comparisons=[]))
    assert message in str(failed.value) and "\n" not in str(failed.value)


def test_a_mix_for_every_arm_that_pretrains_and_has_none() -> None:
    mix = [{"splits": ["train", "val"]}]
    arms = [
        {"name": "a", "objective": {"name": "simclr"}}, {"name": "b", "objective": {"name": "simclr"}, "mix": [{}]}, {"name": "c"}
    ]  # fmt: skip
    found = written_out({"arms": arms, "pretraining_mix": mix})
    assert [arm.get("mix") for arm in found["arms"]] == [mix, [{}], None] and "pretraining_mix" not in found
