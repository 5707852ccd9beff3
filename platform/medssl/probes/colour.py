"""Colour and intensity statistics of an image: the floor that a pretrained encoder has to beat.

Shapes: B images, H, W height and width, C colour channels, Q pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
COLOUR_WIDTH = 66
"""6 channels (red, green, blue, hue, saturation, value) x (mean, standard deviation, 9 percentiles)."""

_AT_ONCE = 64


def colour_features(images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Statistics (B, 66) of uint8 images (B, H, W, C), all in about 0..1.

    Per channel of RGB and of HSV: mean, standard deviation and the percentiles 1, 5, 10, 25, 50, 75, 90, 95 and 99.
    Histograms in place of some percentiles made the floor lower. One channel (or grey with alpha) counts as three equal
    ones, further channels than three are left out.

    Raises:
        ValueError: not a batch of uint8 images.
    """
    if images_BHWC.ndim != 4 or images_BHWC.dtype != np.uint8 or 0 in images_BHWC.shape[1:]:
        raise ValueError(f"images {images_BHWC.shape} of {images_BHWC.dtype}: expected uint8 (B, H, W, C)")
    out = np.empty((len(images_BHWC), COLOUR_WIDTH), np.float32)
    for start in range(0, len(images_BHWC), _AT_ONCE):
        part = images_BHWC[start : start + _AT_ONCE]
        out[start : start + len(part)] = _features(part)
    return out


def _features(images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    images = images_BHWC[..., :3] if images_BHWC.shape[3] >= 3 else np.repeat(images_BHWC[..., :1], 3, axis=3)
    rgb_BQC = (images.reshape(len(images), -1, 3) / np.float32(255)).astype(np.float32)
    channels_BQC = np.concatenate([rgb_BQC, _hsv(rgb_BQC)], axis=2)
    moments = [channels_BQC.mean(axis=1), channels_BQC.std(axis=1)]
    return np.concatenate([*moments, *_percentiles(channels_BQC)], axis=1).astype(np.float32)


def _percentiles(channels_BQC: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """The percentiles (B, C) of each channel, nearest rank; to 16 bits, whose radix sort is several times faster."""
    levels_BCQ = np.ascontiguousarray((channels_BQC * 65535 + 0.5).astype(np.uint16).transpose(0, 2, 1))
    levels_BCQ.sort(axis=2, kind="stable")
    ranks = [round(percentile / 100 * (levels_BCQ.shape[2] - 1)) for percentile in PERCENTILES]
    return [(levels_BCQ[:, :, rank] / np.float32(65535)).astype(np.float32) for rank in ranks]


def _hsv(rgb_BQC: NDArray[np.float32]) -> NDArray[np.float32]:
    """Hue, saturation and value, each in 0..1; a grey pixel has hue and saturation 0."""
    top, low = rgb_BQC.max(axis=2), rgb_BQC.min(axis=2)
    spread = top - low
    red, green, blue = rgb_BQC[..., 0], rgb_BQC[..., 1], rgb_BQC[..., 2]
    safe = np.where(spread > 0, spread, 1)
    sector = np.where(
        top == red, (green - blue) / safe % 6, np.where(top == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    )
    hue = np.where(spread > 0, sector / 6, 0)
    saturation = np.where(top > 0, spread / np.where(top > 0, top, 1), 0)
    return np.stack([hue, saturation, top], axis=2).astype(np.float32)
