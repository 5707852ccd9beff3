"""Asynchronous successive halving: its decisions, what is left of stopped points, resumption, and a real fine-tuning's curve."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from medssl.artifacts import Marker, folder
from medssl.compute import Compute
from medssl.errors import MedsslError, RecipeError
from medssl.networks.encoder import build_encoder, save_weights
from medssl.protocols import FineTune, LinearProbe, MlpProbe, Search
from medssl.recipe import Recipe
from medssl.stages import evaluate
from medssl.stages.context import Context, Opened
from medssl.stages.halving import Halving, Outcome, Outcomes
from medssl.stages.report_data import ReportData
from medssl.stages.report_facts import searches
from medssl.stages.report_grids import search_grids
from medssl.stages.search import Objective, OnEpoch, search
from medssl.stages.specs import Spec, Specs
from medssl.store import Store, open_store
from medssl.training.feed import ResidentImages

ASHA = Search(scheduler="asha", learning_rate=(0.001, 0.01, 0.1), weight_decay=(0.0, 0.01))
ONE_AT_A_TIME = Compute(concurrent_trials=1)
EPOCHS = 5
RECIPE = {
    "study": "s", "dataset": "d", "encoder": {"name": "test_resnet", "image_px": 32}, "arms": [{"name": "random"}],
    "repeats": {"pretraining_seeds": 1, "label_draws": 1, "labels": 24},
    "protocols": [{"name": "tune", "kind": "fine_tune", "training": {"epochs": 3, "batch_size": 12},
                   "search": {"scheduler": "asha", "learning_rate": [0.001, 0.01], "head_seeds": 2}}],
}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"), create=True)


def hill(point: Mapping[str, float], epoch: int) -> float:
    """Rises with the epochs to 0.9 at learning rate 0.01 without weight decay, elsewhere to less."""
    return (0.9 - 0.1 * abs(math.log10(point["learning_rate"]) + 2) - point["weight_decay"]) * epoch / EPOCHS


def logged(where: Path, room: float = math.inf) -> Objective:
    """A training of `EPOCHS` epochs, with a line in a file for each; no more lines than there is room for."""

    def objective(point: Mapping[str, float], on_epoch: OnEpoch) -> float:
        for epoch in range(1, EPOCHS + 1):
            if len(epochs(where)) >= room:
                raise MedsslError("the disk is full: make room")
            with open(where / "epochs.jsonl", "a") as file:
                file.write(json.dumps([point["learning_rate"], point["weight_decay"]]) + "\n")
            on_epoch(epoch, hill(point, epoch))
        return hill(point, EPOCHS)

    return objective


def epochs(where: Path) -> list[tuple[float, float]]:
    """The point of every epoch that was trained."""
    file = where / "epochs.jsonl"
    return [(rate, decay) for rate, decay in map(json.loads, file.read_text().splitlines())] if file.exists() else []


def key(point: Mapping[str, float]) -> tuple[float, float]:
    return point["learning_rate"], point["weight_decay"]


# -- decisions -----------------------------------------------------------------------------------------------------


def scheduler(store: Store, space: Search, length: int) -> Halving:
    made = Halving(space, length, Outcomes(store.uri), lambda config: config)
    made.set_search_properties("score", "max")
    return made


def report(made: Halving, name: str, epoch: int, score: float, *, stored: bool = False) -> bool:
    """Whether the trial goes on."""
    trial = SimpleNamespace(trial_id=name, config={"learning_rate": float(name), "weight_decay": 0.0})
    if epoch == 1:
        made.on_trial_add(cast(Any, None), trial)
    decision = made.on_trial_result(None, trial, {"epoch": epoch, "score": score, "stored": stored})
    return decision == "CONTINUE"


def test_decisions_are_those_of_the_paper(store: Store) -> None:
    """Random curves one after the other against rungs in plain loops: on at the rung's quantile of those before, or above."""
    rng = np.random.default_rng(0)
    made, rungs = scheduler(store, Search(scheduler="asha", grace_epochs=2, reduction_factor=3), 19), {2: [], 6: [], 18: []}
    outcomes, ends = Outcomes(store.uri), []
    for number in range(1, 31):
        curve = rng.random(19).round(3)
        for epoch, score in enumerate(curve, 1):
            before: list[float] = rungs.get(epoch, [])
            expected = not before or score >= np.quantile(before, 2 / 3)
            before.append(score)
            assert report(made, str(number), epoch, score) == expected
            if not expected:
                point = {"learning_rate": float(number), "weight_decay": 0.0}
                assert outcomes.read(point) == Outcome(score, True, tuple(curve[:epoch]))
                break
        ends.append(epoch)
    assert set(ends) == {2, 6, 18, 19}


