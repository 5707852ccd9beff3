"""Pretraining objectives, one file per method. A new method is one file and one line in `METHODS` (and its import)."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from medssl.objectives.barlow_twins import BarlowTwins, barlow_twins_loss
from medssl.objectives.byol import BYOL, byol_loss
from medssl.objectives.common import Clock, MethodParams, Objective
from medssl.objectives.dcl import DCL, dcl_loss
from medssl.objectives.simclr import SimCLR, nt_xent_loss
from medssl.objectives.simsiam import SimSiam, simsiam_loss
from medssl.objectives.supervised import Supervised, SupervisedParams, supervised_loss
from medssl.objectives.swav import SwAV, sinkhorn, swav_loss
from medssl.objectives.vicreg import VICReg, vicreg_loss

METHODS: dict[str, type[Objective]] = {
    "barlow_twins": BarlowTwins,
    "simclr": SimCLR,
    "dcl": DCL,
    "simsiam": SimSiam,
    "vicreg": VICReg,
    "byol": BYOL,
    "swav": SwAV,
    "supervised": Supervised,
}
"""Each method by the name in its parameters."""

if TYPE_CHECKING:
    ObjectiveParams = MethodParams
else:
    ObjectiveParams = Annotated[reduce(or_, (method.Params for method in METHODS.values())), Field(discriminator="name")]

__all__ = [
    "METHODS", "Clock", "MethodParams", "Objective", "ObjectiveParams", "SupervisedParams", "barlow_twins_loss", "byol_loss",
    "dcl_loss", "nt_xent_loss", "simsiam_loss", "sinkhorn", "supervised_loss", "swav_loss", "vicreg_loss",
]  # fmt: skip
