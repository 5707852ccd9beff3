"""What a study asks of its data, said in one line before anything is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.finished_study import fields
from tests.index_only import write_index

from medssl.cli import main
from medssl.store import open_store
from medssl.study import plan

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
