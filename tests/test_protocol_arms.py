"""Protocols that judge some of the arms, and protocols written as a matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests import finished_study

from medssl.errors import RecipeError
from medssl.recipe_file import load
from medssl.study import report

CLAIM = {"better": "random", "than": "colour", "protocol": "probe"}
PROBE, TUNE = finished_study.fields()["protocols"]


def test_a_protocol_judges_the_arms_it_names(tmp_path: Path) -> None:
    other = TUNE | {"name": "other", "kind": "linear_probe", "arms": ["colour"]}
    study = finished_study.make(tmp_path, {"protocols": [PROBE, other]})
    cells = [(cell.protocol.name, cell.arm.name, cell.pretraining_seed) for cell in study.specs.cells()]
    assert cells == [("probe", "random", 0), ("probe", "random", 1), ("probe", "colour", 0), ("other", "colour", 0)]
    assert {line.label.split(":")[0].split(",")[0] for line in study.plan() if line.stage == "evaluate"} == {
        "probe of random", "probe of colour", "other of colour"
    }  # fmt: skip
    result = report(study.recipe, study.store)
    judged = set(zip(result.summary["protocol"], result.summary["arm"], strict=True))
    assert judged == {("probe", "random"), ("probe", "colour"), ("other", "colour")}


def test_a_search_is_made_for_these_arms_alone(tmp_path: Path) -> None:
    searched = PROBE | {"name": "searched", "arms": ["colour"], "search": {"learning_rate": [0.1, 0.01]}}
    study = finished_study.make(tmp_path, {"protocols": [PROBE]})
    fields = finished_study.fields(protocols=[PROBE, searched])
    made = type(study)(load(fields), study.store)
    assert [(arm.name, protocol.name) for arm, protocol in made.searches()] == [("colour", "searched")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocols": [PROBE | {"arms": ["randon"]}]}, r"judges arm 'randon': .*random"),
        ({"protocols": [PROBE | {"arms": []}]}, "arms"),
        ({"protocols": [PROBE | {"arms": ["colour"]}], "comparisons": [CLAIM]}, r"does not judge arm 'random': .*colour"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load(finished_study.fields(**changes))


def test_a_matrix_of_protocols() -> None:
    written = TUNE | {"matrix": {"epochs": [40, 80]}, "name": "tune_{epochs}", "training": {"epochs": "{epochs}"}}
    found = load(finished_study.fields(protocols=[written])).protocols
    assert [(p.name, p.training.epochs) for p in found] == [("tune_40", 40), ("tune_80", 80)]  # type: ignore[union-attr]
