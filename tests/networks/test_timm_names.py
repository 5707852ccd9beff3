"""timm's families by name: their features are as wide as `feature_width` says. On meta tensors, so without memory."""

from __future__ import annotations

import pytest
import torch

from medssl.networks import EncoderParams, build_encoder, feature_width

PLAIN = ["resnet50", "resnext50_32x4d", "densenet121", "efficientnet_b0", "convnext_tiny", "regnety_032", "vit_small_patch16_224"]
WIDER_THAN_THEIR_LAST_MAP = [
    "vgg11", "mobilenetv3_small_050", "ghostnet_050", "hardcorenas_a", "hgnet_base", "efficientvit_b0", "repghostnet_050",
]  # fmt: skip
FIXED_SIZE = ["swin_tiny_patch4_window7_224", "maxvit_tiny_tf_224", "mixer_s16_224"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [*PLAIN, *WIDER_THAN_THEIR_LAST_MAP, *FIXED_SIZE])
def test_features_are_as_wide_as_told(name: str, channels: int) -> None:
    params = EncoderParams(name=name, image_px=224, channels=channels, mean=(0.5,) * channels, std=(0.2,) * channels)
    with torch.device("meta"):
        encoder = build_encoder(params, 0).eval()
    features_BE = encoder(torch.empty(2, channels, 224, 224, device="meta"))
    assert features_BE.shape == (2, feature_width(encoder))
    assert (feature_width(encoder) != encoder.num_features) == (name in WIDER_THAN_THEIR_LAST_MAP)


@pytest.mark.parametrize("px", [96, 448])
@pytest.mark.parametrize("name", ["resnet50", "vit_small_patch16_224", "densenet121"])
def test_the_image_size_is_the_recipes(name: str, px: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder(EncoderParams(name=name, image_px=px), 0).eval()
    assert encoder(torch.empty(2, 3, px, px, device="meta")).shape == (2, feature_width(encoder))