def test_an_earlier_runs_curve_counts_and_is_not_decided_on(store: Store) -> None:
    made = scheduler(store, Search(scheduler="asha"), 4)
    assert report(made, "1", 1, 0.5)
    assert report(made, "2", 1, 0.1, stored=True) and report(made, "2", 2, 0.1, stored=True)
    assert report(made, "3", 1, 0.9, stored=True)
    assert store.list("trials/") == []
    assert not report(made, "4", 1, 0.6)  # two thirds of 0.1, 0.5, 0.9 lie below 0.63
    assert len(store.list("trials/")) == 1


def test_a_trial_that_begins_again_has_one_curve(store: Store) -> None:
    made = scheduler(store, Search(scheduler="asha", reduction_factor=2), 5)
    for epoch in (1, 2):
        assert report(made, "1", epoch, 0.5)
    assert report(made, "2", 1, 0.6)
    for epoch, goes_on in ((1, True), (2, False)):  # its process was lost after the first epoch
        assert report(made, "2", epoch, 0.6 if epoch == 1 else 0.4) == goes_on
    assert Outcomes(store.uri).read({"learning_rate": 2.0, "weight_decay": 0.0}) == Outcome(0.4, True, (0.6, 0.4))


# -- recipes -------------------------------------------------------------------------------------------------------


def test_what_asha_cannot_do_is_one_line(store: Store) -> None:
    for kind in (LinearProbe, MlpProbe):
        with pytest.raises(ValidationError, match=r"protocol 'p': scheduler asha stops .* one pass: set it to none"):
            kind(name="p", search=ASHA)
    with pytest.raises(ValidationError, match="in 10 epochs with 10 grace_epochs"):
        FineTune(name="f", search=ASHA.model_copy(update={"grace_epochs": 10}))
    with pytest.raises(ValidationError, match="belong to scheduler asha"):
        Search(grace_epochs=2)
    with pytest.raises(RecipeError, match="in 1 epochs with 1 grace_epochs"):
        search(hill, ASHA, store=store, name="search-a", compute=ONE_AT_A_TIME, epochs=1)


def test_a_search_without_scheduler_keeps_its_name() -> None:
    plain = FineTune(name="f").canonical()["search"]
    assert "scheduler" not in plain and plain == Search().canonical()
    assert {"scheduler", "grace_epochs", "reduction_factor"} <= set(FineTune(name="f", search=ASHA).canonical()["search"])
    assert Search.model_validate(ASHA.canonical()) == ASHA


# -- on Ray Tune ---------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_weak_points_are_stopped_and_an_interrupted_search_repeats_none(ray_session: Any, store: Store, tmp_path: Path) -> None:
    def go(room: float = math.inf) -> Any:
        return search(logged(tmp_path, room), ASHA, store=store, name="search-h", compute=ONE_AT_A_TIME, epochs=EPOCHS)

    with pytest.raises(MedsslError, match=r"^search-h: the disk is full: make room$"):
        go(room=12)
    kept = {key(record): record for entry in store.list("trials/") if (record := json.loads(store.read(entry.key)))}
    assert 0 < len(kept) < 6
    (tmp_path / "epochs.jsonl").unlink()
    found = go()
    assert len(found.points) == 6
    assert not set(kept) & set(epochs(tmp_path))
    scores = {key(point): score for point, score in found.points}
    assert all(scores[at] == record["score"] for at, record in kept.items())

    stopped = {key(point) for point in found.stopped}
    trained = [at for at in scores if at not in stopped]
    assert stopped and found.score == max(scores[at] for at in trained) and key(found.best) in trained
    for at, score in scores.items():
        point = {"learning_rate": at[0], "weight_decay": at[1]}
        lasted = EPOCHS if at in trained else next(rung for rung in (1, 3) if score == hill(point, rung))
        assert at in kept or epochs(tmp_path).count(at) == lasted
    (tmp_path / "epochs.jsonl").unlink()
    assert go() == found and epochs(tmp_path) == []


