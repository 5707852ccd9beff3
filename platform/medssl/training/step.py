"""One optimiser step of a pretraining: views, forward, backward, clipping, update.

Shapes: B images of this rank, N images of the global batch, H, W, C stored images, E feature width.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from medssl.collectives import Process, all_gather, convert_batch_norm
from medssl.errors import RecipeError
from medssl.networks.encoder import build_encoder, feature_width, load_weights
from medssl.networks.surgery import operate
from medssl.objectives import METHODS, Clock, Objective
from medssl.optim import OptimiserParams, Rate, apply_rate, build_optimiser, clip_gradient, scheduled
from medssl.training.feed import Batch
from medssl.training.finder import RangeTest, range_test
from medssl.training.freezing import last_block, sees_the_batch, train_part
from medssl.training.plan import PretrainPlan
from medssl.views import MultiViews, eval_view, generator_for

logger = logging.getLogger(__name__)


class Pretraining(nn.Module):
    """The encoder and the objective with what it owns: what is trained."""

    def __init__(self, encoder: nn.Module, objective: Objective, encoder_parts: int = 1, surgery: str | None = None) -> None:
        """`surgery` says what was done to the encoder beforehand."""
        super().__init__()
        self.surgery = surgery
        self.encoder = encoder
        self.objective = objective
        self.encoder_parts = encoder_parts

    def forward(self, *views: Tensor, labels_B: Tensor | None = None) -> dict[str, Tensor]:
        """Views (B, C, H, W), and for a method that takes them (B,) labels -> `loss`, the objective's terms by name, and
        `features` and `features2` (B, E).
        """
        labels = {} if labels_B is None else {"labels_B": labels_B}
        found: dict[str, Tensor] = self.objective(self._encode, views, **labels)
        return found

    def _encode(self, images_BCHW: Tensor) -> Tensor:
        """(B, E) features; in parts whose activations are computed again in the backward pass, where so asked."""
        if self.encoder_parts == 1:
            whole: Tensor = self.encoder(images_BCHW)
            return whole
        parts = images_BCHW.chunk(self.encoder_parts)
        return torch.cat([checkpoint(self.encoder, part, use_reentrant=False) for part in parts])


def check_plan(plan: PretrainPlan) -> None:
    """Raises RecipeError where encoder and plan do not go together. Costs no memory: the network is built without weights."""
    with torch.device("meta"):
        encoder = build_encoder(plan.encoder, plan.seed)
    _check_encoder(plan, encoder)


def _check_encoder(plan: PretrainPlan, encoder: nn.Module) -> None:
    name, further = plan.encoder.name, plan.further
    if further.trained == "last_block":
        last_block(encoder)
    train_part(encoder, further.trained, further.frozen_batch_norm)
    if plan.encoder_parts > 1 and sees_the_batch(encoder):
        raise RecipeError(
            f"encoder_parts is {plan.encoder_parts}, but the batch norm of {name} would see one part at a time, which changes "
            "the result: use 1, a smaller batch, or an encoder without batch norm (vit_*, convnext*)"
        )
    if plan.surgery is not None and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in encoder.modules()):
        raise RecipeError(f"surgery rescales convolutions with a batch norm behind them, and {name} has none: leave it out")
    given_size = getattr(encoder, "pretrained_cfg", None) or {}
    if plan.views.small_crops and plan.views.small_px != plan.encoder.image_px and given_size.get("fixed_input_size"):
        raise RecipeError(f"{name} takes images of one size only: set views.small_crops to 0, or use a convolutional encoder")
    encoder.train().requires_grad_(True)


def build_pretraining(
    plan: PretrainPlan, initial_encoder: bytes | None = None, sample_BHWC: Tensor | None = None
) -> Pretraining:
    """Encoder and objective with random weights from the plan's seed; the encoder's from `initial_encoder` where given, after
    the plan's surgery, which says how far it moves the features of `sample_BHWC` (uint8).

    Raises RecipeError where encoder and plan do not go together.
    """
    encoder = build_encoder(plan.encoder, plan.seed)
    _check_encoder(plan, encoder)
    if initial_encoder is not None:
        load_weights(encoder, initial_encoder)
    surgery: str | None = None
    if plan.surgery is not None:
        images = None if sample_BHWC is None else eval_view(sample_BHWC, plan.encoder)
        shape = plan.encoder.channels, plan.encoder.image_px, plan.encoder.image_px
        surgery = operate(encoder, plan.surgery, images, image_shape=shape).describe()
        logger.info("%s", surgery)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for("objective", plan.seed).initial_seed())
        objective = METHODS[plan.objective.name](plan.objective, feature_width(encoder))
    objective.attach(encoder)
    return Pretraining(encoder, objective, plan.encoder_parts, surgery)


def distribute(module: nn.Module, process: Process) -> nn.Module:
    """The module wrapped for gradient averaging, with a bucket layout that never changes; itself with one process.

    DDP regroups its buckets after the first step, which changes the order of summation: a training resumed from a
    checkpoint would then differ from the undisturbed one with three workers or more. One bucket and
    `find_unused_parameters` keep the layout. The synchronised batch norms make the buffers the same without a broadcast.
    """
    if process.world == 1:
        return module
    return DistributedDataParallel(
        module,
        device_ids=[process.device] if process.device.type == "cuda" else None,
        bucket_cap_mb=4096,
        find_unused_parameters=True,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )


@dataclass(frozen=True)
class Outcome:
    """What a step leaves: scalars by name (on the device), features of the first two views, the learning rate used."""

    scalars: dict[str, Tensor]
    """loss, the objective's terms, gradient_norm (before clipping)."""
    features_BE: Tensor
    features2_BE: Tensor
    learning_rate: float


