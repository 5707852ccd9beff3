"""Tables and figures in a paper's form: what a recipe may say, and that the report fills them with the right numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tests import finished_study

from medssl.errors import RecipeError
from medssl.forms import FigureForm, TableForm
from medssl.recipe_file import load
from medssl.stages.report import compose
from medssl.stages.report_data import ReportData
from medssl.stages.report_page import Figure, Table, to_html, to_markdown

ACCURACY = {"title": "Accuracy", "protocol": "probe", "metric": "accuracy"}


def runs(arm: str, mean: float, count: int = 35, metric: str = "accuracy", protocol: str = "probe") -> list[dict[str, Any]]:
    values = mean + 0.01 * np.random.default_rng(len(arm) + count).standard_normal(count)
    named = {"arm": arm, "protocol": protocol, "pretraining_seed": 0, "label_draw": 0, "metric": metric}
    return [named | {"head_seed": seed, "value": value} for seed, value in enumerate(values)]


SCORES = pd.DataFrame([
    *runs("sl", 0.65), *runs("ssl", 0.69), *runs("sl_iu", 0.66, 5), *runs("sl", 0.5, metric="f1_weighted"),
    *runs("sl", 0.4, protocol="probe on away"), *runs("one", 0.3, 1),
])  # fmt: skip


def of(arm: str, metric: str = "accuracy", protocol: str = "probe") -> np.ndarray[Any, Any]:
    chosen = (SCORES["arm"] == arm) & (SCORES["metric"] == metric) & (SCORES["protocol"] == protocol)
    return SCORES.loc[chosen, "value"].to_numpy()


def table(form: dict[str, Any], **frames: Any) -> Table:
    data = ReportData("s", scores=SCORES, tables=[TableForm.model_validate({"title": "Table 4"} | form)], **frames)
    section = next(section for section in compose(data).sections if section.anchor == "forms")
    block = section.blocks[0]
    assert isinstance(block, Table)
    return block


def test_a_table_of_means_and_standard_deviations() -> None:
    columns = [
        ACCURACY | {"value": "mean", "decimals": 5}, ACCURACY | {"value": "std", "decimals": 5}, ACCURACY | {"value": "n"},
        ACCURACY | {"percent": True, "decimals": 2}, ACCURACY | {"metric": "f1_weighted", "value": "mean"},
        ACCURACY | {"shifted": "away", "value": "mean"},
    ]  # fmt: skip
    rows = [
        {"cells": ["Pre-trained once"]}, {"cells": ["SL", "–"], "arm": "sl"}, {"cells": ["SL", "IU"], "arm": "sl_iu"},
        {"cells": ["–", "–"], "arm": "one"}, {"cells": ["–", "–"], "arm": "nobody"},
    ]  # fmt: skip
    found = table({"heads": ["Initial", "Further"], "columns": columns, "rows": rows})
    assert found.rows[0] == ["Pre-trained once", "", *[""] * 6]
    sl, away, f1 = of("sl"), of("sl", protocol="probe on away"), of("sl", "f1_weighted")
    spread = sl.std(ddof=1)
    assert found.rows[1] == [
        "SL", "–", f"{sl.mean():.5f}", f"{spread:.5f}", "35", f"{100 * sl.mean():.2f} ± {100 * spread:.2f}", f"{f1.mean():.3f}",
        f"{away.mean():.3f}",
    ]  # fmt: skip
    assert found.rows[2][2:5] == [f"{of('sl_iu').mean():.5f}", f"{of('sl_iu').std(ddof=1):.5f}", "5"] and found.rows[2][6] == "–"
    assert found.rows[3][3] == "–" and "±" not in found.rows[3][5] and found.rows[4][2:] == ["–"] * 6
    assert [column.title for column in found.columns[:2]] == ["Initial", "Further"]


def test_a_rows_protocol_takes_the_place_of_its_columns() -> None:
    away = "probe on away"  # any other name of a protocol
    columns = [ACCURACY | {"value": "mean"}, ACCURACY | {"value": "std"}]
    rows = [{"cells": ["40 epochs"], "arm": "sl"}, {"cells": ["80 epochs"], "arm": "sl", "protocol": away}]
    found = table({"heads": ["Training time"], "columns": columns, "rows": rows}).rows
    for line, scores in zip(found, (of("sl"), of("sl", protocol=away)), strict=True):
        assert line[1:] == [f"{scores.mean():.3f}", f"{scores.std(ddof=1):.3f}"]


def test_a_row_without_a_protocol_is_named_as_before() -> None:
    row = load(fields(tables=[GOOD])).tables[0].rows[0]
    assert "protocol" not in row.canonical()
    own = load(fields(tables=[GOOD | {"rows": [ROWS[0] | {"protocol": "tune"}]}])).tables[0].rows[0]
    assert own.canonical()["protocol"] == "tune"


def test_tests_and_differences_of_two_arms() -> None:
    columns = [ACCURACY | {"value": "welch_p"}, ACCURACY | {"value": "difference", "percent": True, "decimals": 1}]
    rows = [
        {"cells": ["SSL > SL"], "arm": "ssl", "than": "sl"}, {"cells": ["SL > SSL"], "arm": "sl", "than": "ssl"},
        {"cells": ["SL = IU"], "arm": "sl", "than": "sl_iu", "alternative": "two-sided"},
        {"cells": ["one"], "arm": "sl", "than": "one"}, {"cells": ["none"], "arm": "sl", "than": "nobody"},
    ]  # fmt: skip
    found = table({"heads": ["rows"], "columns": columns, "rows": rows}).rows
    greater = stats.ttest_ind(of("ssl"), of("sl"), equal_var=False, alternative="greater").pvalue
    two_sided = stats.ttest_ind(of("sl"), of("sl_iu"), equal_var=False).pvalue
    assert found[0][1] == f"{greater:.1e}" and found[1][1] == "1.00000"
    assert float(found[2][1]) == pytest.approx(two_sided, abs=1e-5)
    assert found[0][2] == f"+{100 * (of('ssl').mean() - of('sl').mean()):.1f}" and found[1][2].startswith("−")
    assert found[3][1] == "–" and found[3][2] != "–" and found[4][1:] == ["–", "–"]


def test_a_class_report_is_scikit_learns() -> None:
    classes = pd.DataFrame({
        "arm": "sl", "protocol": "probe", "class": ["mel", "nv"], "images": [100, 300], "precision": [0.5, 0.9],
        "recall": [0.6, 0.8], "f1": [0.545, 0.847],
    })  # fmt: skip
    found = table({"class_report": {"cells": ["x"], "arm": "sl"}, "protocol": "probe"}, class_scores=classes).rows
    accuracy = f"{of('sl').mean():.2f}"
    assert found == [
        ["mel", "0.50", "0.60", "0.55", "100"], ["nv", "0.90", "0.80", "0.85", "300"], ["accuracy", "", "", accuracy, "400"],
        ["macro average", "0.70", "0.70", "0.70", "400"], ["weighted average", "0.80", "0.75", "0.77", "400"],
    ]  # fmt: skip


def test_a_figure_of_lines_over_arms_protocols_and_sets() -> None:
    form = {
        "title": "Figure <4>", "x_title": "where", "protocol": "probe", "metric": "accuracy", "lines": {"sl": "SL", "ssl": "SSL"},
        "points": [{"label": "home"}, {"label": "IU", "arm": "{line}_iu"}, {"label": "away", "shifted": "away"}],
    }  # fmt: skip
    data = ReportData("s", scores=SCORES, figures=[FigureForm.model_validate(form)])
    section = next(section for section in compose(data).sections if section.anchor == "forms")
    (figure,) = section.blocks
    assert isinstance(figure, Figure) and [key.label for key in figure.keys] == ["SL", "SSL"]
    (panel,) = figure.panels
    assert panel.count("h0") == 4, "three points of sl, one of ssl"
    assert "Figure &lt;4&gt;" in to_html(compose(data)) and "Figure &lt;4&gt;" in to_markdown(compose(data))


def fields(**changes: Any) -> dict[str, Any]:
    return finished_study.fields(**changes)


COLUMN = {"title": "x", "protocol": "probe", "metric": "balanced_accuracy"}
ROWS = [{"cells": ["x"], "arm": "random"}]
BARE: dict[str, Any] = {"heads": [], "columns": [], "rows": []}
GOOD = {"title": "T", "heads": ["a"], "columns": [COLUMN], "rows": ROWS}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": [{"cells": ["x"], "arm": "randon"}]}, r"names arm 'randon': .*random"),
        ({"rows": [{"cells": ["x"], "arm": "random", "protocol": "prob"}]}, "names protocol 'prob': .*probe"),
        ({"rows": [{"cells": ["x", "y"], "arm": "random"}]}, "needs a cell for each of 1 heads"),
        ({"rows": []}, "give columns and rows"),
        ({"columns": [COLUMN | {"protocol": "prob"}]}, "names protocol 'prob'"),
        ({"columns": [COLUMN | {"metric": "auc"}]}, "names metric 'auc'"),
        ({"columns": [COLUMN | {"shifted": "x"}]}, "names shifted set 'x'"),
        ({"columns": [COLUMN | {"value": "welch_p"}]}, "give it `than`"),
        ({"rows": [{"cells": ["x"], "arm": "random", "matrix": {"n": []}}]}, "tables.0.rows.0.matrix"),
        ({"class_report": {"cells": ["x"], "arm": "random"}, "protocol": "probe"}, "and no heads, columns or rows"),
        ({"class_report": ROWS[0] | {"protocol": "tune"}, **BARE, "protocol": "probe"}, "of a class report stands beside it"),
    ],
)
def test_tables_that_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as refused:
        load(fields(tables=[GOOD | changes]))
    assert "\n" not in str(refused.value)


def test_rows_of_a_matrix_and_figures_that_are_refused() -> None:
    rows = [{"matrix": {"arm": ["random", "colour"]}, "cells": ["{arm}"], "arm": "{arm}"}]
    assert [row.cells for row in load(fields(tables=[GOOD | {"rows": rows}])).tables[0].rows] == [("random",), ("colour",)]
    figure = {"title": "F", "x_title": "x", "protocol": "probe", "metric": "balanced_accuracy", "lines": {"random": "r"}}
    points = [{"label": "a"}, {"label": "b", "arm": "{line}_16"}]
    with pytest.raises(RecipeError, match="figure 'F' names arm 'random_16'"):
        load(fields(figures=[figure | {"points": points}]))
    with pytest.raises(RecipeError, match="points"):
        load(fields(figures=[figure | {"points": points[:1]}]))