@pytest.mark.ray
def test_tpe_with_asha_resumes_to_the_same(ray_session: Any, store: Store, tmp_path: Path) -> None:
    space = Search(scheduler="asha", sampler="tpe", learning_rate=(1e-4, 1.0), weight_decay=(0.0,), trials=6)
    first = search(logged(tmp_path), space, store=store, name="search-i", compute=ONE_AT_A_TIME, epochs=EPOCHS)
    assert first.stopped and first.best not in first.stopped
    for point in (first.best, first.stopped[0]):
        store.delete(Outcomes(store.uri)._key(point))
    (tmp_path / "epochs.jsonl").unlink()
    again = search(logged(tmp_path), space, store=store, name="search-i", compute=ONE_AT_A_TIME, epochs=EPOCHS)
    assert again == first
    assert set(epochs(tmp_path)) == {key(first.best), key(first.stopped[0])}


# -- the report ----------------------------------------------------------------------------------------------------


def test_the_report_strikes_stopped_points_through() -> None:
    points = [{"learning_rate": rate, "weight_decay": decay, "score": 0.5} for rate in (0.01, 0.1) for decay in (0.0, 0.1)]
    arm = Recipe.model_validate({**RECIPE, "arms": [{"name": "random"}]}).arms[0]
    panels = []
    for stopped in (0, 2):
        marked = [*points[: 4 - stopped], *({**point, "stopped": True} for point in points[4 - stopped :])]
        marker = Marker("search-0", "search", 1, {}, {}, {}, {"best": points[0], "on_edge": True, "points": marked})
        figure = search_grids(ReportData("s", searches=searches([(arm, FineTune(name="tune"), marker)])))
        assert figure is not None and ("struck through" in figure.caption) == bool(stopped)
        panels.append(str(figure.panels[0]))
        assert panels[-1].count("stopped before its end") == stopped
    assert panels[1].count("<path") == panels[0].count("<path") + 2


# -- a fine-tuning -------------------------------------------------------------------------------------------------


def test_a_fine_tuning_tells_the_validation_score_after_each_epoch(store: Store, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(RECIPE)
    rng = np.random.default_rng(0)
    index = pd.DataFrame({
        "image_id": [f"i{n:02d}" for n in range(48)], "sha256": [f"h{n}" for n in range(48)], "label": ["a", "b"] * 24,
        "split": np.repeat(["train", "val"], [24, 24]), "patient_id": [f"p{n}" for n in range(48)],
    })  # fmt: skip
    brighter = 55 * (index["label"] == "a").to_numpy(np.uint8)
    pixels = rng.integers(0, 200, (48, 32, 32, 3), dtype=np.uint8) + brighter[:, None, None, None]
    images = ResidentImages.write(tmp_path / "images", pixels, list(index["image_id"]))
    folder(store, "encoder-0").write("encoder.safetensors", save_weights(build_encoder(recipe.encoder, 0)))
    opened = Opened(store, cast(Any, None), recipe, Specs(recipe, index, ["a", "b"]), images)
    context = cast(Context, SimpleNamespace(open=lambda: opened))
    task = evaluate.SearchTask(context, Spec("search", {}, {}, "search"), "random", "tune", "encoder-0")
    score = evaluate._Score(task)
    point, told = {"learning_rate": 0.01, "weight_decay": 0.0}, []
    whole = score(point, lambda epoch, value: told.append((epoch, value)))
    assert [epoch for epoch, _ in told] == [1, 2, 3] == list(range(1, (evaluate._epochs(opened, recipe.protocols[0]) or 0) + 1))
    assert all(0 <= value <= 1 for _, value in told) and whole == score(point)
    single = recipe.protocols[0].model_copy(update={"search": recipe.protocols[0].search.model_copy(update={"head_seeds": 1})})
    alone = Opened(store, cast(Any, None), recipe.model_copy(update={"protocols": (single,)}), opened.specs, images)
    context = cast(Context, SimpleNamespace(open=lambda: alone))
    assert evaluate._Score(evaluate.SearchTask(context, task.spec, "random", "tune", "encoder-0"))(point) == told[-1][1]
