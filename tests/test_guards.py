"""Look-alikes across splits and further looks at the test split: counted as they are, and said in the report."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tests.finished_study import fields, make, write_dataset
from tests.stages.test_report import fake_data

from medssl.guards import foreign_look_alikes, further_looks, look_alikes, near_across
from medssl.results import build_report
from medssl.stages.report import render
from medssl.store import open_store


def index(*rows: tuple[str, str, int]) -> pd.DataFrame:
    """Split, content and perceptual hash of each image."""
    return pd.DataFrame([(split, sha, f"{phash:016x}") for split, sha, phash in rows], columns=["split", "sha256", "phash"])


def test_look_alikes_are_counted_across_splits_only() -> None:
    images = index(
        ("train", "a", 0), ("test", "b", 0b11), ("test", "c", 0b1111),  # c is like b, b like a
        ("test", "d", 0xFF00), ("test", "e", 0xFF01),  # like each other only
        ("val", "f", 0xFFFFFFFF), ("test", "f", 0xFFFFFFFF), ("train", "g", 0xFF0000000000),
    )  # fmt: skip
    test, alone = np.flatnonzero(images["split"] == "test"), images[images["split"] == "test"].reset_index(drop=True)
    assert look_alikes(images, "test", test) == (1, 3)
    assert look_alikes(images, "test", test[:-1]) == (0, 2)  # one that is not judged, for want of a label
    assert look_alikes(images, "val", np.array([5])) == (1, 1)
    assert look_alikes(alone, "test", np.arange(len(alone))) == (0, 0)


def test_hashes_near_across() -> None:
    def hashes(*values: int) -> list[str]:
        return [f"{value:016x}" for value in values]

    these, those = hashes(0b11, 0xFF00, 0xFF01, 0xF0F0F0F000), hashes(0, 0xF0F0F0F000, 0x123456789ABCDEF)
    assert near_across(these, those) == 2
    assert near_across(these, []) == near_across([], those) == 0


def test_other_datasets_with_look_alikes_are_a_caution(tmp_path: Path) -> None:
    """Grey pictures that differ in blue alone: no two files are equal, all look alike."""
    for name in ("away", "fresh"):
        (tmp_path / name).mkdir()
        place = open_store(str(tmp_path / "store"), create=True).sub(f"datasets/{name}")
        write_dataset(tmp_path / name, place, blue={"away": 90, "fresh": 150}[name])
    learner = {
        "name": "bt", "objective": {"name": "barlow_twins", "projector": [8, 8]}, "epochs": 1, "batch_size": 8,
        "mix": [{"dataset": "datasets/away"}],
    }  # fmt: skip
    arms, shifted = fields()["arms"], [{"name": "there", "dataset": "datasets/fresh"}]
    changes = {"arms": [*arms, learner], "shifted": shifted, "protocols": fields()["protocols"][:1]}
    said = foreign_look_alikes(make(tmp_path, changes, evaluated=False))
    assert len(said) == 2
    assert "judged images of 40 look nearly like images of squares, which a pretraining was shown" in said[0]
    assert "of the shifted set there look nearly like images of the study" in said[1]
    assert foreign_look_alikes(make(tmp_path)) == []


def test_allowed_leaks_are_red_and_nobody_is_called_unseen() -> None:
    plain = fake_data()
    assert 'class="box leak"' not in render(plain)["report.html"].decode()
    assert "none of whom is among the training images" in render(plain)["report.md"].decode()
    leaking = dataclasses.replace(plain, leaks=["The images of split test were used in the pretraining of barlow_twins."])
    html, text = (render(leaking)[f"report.{kind}"].decode() for kind in ("html", "md"))
    assert '<div class="box leak" role="note"><p><strong>Leakage.</strong> The images of split test' in html
    assert "none of whom" not in text
    facts = dataclasses.replace(plain.datasets[0], leakage_allowed=True, leakage_patients=3)
    html = render(dataclasses.replace(plain, datasets=[facts]))["report.html"].decode()
    assert re.search(r'class="box leak".*3 patients with images in two splits, allowed', html)


@pytest.mark.parametrize(("copies", "alike", "said"), [(0, 0, False), (0, 15, False), (0, 16, True), (1, 1, True)])
def test_copies_and_many_look_alikes_are_a_caution_and_few_are_counted(copies: int, alike: int, said: bool) -> None:
    plain = fake_data()
    facts = dataclasses.replace(plain.datasets[0], copies=copies, look_alikes=alike)
    assert 1500 < facts.judged_images < 1510
    text = render(dataclasses.replace(plain, datasets=[facts]))["report.md"].decode()
    assert f"| judged images with a look-alike in other splits | {alike} ({copies} copies) |" in text
    assert ("nearly like images of other splits" in text) == said


def test_evaluations_of_other_recipes_on_the_same_test_images_are_further_looks(tmp_path: Path) -> None:
    study = make(tmp_path)
    assert further_looks(study) == 0
    assert "further evaluation" not in build_report(study).to_text()
    fewer = {"repeats": {"pretraining_seeds": 1, "label_draws": 1, "labels": 12}}
    make(tmp_path, fewer)  # part of the first: the same evaluations
    study.refresh()
    assert further_looks(study) == 0
    other = make(tmp_path, fewer | {"repeats": fewer["repeats"] | {"labels": 16}})
    study.refresh()
    own = sum(len(study.evaluations(cell) or {}) for cell in study.specs.cells())
    new = sum(len(other.evaluations(cell) or {}) for cell in other.specs.cells())
    assert own == 7 and new == 5 and further_looks(study) == 5 and further_looks(other) == 7
    build_report(study)
    text = study.store.read("studies/finished/report.md").decode()
    assert "The test images were judged by 5 further evaluations in this store" in text
    assert further_looks(make(tmp_path, {"evaluation_split": "val"})) == 0
