"""What the driver of a run of trials says of it: done, lost, given up."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from tests.listener import latest_gauges

from medssl.stages.trials import Watch


@pytest.fixture
def said() -> Iterator[dict[str, float]]:
    with latest_gauges() as gauges:
        yield gauges


def trial(number: int) -> Any:
    return SimpleNamespace(trial_id=str(number), config={"task": number})


def test_every_lost_attempt_is_counted_once(said: dict[str, float]) -> None:
    """As Ray Tune calls it: `recover` for an attempt that is followed by another, `error` for the last."""
    watch = Watch(trials=2)
    watch.on_trial_start(0, [], trial(0))
    watch.on_trial_recover(0, [], trial(0))
    assert (said["trials_failed"], said["trials_running"]) == (1, 0)
    watch.on_trial_start(0, [], trial(0))
    watch.on_trial_start(0, [], trial(1))
    watch.on_trial_complete(0, [], trial(1))
    watch.on_trial_error(0, [], trial(0))
    assert said == {"trials_planned": 2, "trials_done": 1, "trials_running": 0, "trials_failed": 2}


def test_a_trial_that_fails_by_itself_failed_and_is_not_done(said: dict[str, float]) -> None:
    shown: list[tuple[int, int, str]] = []
    watch = Watch(lambda *now: shown.append(now), lambda config: 1.0, 2.0, 2)
    for number, error in ((0, None), (1, "diverged")):
        watch.on_trial_start(0, [], trial(number))
        watch.on_trial_result(0, [], trial(number), {"error": error, "score": 0.5})
        watch.on_trial_complete(0, [], trial(number))
    assert watch.error == "diverged" and shown[-1] == (1, 2, "1 of 2 trials")
    wanted = {"trials_planned": 2, "trials_done": 1, "trials_running": 0, "trials_failed": 1, "best_score": 0.5}
    assert said == wanted


def test_seeds_that_train_as_one_trial_are_counted_each(said: dict[str, float]) -> None:
    seeds = [35, 5]
    watch = Watch(trials=2, seeds=lambda config: seeds[config["task"]], all_seeds=sum(seeds))
    watch.on_trial_start(0, [], trial(0))
    assert (said["seeds_done"], said["seeds_planned"]) == (0, 40)
    watch.on_trial_complete(0, [], trial(0))
    assert (said["seeds_done"], said["trials_done"]) == (35, 1)
    watch.on_trial_result(0, [], trial(1), {"error": "diverged"})
    watch.on_trial_complete(0, [], trial(1))
    assert (said["seeds_done"], said["seeds_planned"]) == (35, 40)
