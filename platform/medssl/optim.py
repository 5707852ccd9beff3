"""Optimisers, parameter groups and schedules.

Schedules are pure functions of the step: nothing of them needs saving, and a resumed run computes the same values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor, nn

from medssl.params import Params


class OptimiserParams(Params):
    """Optimiser of a pretraining."""

    name: Literal["lars", "sgd", "adam", "adamw"] = "adamw"
    """lars excludes one-dimensional parameters (biases, batch norm) from adaptation and weight decay."""
    learning_rate: float = Field(1.5e-3, gt=0)
    """Peak learning rate, used as given: nothing rescales it."""
    bias_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of one-dimensional parameters; null means the same as the others."""
    weight_decay: float = Field(1e-6, ge=0)
    """Weight decay; one-dimensional parameters are excluded."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of lars and sgd, first beta of adam and adamw (one_cycle moves it, see the schedule)."""
    second_momentum: float = Field(0.999, ge=0, lt=1)
    """Second beta of adam and adamw."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the denominator by adam and adamw."""
    trust_coefficient: float = Field(0.001, gt=0)
    """eta of lars."""


class ScheduleParams(Params):
    """Learning rate over the steps of one training."""

    name: Literal["warmup_cosine", "one_cycle", "constant", "step"] = "warmup_cosine"
    """one_cycle: start at peak/25, up over `warmup_share`, down to peak/1e5, momentum inverse. step: times `step_factor` after
    every `step_epochs`."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Linear warm-up of warmup_cosine, in passes over the images."""
    warmup_steps: int | None = Field(None, ge=1)
    """The same in steps, in place of warmup_epochs: where a paper's epoch is no pass over the images."""
    warmup_share: float = Field(0.25, ge=0, lt=1)
    """Share of one_cycle's steps that go up."""
    final_factor: float = Field(0.001, ge=0, le=1)
    """Final learning rate of warmup_cosine as a share of the peak."""
    step_epochs: float = Field(30.0, gt=0)
    """Epochs between the drops of step."""
    step_factor: float = Field(0.1, gt=0, le=1)
    """What step multiplies the learning rate with at each drop."""
    momentum_high: float = Field(0.95, ge=0, lt=1)
    """one_cycle's momentum (first beta) where the learning rate is lowest; replaces the optimiser's."""
    momentum_low: float = Field(0.85, ge=0, lt=1)
    """one_cycle's momentum (first beta) at the peak of the learning rate."""

    @model_validator(mode="after")
    def _check(self) -> ScheduleParams:
        if self.momentum_low > self.momentum_high:
            raise ValueError(f"momentum_low {self.momentum_low} is above momentum_high {self.momentum_high}")
        if self.warmup_steps is not None and self.warmup_epochs:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs} and warmup_steps {self.warmup_steps}: give one of them")
        return self

    @model_serializer(mode="wrap")
    def _without_idle_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A schedule in epochs is named as it was before there were steps."""
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name != "warmup_steps" or value is not None}


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with momentum (You et al. 2017), as in the Barlow Twins authors' `main.py`.

    The gradient with weight decay is scaled by eta * |p| / |g| (by 1 where either norm is 0) before momentum. Groups with
    `adapt=False` (one-dimensional parameters) are neither scaled nor decayed. Nothing waits for the device.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update from the gradients in place."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        update = parameter.grad
        if group["adapt"]:
            update = update.add(parameter, alpha=group["weight_decay"])
            parameter_norm, update_norm = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(update)
            ratio = group["trust_coefficient"] * parameter_norm / update_norm
            update = update * torch.where((parameter_norm > 0) & (update_norm > 0), ratio, torch.ones_like(ratio))
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
        parameter.add_(velocity, alpha=-group["lr"])


def parameter_groups(module: nn.Module, params: OptimiserParams, constant: Iterable[Tensor] = ()) -> list[dict[str, Any]]:
    """Weights, then one-dimensional parameters (without decay, at the bias rate); then the same two of the parameters in
    `constant`, whose rate no schedule moves. `peak` is the group's peak rate.
    """
    still = {id(p) for p in constant}
    bias_rate = params.learning_rate if params.bias_learning_rate is None else params.bias_learning_rate
    groups: list[dict[str, Any]] = []
    for fixed in (False, True):
        trained = [p for p in module.parameters() if p.requires_grad and (id(p) in still) == fixed]
        weights, flat = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        decay, rate = params.weight_decay, params.learning_rate
        groups.append({"params": weights, "weight_decay": decay, "lr": rate, "adapt": True, "constant": fixed})
        groups.append({"params": flat, "weight_decay": 0.0, "lr": bias_rate, "adapt": False, "constant": fixed})
    return [{**group, "peak": group["lr"]} for group in groups if group["params"]]


def build_optimiser(
    module: nn.Module, params: OptimiserParams, constant: Iterable[Tensor] = ()
) -> torch.optim.Optimizer:
    """The optimiser of `params` over the module's trained parameters; no schedule moves the rate of those in `constant`."""
    groups, rate = parameter_groups(module, params, constant), params.learning_rate
    betas = (params.momentum, params.second_momentum)
    if params.name == "lars":
        return LARS(groups, rate, momentum=params.momentum, trust_coefficient=params.trust_coefficient)
    if params.name == "sgd":
        return torch.optim.SGD(groups, rate, momentum=params.momentum)
    if params.name == "adam":
        return torch.optim.Adam(groups, rate, betas, params.epsilon)
    return torch.optim.AdamW(groups, rate, betas, params.epsilon)


