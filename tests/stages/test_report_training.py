"""What the report shows of the pretrainings: curves, kNN, range tests, collapse in words, bags; parsed back from the page."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from medssl.artifacts import folder
from medssl.recipe import Recipe
from medssl.stages import report_words
from medssl.stages.report import render
from medssl.stages.report_data import DatasetFacts, ReportData
from medssl.stages.report_facts import bag_counts, dataset_facts, monitors, range_tests
from medssl.stages.report_tuning import tuning_frame
from medssl.stages.specs import Spec
from medssl.store import Store, open_store
from medssl.training import loop, signals
from medssl.training.bags import Bags
from medssl.training.finder import RangeTest, range_test

MEASURES = ("embedding_std", "effective_rank", "alignment", "uniformity")


def history(seed: int = 0, steps: int = 660, every: int = 10, **last: float) -> pd.DataFrame:
    """A row per step; the measures stand in every tenth row only, as the loop writes them."""
    step = np.arange(1, steps + 1)
    frame = pd.DataFrame({"seed": seed, "step": step, "epoch": (step - 1) // 55, "loss": 90 * np.exp(-step / 120) + 18})
    final = {"embedding_std": 0.8, "effective_rank": 60.0, "alignment": 0.2, "uniformity": -2.5, **last}
    for name in MEASURES:
        values = final[name] * (1 + np.exp(-step / 100) - np.exp(-steps / 100))
        frame[name] = np.where(step % every == 0, values, np.nan)
    return frame


def knn(seed: int, epochs: int = 6) -> pd.DataFrame:
    done = np.arange(1, epochs + 1) * 2
    values = 0.3 + 0.05 * seed + 0.02 * done
    return pd.DataFrame({"epoch": done, "knn_accuracy": values + 0.1, "knn_balanced_accuracy": values, "seed": seed})


def found_rate(chosen: float = 3e-3) -> RangeTest:
    rates = np.geomspace(1e-7, 10, 100)
    losses = 100 - 60 / (1 + (chosen / rates) ** 1.5) + 1e4 * np.maximum(0, np.log10(rates))
    return RangeTest(rates.tolist(), losses.tolist(), float(rates[np.argmin(np.abs(np.log(rates / chosen)))]))


def data() -> ReportData:
    histories = {name: pd.concat([history(seed) for seed in range(2)]) for name in ("simclr", "barlow_twins")}
    return ReportData(
        "watched",
        histories=histories,
        monitors={"barlow_twins": pd.concat([knn(seed) for seed in range(2)], ignore_index=True)},
        range_tests={("barlow_twins", 0): found_rate(), ("barlow_twins", 1): found_rate(2e-2)},
        datasets=[DatasetFacts("skin", counts={"train": {"nv": 9}}, bags={1: 5514, 2: 1423, 3: 490, 4: 34, 5: 5, 6: 4})],
    )


def page(given: ReportData) -> str:
    return render(given)["report.html"].decode()


def panel(html: str, label: str) -> str:
    found = re.findall(rf'<svg viewBox[^>]*aria-label="{re.escape(label)}">(.*?)</svg>', html, flags=re.DOTALL)
    assert len(found) == 1, (label, re.findall(r'aria-label="([^"]*)"', html))
    return str(found[0])


def curves(drawing: str) -> list[tuple[str, list[tuple[float, float]]]]:
    """Colour and points of each curve of a panel."""
    found = re.findall(r'<path d="M([^"h]*)" fill="none" stroke="([^"]*)" stroke-width="1.6"', drawing)
    return [(stroke, [tuple(map(float, point.split())) for point in re.split("[ML]", path)]) for path, stroke in found]


def scale(drawing: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates and values of an axis's ticks (the text is 4 below a tick on y, centred under it on x)."""
    texts = re.findall(r'<text x="([^"]*)" y="([^"]*)" font-size="11" text-anchor="(\w+)"[^>]*>([^<]*)</text>', drawing)
    anchor = "end" if axis == "y" else "middle"
    ticks = [(float(y) - 4 if axis == "y" else float(x), float(t.replace("−", "-"))) for x, y, a, t in texts if a == anchor]
    places, values = np.array(sorted(ticks)).T
    return places, values