class Stepper:
    """The state of a pretraining on one rank, and the step that moves it on.

    A training has up to two phases, each with an optimiser of its own: the new projector alone on a frozen encoder (further
    pretraining), then what the plan says.
    """

    def __init__(
        self,
        plan: PretrainPlan,
        process: Process,
        steps_per_epoch: int,
        initial_encoder: bytes | None = None,
        sample_BHWC: Tensor | None = None,
        labels_N: Tensor | None = None,
    ) -> None:
        """`initial_encoder` and `sample_BHWC` are for :func:`build_pretraining`; `labels_N` are the labels by image number, for a
        method that takes them.
        """
        self.plan, self.process, self.steps_per_epoch = plan, process, steps_per_epoch
        self.labels_N = labels_N
        self.head_steps = plan.further.head_only_epochs * steps_per_epoch
        self.total_steps = plan.total_steps(steps_per_epoch)
        self.peak_rate = plan.optimiser.learning_rate
        self.module = build_pretraining(plan, initial_encoder, sample_BHWC)
        if process.world > 1:
            self.module = convert_batch_norm(self.module)  # type: ignore[assignment]
        # Channels last is the fast layout of convolutions in reduced precision, on CPU as well as on GPU.
        self.module.to(device=process.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module.train()
        self.distributed = distribute(self.module, process)
        self.views = MultiViews(plan.views, plan.encoder)
        self.enter_phase(0)

    def enter_phase(self, done: int) -> None:
        """Freezes and unfreezes for the step that follows `done` steps, and makes that phase's optimiser anew."""
        self.head_only = done < self.head_steps
        further = self.plan.further
        train_part(self.module.encoder, "nothing" if self.head_only else further.trained, further.frozen_batch_norm)
        self.module.zero_grad()
        if self.head_only:
            params = OptimiserParams(name="adam", learning_rate=further.head_only_learning_rate, weight_decay=0.0)
        else:
            params = self.plan.optimiser.model_copy(update={"learning_rate": self.peak_rate})
        self.optimiser = build_optimiser(self.module, params, self.module.objective.constant_rate())

    def step(self, batch: Batch, done: int) -> Outcome:
        """The step that follows `done` steps. Nothing waits for the device."""
        if self.head_only and done >= self.head_steps:
            self.enter_phase(done)
        return self._step(batch, done, self._rate(done))

    def _step(self, batch: Batch, done: int, rate: Rate) -> Outcome:
        clock, objective = Clock(done, self.total_steps, self.steps_per_epoch), self.module.objective
        used = apply_rate(self.optimiser, rate)
        _seed_dropout(self.plan.seed, done, self.process)
        objective.before_step(clock)
        views = self.make_views(batch, done)
        labels = {} if self.labels_N is None else {"labels_B": self.labels_N[batch.rows_B].to(self.process.device)}
        with self._autocast():
            found: dict[str, Tensor] = self.distributed(*views, **labels)
        self.module.zero_grad()
        found["loss"].backward()  # type: ignore[no-untyped-call]
        objective.after_backward(clock)
        norm = clip_gradient(self.module.parameters(), self.plan.gradient_clip)
        self.optimiser.step()
        objective.after_step(self.module.encoder, clock)
        features_BE, features2_BE = found.pop("features"), found.pop("features2")
        scalars = {name: value.detach() for name, value in found.items()}
        return Outcome({**scalars, "gradient_norm": norm}, features_BE, features2_BE, used)

    def find_rate(self, batches: Iterator[Batch], done: int) -> RangeTest:
        """A range test from the weights as they are, which it leaves as they were; the next phase begins with its choice."""
        before = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        self.enter_phase(done)
        peaks = [group["peak"] / self.peak_rate for group in self.optimiser.param_groups]

        def step(rate: float) -> float:
            for group, share in zip(self.optimiser.param_groups, peaks, strict=True):
                group["peak"] = rate * share  # of every group: also of those that no schedule moves
            return float(self._step(next(batches), done, Rate(1.0, None)).scalars["loss"])

        test = range_test(step)
        self.module.load_state_dict(before)
        self.peak_rate = test.chosen
        self.enter_phase(done)
        return test

    def _rate(self, done: int) -> Rate:
        if done < self.head_steps:
            return Rate(1.0, None)
        steps = self.total_steps - self.head_steps
        return scheduled(self.plan.schedule, done - self.head_steps, steps, self.steps_per_epoch)

    def learning_rate(self, done: int) -> float:
        """The weights' learning rate in the step that follows `done` steps."""
        peak = self.plan.further.head_only_learning_rate if done < self.head_steps else self.peak_rate
        return peak * self._rate(done).factor

    def make_views(self, batch: Batch, done: int) -> list[Tensor]:
        """All views of this rank's images, on the device."""
        images_BHWC = batch.images_BHWC.to(self.process.device, non_blocking=True)
        second = batch.second_BHWC
        share = len(images_BHWC)
        views = self.views(
            images_BHWC,
            second_BHWC=None if second is None else second.to(self.process.device, non_blocking=True),
            seed=self.plan.seed,
            step=done,
            first=self.process.rank * share,
            total=self.process.world * share,
        )
        return [view.contiguous(memory_format=torch.channels_last) for view in views]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.plan.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.process.device.type, torch.bfloat16)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the weights. Order, views and rates follow from seed and step."""
        return {"optimiser": self.optimiser.state_dict(), "head_only": self.head_only, "peak_rate": self.peak_rate}

    def is_finite(self) -> Tensor:
        """Whether no weight, buffer or average of the optimiser is NaN or infinite: a flag on the device."""
        averages = [v for state in self.optimiser.state.values() for v in state.values() if isinstance(v, Tensor)]
        tensors = [t for t in [*self.module.state_dict().values(), *averages] if t.is_floating_point()]
        return torch.stack([torch.isfinite(t).all().to(self.process.device) for t in tensors]).all()

    def restore(self, weights: dict[str, Tensor], state: dict[str, Any], done: int) -> None:
        """Puts the weights and state of a checkpoint after `done` steps in place."""
        self.module.load_state_dict(weights)
        self.peak_rate = state["peak_rate"]
        self.enter_phase(max(0, done - 1))  # the phase the checkpoint was written in; the next step may begin another
        self.optimiser.load_state_dict(state["optimiser"])


def _seed_dropout(seed: int, done: int, process: Process) -> None:
    """Networks with dropout draw from torch's global generator: seeded at each step, a resumed run draws the same."""
    torch.manual_seed(generator_for("dropout", seed, done, process.rank).initial_seed())


