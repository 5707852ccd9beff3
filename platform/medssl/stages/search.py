"""Ray Tune: the search over learning rate and weight decay with Optuna, and the fan-out of independent tasks.

What a trial finds goes into the store, not into Tune's metrics: a search that was interrupted finds the scores of its
finished points there and does not compute them again. Tune keeps its own state below the same store while it runs, through
the retrying filesystem; it is deleted at the end. Nothing here sees rows or labels: an objective is a function of a point.

Tune would replay any exception. Only lost processes and lost storage are worth that, so a trial turns every other failure
into a result, which stops the run at once.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import tune

from medssl.artifacts import digest_json
from medssl.errors import MedsslError, MissingKey, NonFiniteLoss, StoreError
from medssl.filesystem import retrying_filesystem
from medssl.recipe import Compute, Search
from medssl.stages.progress import OnProgress
from medssl.store import Store, open_store

Task = TypeVar("Task")
Point = Mapping[str, float]
Objective = Callable[[Point], float]

_TPE_BATCH = 4
"""Points that TPE proposes at a time. It waits for all of them, so that what it proposes next does not depend on which
trial was faster, nor on how many the machine runs at once."""
_WORST = 0.0
"""Score of a point whose training diverged: the least that any metric gives."""
_NO_DECAY = "no_weight_decay"


@dataclass(frozen=True)
class Found:
    """What a search found."""

    points: list[tuple[dict[str, float], float]]
    """Every point (learning_rate, weight_decay) with its score, in the order of the grid, or of their values for tpe."""
    best: dict[str, float]
    """The point of the highest score; of equals the one with the smaller learning rate, then weight decay."""
    score: float
    on_edge: bool
    """Whether the best lies on the border of the space in a parameter that varies: a wider space may hold a better one.
    A weight decay of 0 is no border."""


def search(
    objective: Objective,
    space: Search,
    *,
    store: Store,
    name: str,
    compute: Compute,
    on_progress: OnProgress | None = None,
) -> Found:
    """Tries the points of a space, each once, as Tune trials, and returns all with the best.

    Args:
        objective: validation score of a point {"learning_rate", "weight_decay"}; called in a trial, pickled with what it
            holds. NonFiniteLoss counts as the worst score.
        space: grid or tpe over learning rate and weight decay.
        store: the artifact's folder; scores of finished points lie there under `trials/`.
        name: name of the search, for Tune and for messages.
        compute: CPUs and GPUs of a trial, and how many run at once.

    Raises:
        MedsslError: a trial failed; its reason in one line.
    """
    scores = _Scores(store.uri)
    if space.sampler == "grid":
        # Whatever order the sampler takes, the points are known: one that is stored costs no trial at all.
        wanted = [
            {"learning_rate": rate, "weight_decay": decay}
            for rate in sorted(set(space.learning_rate))
            for decay in sorted(set(space.weight_decay))
        ]
        if any(scores.read(point) is None for point in wanted):
            _tune_search(objective, space, scores, store, name, compute, len(wanted), on_progress)
    else:
        assert space.trials is not None
        configs = _tune_search(objective, space, scores, store, name, compute, space.trials, on_progress)
        unique = {digest_json(point): point for point in map(_point, configs)}
        wanted = sorted(unique.values(), key=lambda point: (point["learning_rate"], point["weight_decay"]))
    points = [(point, scores.read(point)) for point in wanted]
    lost = [point for point, score in points if score is None]
    if lost:
        raise MedsslError(
            f"{name}: {len(lost)} of {len(points)} points have no score, the first is {_shown(lost[0])}: run it again"
        )
    known = [(point, score) for point, score in points if score is not None]
    best, score = max(known, key=lambda entry: entry[1])
    return Found(known, best, score, _on_edge(best, space))


def fan_out(
    function: Callable[[Task], object],
    tasks: Sequence[Task],
    *,
    compute: Compute,
    store: Store | None = None,
    weights: Sequence[float] | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Calls `function` on every task, each in a Tune trial; what it makes it leaves in the store itself.

    Trials of one worker process follow each other, so what a task opened and cached is there for the next. A lost process
    is replaced and its task done again, up to `compute.max_failures` times.

    Args:
        store: where Tune keeps its state while it runs; needed on more than one node. None takes a temporary folder.
        weights: cost of each task, for progress; default 1.

    Raises:
        MedsslError: a task failed; its reason in one line. Tasks that had not begun are not begun.
    """
    if not tasks:
        return
    costs = [1.0] * len(tasks) if weights is None else list(weights)

    def run(config: dict[str, Any], tasks: Sequence[Task]) -> dict[str, Any]:
        function(tasks[config["task"]])
        return {}

    trainable = tune.with_parameters(_guarded(run, compute.trial_cpus), tasks=list(tasks))
    watch = _Watch(on_progress, lambda config: costs[config["task"]], sum(costs), len(tasks))
    config = tune.TuneConfig(max_concurrent_trials=_concurrent(compute), reuse_actors=True, **_short_names())
    _fit(trainable, {"task": tune.grid_search(list(range(len(tasks))))}, config, compute, store, "tasks", watch)


