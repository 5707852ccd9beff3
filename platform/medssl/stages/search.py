"""The search over learning rate and weight decay: Optuna on Ray Tune, judged by a function of a point.

The score of each finished point goes into the store: a search that was interrupted finds them there and does not compute
them again. Nothing here sees rows or labels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from medssl.artifacts import digest_json
from medssl.errors import MedsslError, MissingKey, NonFiniteLoss
from medssl.protocols import Search
from medssl.recipe import Compute
from medssl.stages.progress import OnProgress
from medssl.stages.trials import Watch, concurrent_trials, fan_out, guarded, run_trials, short_names
from medssl.store import Store, open_for_writing

__all__ = ["Found", "fan_out", "search"]

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
    store.delete_prefix("tune/")  # what a killed run has left
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


# -- the search --------------------------------------------------------------------------------------------------


class _Scores:
    """Scores of finished points in an artifact's folder."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def read(self, point: Point) -> float | None:
        """The score of a point, or None."""
        try:
            return float(json.loads(open_for_writing(self.uri).read(self._key(point)))["score"])
        except MissingKey:
            return None

    def write(self, point: Point, score: float) -> None:
        """Keeps the score of a point."""
        data = json.dumps({**point, "score": score}, allow_nan=False)
        open_for_writing(self.uri).write(self._key(point), data.encode())

    def _key(self, point: Point) -> str:
        return f"trials/{digest_json(dict(point))[:20]}.json"


def _tune_search(
    objective: Objective, space: Search, scores: _Scores, store: Store, name: str, compute: Compute, trials: int,
    on_progress: OnProgress | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Runs the trials that have no score; returns the configuration of every trial."""

    def run(config: dict[str, Any]) -> dict[str, Any]:
        point = _point(config)
        score = scores.read(point)
        if score is None:
            score = _score(objective, point)
            scores.write(point, score)
        return {"score": score}

    config = tune.TuneConfig(
        metric="score", mode="max", search_alg=_optuna(space), num_samples=trials,
        max_concurrent_trials=concurrent_trials(compute), reuse_actors=True, **short_names(),
    )  # fmt: skip
    watch = Watch(on_progress, lambda config: 1.0, float(trials), trials)
    return run_trials(guarded(run, compute.trial_cpus), None, config, compute, store, name, watch)


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
    algorithm = OptunaSearch(distributions, metric="score", mode="max", sampler=sampler)
    return algorithm if space.sampler == "grid" else _Batches(algorithm, _TPE_BATCH)


class _Batches(Searcher):  # type: ignore[misc]
    """Tells a searcher the results of a batch when all of it is finished, in the order of asking.

    Tune's own limiter tells early when the first of a batch end before the last were asked for.
    """

    def __init__(self, inner: Any, size: int) -> None:
        super().__init__(metric=inner.metric, mode=inner.mode)
        self.inner, self.size = inner, size
        self.asked: list[str] = []
        self.finished: dict[str, tuple[dict[str, Any] | None, bool]] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """As the searcher within."""
        return bool(self.inner.set_search_properties(metric, mode, config, **spec))

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next point, or None until the batch is finished."""
        if len(self.asked) == self.size:
            return None
        suggestion: dict[str, Any] | None = self.inner.suggest(trial_id)
        if suggestion is not None:
            self.asked.append(trial_id)
        return suggestion

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Keeps a result, and hands on those of a whole batch."""
        self.finished[trial_id] = (result, error)
        if len(self.asked) == self.size and all(asked in self.finished for asked in self.asked):
            for asked in self.asked:
                told, failed = self.finished[asked]
                self.inner.on_trial_complete(asked, result=told, error=failed)
            self.asked, self.finished = [], {}

    def save(self, checkpoint_path: str) -> None:
        """As the searcher within."""
        self.inner.save(checkpoint_path)

    def restore(self, checkpoint_path: str) -> None:
        """As the searcher within."""
        self.inner.restore(checkpoint_path)


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