def collapse_measures(features_BE: Tensor, features2_BE: Tensor) -> dict[str, Tensor]:
    """How the features of the global batch lie; () each. Costs a decomposition: for logged steps.

    embedding_std: mean standard deviation of L2-normalised features times sqrt(E): 1 when they spread over the sphere, 0 when
    all images have one feature. effective_rank: exponential of the entropy of the normalised singular values of the centred
    features (Roy & Vetterli 2007): between 1 and min(N - 1, E). Both fall when features collapse. alignment: mean squared
    distance of an image's two views on the unit sphere (smaller is closer). uniformity: logarithm of the mean Gaussian
    potential exp(-2 d^2) of all pairs of images (smaller is more even, 0 is collapse); both of Wang & Isola 2020.
    """
    both = all_gather(torch.cat([features_BE.float(), features2_BE.float()], 1).contiguous())
    features_NE, features2_NE = both.chunk(2, 1)
    unit_NE, unit2_NE = nn.functional.normalize(features_NE, dim=1), nn.functional.normalize(features2_NE, dim=1)
    spread = unit_NE.std(0, correction=0).mean() * features_NE.shape[1] ** 0.5
    singular = torch.linalg.svdvals(torch.nan_to_num(features_NE - features_NE.mean(0)))
    share = singular / singular.sum().clamp(min=torch.finfo(singular.dtype).tiny)
    return {
        "embedding_std": spread,
        "effective_rank": torch.special.entr(share).sum().exp(),
        "alignment": (unit_NE - unit2_NE).square().sum(1).mean(),
        "uniformity": torch.pdist(unit_NE).square().mul(-2).exp().mean().log(),
    }
