"""What `medssl plan` says of stages that several arms or protocols share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import finished_study

from medssl.leftovers import needs
from medssl.stages.specs import Spec
from medssl.study import Study


def test_a_stage_that_arms_or_protocols_share_is_listed_once_with_its_users(tmp_path: Path) -> None:
    fixed = {"learning_rate": [0.01], "weight_decay": [0.0]}
    probe = {"kind": "linear_probe", "head_seeds": 1, "probe": {"vary": ["head"]}, "search": fixed}
    arms = [{"name": "random"}, {"name": "again"}, {"name": "colour", "features": "colour"}]
    protocols = [probe | {"name": "probe"}, {"name": "knn", "kind": "knn", "probe": {"k": 3}}]
    repeats = {"pretraining_seeds": 2, "labels": 12}
    study = finished_study.make(tmp_path, {"arms": arms, "protocols": protocols, "repeats": repeats})
    lines = study.plan()
    encoders = [line for line in lines if line.stage == "initialise"]
    assert [(line.label, line.users) for line in encoders] == [(f"initialise random seed {seed}", 2) for seed in (0, 1)]
    features = {line.label: line.users for line in lines if line.stage == "embed"}
    assert features == {f"embed {arm} seed {s}": 2 for arm in ("random", "again") for s in (0, 1)} | {"embed colour seed 0": 2}
    assert len({line.label for line in lines}) == len(lines)


def tuned(kept: str, seeds: int = 2) -> dict[str, Any]:
    search = {"learning_rate": [0.01, 0.1], "weight_decay": [0.0], "head_seeds": 1}
    protocol = {"name": "tune", "kind": "fine_tune", "head_seeds": seeds, "search": search, "training": {"keep_weights": kept}}
    repeats = {"pretraining_seeds": 1, "label_draws": 1, "labels": 12}
    return {"arms": [{"name": "random"}], "protocols": [protocol], "repeats": repeats}


def search_of(study: Study) -> Spec:
    ((arm, protocol),) = study.searches()
    search = study.search_spec(arm, protocol)
    assert search is not None
    return search


def finish_all(study: Study) -> set[str]:
    """Makes what is missing of searches and evaluations; its stages and head seeds."""
    made = set()
    search = search_of(study)
    if not study.is_finished(search):
        finished_study.finish(study, search, {"points.json": b"[]"}, {"best": {"learning_rate": 0.1, "weight_decay": 0.0}})
        made.add("search")
    (cell,) = study.specs.cells()
    pending = study.pending(cell)
    for seed, spec in (pending.specs if pending else {}).items():
        finished_study.evaluation(study, spec, seed, np.random.default_rng(seed))
        made.add(f"head seed {seed}")
    return made


@pytest.mark.parametrize(("before", "after"), [("first", "all"), ("all", "first")])
def test_which_weights_are_kept_changes_no_search_and_no_first_head_seed(tmp_path: Path, before: str, after: str) -> None:
    """A shifted set asks for keep_weights all: of a finished study that leaves the further head seeds to train again."""
    study = finished_study.make(tmp_path, tuned(before))
    assert finish_all(study) == {"search", "head seed 0", "head seed 1"}
    again = finished_study.make(tmp_path, tuned(after), evaluated=False)
    states = {line.stage: line.state for line in again.plan()}
    assert (states["search"], states["evaluate"]) == ("finished", "to do (1 of 2)")
    assert finish_all(again) == {"head seed 1"}
    assert {name for name in needs(again)[0] if name.startswith("search")} == {search_of(study).name}


def test_what_is_named_as_the_recipe_says_comes_first(tmp_path: Path) -> None:
    """Both were made once: each recipe goes on with its own, and names stay as they were."""
    first = finished_study.make(tmp_path, tuned("first"))
    both = finished_study.make(tmp_path, tuned("all"), evaluated=False)
    names = []
    for study in (both, first):
        assert finish_all(study) == {"search", "head seed 0", "head seed 1"}
        names.append(search_of(study).name)
    for study, name, other in ((both, *names), (first, *reversed(names))):
        study.refresh()
        assert study.is_finished_name(other) and search_of(study).name == name != other
