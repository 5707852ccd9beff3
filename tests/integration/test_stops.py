"""A run that is told to stop where nobody gets on, and where the training has just come to its end."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tiny

from medssl.artifacts import finished
from medssl.events import Event
from medssl.recipe_file import load
from medssl.runner import Runner
from medssl.stages import progress
from medssl.stages.progress import board
from medssl.stopping import StopAtOnce, Stopped, orderly_stop, sigterm_handled
from medssl.store import open_store
from medssl.study import Study

pytestmark = pytest.mark.ray


def test_a_stop_that_no_worker_hears_ends_the_run(ray_session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SILENT_SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(StopAtOnce), sigterm_handled(), orderly_stop() as wanted, board(None, wanted):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(120)  # nobody reports
    assert wanted.is_set() and 1 <= time.monotonic() - began < 60


@pytest.mark.acceptance
def test_a_stop_that_comes_with_the_last_step_stops_the_study_and_keeps_the_encoder(undisturbed: Any, tmp_path: Path) -> None:
    repeats = {"pretraining_seeds": 2, "label_draws": 1, "labels": 40}
    compute = tiny.recipe()["compute"]
    fields = tiny.pretraining_only(dataset=undisturbed.dataset, repeats=repeats, compute=compute)
    store, told = open_store(str(tmp_path / "store"), create=True), []

    def on_event(event: Event) -> None:
        # The last report is drawn in the main thread, when the workers have ended.
        last = event.kind == "progress" and event.done == event.total and event.label.startswith("pretrain")
        if last and not told and threading.current_thread() is threading.main_thread():
            told.append(event.label)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="is finished, the study is stopped after it"), sigterm_handled(), ExitStack() as stack:
        Runner(Study(load(fields), store, on_event), stack, None).encoders()
    assert len(told) == 1 and sum(name.startswith("pretrain-") for name in finished(store)) == 1