# -- curves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["standard deviation of the embedding", "alignment (distance of two views)",
                                    "uniformity (smaller: more even)", "effective rank of the embedding"])  # fmt: skip
def test_measures_of_some_steps_are_whole_curves(column: str) -> None:
    """660 steps with a measure in every tenth: no gap, no point lost in the means over stretches."""
    drawn = curves(panel(page(data()), f"{column} over optimiser steps"))
    assert [len(points) for _, points in drawn] == [66] * 4


def test_knn_is_drawn_over_epochs_for_each_seed_in_the_arms_colour() -> None:
    html = page(data())
    colours = {stroke for stroke, _ in curves(panel(html, "loss over optimiser steps"))}
    drawing = panel(html, "balanced accuracy of kNN, validation over epochs")
    drawn = curves(drawing)
    assert [len(points) for _, points in drawn] == [6, 6]
    assert {stroke for stroke, _ in drawn} < colours and len(colours) == 2
    assert drawing.count("stroke-dasharray") == 1  # seed 1, as in the other panels
    (x_places, epochs), (y_places, values) = scale(drawing, "x"), scale(drawing, "y")
    for seed, (_, points) in enumerate(drawn):
        done = np.polyval(np.polyfit(x_places, epochs, 1), [x for x, _ in points])
        read = np.polyval(np.polyfit(y_places, values, 1), [y for _, y in points])
        assert done == pytest.approx(2.0 * np.arange(1, 7), abs=0.05)
        assert read == pytest.approx(0.3 + 0.05 * seed + 0.04 * np.arange(1, 7), abs=2e-3)
    assert "class-balanced votes" in html
    assert "kNN" not in page(dataclasses.replace(data(), monitors={}))


def test_a_single_measurement_is_a_dot() -> None:
    once = dataclasses.replace(data(), monitors={"simclr": knn(1, epochs=1)})
    ((_, points),) = curves(panel(page(once), "accuracy of kNN, validation over epochs"))
    assert len(set(points)) == 1


# -- range tests -------------------------------------------------------------------------------------------------


def test_chosen_learning_rates_are_marked_on_their_curves() -> None:
    given = data()
    drawing = panel(page(given), "loss of barlow_twins over the learning rate, chosen rate marked")
    marks = [float(x) for x in re.findall(r'<path d="M([\d.]+) [\d.]+h0"', drawing)]
    places, rates = scale(drawing, "x")
    assert list(rates) == [10.0**k for k in range(-7, 2)]
    read = 10 ** np.polyval(np.polyfit(places, np.log10(rates), 1), marks)
    assert read == pytest.approx([given.range_tests["barlow_twins", seed].chosen for seed in (0, 1)], rel=0.03)
    chosen = [given.range_tests["barlow_twins", seed].chosen for seed in (0, 1)]
    assert f">barlow_twins, taken: {chosen[0]:.3g}, {chosen[1]:.3g}<" in drawing
    drawn = curves(drawing)
    assert [len(points) for _, points in drawn] == [100, 100]
    assert min(y for _, points in drawn for _, y in points) >= 28  # what explodes stays inside the panel
    assert "Learning-rate finder" not in page(dataclasses.replace(given, range_tests={}))


def test_a_real_range_test_is_drawn() -> None:
    test = range_test(lambda rate: 5.0 - 4 * min(1.0, rate / 1e-2) + 40 * max(0.0, rate - 0.5))
    given = dataclasses.replace(data(), range_tests={("simclr", 0): RangeTest.from_json(test.to_json())})
    drawn = curves(panel(page(given), "loss of simclr over the learning rate, chosen rate marked"))
    assert [len(points) for _, points in drawn] == [len(test.losses)]


