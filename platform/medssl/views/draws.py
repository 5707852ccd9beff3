"""Random parameters of views, drawn on the CPU for the whole global batch from a key of seed, step and view.

N images of the global batch; every tensor here is (N,).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from medssl.views.params import ViewParams

_CROP_TRIES = 10  # torchvision's


class Draws(NamedTuple):
    """Random parameters of one view, one entry per image (on the CPU); flags are 0 or 1."""

    centre_x: Tensor  # of the crop, as a share of the image's width
    centre_y: Tensor
    width: Tensor  # of the crop, as a share of the image's width; negative where flipped
    height: Tensor
    angle: Tensor  # radians
    brightness: Tensor  # factors; 1 where there is no jitter
    contrast: Tensor
    saturation: Tensor
    hue: Tensor  # radians; 0 where there is none
    grey: Tensor
    blur: Tensor
    blur_sigma: Tensor
    solarise: Tensor
    solarise_threshold: Tensor
    solarise_addition: Tensor

    def rows(self, first: int, count: int) -> Draws:
        """The draws of `count` images from `first` on."""
        return Draws._make(values[first : first + count] for values in self)


class Cutout(NamedTuple):
    """Black rectangle in the centre of one view, one entry per image (on the CPU)."""

    hidden: Tensor  # 0 or 1
    width: Tensor  # as a share of the view's
    height: Tensor

    def rows(self, first: int, count: int) -> Cutout:
        """The rectangles of `count` images from `first` on."""
        return Cutout._make(values[first : first + count] for values in self)


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of `key`: streams of nearby seeds and steps have nothing in common."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw(params: ViewParams, view: int, count: int, height: int, width: int, generator: torch.Generator) -> Draws:
    """Parameters of view 0 or 1 for `count` images of height x width, each image its own."""
    u = torch.rand(2 * _CROP_TRIES + 20, count, generator=generator)
    crop_width, crop_height = _draw_crop(params, u[: 2 * _CROP_TRIES], width / height)
    v: Iterator[Tensor] = iter(u[2 * _CROP_TRIES :])

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * next(v)

    def chance(probability: float) -> Tensor:
        return (next(v) < probability).float()

    centre_x = crop_width / 2 + next(v) * (1 - crop_width)
    centre_y = crop_height / 2 + next(v) * (1 - crop_height)
    flipped_width = crop_width * (1 - 2 * chance(params.horizontal_flip))
    flipped_height = crop_height * (1 - 2 * chance(params.vertical_flip))
    limit = math.radians(params.rotation_degrees)
    angle = chance(params.rotation) * uniform(-limit, limit)
    quarter = torch.floor(uniform(0, 4)).clamp_(max=3) * (math.pi / 2)
    jitter = chance(params.jitter)
    return Draws(
        centre_x=centre_x,
        centre_y=centre_y,
        width=flipped_width,
        height=flipped_height,
        angle=angle + quarter if params.quarter_turns else angle,
        brightness=1 + jitter * uniform(-params.brightness, params.brightness),
        contrast=1 + jitter * uniform(-params.contrast, params.contrast),
        saturation=1 + jitter * uniform(-params.saturation, params.saturation),
        hue=jitter * uniform(-params.hue, params.hue) * (2 * math.pi),
        grey=chance(params.grey),
        blur=chance(params.blur[view]),
        blur_sigma=uniform(*params.blur_sigma),
        solarise=chance(params.solarise[view]),
        solarise_threshold=uniform(*params.solarise_threshold),
        solarise_addition=uniform(*params.solarise_addition),
    )


def draw_cutout(params: ViewParams, count: int, generator: torch.Generator) -> Cutout:
    """Rectangles of `count` images. A generator of its own leaves the other draws as they are without a cutout."""
    u = torch.rand(3, count, generator=generator)
    (low_width, high_width), (low_height, high_height) = params.cutout_width, params.cutout_height
    return Cutout(
        hidden=(u[0] < params.cutout).float(),
        width=low_width + (high_width - low_width) * u[1],
        height=low_height + (high_height - low_height) * u[2],
    )


def _draw_crop(params: ViewParams, u: Tensor, image_ratio: float) -> tuple[Tensor, Tensor]:
    """Width and height of crops as shares of the image's, torchvision's way: the first of ten tries that fits inside,
    else the largest crop that keeps to the ratios."""
    scale = params.crop_scale[0] + (params.crop_scale[1] - params.crop_scale[0]) * u[:_CROP_TRIES]
    low, high = math.log(params.crop_ratio[0]), math.log(params.crop_ratio[1])
    relative = torch.exp(low + (high - low) * u[_CROP_TRIES:]) / image_ratio
    width, height = torch.sqrt(scale * relative), torch.sqrt(scale / relative)
    fits = (width <= 1) & (height <= 1)
    chosen = fits.float().argmax(0, keepdim=True)
    ratio = min(max(image_ratio, params.crop_ratio[0]), params.crop_ratio[1]) / image_ratio
    any_fits = fits.any(0)
    width = torch.where(any_fits, width.gather(0, chosen)[0], torch.tensor(min(1.0, ratio)))
    height = torch.where(any_fits, height.gather(0, chosen)[0], torch.tensor(min(1.0, 1 / ratio)))
    return width, height
