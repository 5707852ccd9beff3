"""SimCLR's wide ResNets: every width of a ResNet times a factor, stem and block outputs included.

Papers: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (2020), whose ResNet-50 (1x,
2x, 4x) and ResNet-152 (2x) paper 004 uses. They are not Zagoruyko's (torchvision's and timm's `wide_resnet50_2`), which
widen the 3 x 3 convolutions alone: 2048 features there, 4096 in `resnet50_2x`. Neither are they BiT's (3x), which have
group norm and standardised weights.

The papers' parameter counts (24M, 94M and 375M for ResNet-50 1x, 2x and 4x; 233M for ResNet-152 2x) are those of the
encoder WITHOUT its classifier of 1,000 classes, as here: 23.5, 93.9, 375.4 and 232.2 million (with it 25.6, 98.0, 383.6
and 236.4). `resnet50_1x` is timm's `resnet50` under another name, layer by layer.

Shapes: B images, C channels, H, W height and width, E feature width (2048 times the factor).
"""

from __future__ import annotations

import itertools
from types import MappingProxyType
from typing import Any

from torch import nn

_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_STEM, _STAGES = 64, (64, 128, 256, 512)

WIDE_RESNETS = MappingProxyType(
    {f"resnet{depth}_{factor}x": (depth, factor) for depth, factor in itertools.product(_BLOCKS, (1, 2, 3, 4))}
)
"""Depth and width factor by name."""


def build_wide_resnet(name: str, in_channels: int) -> nn.Module:
    """A timm ResNet without classifier, of a name in `WIDE_RESNETS`, mapping (B, C, H, W) to (B, E).

    Random weights come from torch's global generator.
    """
    from timm.models.resnet import Bottleneck, ResNet

    depth, factor = WIDE_RESNETS[name]
    stages = tuple(width * factor for width in _STAGES)
    block: Any = Bottleneck  # timm's annotation asks for an instance
    network = ResNet(block, _BLOCKS[depth], num_classes=0, in_chans=in_channels, channels=stages)
    if factor > 1:  # timm's stem has 64 channels whatever the stages have
        _widen_stem(network, _STEM * factor, in_channels)
        network.init_weights()
    return network


def _widen_stem(network: Any, width: int, in_channels: int) -> None:
    """Replaces the stem and the two convolutions that read it."""
    network.conv1 = nn.Conv2d(in_channels, width, kernel_size=7, stride=2, padding=3, bias=False)
    network.bn1 = nn.BatchNorm2d(width)
    network.feature_info[0]["num_chs"] = width
    block = network.layer1[0]
    block.conv1 = nn.Conv2d(width, block.conv1.out_channels, kernel_size=1, bias=False)
    block.downsample[0] = nn.Conv2d(width, block.downsample[0].out_channels, kernel_size=1, bias=False)
