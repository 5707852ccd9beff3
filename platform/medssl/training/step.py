"""One optimiser step of a pretraining: views, forward, backward, clipping, update.

Shapes: B images of this rank, N images of the global batch, H, W, C stored images, E feature width.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medssl.collectives import Process, all_gather, convert_batch_norm
from medssl.networks.encoder import build_encoder, feature_width, load_weights
from medssl.objectives import METHODS
from medssl.optim import Rate, apply_rate, build_optimiser, clip_gradient, scheduled
from medssl.training.plan import PretrainPlan
from medssl.views import TwoViews, generator_for


class Pretraining(nn.Module):
    """The encoder and the objective with its projector: what is trained."""

    def __init__(self, encoder: nn.Module, objective: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.objective = objective

    def forward(self, view1_BCHW: Tensor, view2_BCHW: Tensor) -> dict[str, Tensor]:
        """Two views -> `loss`, the objective's terms by name, and `features` (B, E) of the first view, detached.

        The views go through one after the other, as in the methods' published code: batch norm sees one view at a time.
        """
        features1_BE, features2_BE = self.encoder(view1_BCHW), self.encoder(view2_BCHW)
        terms: dict[str, Tensor] = self.objective(features1_BE, features2_BE)._asdict()
        return {**terms, "features": features1_BE.detach()}


def build_pretraining(plan: PretrainPlan, initial_encoder: bytes | None = None) -> Pretraining:
    """Encoder and objective with random weights from the plan's seed; the encoder's from `initial_encoder` where given."""
    encoder = build_encoder(plan.encoder, plan.seed)
    if initial_encoder is not None:
        load_weights(encoder, initial_encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for("objective", plan.seed).initial_seed())
        objective = METHODS[plan.objective.name](plan.objective, feature_width(encoder))
    return Pretraining(encoder, objective)


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
    """What a step leaves: scalars by name (on the device), the first view's features, the learning rate used."""

    scalars: dict[str, Tensor]
    """loss, the objective's terms, gradient_norm (before clipping)."""
    features_BE: Tensor
    learning_rate: float


class Stepper:
    """The state of a pretraining on one rank, and the step that moves it on."""

    def __init__(self, plan: PretrainPlan, process: Process, steps_per_epoch: int, initial_encoder: bytes | None = None) -> None:
        self.plan, self.process, self.steps_per_epoch = plan, process, steps_per_epoch
        self.total_steps = plan.epochs * steps_per_epoch
        self.module = build_pretraining(plan, initial_encoder)
        if process.world > 1:
            self.module = convert_batch_norm(self.module)  # type: ignore[assignment]
        # Channels last is the fast layout of convolutions in reduced precision, on CPU as well as on GPU.
        self.module.to(device=process.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module.train()
        self.distributed = distribute(self.module, process)
        self.optimiser = build_optimiser(self.module, plan.optimiser)
        self.views = TwoViews(plan.views, plan.encoder)

    def step(self, images_BHWC: Tensor, done: int) -> Outcome:
        """The step that follows `done` steps. Nothing waits for the device."""
        rate = apply_rate(self.optimiser, self._rate(done))
        _seed_dropout(self.plan.seed, done, self.process)
        view1_BCHW, view2_BCHW = self.make_views(images_BHWC, done)
        with self._autocast():
            found: dict[str, Tensor] = self.distributed(view1_BCHW, view2_BCHW)
        self.optimiser.zero_grad()
        found["loss"].backward()  # type: ignore[no-untyped-call]
        norm = clip_gradient(self.module.parameters(), self.plan.gradient_clip)
        self.optimiser.step()
        features_BE = found.pop("features")
        scalars = {name: value.detach() for name, value in found.items()}
        return Outcome({**scalars, "gradient_norm": norm}, features_BE, rate)

    def _rate(self, done: int) -> Rate:
        return scheduled(self.plan.schedule, done, self.total_steps, self.steps_per_epoch)

    def learning_rate(self, done: int) -> float:
        """The weights' learning rate in the step that follows `done` steps."""
        return self.plan.optimiser.learning_rate * self._rate(done).factor

    def make_views(self, images_BHWC: Tensor, done: int) -> tuple[Tensor, Tensor]:
        """Both views of this rank's images, on the device."""
        images_BHWC = images_BHWC.to(self.process.device, non_blocking=True)
        share = len(images_BHWC)
        view1_BCHW, view2_BCHW = self.views(
            images_BHWC, seed=self.plan.seed, step=done, first=self.process.rank * share, total=self.process.world * share
        )
        layout = torch.channels_last
        return view1_BCHW.contiguous(memory_format=layout), view2_BCHW.contiguous(memory_format=layout)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.plan.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.process.device.type, torch.bfloat16)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the weights. Order, views and rates follow from seed and step."""
        return {"optimiser": self.optimiser.state_dict()}

    def is_finite(self) -> Tensor:
        """Whether no weight, buffer or average of the optimiser is NaN or infinite: a flag on the device."""
        averages = [v for state in self.optimiser.state.values() for v in state.values() if isinstance(v, Tensor)]
        tensors = [t for t in [*self.module.state_dict().values(), *averages] if t.is_floating_point()]
        return torch.stack([torch.isfinite(t).all().to(self.process.device) for t in tensors]).all()

    def restore(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Puts a checkpoint's weights and state in place."""
        self.module.load_state_dict(weights)
        self.optimiser.load_state_dict(state["optimiser"])


def _seed_dropout(seed: int, done: int, process: Process) -> None:
    """Networks with dropout draw from torch's global generator: seeded at each step, a resumed run draws the same."""
    torch.manual_seed(generator_for("dropout", seed, done, process.rank).initial_seed())


def collapse_measures(features_BE: Tensor) -> tuple[Tensor, Tensor]:
    """Embedding standard deviation and effective rank of the global batch's features; both fall when features collapse.

    The first is the mean standard deviation of L2-normalised features times sqrt(E): 1 when they spread over the sphere, 0
    when all images have one feature. The second is the exponential of the entropy of the normalised singular values of the
    centred features (Roy & Vetterli 2007): between 1 and min(N - 1, E). Costs a decomposition; for logged steps.
    """
    features_NE = all_gather(features_BE.float().contiguous())
    unit_NE = nn.functional.normalize(features_NE, dim=1)
    spread = unit_NE.std(0, correction=0).mean() * features_NE.shape[1] ** 0.5
    singular = torch.linalg.svdvals(torch.nan_to_num(features_NE - features_NE.mean(0)))
    share = singular / singular.sum().clamp(min=torch.finfo(singular.dtype).tiny)
    rank = torch.special.entr(share).sum().exp()
    return spread, rank
