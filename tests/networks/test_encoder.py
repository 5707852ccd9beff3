"""Encoders: reproducible weights, widths, safetensors, batch-norm statistics."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load
from torch import nn

from medssl.errors import DataError, RecipeError
from medssl.networks import (
    EncoderParams,
    build_encoder,
    estimate_batch_norm,
    feature_width,
    load_weights,
    save_weights,
)

SMALL = EncoderParams(image_px=32)


@pytest.mark.parametrize(("name", "width"), [("resnet18", 512), ("resnet50", 2048)])
def test_features(name: str, width: int) -> None:
    encoder = build_encoder(EncoderParams(name=name, image_px=32), 0)
    assert feature_width(encoder) == width
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, width)


def test_one_channel_and_a_transformer() -> None:
    grey = EncoderParams(image_px=32, channels=1, mean=(0.5,), std=(0.2,))
    assert build_encoder(grey, 0)(torch.randn(2, 1, 32, 32)).shape == (2, 512)
    transformer = build_encoder(EncoderParams(name="vit_tiny_patch16_224", image_px=64), 0)
    assert transformer(torch.randn(2, 3, 64, 64)).shape == (2, feature_width(transformer))


def test_weights_come_from_the_seed_and_leave_the_global_generator() -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, again, other = build_encoder(SMALL, 1), build_encoder(SMALL, 1), build_encoder(SMALL, 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert save_weights(first) == save_weights(again) != save_weights(other)


def test_safetensors_round_trip() -> None:
    source, target = build_encoder(SMALL, 1), build_encoder(SMALL, 2)
    source(torch.randn(4, 3, 32, 32))  # moves the running statistics
    data = save_weights(source, {"encoder": "resnet18"})
    assert set(load(data)) == set(source.state_dict())
    load_weights(target, data)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(target.eval()(x), source.eval()(x))


def test_weights_that_do_not_fit() -> None:
    grey = build_encoder(EncoderParams(image_px=32, channels=1, mean=(0.5,), std=(0.2,)), 0)
    with pytest.raises(DataError, match=r"1 of 120 tensors differ.*'conv1.weight'"):
        load_weights(grey, save_weights(build_encoder(SMALL, 0)))
    with pytest.raises(DataError, match="no safetensors file"):
        load_weights(grey, b"something else")


def test_unknown_name_and_wrong_statistics() -> None:
    with pytest.raises(RecipeError, match=r"'resnet81' is no timm model; did you mean 'resnet"):
        build_encoder(EncoderParams(name="resnet81"), 0)
    with pytest.raises(ValidationError, match=r"mean has 3 values for 1 channel"):
        EncoderParams(channels=1)
    with pytest.raises(ValidationError, match=r"std must be above 0"):
        EncoderParams(std=(0.1, 0.0, 0.1))


def test_estimated_statistics_are_the_average_over_batches() -> None:
    class Plain(nn.Module):
        num_features = 3

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x).mean((2, 3))

    batches = [torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(k)) * (k + 1) + k for k in range(3)]
    encoder = Plain()
    encoder(torch.full((8, 3, 4, 4), 1e6))  # what was there before must not count
    estimate_batch_norm(encoder, iter(batches))
    mean = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    variance = torch.stack([batch.var((0, 2, 3), correction=1) for batch in batches]).mean(0)
    torch.testing.assert_close(encoder.norm.running_mean, mean)
    torch.testing.assert_close(encoder.norm.running_var, variance)
    assert encoder.norm.momentum == 0.1 and not encoder.training
    with pytest.raises(DataError, match="not finite"):
        estimate_batch_norm(encoder, [torch.full((8, 3, 4, 4), float("nan"))])
