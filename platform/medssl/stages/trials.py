"""Trials on Ray Tune: independent tasks fanned out, each in a worker process that the next one takes over.

Tune keeps its own state in the store while it runs, through the retrying filesystem; it is deleted at the end.
Results go into the store, not into Tune's metrics.

Tune would replay any exception. Only lost processes and lost storage are worth that, so a trial turns every other failure
into a report, which stops the run at once.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import tune

from medssl import telemetry
from medssl.compute import Compute
from medssl.errors import MedsslError, StoreError
from medssl.exporter import export
from medssl.filesystem import retrying_filesystem
from medssl.stages.progress import OnProgress
from medssl.store import Store

Task = TypeVar("Task")
_one_thread = threading.Lock()
_quiet_now: list[ExitStack | None] = []
"""What puts the process back, then an entry for each run under way."""


def fan_out(
    function: Callable[[Task], object],
    tasks: Sequence[Task],
    *,
    compute: Compute,
    store: Store | None = None,
    weights: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Calls `function` on every task, each in a Tune trial; what it makes it leaves in the store itself.

    Trials of one worker process follow each other, so what a task opened and cached is there for the next. A lost process
    is replaced and its task done again, up to `compute.max_failures` times.

    Args:
        store: where Tune keeps its state while it runs; needed on more than one node. None takes a temporary folder.
        weights: cost of each task, for progress; default 1.
        seeds: head seeds in each task, for telemetry: those of a probe train as one.

    Raises:
        MedsslError: a task failed; its reason in one line. Tasks that had not begun are not begun.
    """
    if not tasks:
        return
    costs = [1.0] * len(tasks) if weights is None else list(weights)

    def run(config: dict[str, Any], tasks: Sequence[Task]) -> dict[str, Any]:
        function(tasks[config["task"]])
        return {}

    trainable = tune.with_parameters(guarded(run, compute.trial_cpus), tasks=list(tasks))
    counted = [0] * len(tasks) if seeds is None else list(seeds)
    watch = Watch(
        on_progress, lambda config: costs[config["task"]], sum(costs), len(tasks),
        seeds=lambda config: counted[config["task"]], all_seeds=sum(counted),
    )  # fmt: skip
    config = tune.TuneConfig(max_concurrent_trials=concurrent_trials(compute), reuse_actors=True, **short_names())
    run_trials(trainable, {"task": tune.grid_search(list(range(len(tasks))))}, config, compute, store, "tasks", watch)


def guarded(run: Callable[..., dict[str, Any]], cpus: int) -> Callable[..., None]:
    """A Tune function that reports what `run` returns, or the reason for which it failed."""

    def trial(config: dict[str, Any], **parameters: Any) -> None:
        import torch

        export()
        torch.set_num_threads(cpus)
        try:
            tune.report({"error": None, **run(config, **parameters)})
        except (StoreError, ray.exceptions.RayError):
            raise  # lost storage, lost processes: Tune starts the trial anew
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            reason = text[0] if isinstance(error, MedsslError) else f"{type(error).__name__}: {text[0]}"
            tune.report({"error": reason, "score": 0.0})

    return trial


class Watch(tune.Callback):  # type: ignore[misc]
    """Adds up what finished, and keeps the first failure. Pickled as an empty one: it lives in the driver alone."""

    def __init__(
        self,
        on_progress: OnProgress | None = None,
        cost: Callable[[dict[str, Any]], float] | None = None,
        total: float = 0.0,
        trials: int = 0,
        *,
        seeds: Callable[[dict[str, Any]], int] | None = None,
        all_seeds: int = 0,
    ) -> None:
        self.on_progress, self.cost, self.total, self.trials = on_progress, cost, total, trials
        self.seeds, self.all_seeds = seeds, all_seeds
        self.error: str | None = None
        self.done, self.finished, self.seeds_done = 0.0, 0, 0
        self._under_way: set[str] = set()
        self._refused: set[str] = set()
        """Trials that reported a failure of their own."""
        self._lost, self._best = 0, -math.inf

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()

    def setup(self, *args: Any, **info: Any) -> None:
        """Shows the empty bar."""
        self._show()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Counts a trial that begins, or begins anew."""
        self._under_way.add(str(trial.trial_id))
        self._tell()

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Counts a lost attempt that is followed by another."""
        self._under_way.discard(str(trial.trial_id))
        self._lost += 1
        self._tell()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Counts the lost attempt after which the trial is given up."""
        self.on_trial_recover(iteration, trials, trial)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Counts a trial that ended well; one that reported a failure comes by here too."""
        self._under_way.discard(str(trial.trial_id))
        if str(trial.trial_id) not in self._refused:
            self.done += self.cost(trial.config) if self.cost else 0.0
            self.finished += 1
            self.seeds_done += self.seeds(trial.config) if self.seeds else 0
        self._show()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """Notes the reason of a trial that failed."""
        self.error = self.error or result.get("error")
        if result.get("error") is not None:
            self._refused.add(str(trial.trial_id))
            self._tell()
        if self.error is None and "score" in result:
            self._best = max(self._best, float(result["score"]))
            telemetry.gauge("best_score", self._best)

    def _tell(self) -> None:
        telemetry.gauge("trials_planned", self.trials)
        telemetry.gauge("trials_done", self.finished)
        telemetry.gauge("trials_running", len(self._under_way))
        telemetry.gauge("trials_failed", self._lost + len(self._refused))
        if self.all_seeds:
            telemetry.gauge("seeds_planned", self.all_seeds)
            telemetry.gauge("seeds_done", self.seeds_done)

    def _show(self) -> None:
        self._tell()
        if self.on_progress is not None and self.trials:
            self.on_progress(round(self.done), round(self.total), f"{self.finished} of {self.trials} trials")


