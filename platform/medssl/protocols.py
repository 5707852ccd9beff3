"""How features are judged: the evaluation protocols of a recipe, and the search over learning rate and weight decay."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medssl.errors import nearest
from medssl.metrics import LOWER_IS_BETTER, SCORES
from medssl.params import Params
from medssl.probes.knn import KnnParams
from medssl.probes.linear import LinearProbeParams
from medssl.probes.mlp import MlpProbeParams
from medssl.training.finetune import FineTuneParams
from medssl.views import ViewParams

NAME = r"^[a-z0-9][a-z0-9_.-]{0,63}$"
"""Pattern of the names that users give."""

_HALVING = ("grace_epochs", "reduction_factor")


def check_metric(name: str) -> None:
    """Raises ValueError with the nearest name when there is no such metric."""
    if name not in SCORES:
        raise ValueError(f"unknown metric '{name}': {nearest(name, SCORES)}")


class Search(Params):
    """Search over learning rate and weight decay, judged on the validation split only, the same for every arm.

    It runs on the arm's first pretraining seed and the first label draw, once per arm and protocol.
    """

    sampler: Literal["grid", "tpe"] = "grid"
    """grid: every pair once. tpe: Optuna's tree-structured Parzen estimator between the smallest and largest values."""
    learning_rate: tuple[float, ...] = Field((1e-2,), min_length=1)
    """Learning rates; one value and one weight decay mean no search."""
    weight_decay: tuple[float, ...] = Field((0.0,), min_length=1)
    """Weight decays."""
    trials: int | None = Field(None, ge=1)
    """Points that tpe tries; not for grid, which tries all."""
    metric: str = "balanced_accuracy"
    """Metric on the validation split that is maximised."""
    head_seeds: int = Field(3, ge=1)
    """Head seeds whose mean score is a point's score."""
    scheduler: Literal["none", "asha"] = "none"
    """none: every point is trained to its end. asha: asynchronous successive halving (Li et al., 2020) stops the weak ones of a
    fine-tuning between epochs, by the validation score of the first head seed; only points trained to their end with all head
    seeds can be chosen. Which points are stopped also depends on which trial was faster; what was stopped stays so."""
    grace_epochs: int = Field(1, ge=1)
    """Epochs, after the head's own, before asha may stop a point."""
    reduction_factor: int = Field(3, ge=2)
    """asha lets about one in so many points go on, after grace_epochs times each power of it."""

    @model_validator(mode="after")
    def _consistent(self) -> Search:
        check_metric(self.metric)
        if self.metric in LOWER_IS_BETTER:
            fitting = ", ".join(sorted(set(SCORES) - LOWER_IS_BETTER))
            raise ValueError(f"a search takes the highest {self.metric}, of which less is better: choose from {fitting}")
        if min(self.learning_rate) <= 0:
            raise ValueError(f"learning_rate holds {min(self.learning_rate):g}: give values above 0")
        if min(self.weight_decay) < 0:
            raise ValueError(f"weight_decay holds {min(self.weight_decay):g}: give 0 or more")
        if (self.sampler == "tpe") != (self.trials is not None):
            raise ValueError("trials is needed for sampler tpe and refused for grid")
        halving = {name: getattr(self, name) for name in _HALVING}
        if self.scheduler == "none" and halving != {name: type(self).model_fields[name].default for name in _HALVING}:
            raise ValueError(f"{' and '.join(_HALVING)} belong to scheduler asha: set it, or leave them out")
        return self

    @model_serializer(mode="wrap")
    def _without_idle_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A search without scheduler is named as it was before there were schedulers."""
        fields: dict[str, Any] = handler(self)
        idle = ("scheduler", *_HALVING) if self.scheduler == "none" else ()
        return {name: value for name, value in fields.items() if name not in idle}

    @property
    def needed(self) -> bool:
        """Whether there is anything to search: one pair of values is taken as it is."""
        return self.sampler == "tpe" or self.points > 1

    @property
    def points(self) -> int:
        """Trials of the search."""
        return self.trials or len(self.learning_rate) * len(self.weight_decay)


class ProtocolBase(Params):
    """What every evaluation protocol has."""

    name: str = Field(pattern=NAME)
    """Name of the protocol in tables and comparisons."""
    arms: tuple[str, ...] | None = Field(None, min_length=1)
    """Arms that it judges; null judges all."""
    head_seeds: int = Field(35, ge=1)
    """Independent heads (fine-tunings) per pretraining seed and label draw."""
    pretraining_seeds: int | None = Field(None, ge=1)
    """Evaluate only the first so many pretraining seeds; null all."""
    label_draws: int | None = Field(None, ge=1)
    """Evaluate only the first so many label draws; null all."""
    labels: Annotated[int, Field(ge=2)] | Annotated[float, Field(gt=0, lt=1)] | Literal["all"] | None = None
    """Labelled training images in one draw: a number, a share of each class (a smaller share is a part of a larger one), or all
    (then one draw); null as `repeats.labels` says. A list stands for a protocol at each value."""
    curve: str | None = None
    """Label curve that the protocol is a point of: the report draws the protocols of one curve together. A list of `labels` sets
    it."""
    search: Search = Search()
    """Search space of learning rate and weight decay."""

    @model_validator(mode="after")
    def _stops_between_epochs(self) -> ProtocolBase:
        kind = getattr(self, "kind", None)
        if self.search.scheduler == "asha" and kind != "fine_tune":
            raise ValueError(
                f"protocol '{self.name}': scheduler asha stops trainings between epochs, and the heads of a {kind} train in one "
                "pass: set it to none"
            )
        return self

    @property
    def fixed_point(self) -> dict[str, float] | None:
        """What the heads are trained with where nothing is searched for; None where a search says."""
        search = self.search
        return None if search.needed else {"learning_rate": search.learning_rate[0], "weight_decay": search.weight_decay[0]}


class LinearProbe(ProtocolBase):
    """A linear classifier on frozen features; all heads train in lockstep."""

    kind: Literal["linear_probe"] = "linear_probe"
    """Which protocol this is."""
    probe: LinearProbeParams = LinearProbeParams()
    """Training of the heads."""


class MlpProbe(ProtocolBase):
    """A classifier of two layers on frozen features (paper 001); all heads train in lockstep."""

    kind: Literal["mlp_probe"] = "mlp_probe"
    """Which protocol this is."""
    probe: MlpProbeParams = MlpProbeParams()
    """Training of the heads."""


class Knn(ProtocolBase):
    """The nearest labelled images vote, by cosine similarity of frozen features; nothing is trained, so one seed is all."""

    kind: Literal["knn"] = "knn"
    """Which protocol this is."""
    head_seeds: int = Field(1, ge=1, le=1)
    """1: without training there is no chance in a head."""
    probe: KnnParams = KnnParams()
    """The votes."""

    @model_validator(mode="after")
    def _searches_nothing(self) -> Knn:
        if self.search != Search():
            raise ValueError(f"protocol '{self.name}': kNN trains nothing, so there is no search: leave it out")
        return self

    @property
    def fixed_point(self) -> dict[str, float]:
        """Nothing is trained."""
        return {}


class FineTune(ProtocolBase):
    """The whole network trained on the labels; each seed is a trial of its own.

    Seeds differ in the head's first weights, the order of the images and every augmentation drawn: they are whole trainings, of
    which, unlike a probe's heads, no part can be held fixed at no cost.
    """

    kind: Literal["fine_tune"] = "fine_tune"
    """Which protocol this is."""
    training: FineTuneParams = FineTuneParams()
    """Training of network and head."""

    @model_validator(mode="after")
    def _one_source_of_rates(self) -> FineTune:
        if self.training.learning_rate_finder and (self.search.sampler == "tpe" or len(set(self.search.learning_rate)) > 1):
            raise ValueError(
                f"protocol '{self.name}': the learning-rate finder picks each seed's rate: give search.learning_rate one value"
            )
        epochs, grace = self.training.epochs, self.search.grace_epochs
        if self.search.scheduler == "asha" and epochs is not None and grace >= epochs:
            raise ValueError(
                f"protocol '{self.name}': asha stops nothing in {epochs} epochs with {grace} grace_epochs: give fewer"
            )
        return self

    def kept_otherwise(self) -> FineTune:
        """The same with the other choice of which head seeds leave their weights: searches and head seed 0 come out alike."""
        other = "first" if self.training.keep_weights == "all" else "all"
        return self.model_copy(update={"training": self.training.model_copy(update={"keep_weights": other})})


Probe = LinearProbe | MlpProbe | Knn
"""Protocols on frozen features."""
Protocol = Annotated[LinearProbe | MlpProbe | Knn | FineTune, Field(discriminator="kind")]
KINDS = ("linear_probe", "mlp_probe", "knn", "fine_tune")
"""Of protocols."""


def views_of(protocol: Protocol) -> ViewParams | None:
    """Augmentation of the labelled images; None where a protocol has none."""
    if protocol.kind == "fine_tune":
        return protocol.training.views
    return None if protocol.kind == "knn" else protocol.probe.bank_views
