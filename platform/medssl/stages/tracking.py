"""Tells MLflow and Weights & Biases of a run, through Ray's own integrations (`setup_mlflow`, `setup_wandb`).

Each pretraining, each trial of a search and each arm's scores is a run of the tracker, found again by its key: what is resumed
goes on in the run that it began. A tracker that fails is told nothing more, and nobody waits for it: results are in the store.

Ray's callbacks for Tune are not used: that of Weights & Biases puts the API key into an actor's runtime environment, which Ray
writes to its logs.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol

from medssl.artifacts import digest_json
from medssl.compute import TrackingParams
from medssl.errors import MedsslError, RecipeError

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

END_SECONDS = 30.0
"""How long the end of a run waits for a tracker."""
_MOST_WAITING = 10_000
_KEY = "medssl.key"
_QUIET = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
}
"""A tracker that hangs must not hold up a training, and neither package is to tell its makers of what is done here."""
_OFFLINE = {"offline", "disabled"}


class _Tracker(Protocol):
    def say(self, values: dict[str, float], step: int) -> None: ...

    def end(self, *, failed: bool) -> None: ...


def check(tracking: TrackingParams, study: str) -> None:
    """Refuses, before work starts, a tracker that could not be told of anything; makes MLflow's experiment for the study.

    Raises:
        RecipeError: a package is missing, or there is no key for Weights & Biases.
        MedsslError: the MLflow server does not answer, or refuses.
    """
    _prepare()
    for name, asked in (("mlflow", tracking.mlflow), ("wandb", tracking.wandb)):
        if asked is not None and importlib.util.find_spec(name) is None:
            raise RecipeError(f"compute.tracking.{name} needs the package {name}: pip install 'medssl[tracking]' on every node")
    if tracking.mlflow is not None:
        try:
            _experiment(tracking.mlflow, study)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise MedsslError(
                f"the MLflow server {tracking.mlflow} (compute.tracking.mlflow) cannot be used: {reason[:300]}; mend it, or run "
                "with --set compute.tracking.mlflow=null"
            ) from None
    if tracking.wandb is not None and os.environ.get("WANDB_MODE") not in _OFFLINE and not os.environ.get("WANDB_API_KEY"):
        raise RecipeError(
            "compute.tracking.wandb needs WANDB_API_KEY in the environment of every node; WANDB_MODE=offline keeps what is told "
            "in WANDB_DIR, for `wandb sync`"
        )


class Tracked:
    """Called with values by name and the step they are of; what is no finite number is left out."""

    def __init__(self, trackers: Sequence[_Background]) -> None:
        self._trackers = trackers
        self.failed = False
        """Set where the work did not come to its end without an exception."""

    def __call__(self, values: Mapping[str, Any], step: int) -> None:
        """Tells every tracker; waits for none."""
        finite = {k: float(v) for k, v in values.items() if isinstance(v, Real) and math.isfinite(v)}
        for each in self._trackers:
            each.say(finite, step)


@contextmanager
def tracked(
    tracking: TrackingParams, *, study: str, kind: str, name: str, key: str, config: Mapping[str, Any]
) -> Iterator[Tracked]:
    """One run of each tracker, for the block.

    Args:
        study: MLflow's experiment, and the group in Weights & Biases.
        kind: pretrain, search or scores.
        name: what people read.
        key: the same for the same work, so that it goes on in the run that it began.
        config: parameters, nested as they are.
    """
    _prepare()
    trackers, facts = [], (study, kind, name, key, config)
    if tracking.mlflow is not None:
        trackers.append(_Background("MLflow", partial(_Mlflow, tracking.mlflow, *facts)))
    if tracking.wandb is not None:
        trackers.append(_Background("Weights & Biases", partial(_Wandb, tracking.wandb, *facts)))
    said = Tracked(trackers)
    try:
        yield said
    except BaseException:
        said.failed = True
        raise
    finally:
        for each in trackers:
            each.end(failed=said.failed)


class _Background:
    """A tracker in a thread of its own, which nobody waits for: a server that hangs costs END_SECONDS at the end of a run and
    nothing before. Its first failure is its last: a warning, and the work goes on without it."""

    def __init__(self, whose: str, open_: Callable[[], _Tracker]) -> None:
        self._whose, self._open = whose, open_
        self._waiting: queue.Queue[Callable[[_Tracker], None] | None] = queue.Queue(_MOST_WAITING)
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"medssl-{whose}", daemon=True)
        self._thread.start()

    def say(self, values: dict[str, float], step: int) -> None:
        """Leaves it to the thread; what it is too slow for is dropped."""
        if not self._lost.is_set():
            with suppress(queue.Full):
                self._waiting.put_nowait(lambda tracker: tracker.say(values, step))

    def end(self, *, failed: bool) -> None:
        """Gives it END_SECONDS to end the run."""
        deadline = time.monotonic() + END_SECONDS
        if self._thread.is_alive():
            with suppress(queue.Full):  # what waits is told first
                self._waiting.put(lambda tracker: tracker.end(failed=failed), timeout=END_SECONDS)
                self._waiting.put(None, timeout=END_SECONDS)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("%s does not answer: the rest of this run is not told to it", self._whose)
        self._lost.set()

    def _work(self) -> None:
        try:
            tracker = self._open()
            while (call := self._waiting.get()) is not None:
                call(tracker)
        except Exception as error:
            if self._lost.is_set():  # it was given up before
                return
            self._lost.set()
            reason = (str(error).strip().splitlines() or [""])[0]
            logger.warning("%s is told nothing more of this run: %s: %s", self._whose, type(error).__name__, reason[:300])


class _Mlflow:
    """A run of MLflow."""

    def __init__(self, uri: str, study: str, kind: str, name: str, key: str, config: Mapping[str, Any]) -> None:
        from ray.air.integrations.mlflow import setup_mlflow

        experiment = _experiment(uri, study)
        begun = _client(uri).search_runs([experiment], filter_string=f"tags.`{_KEY}` = '{key}'", max_results=1)
        if begun:  # setup_mlflow takes no run, but what it calls takes it from here
            os.environ["MLFLOW_RUN_ID"] = begun[0].info.run_id
        try:
            self._mlflow = setup_mlflow(
                dict(config), tracking_uri=uri, experiment_id=experiment, run_name=name,
                tags={_KEY: key, "medssl.kind": kind}, rank_zero_only=False,
            )  # fmt: skip
        except BaseException:
            import mlflow

            mlflow.end_run("FAILED")
            raise
        finally:
            os.environ.pop("MLFLOW_RUN_ID", None)

    def say(self, values: dict[str, float], step: int) -> None:
        """Logs them."""
        self._mlflow.log_metrics(values, step=step)

    def end(self, *, failed: bool) -> None:
        """Ends the run."""
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


class _Wandb:
    """A run of Weights & Biases."""

    def __init__(self, project: str, study: str, kind: str, name: str, key: str, config: Mapping[str, Any]) -> None:
        import wandb
        from ray.air.integrations.wandb import setup_wandb

        entity, _, short = project.rpartition("/")
        self._run = setup_wandb(
            dict(config), project=short, entity=entity or None, trial_id=key, trial_name=name, group=study, job_type=kind,
            rank_zero_only=False, settings=wandb.Settings(
                console="off", disable_git=True, disable_code=True, init_timeout=END_SECONDS, finish_timeout=END_SECONDS
            ),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")

    def say(self, values: dict[str, float], step: int) -> None:
        """Logs them."""
        self._run.log({"step": step, **values})

    def end(self, *, failed: bool) -> None:
        """Ends the run, which uploads what is left."""
        self._run.finish(exit_code=int(failed))


def tell_scores(tracking: TrackingParams, study: str, summary: pd.DataFrame) -> None:
    """A run for each arm of a finished study: mean and standard deviation of each metric under each protocol.

    Args:
        summary: one row per arm, protocol and metric, with mean, std and n (`StudyResult.summary`).
    """
    if tracking == TrackingParams():
        return
    for arm, rows in summary.groupby("arm", sort=False):
        values: dict[str, float] = {}
        for row in rows.to_dict("records"):
            name = re.sub(r"[^\w.-]+", "_", str(row["protocol"])) + f"/{row['metric']}"
            values |= {name: row["mean"], f"{name}/std": row["std"], f"{name}/n": row["n"]}
        key = key_of("scores", study, arm)
        with tracked(tracking, study=study, kind="scores", name=f"scores of {arm}", key=key, config={"arm": arm}) as say:
            say(values, 0)


def key_of(*parts: Any) -> str:
    """A key for a run, short and without signs that a tracker refuses."""
    return digest_json([str(part) for part in parts])[:32]


def _experiment(uri: str, study: str) -> str:
    """The id of a study's experiment, made where there is none."""
    client, name = _client(uri), f"medssl/{study}"
    found = client.get_experiment_by_name(name)
    return str(found.experiment_id if found else client.create_experiment(name))


def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _prepare() -> None:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for talkative in ("mlflow", "alembic"):  # of the tables that they make
        logging.getLogger(talkative).setLevel(logging.WARNING)