class Halt:
    """Tells runs in other threads to end. Pickled as a fresh one: it lives in the driver alone."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __reduce__(self) -> tuple[type[Halt], tuple[()]]:
        return Halt, ()


class _StopOnFailure(tune.Stopper):  # type: ignore[misc]
    """Ends the whole run when a trial has reported a failure, or when it is told to."""

    def __init__(self, halt: Halt | None) -> None:
        self.failed, self.halt = False, halt

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self.failed = self.failed or result.get("error") is not None
        return False

    def stop_all(self) -> bool:
        """Whether to end."""
        return self.failed or (self.halt is not None and self.halt.event.is_set())


def run_trials(
    trainable: Any, space: dict[str, Any] | None, config: Any, compute: Compute, store: Store | None, name: str, watch: Watch,
    halt: Halt | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Runs a Tuner and returns the configuration of each trial; several may run in threads of one driver."""
    resources = {"cpu": compute.trial_cpus, **({"gpu": compute.gpus_per_worker} if compute.gpus_per_worker else {})}
    _keep_credentials_out()
    run_name = f"{name}-{uuid.uuid4().hex[:8]}"  # never the name of an earlier try: Tune would take up its state
    with _storage(store, run_name) as (filesystem, root), _quiet():
        with _one_thread:  # Tune's table of functions can be written by one thread at a time
            tune.register_trainable(run_name, tune.with_resources(trainable, resources))
        tuner = tune.Tuner(
            run_name,
            param_space=space,
            tune_config=config,
            run_config=tune.RunConfig(
                name=run_name, storage_path=root, storage_filesystem=filesystem, verbose=0, callbacks=[watch],
                stop=_StopOnFailure(halt), failure_config=tune.FailureConfig(max_failures=compute.max_failures),
            ),
        )  # fmt: skip
        results = tuner.fit()
    if watch.error is not None:
        raise MedsslError(f"{name}: {watch.error}")
    if results.errors:
        lines = str(results.errors[0]).strip().splitlines() or ["a trial was lost"]
        raise MedsslError(f"{name}: {len(results.errors)} trials were given up after {compute.max_failures} tries: {lines[-1]}")
    return [dict(results[i].config or {}) for i in range(len(results))]


@contextmanager
def _storage(store: Store | None, run_name: str) -> Iterator[tuple[Any, str]]:
    """Filesystem and path for Tune's state, deleted at the end."""
    if store is None:
        with tempfile.TemporaryDirectory(prefix="medssl-tune-") as folder:
            yield retrying_filesystem(Path(folder).as_uri())
        return
    try:
        yield retrying_filesystem(store.uri_of("tune"))
    finally:
        store.delete_prefix(f"tune/{run_name}/")


def _keep_credentials_out() -> None:
    """Stops Tune from putting the driver's AWS keys into its trials' runtime environment, which Ray writes to its logs.

    Each node has credentials of its own, from its environment, profile or instance role. (There is no public switch; the
    test that looks for a secret in Ray's folders fails should this stop working.)
    """
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(
        {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Tune's tables on the terminal and the three log files that it adds to each trial by itself.

    Nor does Tune take Ctrl-C for itself: it would end the run and return as if all were done. What is changed is the process's,
    so of several threads the first changes it and the last puts it back.
    """
    with _one_thread:
        if not _quiet_now:
            stack = ExitStack()
            stack.enter_context(_made_quiet())
            _quiet_now.append(stack)
        _quiet_now.append(None)
    try:
        yield
    finally:
        with _one_thread:
            _quiet_now.pop()
            if len(_quiet_now) == 1:
                first = _quiet_now.pop()
                assert first is not None
                first.close()


@contextmanager
def _made_quiet() -> Iterator[None]:
    settings = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
    }
    before = {name: os.environ.get(name) for name in settings}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(settings)
    logger.setLevel(logging.ERROR)
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # it prints a line per trial at any verbosity
            yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def shared_out(compute: Compute, wanted: Sequence[int]) -> tuple[int, Compute]:
    """How many runs to have under way at once, so that their trials fill what one alone would not, and what each may use.

    Args:
        wanted: trials that each run has at most at once by itself.
    """
    slots = concurrent_trials(compute)
    runs = min(len(wanted), -(-slots // max(1, *wanted))) if wanted else 1
    return runs, compute.model_copy(update={"concurrent_trials": slots // runs}) if runs > 1 else compute


def concurrent_trials(compute: Compute, cluster: Mapping[str, float] | None = None) -> int:
    """Trials at once: as the recipe says, or what the cores hold beside those kept for reading."""
    if compute.concurrent_trials is not None:
        return compute.concurrent_trials
    cpus = int((cluster or ray.cluster_resources()).get("CPU", 1))
    return max(1, (cpus - 2) // compute.trial_cpus)


def trials_held(compute: Compute, cluster: Mapping[str, float] | None = None) -> int:
    """Of those, the trials that have their CPUs and GPUs at the same time: the others wait until some are free.

    Args:
        cluster: its CPUs and GPUs in all; those of the Ray that is connected where it is None.
    """
    there = cluster or ray.cluster_resources()
    fitting = [concurrent_trials(compute, there), int(there.get("CPU", 1)) // compute.trial_cpus]
    if compute.gpus_per_worker:
        fitting.append(int(there.get("GPU", 0)) * int(1 / compute.gpus_per_worker))  # a trial's part is of one GPU
    return max(1, min(fitting))


def short_names() -> dict[str, Any]:
    """Trials named by their number: Tune's own names hold every parameter."""
    return {"trial_name_creator": _trial_name, "trial_dirname_creator": _trial_name}


def _trial_name(trial: Any) -> str:
    return str(trial.trial_id)
