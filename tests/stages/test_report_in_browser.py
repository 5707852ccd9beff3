"""The report as a browser shows it: nothing asked for outside the page, no error, nothing wider than a telephone."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.judged_study import study
from tests.stages.test_report import fake_data, png

from medssl.forms import FigureForm, TableForm
from medssl.judging import judge
from medssl.results import _scores_frame, _summary_frame
from medssl.stages.report import render, render_together
from medssl.stages.report_data import COLUMNS, EmbeddingMap, Mistake, PublishedFacts, ReportData
from medssl.statistics import PublishedTest, recompute_published

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def whole() -> ReportData:
    """Data for every section of a report."""
    rng = np.random.default_rng(0)
    prior = {"bcc": 1, "mel": 1, "nv": 8}
    recipe, specs, runs = study(subgroups=["site", "age"], bands={"age": [40, 60]}, decision_class="mel", deployment_prior=prior)
    rows = {"SL": (0.657, 0.021), "SSL": (0.691, 0.011)}
    printed = PublishedTest("SSL", "SL", "greater", 1e-10, is_bound=True)
    tests = recompute_published({name: (*row, 35) for name, row in rows.items()}, [printed])
    away = ("clinic", "random", "probe", "balanced_accuracy", 0.5, 0.4)
    return dataclasses.replace(
        fake_data(), **judge(recipe, specs, runs), main_protocol="probe",
        summary=_summary_frame(runs), scores=_scores_frame(runs),
        embeddings={"random": EmbeddingMap(rng.normal(size=(300, 2)), rng.integers(0, 3, 300), ["bcc", "mel", "nv"])},
        mistakes={"random": [Mistake(f"image-with-a-long-name-{n:020d}", "mel", "nv", 0.9, png()) for n in range(8)]},
        published=[PublishedFacts("paper 000", "accuracy", 35, rows, {"SSL": "random"}, {"SSL": "probe"}, tests)],
        label_curves={"probe": {"probe": 100, "tune": 1000}},
        shifted=pd.DataFrame([away], columns=list(COLUMNS["shifted"])), shifted_notes=["clinic: 2,750 images."],
        tables=[TableForm.model_validate(TABLE)], figures=[FigureForm.model_validate(FIGURE)],
        leaks=["The images of split test were used in the pretraining of random."],
    )  # fmt: skip


CELL = {"protocol": "probe", "metric": "balanced_accuracy", "decimals": 5}
TABLE = {
    "title": "Table 4. Fine-tuning of models pre-trained once and twice.", "heads": ["Initial", "Further dataset", "Method"],
    "columns": [CELL | {"title": title, "value": value} for title in ("Accuracy", "F1") for value in ("mean", "std")],
    "rows": [{"cells": ["Pre-trained once"]}, {"cells": ["Self-supervised", "–", "–"], "arm": "random"}],
}  # fmt: skip
FIGURE = {
    "title": "Figure 4. Fewer labels.", "x_title": "labels", "protocol": "probe", "metric": "balanced_accuracy",
    "lines": {"random": "Random"}, "points": [{"label": "100"}, {"label": "1,000", "protocol": "tune"}],
}  # fmt: skip


def several() -> dict[str, bytes]:
    """The page of a recipe with two datasets."""
    scores, names = whole().scores, ("skin", "chest")
    columns = [CELL | {"title": name, "dataset": name} for name in names]
    data = ReportData(
        "several-datasets", description="Several.", by_dataset=dict.fromkeys(names, scores),
        tables=[TableForm.model_validate(TABLE | {"columns": columns})],
        figures=[FigureForm.model_validate(FIGURE | {"panels": {name: name.title() for name in names}})],
    )  # fmt: skip
    return render_together(data, {name: f"a-study-with-a-long-name-on-several-datasets.{name}" for name in names})


@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize(
    ("make", "sections"),
    [
        (
            lambda: render(whole()),
            {"result", "forms", "training", "believed", "subgroups", "embedding", "mistakes", "published", "labels", "shifted",
             "run"},
        ),
        (several, {"forms", "studies"}),
    ],
    ids=["study", "several"],
)  # fmt: skip
def test_the_page_is_whole_in_itself_and_fits(
    browser: Any, tmp_path: Path, width: int, make: Callable[[], dict[str, bytes]], sections: set[str]
) -> None:
    path = tmp_path / "report.html"
    path.write_bytes(make()["report.html"])
    page = browser.new_page(viewport={"width": width, "height": 900})
    requests: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(path.as_uri(), wait_until="load")
    for fold in page.query_selector_all("details > summary"):
        fold.click()
    assert sections <= {element.get_attribute("id") for element in page.query_selector_all("section")}
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()] and said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # what is wider scrolls in a region of its own; text is never cut off, nor smaller than a telephone shows
    overflowing = """[...document.querySelectorAll('p, li, figcaption, h1, h2, .box')]
        .filter(e => e.getClientRects().length && e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 120))"""
    assert page.evaluate(overflowing) == []
    small = """[...document.querySelectorAll('p, li, td, th, figcaption')].filter(e => e.getClientRects().length &&
        parseFloat(getComputedStyle(e).fontSize) < 11).map(e => e.outerHTML.slice(0, 120))"""
    assert page.evaluate(small) == []
    page.close()
