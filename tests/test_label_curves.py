"""Label curves: what a list of labels stands for, which images each point takes, and how the report draws them."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from medssl.datasets.draws import label_draw
from medssl.errors import DataError
from medssl.recipe import Recipe
from medssl.stages.report import render
from medssl.stages.report_data import ReportData
from medssl.stages.report_facts import label_curves
from medssl.stages.specs import Specs

COUNTS = {"a": 301, "b": 47, "c": 3}
INDEX = pd.DataFrame({
    "image_id": [f"image-{n}" for n in range(2 * sum(COUNTS.values()))],
    "label": 2 * [name for name, count in COUNTS.items() for _ in range(count)],
    "split": ["train"] * sum(COUNTS.values()) + ["test"] * sum(COUNTS.values()),
    "sha256": "",
    "patient_id": None,
})  # fmt: skip


def recipe(labels: Any = (0.1, 0.5, "all"), **changes: Any) -> Recipe:
    fields = {"study": "s", "dataset": "d", "arms": [{"name": "random"}, {"name": "colour", "features": "colour"}]}
    protocols = [{"name": "probe", "kind": "linear_probe", "labels": list(labels)}, {"name": "knn", "kind": "knn"}]
    return Recipe.model_validate(fields | {"protocols": protocols, "repeats": {"labels": 40, "label_draws": 3}} | changes)


def test_a_list_of_labels_is_a_protocol_at_each() -> None:
    claims = [{"better": "random", "than": "colour", "protocol": name} for name in ("probe", "knn")]
    found = recipe((0.1, 0.125, 200, "all"), comparisons=claims)
    assert [p.name for p in found.protocols] == ["probe_10pct", "probe_12.5pct", "probe_200", "probe_all", "knn"]
    assert [p.curve for p in found.protocols] == ["probe"] * 4 + [None]
    assert [c.protocol for c in found.comparisons] == ["probe_10pct", "probe_12.5pct", "probe_200", "probe_all", "knn"]
    assert [found.labels_of(p) for p in found.protocols] == [0.1, 0.125, 200, None, 40]
    assert [found.draws_of(p) for p in found.protocols] == [3, 3, 3, 1, 3]
    assert Recipe.model_validate(found.canonical()) == found


@pytest.mark.parametrize(
    ("labels", "words"),
    [([], "is an empty list"), ([0.1, 0.1001], "has 0.1 twice"), ([1.5], "less than 1"), ([1], "greater than or equal to 2")],
)
def test_lists_that_cannot_be_are_refused(labels: list[Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        recipe(labels)


def test_a_smaller_share_is_part_of_a_larger_one() -> None:
    for draw in range(3):
        taken = [set(label_draw(INDEX, labels=tenths / 10, draw=draw).tolist()) for tenths in range(1, 10)]
        assert all(small < large for small, large in pairwise(taken))
        for tenths, rows in enumerate(taken, 1):
            held = INDEX.loc[sorted(rows), "label"].value_counts().to_dict()
            assert held == {name: max(1, round(tenths / 10 * count)) for name, count in COUNTS.items()}
    first, second = (label_draw(INDEX, labels=0.1, draw=draw) for draw in (0, 1))
    assert set(first) != set(second) and len(first) == len(second)
    with pytest.raises(DataError, match=r"labels is 400, but split 'train' has 351"):
        label_draw(INDEX, labels=400, draw=0)


def test_each_protocol_has_its_draws() -> None:
    specs = Specs(recipe(), INDEX, list(COUNTS))
    sizes = [len(specs.draw(0, protocol)) for protocol in specs.recipe.protocols]
    assert sizes == [30 + 5 + 1, 150 + 24 + 2, 351, 40] and len(specs.draw(0)) == 40
    cells = [(cell.protocol.name, cell.label_draw) for cell in specs.cells() if cell.arm.name == "colour"]
    assert cells == [(f"probe_{at}", d) for at in ("10pct", "50pct") for d in range(3)] + [("probe_all", 0)] + [
        ("knn", d) for d in range(3)
    ]
    assert specs.drawn_rows().tolist() == list(range(351))
    assert label_curves(specs.recipe, specs) == {"probe": {"probe_10pct": 36, "probe_50pct": 176, "probe_all": 351}}


PROBE = {"name": "probe", "kind": "linear_probe", "labels": 40, "label_draws": 1}
BESIDE = {"name": "beside", "labels": "all", "head_seeds": 1}


@pytest.mark.parametrize(
    ("protocols", "draws"),
    [
        ([PROBE, BESIDE | {"kind": "knn"}], 3),
        ([PROBE, BESIDE | {"kind": "fine_tune"}], 3),
        ([PROBE, BESIDE | {"kind": "mlp_probe", "probe": {"vary": ["head"]}}], 3),
        ([PROBE], 5),
        ([PROBE, BESIDE | {"kind": "knn", "labels": None}], 5),
    ],
)
def test_a_probes_bank_is_not_moved_by_protocols_and_draws_that_use_none(protocols: list[dict[str, Any]], draws: int) -> None:
    """A pass augments an image by its place in the bank: other rows there are other features, searches and scores."""

    def bank(protocols: list[dict[str, Any]], draws: int) -> tuple[list[int], str, int]:
        found = recipe(protocols=protocols, repeats={"labels": 40, "label_draws": draws})
        specs, probe = Specs(found, INDEX, list(COUNTS)), found.protocols[0]
        assert probe.kind == "linear_probe"
        return specs.drawn_rows().tolist(), specs.embed(found.arms[1], 0, probe, None).name, specs.embed_images(probe)

    assert bank(protocols, draws) == bank([PROBE], 3)
    assert bank([PROBE | {"label_draws": None}], 3) != bank([PROBE], 3)
    assert bank([PROBE, PROBE | {"name": "more", "labels": 80}], 3) != bank([PROBE], 3)


def test_the_report_draws_a_curve_through_the_means() -> None:
    points = {"probe_10pct": 36, "probe_50pct": 176, "probe_all": 351}
    means = {"random": [0.3, 0.5, 0.6], "colour": [0.4, 0.45, 0.46]}
    summary = pd.DataFrame([
        {"arm": arm, "protocol": protocol, "metric": "balanced_accuracy", "mean": mean, "std": 0.01 if protocol != "probe_all"
         else np.nan, "n": 3, "n_pretraining": 1, "n_draw": 3, "n_head": 1}
        for arm, row in means.items() for protocol, mean in zip(points, row, strict=True)
    ])  # fmt: skip
    files = render(ReportData("s", summary=summary, label_curves={"probe": points}))
    text, page = files["report.md"].decode(), files["report.html"].decode()
    assert "| random | 0.300 ± 0.010 | 0.500 ± 0.010 | 0.600 |" in text
    drawing = next(svg for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL) if "number of labelled images" in svg)
    curves = [
        [tuple(map(float, point.split())) for point in path.split("L")]
        for path in re.findall(r'd="M([\d. L]+)"[^>]*stroke-linejoin', drawing)
    ]
    assert len(curves) == 2 and all(len(curve) == 3 for curve in curves)
    (x, y), at = np.array(curves).T.swapaxes(1, 2)[:, :, :], np.log([36, 176, 351])
    np.testing.assert_allclose((x[0] - x[0, 0]) / (x[0, -1] - x[0, 0]), (at - at[0]) / (at[-1] - at[0]), atol=0.01)
    heights = np.array(list(means.values()))
    np.testing.assert_allclose((y - y[0, 0]) / (y[0, 2] - y[0, 0]), (heights - 0.3) / 0.3, atol=0.01)
