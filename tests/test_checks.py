"""What a study asks of its data, said in one line before anything is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tests.finished_study import fields
from tests.index_only import write_index

from medssl.cli import main
from medssl.errors import RecipeError
from medssl.metrics import UNKNOWN
from medssl.recipe_file import load
from medssl.stages.report_facts import neighbour_warnings
from medssl.store import open_store
from medssl.study import Study, plan

SPLITS = ["train"] * 24 + ["val"] * 8 + ["test"] * 8


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    ("labels", "splits", "words"),
    [
        (["a", "a", "b", "b"] * 8 + ["a"] * 8, SPLITS, "class 'b' has no labelled image in split 'test' of"),
        (["a", "a", "b", "b"] * 6 + ["a"] * 8 + ["a", "b"] * 4, SPLITS, "class 'b' has no labelled image in split 'val' of"),
        ([None] * 40, SPLITS, "has 0 classes; an evaluation needs two or more"),
        (["a"] * 40, SPLITS, "has 1 classes; an evaluation needs two or more"),
        (["a", "a", "b", "b"] * 10, ["train"] * 32 + ["test"] * 8, "has no images in split 'val'; its splits: test, train"),
        (["a", "a", "b", "b"] * 10, SPLITS, "labels is 500, but split 'train' has 24 labelled images"),
    ],
    ids=["class not in test", "class not in val", "no labels", "one class", "no val", "too many labels"],
)  # fmt: skip
def test_data_that_a_study_cannot_be_made_of(
    labels: list[str | None], splits: list[str], words: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(tmp_path / "store"), create=True)
    write_index(store.sub("datasets/squares"), labels, splits)
    before = {entry.key for entry in store.list()}
    repeats = fields()["repeats"] | ({"labels": 500} if "labels is 500" in words else {})
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(fields(repeats=repeats)))
    assert main([command, str(path), "--store", store.uri]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and said.out == ""
    assert {entry.key for entry in store.list()} == before


PRETRAINED = {"name": "simclr", "objective": {"name": "simclr", "projector": [8, 8]}, "epochs": 1}


def arm_with(batch_size: int, **changes: Any) -> dict[str, Any]:
    return fields(arms=[{"name": "random"}, PRETRAINED | {"batch_size": batch_size} | changes])


@pytest.mark.parametrize(("mix", "images"), [([], 24), ([{"times": 2}], 48), ([{"splits": ["train", "val"]}], 32)])
def test_a_batch_larger_than_an_epoch_is_refused_before_anything_is_made(
    mix: list[dict[str, Any]], images: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(tmp_path / "store"), create=True)
    write_index(store.sub("datasets/squares"), ["a", "a", "b", "b"] * 10, SPLITS)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(arm_with(images + 2, mix=mix)))
    assert main(["plan", str(path), "--store", store.uri]) == 2
    said = capsys.readouterr()
    assert f"arm 'simclr': batch_size {images + 2} is larger than the {images} images that an epoch of" in said.err
    assert said.err.count("\n") == 1 and said.out == ""
    assert plan(arm_with(images, mix=mix), store), "a batch of all images is one step"


def test_neighbours_are_counted_in_every_label_draw(tmp_path: Path) -> None:
    """Draws of findings are plain: one that is seldom mentioned is known of more images in one draw than in another."""
    splits = ["train"] * 160 + ["val"] * 20 + ["test"] * 20
    mentioned = np.random.default_rng(1).random(200) < 0.4
    mentioned[160:] = True
    further = {"edema": [n % 2 for n in range(200)], "mass": [n // 2 % 2 if known else None for n, known in enumerate(mentioned)]}
    store = open_store(str(tmp_path), create=True)
    write_index(store.sub("datasets/squares"), [None] * 200, splits, further)

    def recipe(k: int, **protocol: Any) -> dict[str, Any]:
        knn = {"name": "knn", "kind": "knn", "probe": {"k": k}} | protocol
        repeats = {"pretraining_seeds": 1, "label_draws": 3, "labels": 48}
        return fields(findings={"names": ["edema", "mass"]}, protocols=[knn], repeats=repeats)

    study = Study(load(recipe(1)), store)
    labels = [study.specs.labels(study.specs.draw(draw, study.recipe.protocols[0])) for draw in range(3)]
    known = [int((each[:, 1] != UNKNOWN).sum()) for each in labels]
    fewest = min(known)
    assert known[0] > fewest, known
    with pytest.raises(RecipeError) as caught:
        plan(recipe(fewest + 1), store)
    where = f"label draw {known.index(fewest)} has {fewest} images of which finding 'mass' is known"
    assert f"probe.k is {fewest + 1}, but {where}: use {fewest} or less" in str(caught.value)
    assert plan(recipe(fewest), store)
    assert plan(recipe(known[0], label_draws=1), store), "a protocol of one draw takes the first"

    rarest = [min(int((each[:, f] == side).sum()) for f in (0, 1) for side in (0, 1)) for each in labels]
    assert rarest[0] > min(rarest), rarest
    study = Study(load(recipe(min(rarest) + 1)), store)
    (said,) = neighbour_warnings(study.recipe, study.specs)
    assert f"k is {min(rarest) + 1}, but class" in said and f"has {min(rarest)} images" in said
    study = Study(load(recipe(min(rarest))), store)
    assert not neighbour_warnings(study.recipe, study.specs)
