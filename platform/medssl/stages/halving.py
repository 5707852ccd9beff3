"""Asynchronous successive halving (ASHA) of a search's points, and what came of each of them, kept in the store.

ASHA (Li et al., 2020, "A System for Massively Parallel Hyperparameter Tuning") compares points that have trained equally long, at
a few numbers of epochs (rungs), and lets about one in `reduction_factor` go on; this is Ray Tune's scheduler. It decides as
results arrive, so a stopped point depends on which others were there before. That is why what it decided is kept: a search that
goes on shows it the curves of finished and of stopped points again, and neither is asked for anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from medssl.artifacts import digest_json
from medssl.errors import MissingKey, RecipeError
from medssl.protocols import Search
from medssl.store import open_for_writing

Point = Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """What came of a point."""

    score: float
    """Of the whole training, or where it was stopped the last one."""
    stopped: bool = False
    curve: tuple[float, ...] = ()
    """Scores after each epoch but the last, where a scheduler goes by them."""


class Outcomes:
    """Outcomes of finished points in an artifact's folder."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def read(self, point: Point) -> Outcome | None:
        """The outcome of a point, or None."""
        try:
            found = json.loads(open_for_writing(self.uri).read(self._key(point)))
        except MissingKey:
            return None
        return Outcome(float(found["score"]), bool(found.get("stopped", False)), tuple(found.get("curve", ())))

    def write(self, point: Point, outcome: Outcome) -> None:
        """Keeps the outcome of a point."""
        record: dict[str, Any] = {**point, "score": outcome.score}
        if outcome.curve:
            record |= {"stopped": outcome.stopped, "curve": list(outcome.curve)}
        open_for_writing(self.uri).write(self._key(point), json.dumps(record, allow_nan=False).encode())

    def _key(self, point: Point) -> str:
        return f"trials/{digest_json(dict(point))[:20]}.json"


class Halving(ASHAScheduler):  # type: ignore[misc]
    """Ray Tune's ASHA on reports of `epoch`, `score` and `stored`; lives in the driver.

    A report that is `stored` comes from an earlier run: it counts for the others, and is not decided on again. Reports without
    `epoch` are a trial's last.
    """

    def __init__(self, space: Search, epochs: int, outcomes: Outcomes, point_of: Callable[[Mapping[str, Any]], Point]) -> None:
        """`epochs` of a whole training; RecipeError where they are too few to stop anything."""
        if epochs <= space.grace_epochs:
            raise RecipeError(
                f"asha stops nothing in {epochs} epochs with {space.grace_epochs} grace_epochs: give fewer, or train for longer"
            )
        # The last rung lies before the last epoch, so that no point is stopped that has trained to its end.
        super().__init__(
            time_attr="epoch", max_t=epochs - 1, grace_period=space.grace_epochs, reduction_factor=space.reduction_factor,
            stop_last_trials=False,
        )  # fmt: skip
        self._outcomes, self._point_of = outcomes, point_of
        self._curves: dict[str, list[float]] = {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether the trial goes on. The outcome of one that does not is in the store before it is told."""
        decision: str = super().on_trial_result(tune_controller, trial, result)
        if "epoch" not in result:
            return decision
        curve = self._curves.setdefault(trial.trial_id, [])
        curve[int(result["epoch"]) - 1 :] = [float(result["score"])]  # a lost trial begins with its first epoch again
        if result["stored"]:
            return str(TrialScheduler.CONTINUE)
        if decision == TrialScheduler.STOP:
            self._outcomes.write(self._point_of(trial.config), Outcome(curve[-1], True, tuple(curve)))
        return decision
