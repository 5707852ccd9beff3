"""SimCLR's wide ResNets: the papers' parameter counts, widths, and timm's own network at 1x; all without memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from medssl.errors import RecipeError
from medssl.networks import EncoderParams, build_encoder, feature_width
from medssl.networks.wide_resnet import WIDE_RESNETS, build_wide_resnet


def on_meta(name: str, channels: int = 3) -> nn.Module:
    with torch.device("meta"):
        return build_wide_resnet(name, channels)


def millions(network: nn.Module) -> float:
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "paper"), [("resnet50_1x", 24), ("resnet50_2x", 94), ("resnet50_4x", 375), ("resnet152_2x", 233)]
)
def test_parameter_counts_of_the_papers(name: str, paper: int) -> None:
    """24M, 94M, 233M: the checkpoints' table in google-research/simclr (233M in paper 004 too); 375M: SimCLR, Table 6.

    All without the classifier of 1,000 classes.
    """
    network = on_meta(name)
    assert abs(millions(network) - paper) < 1
    classifier = (feature_width(network) + 1) * 1000 / 1e6
    assert abs(millions(network) + classifier - paper) > 1


@pytest.mark.parametrize("name", WIDE_RESNETS)
def test_every_channel_count_is_the_factor_times_that_of_1x(name: str) -> None:
    depth, factor = WIDE_RESNETS[name]
    wide, narrow = on_meta(name), on_meta(f"resnet{depth}_1x")
    theirs = dict(narrow.named_modules())
    for path, module in wide.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.out_channels == factor * theirs[path].out_channels
            assert path == "conv1" or module.in_channels == factor * theirs[path].in_channels
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_features == factor * theirs[path].num_features
    assert wide.conv1.in_channels == 3 and wide.conv1.out_channels == 64 * factor
    assert feature_width(wide) == 2048 * factor
    assert wide(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 2048 * factor)
    assert [info["num_chs"] for info in wide.feature_info] == [factor * info["num_chs"] for info in narrow.feature_info]
    assert list(wide.state_dict()) == list(narrow.state_dict())


@pytest.mark.parametrize("depth", [50, 152])
def test_1x_is_timms(depth: int) -> None:
    with torch.device("meta"):
        timms = build_encoder(EncoderParams(name=f"resnet{depth}"), 0)
    ours = on_meta(f"resnet{depth}_1x")
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in timms.state_dict().items()}
    assert repr(ours) == repr(timms)


def test_weights_are_he_normal_and_the_last_gamma_of_a_block_is_zero() -> None:
    encoder = build_encoder(EncoderParams(name="resnet50_2x"), 3)
    for convolution in (encoder.conv1, encoder.layer1[0].conv1, encoder.layer1[0].downsample[0], encoder.layer1[1].conv2):
        fan_out = convolution.out_channels * convolution.kernel_size[0] ** 2
        assert float(convolution.weight.detach().std()) == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
    assert not encoder.layer1[0].bn3.weight.any() and encoder.bn1.weight.all()
    again = build_encoder(EncoderParams(name="resnet50_2x"), 3)
    assert torch.equal(again.conv1.weight, encoder.conv1.weight)


def test_grey_images() -> None:
    with torch.device("meta"):
        encoder = build_encoder(EncoderParams(name="resnet152_2x", channels=1, mean=(0.5,), std=(0.2,)), 0)
    assert encoder(torch.empty(2, 1, 448, 448, device="meta")).shape == (2, 4096)


def test_an_unknown_width_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"'resnet50_5x' is no timm model.*did you mean 'resnet50_.x'"):
        build_encoder(EncoderParams(name="resnet50_5x"), 0)
