"""Several searches in threads of one driver: really at once, each with its own objective, and ended together."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from medssl.compute import Compute
from medssl.errors import MedsslError
from medssl.events import Event
from medssl.protocols import Search
from medssl.stages.search import Found, most_at_once, search
from medssl.stages.side_by_side import SideBySide
from medssl.stages.trials import shared_out
from medssl.store import Store, open_store

COMPUTE = Compute(concurrent_trials=1, max_failures=0)
GRID = Search(learning_rate=(0.001, 0.01), weight_decay=(0.0,))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"), create=True)


def until(there: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 600
    while not there():
        assert time.monotonic() < end, f"waited 600 s for {what}"
        time.sleep(0.02)


def meeting(folder: Path, me: str, other: str, best: float, point: Mapping[str, float]) -> float:
    """Comes back when the other search has a trial under way too."""
    (folder / me).touch()
    until((folder / other).exists, f"{other} to begin")
    return 1.0 if point["learning_rate"] == best else 0.5


def never(folder: Path, point: Mapping[str, float]) -> float:
    """Says that it has begun, and does not end by itself."""
    (folder / "begun").touch()
    until(lambda: False, "what never comes")
    return 0.0


def failing(folder: Path, point: Mapping[str, float]) -> float:
    until((folder / "begun").exists, "the other search to begin")
    raise MedsslError("the labels of a.jpg are gone")


@pytest.mark.ray
def test_two_searches_run_at_once_each_with_its_own_objective(
    ray_session: Any, store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    found: dict[str, Found] = {}
    together, output = SideBySide(events.append, "2 searches"), sys.stdout

    def run(name: str, objective: Any) -> None:
        emit = together.emit_of(name)
        found[name] = search(
            objective, GRID, store=store.sub(name), name=name, compute=COMPUTE, halt=together.halt,
            on_progress=lambda done, total, note="": emit(Event("progress", name, done, total, note)),
        )  # fmt: skip

    capfd.readouterr()
    with together.under_way(2) as start:
        start(partial(run, "a", partial(meeting, tmp_path, "a", "b", 0.001)))
        start(partial(run, "b", partial(meeting, tmp_path, "b", "a", 0.01)))
    assert found["a"].best["learning_rate"] == 0.001 and found["b"].best["learning_rate"] == 0.01
    assert [e.kind for e in (events[0], events[-1])] == ["begin", "end"] and {e.label for e in events} == {"2 searches"}
    last = [e for e in events if e.kind == "progress"][-1]
    assert (last.done, last.total) == (4, 4)
    assert sys.stdout is output and capfd.readouterr() == ("", "")


@pytest.mark.ray
def test_one_that_fails_ends_the_others_and_says_why(ray_session: Any, store: Store, tmp_path: Path) -> None:
    together = SideBySide(lambda event: None, "2 searches")
    begun = time.monotonic()

    def run(name: str, objective: Any) -> None:
        search(objective, GRID, store=store.sub(name), name=name, compute=COMPUTE, halt=together.halt)

    with pytest.raises(MedsslError, match=r"a\.jpg are gone"), together.under_way(2) as start:
        start(partial(run, "long", partial(never, tmp_path)))
        start(partial(run, "broken", partial(failing, tmp_path)))
    assert time.monotonic() - begun < 90  # the long one would have waited for 120 s
    assert not [entry.key for entry in store.list() if "/tune/" in entry.key]


@pytest.mark.parametrize(
    ("slots", "wanted", "runs", "each"),
    [(64, [28, 28, 28], 3, 21), (64, [28], 1, 64), (2, [28, 28], 1, 2), (8, [4] * 6, 2, 4), (35, [28, 4], 2, 17), (5, [], 1, 5)],
)
def test_slots_are_filled_and_never_exceeded(slots: int, wanted: list[int], runs: int, each: int) -> None:
    at_once, compute = shared_out(Compute(concurrent_trials=slots), wanted)
    assert (at_once, compute.concurrent_trials) == (runs, each) and at_once * each <= slots


def test_tpe_has_a_batch_at_once() -> None:
    assert most_at_once(GRID) == 2
    assert most_at_once(Search(sampler="tpe", trials=40, learning_rate=(0.001, 0.1))) == 4