# -- the search --------------------------------------------------------------------------------------------------


class _Scores:
    """Scores of finished points in an artifact's folder."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def read(self, point: Point) -> float | None:
        """The score of a point, or None."""
        try:
            return float(json.loads(open_store(self.uri, create=True).read(self._key(point)))["score"])
        except MissingKey:
            return None

    def write(self, point: Point, score: float) -> None:
        """Keeps the score of a point."""
        data = json.dumps({**point, "score": score}, allow_nan=False)
        open_store(self.uri, create=True).write(self._key(point), data.encode())

    def _key(self, point: Point) -> str:
        return f"trials/{digest_json(dict(point))[:20]}.json"


def _tune_search(
    objective: Objective, space: Search, scores: _Scores, store: Store, name: str, compute: Compute, trials: int,
    on_progress: OnProgress | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Runs the trials that have no score; returns the configuration of every trial."""
    from ray.tune.search import ConcurrencyLimiter

    def run(config: dict[str, Any]) -> dict[str, Any]:
        point = _point(config)
        score = scores.read(point)
        if score is None:
            score = _score(objective, point)
            scores.write(point, score)
        return {"score": score}

    algorithm: Any = _optuna(space)
    if space.sampler == "tpe":
        algorithm = ConcurrencyLimiter(algorithm, max_concurrent=_TPE_BATCH, batch=True)
    config = tune.TuneConfig(
        metric="score", mode="max", search_alg=algorithm, num_samples=trials,
        max_concurrent_trials=None if space.sampler == "tpe" else _concurrent(compute), reuse_actors=True, **_short_names(),
    )  # fmt: skip
    watch = _Watch(on_progress, lambda config: 1.0, float(trials), trials)
    return _fit(_guarded(run, compute.trial_cpus), None, config, compute, store, name, watch)


