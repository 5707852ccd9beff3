"""Projection and prediction heads: linear layers with batch norm and ReLU between them.

Shapes: B batch, E feature width, D width of the last layer.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

Widths = Annotated[tuple[Annotated[int, Field(ge=1, le=65536)], ...], Field(min_length=1)]
"""Widths of a head's linear layers, the last one its output's."""

LastNorm = Literal["none", "affine", "plain"]


def build_head(
    width: int,
    widths: tuple[int, ...],
    *,
    batch_norm: bool = True,
    last_norm: LastNorm = "none",
    last_bias: bool = False,
) -> nn.Sequential:
    """(B, width) -> (B, widths[-1]): linear, batch norm and ReLU, the last layer linear alone.

    A linear layer before a batch norm has no bias: the norm would take it away again.

    Args:
        width: of the input.
        widths: of the layers' outputs.
        batch_norm: between the layers; without it hidden layers have a bias.
        last_norm: batch norm after the last layer: none, with weight and bias (affine), or without (plain).
        last_bias: whether the last linear layer has a bias.
    """
    layers: list[nn.Module] = []
    for out in widths[:-1]:
        layers.append(nn.Linear(width, out, bias=not batch_norm))
        layers += [nn.BatchNorm1d(out), nn.ReLU(inplace=True)] if batch_norm else [nn.ReLU(inplace=True)]
        width = out
    layers.append(nn.Linear(width, widths[-1], bias=last_bias))
    if last_norm != "none":
        layers.append(nn.BatchNorm1d(widths[-1], affine=last_norm == "affine"))
    return nn.Sequential(*layers)
