"""Arms that start from another arm's encoder: what a chain must keep to, and how it is named and planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests import finished_study

from medssl.errors import RecipeError
from medssl.recipe import Recipe
from medssl.recipe_file import load
from medssl.stages.model_card import data_facts
from medssl.stages.report_facts import arm_facts

TWINS = {"objective": {"name": "barlow_twins", "projector": [8, 8]}, "epochs": 1, "batch_size": 8}


def recipe(*arms: dict[str, Any], **changes: Any) -> Recipe:
    return load(finished_study.fields(arms=list(arms), **changes))


def chain(**changes: Any) -> dict[str, Any]:
    return TWINS | {"name": "second", "initial_weights": "arm:first"} | changes


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ([chain(initial_weights="arm:fist"), TWINS | {"name": "first"}], "there is no such arm: .*first"),
        ([chain(), chain(name="first", initial_weights="arm:second")], "in the end from itself: second from first from second"),
        ([chain(initial_weights="arm:second")], "in the end from itself"),
        ([{"name": "second", "initial_weights": "arm:first"}, TWINS | {"name": "first"}], "is the same encoder"),
        ([{"name": "second", "initial_weights": "arm:third"}, {"name": "third", "features": "colour"}], "has no network"),
        ([chain(), {"name": "first", "features": "colour"}], "has no network"),
        ([chain(encoder={"name": "resnet18"}), TWINS | {"name": "first"}], "whose encoder is test_resnet"),
        ([chain(pretraining_seeds=3), TWINS | {"name": "first", "pretraining_seeds": 2}], "2 pretraining seeds for its 3"),
        ([TWINS | {"name": "s", "objective": {"name": "supervised"}}], "is on labels of other datasets"),
        (
            [TWINS | {"name": "s", "objective": {"name": "supervised"}, "mix": [{"dataset": "datasets/x"}], "pairs": "bag"}],
            "is on labels of other datasets",
        ),
    ],
)
def test_chains_that_are_refused(arms: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(*arms)


def test_what_a_chain_is_named_by(tmp_path: Path) -> None:
    arms = [chain(further={"head_only_epochs": 1}), TWINS | {"name": "first"}]
    study = finished_study.make(tmp_path, {"arms": [{"name": "random"}]})
    specs = type(study.specs)(recipe(*arms), study.specs.index, study.specs.classes, {})
    second, first = specs.recipe.arms
    assert [specs.recipe.generation(arm) for arm in (second, first)] == [1, 0]
    for seed in (0, 1):
        mine, theirs = specs.encoder(second, seed), specs.encoder(first, seed)
        assert mine is not None and theirs is not None and mine.inputs["initial_weights"] == theirs.name
    longer = type(specs)(recipe(arms[0], arms[1] | {"epochs": 2}), study.specs.index, study.specs.classes, {})
    changed, before = longer.encoder(longer.recipe.arms[0], 0), specs.encoder(second, 0)
    assert changed is not None and before is not None and changed.name != before.name, "another start is another encoder"
    one = type(specs)(recipe(arms[0], arms[1] | {"pretraining_seeds": 1}), study.specs.index, study.specs.classes, {})
    starts = {spec.inputs["initial_weights"] for seed in (0, 1) if (spec := one.encoder(one.recipe.arms[0], seed)) is not None}
    assert len(starts) == 1, "one start for all seeds"


def test_a_mix_of_some_classes_shows_these_alone(tmp_path: Path) -> None:
    study = finished_study.make(tmp_path, {"arms": [{"name": "random"}]})
    mix = [{"classes": ["a"]}, {"classes": ["b"], "times": 3}]
    specs = type(study.specs)(recipe(TWINS | {"name": "first", "mix": mix}), study.specs.index, study.specs.classes, {})
    parts = specs.mix(specs.recipe.arms[0])
    assert [set(part.index.loc[part.rows, "label"]) for part in parts] == [{"a"}, {"b"}] and [p.times for p in parts] == [1, 3]
    with pytest.raises(RecipeError, match="names split 'train' of the study's dataset twice"):
        recipe(TWINS | {"name": "first", "mix": [{"classes": ["a"]}, {"classes": ["a", "b"]}]})
    for whole in ([{"classes": ["a"]}, {}], [{}, {"classes": ["a"], "splits": ["val", "train"]}]):
        with pytest.raises(RecipeError, match="names split 'train' of the study's dataset twice"):
            recipe(TWINS | {"name": "first", "mix": whole})


@pytest.mark.parametrize(
    ("changes", "renamed"),
    [
        ({"mix": [{"classes": ["a"]}]}, {"streaming"}),  # a stream once showed all classes
        ({"mix": [{"classes": ["a"]}, {"dataset": "datasets/x"}]}, {"streaming"}),
        ({"mix": [{}, {"dataset": "datasets/x"}]}, set()),
        ({}, set()),
        ({"mix": [{"classes": ["a"]}, {"classes": ["b"]}], "pairs": "bag"}, {"resident"}),  # each part's bags were its own
        ({"mix": [{}, {"dataset": "datasets/x"}], "pairs": "bag"}, set()),
    ],
)
def test_what_was_once_shown_otherwise_is_made_anew(tmp_path: Path, changes: dict[str, Any], renamed: set[str]) -> None:
    study = finished_study.make(tmp_path, {"arms": [{"name": "random"}]})
    index = study.specs.index
    for feeding in ("resident",) if "pairs" in changes else ("resident", "streaming"):
        made = recipe(TWINS | {"name": "first"} | changes, images={"decode_px": 32, "feeding": feeding})
        specs = type(study.specs)(made, index, study.specs.classes, {}, others={"datasets/x": index})
        spec = specs.encoder(made.arms[0], 0)
        assert spec is not None and bool({"streamed", "told_apart"} & set(spec.inputs)) is (feeding in renamed)


def test_an_encoder_at_another_size_has_the_seeds_of_the_one_it_is(tmp_path: Path) -> None:
    study = finished_study.make(tmp_path, {"arms": [{"name": "random"}]})
    larger = {"name": "larger", "initial_weights": "arm:first", "encoder": {"name": "test_resnet", "image_px": 40}}
    specs = type(study.specs)(recipe(larger, TWINS | {"name": "first"}), study.specs.index, study.specs.classes, {})
    arm, parent = specs.recipe.arms
    assert list(specs.pretraining_seeds(arm)) == [0, 1]
    for seed in (0, 1):
        spec, start = specs.encoder(arm, seed), specs.encoder(parent, seed)
        assert spec is not None and start is not None
        assert spec.stage == "initialise" and spec.inputs["initial_weights"] == start.name


@pytest.mark.parametrize(
    ("seeds", "last", "asked", "words"),
    [
        ({"pretraining_seeds": 2}, 3, 3, "starts from arm:larger, which has 2 pretraining seeds for its 3"),
        ({"pretraining_seeds": 2}, None, 2, None),
        ({"pretraining_seeds": 1}, 3, 3, None),
        ({}, None, 3, None),
        ({"initial_weights": "timm", "objective": None, "epochs": None}, None, 3, None),
    ],
    ids=["fewer seeds", "as many seeds", "one start", "seeds of the recipe", "given weights"],
)
def test_an_arm_that_pretrains_nothing_has_the_seeds_of_its_parent(
    tmp_path: Path, seeds: dict[str, Any], last: int | None, asked: int, words: str | None
) -> None:
    """Of a chain of three, the one in the middle gives the last as many starts as the first has, whatever its own field says."""
    larger = {"name": "larger", "initial_weights": "arm:first", "encoder": {"name": "test_resnet", "image_px": 40}}
    chosen = {key: value for key, value in (TWINS | {"name": "first"} | seeds).items() if value is not None}
    third = chain(initial_weights="arm:larger", encoder=larger["encoder"], **({"pretraining_seeds": last} if last else {}))
    repeats = {"pretraining_seeds": asked, "label_draws": 1, "labels": 12}
    for own in ({}, {"pretraining_seeds": 2}):
        arms = [third, larger | own, chosen]
        if words is not None:
            with pytest.raises(RecipeError, match=words):
                recipe(*arms, repeats=repeats)
            continue
        made = recipe(*arms, repeats=repeats)
        study = finished_study.make(tmp_path, {"arms": [{"name": "random"}]}, evaluated=False)
        specs = type(study.specs)(made, study.specs.index, study.specs.classes, {"first": "digest of the given weights"})
        arm, middle, first = made.arms
        assert specs.pretraining_seeds(middle) == specs.pretraining_seeds(first)
        starts = [specs.parent_seed(middle, seed) for seed in specs.pretraining_seeds(arm)]
        assert len(starts) == asked and (len(set(starts)) in (1, asked)), "all from one, or each from its own"


def test_a_size_more_of_an_arm_with_other_seeds_than_the_recipe_says() -> None:
    larger = {"name": "larger", "initial_weights": "arm:first", "encoder": {"name": "test_resnet", "image_px": 40}}
    repeats = {"pretraining_seeds": 3, "label_draws": 1, "labels": 12}
    made = recipe(larger, TWINS | {"name": "first", "pretraining_seeds": 2}, repeats=repeats)
    assert [made.seeds_of(arm) for arm in made.arms] == [2, 2]
    with pytest.raises(RecipeError, match="arm 'larger' starts from arm:first, which has 2 pretraining seeds for its 3"):
        recipe(larger | {"pretraining_seeds": 3}, TWINS | {"name": "first", "pretraining_seeds": 2}, repeats=repeats)


def test_reports_and_cards_say_which_classes_were_shown(tmp_path: Path) -> None:
    study = finished_study.make(tmp_path, {"arms": [{"name": "random"}]})
    made = recipe(TWINS | {"name": "first", "mix": [{"classes": ["a"], "splits": ["train", "val"]}]})
    (arm,) = made.arms
    assert "1 x the dataset (train, val; a alone)" in arm_facts(made, arm).description
    (facts,) = data_facts(study.store, made, arm, None)
    index = study.specs.index
    shown = int((index["split"].isin(["train", "val"]) & (index["label"] == "a")).sum())
    assert facts.role.startswith(f"{shown} images of split train, val; a alone, of {len(index)} in all")