def warmup_cosine(step: int, total_steps: int, warmup_steps: float, final_factor: float) -> float:
    """Share of the peak at `step` (from 0): linear from 0, then half a cosine to `final_factor` (Barlow Twins' authors)."""
    if step < warmup_steps:
        return step / warmup_steps
    share = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1.0, total_steps - warmup_steps)))
    return share + final_factor * (1 - share)


def _cosine(start: float, end: float, position: float) -> float:
    return start + (end - start) * (1 - math.cos(math.pi * position)) / 2


def one_cycle(step: int, total_steps: int, warmup_share: float, momentum_high: float, momentum_low: float) -> tuple[float, float]:
    """Share of the peak and momentum at `step` (from 0): peak/25 up to the peak, down to peak/1e5, on cosines.

    fastai's defaults (the library of paper 000's authors); the momentum goes the other way round.
    """
    position = step / total_steps
    if position < warmup_share:
        up = position / warmup_share
        return _cosine(1 / 25, 1.0, up), _cosine(momentum_high, momentum_low, up)
    down = (position - warmup_share) / (1 - warmup_share)
    return _cosine(1.0, 1e-5, down), _cosine(momentum_low, momentum_high, down)


class Rate(NamedTuple):
    """What a schedule says for one step: share of the peak learning rate, and the momentum where the schedule moves it."""

    factor: float
    momentum: float | None


def scheduled(params: ScheduleParams, step: int, total_steps: int, steps_per_epoch: int) -> Rate:
    """The schedule at `step`, counted from 0 to total_steps - 1."""
    if params.name == "one_cycle":
        return Rate(*one_cycle(step, total_steps, params.warmup_share, params.momentum_high, params.momentum_low))
    if params.name == "warmup_cosine":
        warmup_steps = params.warmup_steps or params.warmup_epochs * steps_per_epoch
        return Rate(warmup_cosine(step, total_steps, warmup_steps, params.final_factor), None)
    if params.name == "step":
        return Rate(params.step_factor ** int(step // (params.step_epochs * steps_per_epoch)), None)
    return Rate(1.0, None)


def apply_rate(optimiser: torch.optim.Optimizer, rate: Rate) -> float:
    """Sets each group's learning rate (and momentum where the schedule moves it); returns the first group's."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * (1.0 if group["constant"] else rate.factor)
        if rate.momentum is not None:
            if "betas" in group:
                group["betas"] = (rate.momentum, group["betas"][1])
            else:
                group["momentum"] = rate.momentum
    return float(optimiser.param_groups[0]["lr"])


def clip_gradient(parameters: Iterable[Tensor], largest_norm: float | None) -> Tensor:
    """L2 norm () of all gradients before clipping; where `largest_norm` is given, gradients are scaled down to it.

    A norm that is not finite stays visible in the value returned; nothing is raised and nothing waits for the device.
    """
    trained = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if largest_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(trained, largest_norm, norm)
    return norm