# -- collapse ----------------------------------------------------------------------------------------------------


def test_limits_are_the_loops() -> None:
    assert (report_words.COLLAPSED_STD, report_words.COLLAPSED_RANK) == (signals._COLLAPSED_STD, signals._COLLAPSED_RANK)


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ({"embedding_std": 0.02}, "seed 1: standard deviation 0.020, effective rank 60.000"),
        ({"effective_rank": 1.5}, "seed 1: standard deviation 0.800, effective rank 1.500"),
        ({"embedding_std": 0.021, "effective_rank": 1.51}, None),
    ],
)
def test_a_collapse_is_said_in_words(last: dict[str, float], said: str | None) -> None:
    frame = pd.concat([history(0), history(1, **last)])
    text = render(ReportData("c", histories={"simclr": frame}))["report.md"].decode()
    assert ("simclr: the embedding collapsed" in text) == (said is not None)
    if said is not None:
        assert said in text and "seed 0:" not in text and text.count("collapsed") == 1


def test_a_collapse_in_the_middle_that_was_overcome_is_none() -> None:
    frame = history()
    frame.loc[frame["step"] == 300, ["embedding_std", "effective_rank"]] = [0.001, 1.0]
    text = render(ReportData("c", histories={"simclr": frame}))["report.md"].decode()
    assert "collapsed" not in text


# -- bags --------------------------------------------------------------------------------------------------------


def recipe(pairs: str = "bag", **changed: Any) -> Recipe:
    arm = {"name": "micle", "objective": {"name": "barlow_twins"}, "epochs": 2, "pairs": pairs, "learning_rate_finder": True}
    protocols = [{"name": "p", "kind": "linear_probe"}]
    fields = {"study": "s", "dataset": "d", "arms": [arm, {"name": "random"}], "protocols": protocols}
    return Recipe.model_validate(fields | changed)


def bag_index() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    bag = rng.integers(0, 90, 200).astype(object)
    bag[rng.random(200) < 0.2] = None
    split = np.array(["train", "val", "test"])[rng.integers(0, 3, 200)]
    label = rng.choice(["a", "b"], 200)
    patient = [None if b is None else f"p{b}" for b in bag]
    return pd.DataFrame({"bag_id": bag, "patient_id": patient, "split": split, "label": label})


@pytest.mark.parametrize("splits", [("train",), ("train", "val")])
def test_bags_are_counted_as_the_feed_counts_them(splits: tuple[str, ...]) -> None:
    index = bag_index()
    rows = index.index[index["split"].isin(splits)].tolist()
    found = bag_counts(recipe(pretraining_splits=splits), index)
    assert found == Bags.of_index(index, rows).counts()
    assert list(found) == sorted(found) and sum(size * bags for size, bags in found.items()) == len(rows)
    assert bag_counts(recipe("image", pretraining_splits=splits), index) == {}


def test_dataset_facts_hold_the_bags() -> None:
    card = {"digests": {"images": "0" * 64, "labels": "1" * 64}}
    dataset: Any = SimpleNamespace(card=card, name="skin", index=bag_index)
    assert dataset_facts(dataset, recipe()).bags == bag_counts(recipe(), bag_index())


def test_table_of_bags() -> None:
    text = render(data())["report.md"].decode()
    table = text[text.index("bags by number of images") :].split("\n\n")[1].splitlines()
    assert table[0] == "| images in a bag | bags | images |"
    assert table[2:] == [
        "| 1 | 5,514 | 5,514 |", "| 2 | 1,423 | 2,846 |", "| 3 | 490 | 1,470 |", "| 4 | 34 | 136 |", "| 5 | 5 | 25 |",
        "| 6 | 4 | 24 |", "| all bags | 7,470 | 10,015 |",
    ]  # fmt: skip
    many = DatasetFacts("slides", bags={size: 1 for size in range(1, 31)})
    text = render(ReportData("m", datasets=[many]))["report.md"].decode()
    assert f"| 13 to 30 | 18 | {sum(range(13, 31))} |" in text and "| all bags | 30 | 465 |" in text
    assert "bags by number" not in render(ReportData("m", datasets=[DatasetFacts("d")]))["report.md"].decode()


