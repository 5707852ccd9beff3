"""A recipe with several datasets: a study on each, planned, reported and shown together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests import finished_study

import medssl
from medssl import cli
from medssl.errors import RecipeError
from medssl.recipe_file import load, load_all

COLUMN = {"title": "balanced accuracy", "protocol": "probe", "metric": "balanced_accuracy", "value": "mean_std"}
TABLE = {
    "title": "Table 2. Two datasets.",
    "heads": ["method"],
    "columns": [COLUMN | {"dataset": "one", "unit": "One"}, COLUMN | {"dataset": "two", "unit": "Two"}],
    "rows": [{"matrix": {"arm": ["random", "colour"]}, "cells": ["{arm}"], "arm": "{arm}"}],
}
FIGURE = {
    "title": "Figure 3. Lines.", "x_title": "protocol", "protocol": "probe", "metric": "balanced_accuracy",
    "lines": {"random": "random"}, "points": [{"label": "probe"}, {"label": "tuned", "protocol": "tune"}],
    "panels": {"one": "One", "two": "Two"},
}  # fmt: skip


def fields(**changes: Any) -> dict[str, Any]:
    base = finished_study.fields(study="pair", description="On {dataset}.")
    del base["dataset"]
    return base | {
        "datasets": {"one": {"dataset": "datasets/squares"}, "two": {"dataset": "datasets/circles", "repeats": {"labels": 10}}},
        "together": {"tables": [TABLE], "figures": [FIGURE]},
    } | changes  # fmt: skip


def test_a_study_for_each_dataset() -> None:
    family = load_all(fields())
    assert family.name == "pair" and list(family.recipes) == ["one", "two"]
    one, two = family.recipes.values()
    assert (one.study, two.study, two.dataset, two.description) == ("pair.one", "pair.two", "datasets/circles", "On two.")
    assert (one.repeats.labels, two.repeats.labels, two.repeats.pretraining_seeds) == (12, 10, 2), "merged, not replaced"
    changed = load_all(fields(), ["repeats.pretraining_seeds=1", "datasets.two.repeats.labels=8"]).recipes
    assert [(r.repeats.pretraining_seeds, r.repeats.labels) for r in changed.values()] == [(1, 12), (1, 8)]
    single = load_all(finished_study.fields())
    assert single.together is None and list(single.recipes) == ["finished"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"datasets": {}}, "datasets is {}: give the fields of each"),
        ({"datasets": {"one": "datasets/squares"}}, "datasets.one is 'datasets/squares': give its fields"),
        ({"datasets": {"one": {"dataset": "d", "labels": 3}}, "together": {}}, "dataset one: unknown field 'labels'"),
        ({"together": {"tabels": []}}, "together.unknown field 'tabels'"),
        ({"together": {"tables": [TABLE | {"columns": [COLUMN]}]}}, "a column names no dataset; choices: one, two"),
        ({"together": {"tables": [TABLE | {"columns": [COLUMN | {"dataset": "on"}]}]}}, "names dataset 'on': .*one"),
        ({"together": {"tables": [TABLE | {"columns": [COLUMN | {"dataset": "one", "metric": "auc"}]}]}}, "names metric 'auc'"),
        ({"together": {"figures": [FIGURE | {"panels": {}}]}}, "has no panels: name the datasets"),
        ({"together": {"figures": [FIGURE | {"panels": {"three": "x"}}]}}, "names dataset 'three'"),
        ({"tables": [TABLE]}, "names datasets: put it under together"),
        ({"figures": [FIGURE]}, "has panels, which are datasets: put it under together"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as refused:
        load_all(fields(**changes))
    assert "\n" not in str(refused.value)


def test_together_needs_datasets_and_load_one_study() -> None:
    with pytest.raises(RecipeError, match="there is no field datasets"):
        load(finished_study.fields(together={}))
    with pytest.raises(RecipeError, match=r"study 'pair' is one on each of its datasets \(one, two\)"):
        load(fields())


def test_planned_and_reported_through_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pair.yaml"
    path.write_text(yaml.safe_dump(fields()))
    store = finished_study.make(tmp_path, {"study": "pair.one", "description": "On one."}).store
    arguments = [str(path), "--store", store.uri]
    assert cli.main(["run", *arguments]) == 2, "refused before the first study runs, for what the second lacks"
    assert "no dataset" in capsys.readouterr().err and not store.exists("studies/pair.one/report.html")
    (tmp_path / "circles").mkdir()
    finished_study.write_dataset(tmp_path / "circles", store.sub("datasets/circles"))
    second = {"study": "pair.two", "description": "On two.", "dataset": "datasets/circles"}
    repeats = finished_study.fields()["repeats"] | {"labels": 10}
    finished_study.make(tmp_path, second | {"repeats": repeats})

    assert cli.main(["plan", *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("pair.one:") and "\npair.two:" in printed
    assert cli.main(["plan", *arguments, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["pair.one", "pair.two"]

    assert cli.main(["report", *arguments]) == 0
    printed = capsys.readouterr().out
    page = store.uri_of("studies/pair/report.html")
    assert "one:" in printed and f"all together: {page}" in printed
    assert cli.main(["report", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == page and set(found["studies"]) == {"one", "two"}
    results = medssl.report_all(path, store.uri)
    text = store.read("studies/pair/report.md").decode()
    for name, result in results.items():
        assert store.exists(f"studies/pair.{name}/report.html") and f"[pair.{name}](../pair.{name}/report.html)" in text
        assert f'<a href="../pair.{name}/report.html">pair.{name}</a>' in store.read("studies/pair/report.html").decode()
        assert result.report_uri not in text, "a copy of the store leads to its own reports"
        for arm in ("random", "colour"):
            scores = result.scores
            mine = (scores["arm"] == arm) & (scores["protocol"] == "probe") & (scores["metric"] == "balanced_accuracy")
            values = scores.loc[mine, "value"]
            assert f"{values.mean():.3f} ± {values.std():.3f}" in text
    html = store.read("studies/pair/report.html").decode()
    assert "On one, two." in html and "No result yet" not in html
    assert "Table 2. Two datasets." in text and html.count("<svg") >= 2 and "One: balanced accuracy" in html
