"""What the report shows of the predictions: numbers parsed back from tables and drawings of the page."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.judged_study import CLASSES, study
from tests.stages.test_report import Reader, markdown_tables, png

from medssl.calibration import Reliability
from medssl.judging import judge
from medssl.results import _summary_frame
from medssl.stages import report_svg as svg
from medssl.stages.report import render
from medssl.stages.report_data import COLUMNS, DecisionCurves, EmbeddingMap, Mistake, ReportData, UnitFacts
from medssl.stages.report_text import number3

NASTY = '<i onload="x">&\'"|_*</i>'


@pytest.fixture(scope="module")
def data() -> ReportData:
    made = study(subgroups=["site", "age"], bands={"age": [40, 60]}, decision_class="mel",
                 deployment_prior={"bcc": 1, "mel": 1, "nv": 8})  # fmt: skip
    return ReportData(
        "judged", main_metric="accuracy", main_protocol="probe", summary=_summary_frame(made[2]), **judge(*made)
    )


@pytest.fixture(scope="module")
def html(data: ReportData) -> str:
    return page(data)


def page(data: ReportData) -> str:
    return render(data)["report.html"].decode()


def section(html: str, anchor: str) -> str:
    begin = f'<section id="{anchor}">'
    return html.split(begin)[1].partition("</section>")[0] if begin in html else ""


def tables(html: str, anchor: str) -> list[list[list[str]]]:
    return Reader(section(html, anchor)).tables


def panels(html: str, anchor: str) -> dict[str, str]:
    return dict(re.findall(r'<svg viewBox[^>]*aria-label="([^"]*)">(.*?)</svg>', section(html, anchor), flags=re.DOTALL))


def ticks(drawing: str, anchor: str) -> np.ndarray:
    """Line through the ticks of an axis: value = a * coordinate + b."""
    look = r'<text x="([^"]*)" y="([^"]*)" font-size="11" text-anchor="(\w+)" fill="#555555">([\d.−]+)</text>'
    texts = re.findall(look, drawing)
    pairs = [(float(y) - 4 if anchor == "end" else float(x), float(t.replace("−", "-"))) for x, y, a, t in texts if a == anchor]
    return np.polyfit(*np.array(sorted(set(pairs))).T, 1)


def dots(drawing: str, size: str) -> np.ndarray:
    """Coordinates of the dots of one size."""
    paths = re.findall(rf'<path d="([^"]*h0)" fill="none" stroke="[^"]*" stroke-width="{size}"', drawing)
    return np.array([list(map(float, p.split())) for path in paths for p in re.findall(r"M([\d.]+ [\d.]+)h0", path)])


# -- class by class ----------------------------------------------------------------------------------------------


def test_tables_of_classes_hold_the_frame(data: ReportData, html: str) -> None:
    found = tables(html, "classes")
    frame = data.class_scores.groupby(["arm", "protocol"], sort=False)
    assert len(found) == len(frame) == 4
    for table, (_, rows) in zip(found, frame, strict=True):
        wanted = [[row[3], f"{row[4]:.0f}", *map(number3, row[5:])] for row in rows.itertuples()]
        assert table[1:] == wanted
    assert "at 0.95 specificity" in found[0][0][-1]


def test_two_best_arms_are_shown_and_the_rest_folded(data: ReportData) -> None:
    means = {"a": 0.5, "b": 0.9, "c": 0.7, "d": float("nan")}
    summary = pd.DataFrame([{"arm": a, "protocol": "p", "metric": "accuracy", "mean": m} for a, m in means.items()])
    scores = pd.concat([data.class_scores.iloc[:3].assign(arm=arm, protocol="p") for arm in means])
    given = ReportData("x", main_metric="accuracy", main_protocol="p", summary=summary, class_scores=scores)
    shown, folded = section(page(given), "classes").split("<details>")
    heads = [re.findall(r'<p class="caption">(\w), p:', part) for part in (shown, folded)]
    assert heads == [["b", "c"], ["a", "d"]]
    lower = dataclasses.replace(given, main_metric="expected_calibration_error",
                                summary=summary.assign(metric="expected_calibration_error"))  # fmt: skip
    assert re.findall(r'<p class="caption">(\w), p:', section(page(lower), "classes").split("<details>")[0]) == ["a", "c"]


def test_lower_is_better_is_said_where_it_is(html: str) -> None:
    assert "Lower is better: calibration error (ECE)." in section(html, "scores")
    table = tables(html, "scores")[0]
    ece = table[0].index(next(h for h in table[0] if "ECE" in h))
    means = [float(row[ece].split(" ± ")[0]) for row in table[1:]]
    best = re.findall(r"<strong>([^<]*)</strong>", section(html, "scores"))
    assert table[1 + int(np.argmin(means))][ece] in best


# -- can the probabilities be believed ---------------------------------------------------------------------------


def test_reliability_is_drawn_where_it_was_counted(data: ReportData, html: str) -> None:
    for (arm, protocol), (plain, corrected) in data.reliabilities.items():
        drawing = panels(html, "believed")[f"reliability of {arm}, {protocol}"]
        for found, size in ((plain, "7"), (corrected, "5")):
            if found is None:
                assert not len(dots(drawing, size))
                continue
            points = dots(drawing, size)
            np.testing.assert_allclose(np.polyval(ticks(drawing, "middle"), points[:, 0]), found.confidence_B, atol=2e-3)
            np.testing.assert_allclose(np.polyval(ticks(drawing, "end"), points[:, 1]), found.accuracy_B, atol=2e-3)
        assert drawing.count("of the images</title>") == len(plain.images_B)
        assert drawing.count("stroke-dasharray") == 1 + (corrected is not None)
    assert "put the class frequencies" in section(html, "believed")
    unweighted = dataclasses.replace(
        data, reliabilities={k: v for k, v in data.reliabilities.items() if v[1] is None},
        calibration=data.calibration[data.calibration["protocol"] == "tune"],
    )  # fmt: skip
    assert "put the class frequencies" not in section(page(unweighted), "believed")
    assert "corrected" not in tables(page(unweighted), "believed")[0][0][-1]


def test_calibration_and_prior_tables_hold_the_frames(data: ReportData, html: str) -> None:
    calibration, prior, folded = tables(html, "believed")
    wanted = [[r.arm, r.protocol, *map(number3, r[3:])] for r in data.calibration.itertuples(index=True)]
    assert calibration[1:] == wanted
    rows = data.priors[data.priors["protocol"] == "probe"].set_index(["arm", "metric"])
    assert len(prior) - 1 == len(rows) == len(folded) - 1
    assert prior[1][2:] == [number3(v) for v in rows.loc[prior[1][0], "accuracy"][["measured", "as_it_is", "corrected"]]]
    assert "bcc 10.0%, mel 10.0%, nv 80.0%" in html and "(label shift)" in html
    assert "label shift" not in page(dataclasses.replace(data, priors=ReportData("x").priors))


def test_decision_curves_are_drawn_as_they_are(data: ReportData, html: str) -> None:
    curves = data.decisions
    assert curves is not None
    drawing = panels(html, "believed")["decision curves for mel, tune"]
    look = r'<path d="M([^"h]*)" fill="none" stroke="([^"]*)" stroke-width="1.6"[^>]*?(?:stroke-dasharray="([^"]*)")?/>'
    drawn = re.findall(look, drawing)
    assert len(drawn) == 3 and len({stroke for _, stroke, _ in drawn}) == 3 and len({dash for *_, dash in drawn}) == 3
    points = np.array([list(map(float, p.split())) for p in re.split("[ML]", drawn[1][0])])
    benefit = np.polyval(ticks(drawing, "end"), points[:, 1])
    at = np.polyval(ticks(drawing, "middle"), points[:, 0])
    line = curves.models["pretrained", "tune"]
    np.testing.assert_allclose(benefit, line[: len(benefit)], atol=1e-3)
    np.testing.assert_allclose(at, curves.thresholds_T[: len(at)], atol=2e-3)
    assert "Decision curves" not in page(dataclasses.replace(data, decisions=None))


def test_a_line_that_leaves_the_picture_comes_back_as_another_piece() -> None:
    thresholds = np.arange(1, 100) / 100
    line = np.where((thresholds > 0.3) & (thresholds < 0.5), -5.0, 0.1)
    given = ReportData(
        "x", main_protocol="p", calibration=pd.DataFrame([{"arm": "a", "protocol": "p", "ece": 0.1}]),
        decisions=DecisionCurves("c", 0.2, thresholds, np.full(99, -5.0), {("a", "p"): line}),
        reliabilities={("a", "p"): (Reliability(np.array([0.5]), np.array([0.5]), np.array([9])), None)},
    )  # fmt: skip
    drawing = panels(page(given), "believed")["decision curves for c, p"]
    (path,) = re.findall(r'<path d="(M[^"h]*)" fill="none" stroke="[^"]*" stroke-width="1.6"', drawing)
    assert [len(piece.split("L")) for piece in path.split("M")[1:]] == [30, 50]


# -- patients, bags, subgroups -----------------------------------------------------------------------------------


def test_patients_and_bags_are_scored_and_what_is_left_out_is_said(data: ReportData, html: str) -> None:
    text = " ".join(Reader(section(html, "units")).text.split())
    facts = {each.unit: each for each in data.unit_facts}
    person, bag = facts["patient"], facts["bag"]
    assert f"{person.units} patients with {person.images} test images; {person.several} have more than one." in text
    assert f"Left out: {person.torn} patients with {person.torn_images} images whose labels differ" in text
    assert f"{bag.units} bags (a lesion or case each)" in text and text.count("Left out") == 1
    found = tables(html, "units")
    assert len(found) == 4  # patients and bags, under two protocols each
    rows = data.units[(data.units["unit"] == "patient") & (data.units["protocol"] == "probe")].set_index(["arm", "metric"])
    assert len(found[0]) - 1 == len(rows)
    first = rows.loc[found[0][1][0], "accuracy"]
    assert found[0][1][1:] == ["accuracy", number3(first["per_image"]), number3(first["per_unit"])]
    torn = ReportData("x", unit_facts=[UnitFacts("patient", 3, 3, 0, 1, 2)])
    assert "Left out: 1 patient with 2 images" in page(torn) and not tables(page(torn), "units")


def test_subgroups_are_tabled_and_drawn_with_their_intervals(data: ReportData, html: str) -> None:
    found = tables(html, "subgroups")
    assert len(found) == 2 * 7 * 2  # columns, metrics, protocols
    mine = data.subgroups[data.subgroups["column"] == "age"]
    first = next(table for table in found if table[0][0] == "age")
    rows = mine[(mine["metric"] == "accuracy") & (mine["protocol"] == "probe")].set_index(["group", "arm"])
    for line in first[1:]:
        row = rows.loc[line[0], "random"]
        assert line[1:4] == [str(row["images"]), str(row["patients"]), str(row["classes"])]
        assert line[-1] == f"{row['score']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
    assert [line[0] for line in first[1:]] == ["below 40", "40 to below 60", "60 and above", "not stated"]
    drawing = panels(html, "subgroups")["accuracy of random by group"]
    assert "40 to below 60" in drawing  # the last panel of that name: of the ages
    axis = ticks(drawing, "middle")
    np.testing.assert_allclose(np.polyval(axis, dots(drawing, "9")[:, 0]), rows.xs("random", level="arm")["score"], atol=2e-3)
    ends = re.findall(r'<path d="M([\d.]+) ([\d.]+)L([\d.]+) \2" fill="none" stroke="#0072b2" stroke-width="2.4"', drawing)
    measured = [[np.polyval(axis, float(low)), np.polyval(axis, float(high))] for low, _, high in ends]
    np.testing.assert_allclose(measured, rows.xs("random", level="arm")[["low", "high"]].to_numpy(float), atol=2e-3)


def test_small_groups_are_counted_only(data: ReportData, html: str) -> None:
    sites = next(table for table in tables(html, "subgroups") if table[0][0] == "site")
    east = next(line for line in sites[1:] if line[0] == "<b>east</b>")
    assert int(east[1]) < 20 and east[4:] == ["–", "–"]
    assert "<b>east" not in html and "fewer than 20 images" in section(html, "subgroups")
    assert "east" not in panels(html, "subgroups")["accuracy of pretrained by group"]
    none = data.subgroups.assign(score=np.nan, low=np.nan, high=np.nan)
    assert not panels(page(dataclasses.replace(data, subgroups=none)), "subgroups")


# -- pictures ----------------------------------------------------------------------------------------------------


def cloud(classes: int, images: int = 300) -> EmbeddingMap:
    rng = np.random.default_rng(2)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, images - classes)])
    return EmbeddingMap(rng.normal(size=(images, 2)), labels, [f"class {k}" for k in range(classes)])


def test_every_point_is_on_the_map_with_the_mark_of_its_class() -> None:
    found = cloud(5)
    html = page(ReportData("x", embeddings={"bt": found, "random": cloud(5)}))
    drawing = panels(html, "embedding")["t-SNE map of the features of bt"]
    paths = re.findall(r'<path d="(M[^"]*)" fill="([^"]*)"(?: stroke="([^"]*)")?', drawing)
    starts = {(fill if stroke == "" else stroke): re.findall(r"M([\d.]+ [\d.]+)", path) for path, fill, stroke in paths}
    assert {colour: len(points) for colour, points in starts.items()} == {
        svg.colour(k): int((found.labels_N == k).sum()) for k in range(5)
    }  # fmt: skip
    shapes = {re.sub(r"[\d.]+", "", path.split("M")[1]) for path, *_ in paths}
    assert len(shapes) == 5  # told apart without colour
    places = np.array([list(map(float, p.split())) for p in starts[svg.colour(2)]])
    points = found.points_N2[found.labels_N == 2]
    scale = [np.polyfit(points[:, axis], places[:, axis], 1) for axis in range(2)]
    assert scale[0][0] == pytest.approx(scale[1][0], rel=0.01)  # both axes alike
    np.testing.assert_allclose([np.polyval(s, points[:, i]) for i, s in enumerate(scale)], places.T, atol=0.06)
    assert places.min() > 0 and places[:, 0].max() < 360


def test_marks_of_49_classes_differ_in_colour_or_shape_and_many_classes_share_grey() -> None:
    marks = set()
    for k in range(49):
        panel = svg.Panel(10, 10, "")
        panel.marks([(5, 5)], k)
        marks.add(panel.parts[0])
    assert len(marks) == 49
    html = page(ReportData("x", embeddings={"bt": cloud(30)}))
    assert "16 rarer classes" in html
    assert len(re.findall(r"<li>", section(html, "embedding"))) == 15


def test_thumbnails_stand_with_label_prediction_and_confidence_and_are_escaped() -> None:
    mistakes = [Mistake(NASTY, NASTY, "nv", 0.987, png(8, 8)), Mistake("i2", "mel", "bcc", 0.5, png(8, 8))]
    html = page(ReportData("x", main_protocol="probe", mistakes={NASTY: mistakes, "bt": mistakes[1:]}))
    reader = Reader(section(html, "mistakes"))
    images = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert len(images) == 3 and all(each["src"].startswith("data:image/png;base64,") for each in images)
    assert images[0]["alt"] == f"{NASTY}, named nv (99%), image {NASTY}"
    assert not [a for _, attributes in reader.tags for a in attributes if a.startswith("on")]
    assert "mel, named bcc (50%), image i2" in reader.text
    assert "mistakes" not in page(ReportData("x"))


def test_names_are_escaped_and_nothing_leaves_the_page(data: ReportData) -> None:
    swap: Any = {"arm": {"random": NASTY}, "protocol": {"probe": NASTY}, "class": {"mel": NASTY}, "column": {"site": NASTY}}
    frames = {name: getattr(data, name).replace(swap) for name in COLUMNS}
    key = {(a, p): (NASTY if a == "random" else a, NASTY if p == "probe" else p) for a, p in data.reliabilities}
    curves = data.decisions
    assert curves is not None
    given = dataclasses.replace(
        data, **frames, main_protocol=NASTY, reliabilities={key[k]: v for k, v in data.reliabilities.items()},
        decisions=dataclasses.replace(curves, class_name=NASTY, models={key[k]: v for k, v in curves.models.items()}),
        deployment_prior={NASTY: 1.0}, embeddings={NASTY: EmbeddingMap(np.eye(2), np.arange(2), [NASTY, "b"])},
    )  # fmt: skip
    reader = Reader(page(given))
    assert "i" not in {tag for tag, _ in reader.tags}
    assert not [a for _, attributes in reader.tags for a in attributes if a.startswith("on")]
    assert NASTY in reader.text
    for tag, attributes in reader.tags:
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)


def test_markdown_holds_the_same_tables(data: ReportData, html: str) -> None:
    assert len(Reader(html).tables) == len(markdown_tables(render(data)["report.md"].decode()))
    assert CLASSES[0] in render(data)["class_scores.csv"].decode()