# -- from the store ----------------------------------------------------------------------------------------------


def artifact(store: Store, arm: Any, seed: int, watched: bool, found: bool) -> tuple[Any, int, Spec]:
    """What a pretraining leaves, by the loop's own names."""
    spec = Spec("pretrain", {"arm": arm.name, "seed": seed}, {}, "")
    place = folder(store, spec.name)
    place.write("encoder.safetensors", b"")
    if watched:
        for row in knn(seed).drop(columns="seed").to_dict("records"):
            place.write(f"{loop.MONITOR_FOLDER}/{int(row['epoch']):05d}.json", json.dumps(row).encode())
    if found:
        place.write(loop.FINDER_FILE, found_rate().to_json())
    return arm, seed, spec


def test_what_pretrainings_left_is_read_and_what_they_did_not_is_no_error(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), create=True)
    micle, random = recipe().arms
    other = recipe("image").arms[0].model_copy(update={"name": "other", "learning_rate_finder": False})
    encoders = [
        artifact(store, micle, 0, watched=True, found=True),
        artifact(store, micle, 1, watched=False, found=False),
        artifact(store, micle, 2, watched=True, found=True),
        artifact(store, other, 0, watched=False, found=True),  # of an earlier try, not of this recipe
        (random, 0, Spec("initialise", {}, {}, "")),
    ]
    curves_of = monitors(store, encoders)
    assert list(curves_of) == ["micle"]
    expected = pd.concat([knn(0), knn(2)], ignore_index=True)
    pd.testing.assert_frame_equal(curves_of["micle"], expected)
    assert range_tests(store, encoders) == {("micle", 0): found_rate(), ("micle", 2): found_rate()}
    assert monitors(store, encoders[1:2]) == {} and range_tests(store, encoders[3:]) == {}


def test_fine_tunings_are_means_over_the_runs_that_got_so_far() -> None:
    """Paper 003's figures 1 and 2: training and validation loss, validation accuracy, an arm a colour."""
    first = [{"epoch": 1.0, "loss": 2.0, "learning_rate": 0.1}]
    first += [{"epoch": e, "loss": 1 / e, "validation": 0.1 * e, "validation_loss": 3 / e} for e in (2.0, 3.0)]
    frame = tuning_frame([first, [line | {"loss": 4.0} for line in first[:2]]], "accuracy")
    assert frame["epoch"].tolist() == [1, 2, 3] and frame["training loss"].tolist() == pytest.approx([3, 2.25, 1 / 3])
    assert frame["validation loss"].tolist()[1:] == pytest.approx([1.5, 1.0]) and np.isnan(frame["validation loss"][0])
    assert frame["validation accuracy"].tolist()[1:] == pytest.approx([0.2, 0.3])
    assert list(tuning_frame([first], "loss").columns) == ["epoch", "training loss", "validation loss"]
    run = {"protocol": "tune", "pretraining_seed": 0, "label_draw": 0, "head_seed": 0, "metric": "accuracy", "value": 0.5}
    scores = pd.DataFrame([{"arm": "a", **run}, {"arm": "b", **run}])
    data = ReportData("s", scores=scores, tunings={("a", "tune"): frame, ("b", "tune"): frame, ("c", "probe"): frame[:0]})
    html = render(data)["report.html"].decode()
    for title in ("training loss", "validation loss", "validation accuracy"):
        assert html.count(f'aria-label="{title} over epochs"') == 1
    assert "tune: fine-tuning, epoch by epoch" in html and "probe: fine-tuning" not in html
