"""Features against the encoder called by hand, the bank's draws, and the colour arm."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medssl.errors import DataError
from medssl.networks.encoder import EncoderParams, build_encoder, save_weights
from medssl.probes.colour import colour_features
from medssl.stages.embed import embed
from medssl.training.feed import ResidentImages
from medssl.views import RandomView, ViewParams, eval_view

ENCODER = EncoderParams(name="resnet18", image_px=32)
VIEWS = ViewParams(crop_scale=(0.7, 1.0), jitter=0.0, grey=0.0, blur=(0.0, 0.0), solarise=(0.0, 0.0))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ResidentImages:
    pixels = np.random.default_rng(0).integers(0, 256, size=(300, 24, 24, 3), dtype=np.uint8)
    ids = [f"image-{i:04d}" for i in range(len(pixels))]
    return ResidentImages.write(tmp_path_factory.mktemp("resident") / "digest", pixels, ids)


@pytest.fixture(scope="module")
def weights() -> bytes:
    return save_weights(build_encoder(ENCODER, 3))


def test_features_are_the_encoders_in_the_order_of_the_rows(images: ResidentImages, weights: bytes) -> None:
    rows = np.array([299, 5, 5, 17])
    encoder = build_encoder(ENCODER, 3).eval()
    with torch.inference_mode():
        expected = encoder(eval_view(torch.from_numpy(images.images[rows]), ENCODER)).numpy()
    features = embed(weights, ENCODER, images, rows)
    assert features.dtype == np.float32
    assert features.shape == (4, 512)
    np.testing.assert_allclose(features, expected, atol=1e-4, rtol=1e-4)
    seen: list[tuple[int, int]] = []
    whole = embed(weights, ENCODER, images, range(300), on_progress=lambda *report: seen.append(report))
    np.testing.assert_allclose(whole[rows], features, atol=1e-4, rtol=1e-4)  # whatever else is in the batch
    assert seen == [(256, 300), (300, 300)]


def test_a_bank_holds_differently_augmented_passes(images: ResidentImages, weights: bytes) -> None:
    rows = np.arange(270)
    bank = embed(weights, ENCODER, images, rows, passes=2, views=VIEWS, seed=4)
    assert bank.shape == (2, 270, 512)
    encoder = build_encoder(ENCODER, 3).eval()
    view = RandomView(VIEWS, ENCODER)
    for number in range(2):
        with torch.inference_mode():
            part = view(torch.from_numpy(np.array(images.images[256:270])), seed=4, step=number, first=256, total=270)
            np.testing.assert_allclose(bank[number, 256:], encoder(part).numpy(), atol=1e-4, rtol=1e-4)
    assert not np.allclose(bank[0], bank[1], atol=1e-3)
    np.testing.assert_array_equal(bank, embed(weights, ENCODER, images, rows, passes=2, views=VIEWS, seed=4))
    assert not np.allclose(bank, embed(weights, ENCODER, images, rows, passes=2, views=VIEWS, seed=5), atol=1e-3)


def test_without_weights_the_features_are_colours(images: ResidentImages) -> None:
    rows = np.array([7, 3])
    np.testing.assert_array_equal(embed(None, ENCODER, images, rows), colour_features(images.images[rows]))
    still = ViewParams(
        crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), horizontal_flip=0.0, vertical_flip=0.0, jitter=0.0, grey=0.0,
        blur=(0.0, 0.0), solarise=(0.0, 0.0),
    )  # fmt: skip
    same_size = EncoderParams(image_px=24)
    bank = embed(None, same_size, images, rows, passes=3, views=still)
    np.testing.assert_allclose(bank, np.broadcast_to(colour_features(images.images[rows]), (3, 2, 66)), atol=0.01)


def test_what_does_not_fit_is_refused(images: ResidentImages, weights: bytes) -> None:
    with pytest.raises(DataError, match="do not fit"):
        embed(weights, EncoderParams(name="resnet34", image_px=32), images, [0])
    with pytest.raises(ValueError, match="views"):
        embed(weights, ENCODER, images, [0], passes=2)
