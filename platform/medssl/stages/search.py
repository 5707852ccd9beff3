"""The search over learning rate and weight decay: Optuna on Ray Tune, judged by a function of a point.

The score of each finished point goes into the store: a search that was interrupted finds them there and does not compute
them again. With `scheduler: asha` weak points are stopped between epochs (`halving.py`). Nothing here sees rows or labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from medssl.artifacts import digest_json
from medssl.compute import Compute
from medssl.errors import MedsslError, NonFiniteLoss
from medssl.protocols import Search
from medssl.stages.halving import Halving, Outcome, Outcomes, Point
from medssl.stages.progress import OnProgress
from medssl.stages.trials import Halt, Watch, concurrent_trials, fan_out, guarded, run_trials, short_names
from medssl.store import Store

__all__ = ["Found", "fan_out", "search", "shown_point"]

OnEpoch = Callable[[int, float], None]
"""Called with the number of an epoch, from 1, and the validation score after it."""
Objective = Callable[..., float]
"""Score of a point; with scheduler asha called with an OnEpoch too."""

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
    """The point of the highest score among those that were not stopped; of equals the one with the smaller learning rate, then
    weight decay."""
    score: float
    on_edge: bool
    """Whether the best lies on the border of the space in a parameter that varies: a wider space may hold a better one.
    A weight decay of 0 is no border."""
    stopped: tuple[dict[str, float], ...] = ()
    """Points that the scheduler stopped before their end; their score is the last they had."""


def search(
    objective: Objective,
    space: Search,
    *,
    store: Store,
    name: str,
    compute: Compute,
    epochs: int | None = None,
    on_progress: OnProgress | None = None,
    halt: Halt | None = None,
) -> Found:
    """Tries the points of a space, each once, as Tune trials, and returns all with the best.

    Args:
        objective: validation score of a point {"learning_rate", "weight_decay"}; called in a trial, pickled with what it
            holds. NonFiniteLoss counts as the worst score. With scheduler asha it is called with (point, on_epoch), and
            calls on_epoch(epoch, score) after each; a trial that is stopped does not come back from there.
        space: grid or tpe over learning rate and weight decay.
        store: the artifact's folder; scores of finished points lie there under `trials/`.
        name: name of the search, for Tune and for messages.
        compute: CPUs and GPUs of a trial, and how many run at once.
        epochs: of a whole training; scheduler asha needs them.
        halt: ends the search before its end, which then raises.

    Raises:
        MedsslError: a trial failed; its reason in one line.
        RecipeError: too few epochs for scheduler asha.
    """
    outcomes = Outcomes(store.uri)
    work = _Work(objective, space, outcomes, epochs)
    store.delete_prefix("tune/")  # what a killed run has left
    if space.sampler == "grid":
        # Whatever order the sampler takes, the points are known: one that is stored costs no trial at all.
        wanted = [
            {"learning_rate": rate, "weight_decay": decay}
            for rate in sorted(set(space.learning_rate))
            for decay in sorted(set(space.weight_decay))
        ]
        if any(outcomes.read(point) is None for point in wanted):
            _tune_search(work, store, name, compute, len(wanted), on_progress, halt)
    else:
        assert space.trials is not None
        configs = _tune_search(work, store, name, compute, space.trials, on_progress, halt)
        unique = {digest_json(point): point for point in map(_point, configs)}
        wanted = sorted(unique.values(), key=lambda point: (point["learning_rate"], point["weight_decay"]))
    points = [(point, outcomes.read(point)) for point in wanted]
    lost = [point for point, outcome in points if outcome is None]
    if lost:
        raise MedsslError(
            f"{name}: {len(lost)} of {len(points)} points have no score, the first is {shown_point(lost[0])}: run it again"
        )
    known = [(point, outcome) for point, outcome in points if outcome is not None]
    # The best of a rung always goes on, so at least one point has trained to its end.
    best, score = max(((point, o.score) for point, o in known if not o.stopped), key=lambda entry: entry[1])
    stopped = tuple(point for point, o in known if o.stopped)
    return Found([(point, o.score) for point, o in known], best, score, _on_edge(best, space), stopped)


# -- the search --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """What a trial does; goes to its process."""

    objective: Objective
    space: Search
    outcomes: Outcomes
    epochs: int | None

    def scheduler(self) -> Halving | None:
        """What stops trials, if anything."""
        if self.space.scheduler == "none":
            return None
        assert self.epochs is not None
        return Halving(self.space, self.epochs, self.outcomes, _point)

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        """The score of a point that has none; the known one, with its curve, of another."""
        point = _point(config)
        known = self.outcomes.read(point)
        if known is None:
            known = self._try(point)
            self.outcomes.write(point, known)
        elif self.space.scheduler != "none":
            for epoch, score in enumerate(known.curve, 1):
                _report(epoch, score, stored=True)
        return {"score": known.score}

    def _try(self, point: Point) -> Outcome:
        if self.space.scheduler == "none":
            return Outcome(_score(self.objective, point))
        curve: list[float] = []

        def on_epoch(epoch: int, score: float) -> None:
            if epoch != self.epochs:  # after the last there is nothing to stop
                curve.append(_finite(score, point))
                _report(epoch, curve[-1], stored=False)

        return Outcome(_score(self.objective, point, on_epoch), curve=tuple(curve))


def _report(epoch: int, score: float, *, stored: bool) -> None:
    """Tells Tune, and ends the trial here where it is to be stopped."""
    tune.report({"error": None, "score": score, "epoch": epoch, "stored": stored})


def _tune_search(
    work: _Work, store: Store, name: str, compute: Compute, trials: int, on_progress: OnProgress | None, halt: Halt | None
) -> list[dict[str, Any]]:
    """Runs the trials that have no score; returns the configuration of every trial."""
    config = tune.TuneConfig(
        metric="score", mode="max", search_alg=_optuna(work.space), scheduler=work.scheduler(), num_samples=trials,
        max_concurrent_trials=concurrent_trials(compute), reuse_actors=True, **short_names(),
    )  # fmt: skip
    watch = Watch(on_progress, lambda config: 1.0, float(trials), trials)
    return run_trials(guarded(work, compute.trial_cpus), None, config, compute, store, name, watch, halt)


def most_at_once(space: Search) -> int:
    """Trials that a search has under way at most: TPE waits for each batch."""
    return space.points if space.sampler == "grid" else min(space.points, _TPE_BATCH)


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


def _score(objective: Objective, point: Point, *on_epoch: OnEpoch) -> float:
    try:
        score = float(objective(point, *on_epoch))
    except NonFiniteLoss:
        return _WORST
    return _finite(score, point)


def _finite(score: float, point: Point) -> float:
    if not math.isfinite(score):
        raise MedsslError(
            f"the validation score of {shown_point(point)} is {score}: has the validation split images of two classes?"
        )
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


def shown_point(point: Mapping[str, float]) -> str:
    """In words."""
    return f"learning rate {point['learning_rate']:g}, weight decay {point['weight_decay']:g}"
