"""Colour statistics against Python's own colour conversion and numpy's percentiles."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest

from medssl.probes.colour import COLOUR_WIDTH, colour_features


def naive(image: np.ndarray) -> np.ndarray:
    """One image, pixel by pixel."""
    rgb = image.reshape(-1, 3) / 255
    channels = np.concatenate([rgb, np.array([colorsys.rgb_to_hsv(*pixel) for pixel in rgb])], axis=1)
    ranks = [np.sort(channels, axis=0)[round(p / 100 * (len(rgb) - 1))] for p in (1, 5, 10, 25, 50, 75, 90, 95, 99)]
    return np.concatenate([channels.mean(axis=0), channels.std(axis=0), *ranks])


def test_equals_a_pixel_by_pixel_computation() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(5, 13, 11, 3), dtype=np.uint8)
    images[1] = 0
    images[2] = 255
    images[3, ..., 1] = images[3, ..., 0]
    features = colour_features(images)
    assert features.shape == (5, COLOUR_WIDTH) == (5, 66)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, np.stack([naive(image) for image in images]), atol=2e-5)


def test_features_do_not_depend_on_the_batch_or_on_where_pixels_are() -> None:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, size=(70, 8, 8, 3), dtype=np.uint8)
    whole = colour_features(images)
    np.testing.assert_array_equal(whole[65:67], colour_features(images[65:67]))
    np.testing.assert_allclose(whole, colour_features(images[:, ::-1, :, :].transpose(0, 2, 1, 3)), atol=1e-6)


def test_grey_images_are_three_equal_channels() -> None:
    grey = np.random.default_rng(2).integers(0, 256, size=(3, 9, 9, 1), dtype=np.uint8)
    expected = colour_features(np.repeat(grey, 3, axis=3))
    np.testing.assert_array_equal(colour_features(grey), expected)
    np.testing.assert_array_equal(colour_features(np.concatenate([grey, grey // 2], axis=3)), expected)
    assert np.isfinite(expected).all()
    with_alpha = np.concatenate([np.repeat(grey, 3, axis=3), grey // 2], axis=3)
    np.testing.assert_array_equal(colour_features(with_alpha), expected)


@pytest.mark.parametrize("images", [np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8), np.zeros((1, 0, 4, 3), np.uint8)])
def test_other_arrays_are_refused(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        colour_features(images)


def test_no_images_give_no_features() -> None:
    assert colour_features(np.zeros((0, 4, 4, 3), np.uint8)).shape == (0, 66)
