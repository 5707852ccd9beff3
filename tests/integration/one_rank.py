"""A user's encoder that fails in one rank only, after a few steps: the others are left waiting for it in a collective."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from medssl.collectives import rank_index


class Failing(nn.Module):
    """Means of the channels through a linear layer; the second rank's sixth training pass raises."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 8)
        self.passes = 0

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 8)."""
        self.passes += self.training and dist.is_initialized()
        if self.passes == 6 and rank_index() == 1:
            raise RuntimeError("this rank's disk is full")
        features_BE: Tensor = self.linear(images_BCHW.mean((2, 3)))
        return features_BE


def encoder() -> nn.Module:
    """See Failing."""
    return Failing()
