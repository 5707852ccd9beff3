"""What the comparisons of a study find, against the statistics called one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medssl import statistics
from medssl.claims import Planned
from medssl.comparing import Found, Runs, compare
from medssl.comparison import Comparison
from medssl.recipe import Recipe
from medssl.recipe_file import load
from medssl.stages.report_data import BOOTSTRAP, COLUMNS, EQUIVALENCE, NOT_REPORTED, SAME_AGAINST_SAME, WELCH

METRICS = ("balanced_accuracy", "accuracy")
LABELS = np.random.default_rng(0).integers(0, 3, size=90)
PATIENTS = [f"p{n // 2}" if n % 9 else None for n in range(90)]
CLAIMS = [
    {"better": "good", "than": "random", "protocol": "probe"},
    {"better": "good", "than": "colour", "protocol": "probe", "equivalence_margin": 0.3},
    {"better": "colour", "than": "random", "protocol": "probe", "metric": "accuracy", "equivalence_margin": 0.05},
]


def recipe(*comparisons: dict[str, Any]) -> Recipe:
    arms = [
        {"name": "good", "objective": {"name": "barlow_twins"}, "epochs": 1},
        {"name": "random"}, {"name": "colour", "features": "colour"},
    ]  # fmt: skip
    return load({
        "study": "s", "dataset": "d", "arms": arms, "protocols": [{"name": "probe", "kind": "linear_probe"}],
        "metrics": METRICS, "comparisons": list(comparisons), "bootstrap": {"replicates": 300, "seed": 4},
    })  # fmt: skip


def runs_of(arm: str, shape: tuple[int, int, int], skill: float, seed: int) -> Runs:
    logits = np.random.default_rng(seed).normal(size=(*shape, 90, 3)).astype(np.float32)
    logits[..., np.arange(90), LABELS] += skill
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    scores = {metric: statistics.run_scores(probabilities, LABELS, metric) for metric in METRICS}
    return Runs(arm, "probe", scores, probabilities, LABELS, PATIENTS)


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, str], Runs]:
    arms = [runs_of("good", (3, 2, 4), 1.6, 1), runs_of("random", (3, 2, 4), 1.2, 2), runs_of("colour", (1, 3, 4), 1.1, 3)]
    return {(arm.arm, arm.protocol): arm for arm in arms}


def row(found: Found, test: str, better: str, than: str) -> dict[str, Any]:
    [one] = [r for r in found.rows if (r["test"], r["better"], r["than"]) == (test, better, than)]
    return one


def test_rows_are_the_statistics_own(runs: dict[tuple[str, str], Runs]) -> None:
    found = compare(recipe(*CLAIMS), runs)
    assert {key for r in found.rows for key in r} <= set(COLUMNS["comparisons"])
    for claim in CLAIMS:
        first, second = runs[claim["better"], "probe"], runs[claim["than"], "probe"]
        metric = claim.get("metric", "balanced_accuracy")
        expected = statistics.nested_bootstrap(
            first.probabilities_PDSNK[:, :2], second.probabilities_PDSNK[:, :2], LABELS, PATIENTS,
            metric=metric, replicates=300, seed=4,
        )  # fmt: skip
        mine = row(found, BOOTSTRAP, claim["better"], claim["than"])
        for key in ("difference", "low", "high", "p"):
            assert mine[key] == getattr(expected, key)
        size = statistics.effect_size(first.metrics[metric][:, :2], second.metrics[metric][:, :2])
        assert (mine["effect_size"], mine["metric"], mine["planned"]) == (size, metric, None)
        papers = statistics.welch(first.metrics[metric][0, 0], second.metrics[metric][0, 0])
        assert row(found, WELCH, claim["better"], claim["than"])["p"] == papers.p
        if "equivalence_margin" in claim:
            same = statistics.nested_equivalence(expected, claim["equivalence_margin"], level=1 - 0.95)
            mine = row(found, EQUIVALENCE, claim["better"], claim["than"])
            assert (mine["p"], mine["low"], mine["high"], mine["margin"]) == (same.p, same.low, same.high, same.margin)
    same = [(r["than"], r["metric"]) for r in found.rows if r["test"] == SAME_AGAINST_SAME]
    assert same == [("random", "balanced_accuracy"), ("random", "accuracy")]


def test_everything_on_the_nested_bootstrap_is_one_family(runs: dict[tuple[str, str], Runs]) -> None:
    found = compare(recipe(*CLAIMS), runs)
    family = [r for r in found.rows if r["test"] in (BOOTSTRAP, EQUIVALENCE)]
    assert len(family) == 5
    assert [r["p_holm"] for r in family] == statistics.holm([r["p"] for r in family]).tolist()
    assert not any("p_holm" in r for r in found.rows if r not in family)
    alone = compare(recipe(CLAIMS[0]), runs)
    [one] = [r for r in alone.rows if r["test"] == BOOTSTRAP]
    assert one["p_holm"] == one["p"]


def test_claims_are_marked_by_the_first_list(runs: dict[tuple[str, str], Runs]) -> None:
    claims = [Comparison(**c) for c in CLAIMS]
    other = Comparison(better="random", than="colour", protocol="tune")
    narrow = claims[1].model_copy(update={"equivalence_margin": 0.01})
    planned = Planned((claims[0], narrow, other), "digest", 0)
    found = compare(recipe(*CLAIMS), runs, planned)
    marks = {(r["test"], r["better"], r["than"]): r["planned"] for r in found.rows if r["test"] != SAME_AGAINST_SAME}
    assert marks == {
        (BOOTSTRAP, "good", "random"): True, (WELCH, "good", "random"): True,
        (BOOTSTRAP, "good", "colour"): True, (WELCH, "good", "colour"): True, (EQUIVALENCE, "good", "colour"): False,
        (BOOTSTRAP, "colour", "random"): False, (WELCH, "colour", "random"): False, (EQUIVALENCE, "colour", "random"): False,
        (NOT_REPORTED, "good", "colour"): True, (NOT_REPORTED, "random", "colour"): True,
    }  # fmt: skip
    assert row(found, NOT_REPORTED, "good", "colour")["margin"] == 0.01
    assert row(found, NOT_REPORTED, "random", "colour")["protocol"] == "tune"
    assert all(r["planned"] is None for r in compare(recipe(*CLAIMS), runs).rows if r["test"] != SAME_AGAINST_SAME)
