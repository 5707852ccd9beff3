"""What `medssl plan` says of stages that several arms or protocols share."""

from __future__ import annotations

from pathlib import Path

from tests import finished_study


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