def _optuna(space: Search) -> Any:
    """Tune's Optuna search over the space."""
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rates, decays = sorted(set(space.learning_rate)), sorted(set(space.weight_decay))
    distributions: dict[str, Any]
    if space.sampler == "grid":
        grid: dict[str, Any] = {"learning_rate": rates, "weight_decay": decays}
        distributions = {key: CategoricalDistribution(values) for key, values in grid.items()}
        sampler: Any = optuna.samplers.GridSampler(grid, seed=0)
    else:
        positive = [decay for decay in decays if decay > 0]
        distributions = {"learning_rate": FloatDistribution(rates[0], rates[-1], log=True)}
        if positive:
            distributions["weight_decay"] = FloatDistribution(positive[0], positive[-1], log=True)
        if positive and len(positive) < len(decays):  # 0 has no place on a logarithmic scale
            distributions[_NO_DECAY] = CategoricalDistribution([False, True])
        sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=min(10, max(4, (space.trials or 0) // 3)))
    return OptunaSearch(distributions, metric="score", mode="max", sampler=sampler)


def _point(config: Mapping[str, Any]) -> dict[str, float]:
    """Learning rate and weight decay of a trial's configuration."""
    decay = 0.0 if config.get(_NO_DECAY) else float(config.get("weight_decay", 0.0))
    return {"learning_rate": float(config["learning_rate"]), "weight_decay": decay}


def _score(objective: Objective, point: Point) -> float:
    try:
        score = float(objective(point))
    except NonFiniteLoss:
        return _WORST
    if not math.isfinite(score):
        raise MedsslError(f"the validation score of {_shown(point)} is {score}: has the validation split images of two classes?")
    return score


def _on_edge(best: Point, space: Search) -> bool:
    """Whether a varied parameter lies at its least or greatest value; for tpe within 5% of the (logarithmic) range."""
    for name, values in (("learning_rate", space.learning_rate), ("weight_decay", space.weight_decay)):
        value, low, high = best[name], min(values), max(values)
        if low == high or value == 0:
            continue
        if space.sampler == "tpe":
            low = min(v for v in values if v > 0)
            margin = 0.05 * math.log(high / low)
            if math.log(value / low) < margin or math.log(high / value) < margin:
                return True
        elif value in (low, high):
            return True
    return False


def _shown(point: Point) -> str:
    return f"learning rate {point['learning_rate']:g}, weight decay {point['weight_decay']:g}"


# -- Tune --------------------------------------------------------------------------------------------------------


def _guarded(run: Callable[..., dict[str, Any]], cpus: int) -> Callable[..., None]:
    """A Tune function that reports what `run` returns, or the reason for which it failed."""

    def trial(config: dict[str, Any], **parameters: Any) -> None:
        import torch

        torch.set_num_threads(cpus)
        try:
            tune.report({"error": None, **run(config, **parameters)})
        except (StoreError, ray.exceptions.RayError):
            raise  # lost storage, lost processes: Tune starts the trial anew
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            reason = text[0] if isinstance(error, MedsslError) else f"{type(error).__name__}: {text[0]}"
            tune.report({"error": reason, "score": _WORST})

    return trial


class _Watch(tune.Callback):
    """Adds up what finished, and keeps the first failure. Pickled as an empty one: it lives in the driver alone."""

    def __init__(
        self,
        on_progress: OnProgress | None = None,
        cost: Callable[[dict[str, Any]], float] | None = None,
        total: float = 0.0,
        trials: int = 0,
    ) -> None:
        self.on_progress, self.cost, self.total, self.trials = on_progress, cost, total, trials
        self.error: str | None = None
        self.done, self.finished = 0.0, 0

    def __reduce__(self) -> tuple[type[_Watch], tuple[()]]:
        return _Watch, ()

    def setup(self, *args: Any, **info: Any) -> None:
        """Shows the empty bar."""
        self._show()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Counts a trial."""
        self.done += self.cost(trial.config) if self.cost else 0.0
        self.finished += 1
        self._show()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """Notes the reason of a trial that failed."""
        self.error = self.error or result.get("error")

    def _show(self) -> None:
        if self.on_progress is not None and self.trials:
            self.on_progress(round(self.done), round(self.total), f"{self.finished} of {self.trials} trials")


class _StopOnFailure(tune.Stopper):
    """Ends the whole run when a trial has reported a failure."""

    def __init__(self) -> None:
        self.failed = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self.failed = self.failed or result.get("error") is not None
        return False

    def stop_all(self) -> bool:
        """Whether to end."""
        return self.failed


def _fit(
    trainable: Any, space: dict[str, Any] | None, config: Any, compute: Compute, store: Store | None, name: str, watch: _Watch
) -> list[dict[str, Any]]:
    """Runs a Tuner and returns the configuration of each trial."""
    resources = {"cpu": compute.trial_cpus, **({"gpu": compute.gpus_per_worker} if compute.gpus_per_worker else {})}
    run_name = f"{name}-{uuid.uuid4().hex[:8]}"  # never the name of an earlier try: Tune would take up its state
    with _storage(store, run_name) as (filesystem, root), _quiet():
        tuner = tune.Tuner(
            tune.with_resources(trainable, resources),
            param_space=space,
            tune_config=config,
            run_config=tune.RunConfig(
                name=run_name, storage_path=root, storage_filesystem=filesystem, verbose=0, callbacks=[watch],
                stop=_StopOnFailure(), failure_config=tune.FailureConfig(max_failures=compute.max_failures),
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the loggers that Tune adds by itself: a CSV, a JSON and a TensorBoard file for each trial."""
    name = "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _concurrent(compute: Compute) -> int:
    """Trials at once: as the recipe says, or what the cores hold beside those kept for reading."""
    if compute.concurrent_trials is not None:
        return compute.concurrent_trials
    cpus = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    return max(1, (cpus - 2) // compute.trial_cpus)


def _short_names() -> dict[str, Any]:
    """Trials named by their number: Tune's own names hold every parameter."""
    return {"trial_name_creator": _trial_name, "trial_dirname_creator": _trial_name}


def _trial_name(trial: Any) -> str:
    return str(trial.trial_id)
