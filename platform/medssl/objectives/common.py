"""What the objectives share: the small protocol that a training step speaks with each, and terms that several use.

Shapes: B rows of this rank, N rows of the global batch, D projection width, E feature width, C, H, W images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NamedTuple, ParamSpec, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from medssl.collectives import all_gather, all_reduce, rank_index, world_size
from medssl.networks.heads import Widths, build_head
from medssl.params import Params

P = ParamSpec("P")
R = TypeVar("R")

Encoder = Callable[[Tensor], Tensor]
"""(B, C, H, W) -> (B, E)."""


class MethodParams(Params):
    """Base of every method's parameters."""

    multi_crop: ClassVar[bool] = False
    """Whether the method takes more than two views."""
    takes_labels: ClassVar[bool] = False
    """Whether it is trained on labels of the images shown."""
    name: str
    """Which objective this is."""

    def check(self, *, batch_size: int) -> None:
        """Raises ValueError for a batch that the method cannot work on; the text says what to change."""


class Clock(NamedTuple):
    """Where a training is: steps done so far, steps in all, steps in an epoch."""

    done: int
    total: int
    per_epoch: int


class Objective(nn.Module):
    """A pretraining method: what it owns beside the encoder, and its loss. State that must outlive a killed worker is kept
    in parameters and buffers (they are in the checkpoint) or follows from the clock.
    """

    Params: ClassVar[type[MethodParams]]
    """The method's parameters."""

    def __init__(self, params: MethodParams, feature_width: int) -> None:
        """`feature_width` is E, the encoder's."""
        super().__init__()

    def attach(self, encoder: nn.Module) -> None:
        """Called once with the encoder as it starts; for methods that keep a copy of it."""

    def before_step(self, clock: Clock) -> None:
        """Called before the forward pass."""

    def after_backward(self, clock: Clock) -> None:
        """Called when the gradients are there, before the optimiser."""

    def after_step(self, encoder: nn.Module, clock: Clock) -> None:
        """Called after the optimiser; `clock.done` does not count this step yet."""

    def constant_rate(self) -> Iterator[nn.Parameter]:
        """Parameters whose learning rate the schedule leaves at its peak."""
        return iter(())

    def forward(self, encoder: Encoder, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """Views (B, C, H, W) -> `loss` (global, the same on every rank), the method's terms by name, and `features` and
        `features2` (B, E) of the first two views, detached.
        """
        raise NotImplementedError


class TwoViewObjective(Objective):
    """A method that compares the features of two views."""

    def forward(self, encoder: Encoder, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """See :class:`Objective`. The views go through one after the other, as in the methods' published code: batch norm
        sees one view at a time.
        """
        features1_BE, features2_BE = encoder(views[0]), encoder(views[1])
        terms = self.terms(features1_BE, features2_BE)
        return {**terms, "features": features1_BE.detach(), "features2": features2_BE.detach()}

    def terms(self, features1_BE: Tensor, features2_BE: Tensor) -> dict[str, Tensor]:
        """(B, E) features of each view -> `loss` and its terms."""
        raise NotImplementedError


class ContrastiveParams(MethodParams):
    """Parameters of a contrastive loss on a projection head."""

    temperature: float = Field(0.1, gt=0)
    """Divides the cosine similarities; 0.1 for ImageNet, 0.5 is common for small data."""
    projector: Widths = (2048, 128)
    """Widths of the head's layers; papers 002 and 004 have two layers, SimCLRv2 three."""
    batch_norm: bool = True
    """Batch norm after each layer of the head."""


class ContrastiveObjective(TwoViewObjective):
    """A contrastive loss on a projection head."""

    loss: Callable[[Tensor, Tensor, float], Tensor]
    """Embeddings (B, D) of two views and a temperature -> the loss."""

    def __init__(self, params: ContrastiveParams, feature_width: int) -> None:
        super().__init__(params, feature_width)
        self.temperature = params.temperature
        self.projector = build_head(
            feature_width, params.projector, batch_norm=params.batch_norm, last_norm="affine" if params.batch_norm else "none"
        )

    def terms(self, features1_BE: Tensor, features2_BE: Tensor) -> dict[str, Tensor]:
        """(B, E) features of each view -> the loss."""
        return {"loss": self.loss(self.projector(features1_BE), self.projector(features2_BE), self.temperature)}


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator for losses: tensors come in as float32 or wider whatever they were, and autocast is off."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        with torch.autocast(given[0].device.type, enabled=False):
            widened = (_widen(value) for value in args)
            return function(*widened, **{name: _widen(value) for name, value in kwargs.items()})  # type: ignore[arg-type]

    return wrapped


def _widen(value: object) -> object:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.promote_types(value.dtype, torch.float32))
    return value


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of the ranks' values, on every rank; every rank holds as many rows."""
    return all_reduce(value) / world_size()


def cosine(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """Cosine similarity (B,) of paired rows."""
    return (F.normalize(a_BD, dim=1) * F.normalize(b_BD, dim=1)).sum(1)


class Similarities(NamedTuple):
    """Cosine similarities over temperature of this rank's 2B anchors with all 2N embeddings, and where their partners are."""

    logits: Tensor
    """(2B, 2N); an anchor's similarity with itself is -inf."""
    partner: Tensor
    """(2B,) column of each anchor's other view."""


def pairwise_similarities(z1_BD: Tensor, z2_BD: Tensor, temperature: float) -> Similarities:
    """The table that contrastive losses work on; anchors and columns are first views, then second views."""
    u1_BD, u2_BD = F.normalize(z1_BD, dim=1), F.normalize(z2_BD, dim=1)
    u1_ND, u2_ND = all_gather(torch.cat([u1_BD, u2_BD], 1)).chunk(2, 1)
    logits = torch.cat([u1_BD, u2_BD]) @ torch.cat([u1_ND, u2_ND]).T / temperature
    rows, total = z1_BD.shape[0], u1_ND.shape[0]
    first = rank_index() * rows + torch.arange(rows, device=z1_BD.device)
    own, partner = torch.cat([first, first + total]), torch.cat([first + total, first])
    itself = F.one_hot(own, 2 * total).bool()
    return Similarities(logits.masked_fill(itself, float("-inf")), partner)
