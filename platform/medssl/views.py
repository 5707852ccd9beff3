"""Augmented views of a batch, made on the worker's device from the stored uint8 images.

Geometry (crop, flips, rotation) is composed into ONE affine sampling per view; colour and blur are kornia's. kornia's own
pipeline of modules gives the same views at 82 ms for 128 images of 64 px on one core, this one at about 28: its crop, flips
and rotation each resample or copy, and its hue goes through HSV (33 ms of the 82).

All random numbers of a step are one table drawn on the CPU from (seed, step) for the whole GLOBAL batch, of which each rank
takes its columns. So the views do not depend on the number of workers, nor on device or resumption.

Shapes: B images of this rank, N images of the global batch, C channels, H, W stored height and width, h, w the view's.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from medssl.networks.encoder import EncoderParams
from medssl.params import Params

_CROP_TRIES = 10  # torchvision's


class ViewParams(Params):
    """Augmentation of one batch into two views, every parameter drawn per image.

    Where a pair is given the first value is for the first view, the second for the second (Barlow Twins, BYOL).
    """

    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Share of the stored image's area that a random resized crop keeps."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    """Aspect ratio (width / height) of the crop."""
    horizontal_flip: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    vertical_flip: float = Field(0.5, ge=0, le=1)
    """Probability of a vertical flip."""
    rotation_degrees: float = Field(0.0, ge=0, le=180)
    """Largest rotation to either side, in degrees; 0 is none."""
    rotation: float = Field(0.0, ge=0, le=1)
    """Probability of a rotation."""
    quarter_turns: bool = False
    """Turn by a random multiple of 90 degrees."""
    jitter: float = Field(0.8, ge=0, le=1)
    """Probability of colour jitter."""
    brightness: float = Field(0.4, ge=0, le=1)
    """Strength of the brightness jitter (factor in 1 +- this)."""
    contrast: float = Field(0.4, ge=0, le=1)
    """Strength of the contrast jitter."""
    saturation: float = Field(0.2, ge=0, le=1)
    """Strength of the saturation jitter."""
    hue: float = Field(0.1, ge=0, le=0.5)
    """Strength of the hue jitter, as a share of the colour circle."""
    grey: float = Field(0.2, ge=0, le=1)
    """Probability of turning to grey."""
    blur: tuple[float, float] = (1.0, 0.1)
    """Probability of a Gaussian blur in each view."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation in pixels."""
    solarise: tuple[float, float] = (0.0, 0.2)
    """Probability of solarisation in each view."""
    solarise_threshold: tuple[float, float] = (0.5, 0.5)
    """Range of the brightness from which solarisation inverts."""
    solarise_addition: tuple[float, float] = (0.0, 0.0)
    """Range of what solarisation adds before (paper 000: -0.1 to 0.1, with thresholds 0.4 to 0.6)."""

    @model_validator(mode="after")
    def _check(self) -> ViewParams:
        bounds = {
            "crop_scale": (1e-3, 1.0),
            "crop_ratio": (0.1, 10.0),
            "blur_sigma": (1e-3, 100.0),
            "solarise_threshold": (0.0, 1.0),
            "solarise_addition": (-0.5, 0.5),
        }
        for field, (low, high) in bounds.items():
            first, last = getattr(self, field)
            if not low <= first <= last <= high:
                raise ValueError(f"{field} must be two rising values within {low} to {high}, got {first}, {last}")
        for field in ("blur", "solarise"):
            if not all(0 <= p <= 1 for p in getattr(self, field)):
                raise ValueError(f"{field} must be two probabilities, got {getattr(self, field)}")
        return self


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


def _moved(values: Tensor, device: torch.device) -> Tensor:
    return values if device.type == "cpu" else values.to(device, non_blocking=True)


def _sample(images_BCHW: Tensor, draws: Draws, px: int) -> Tensor:
    """(B, C, H, W) -> (B, C, px, px): crop, flips and rotation as one bilinear sampling; outside is mirrored.

    Where a crop is shrunk by 2 or more, it is sampled from an image averaged down by powers of 2 first, so that a sampling
    step stays below 2 pixels and nothing aliases.
    """
    device = images_BCHW.device
    cosine, sine = torch.cos(draws.angle), torch.sin(draws.angle)
    table = [
        2 * draws.centre_x - 1,
        2 * draws.centre_y - 1,
        draws.width * cosine,
        -draws.width * sine,
        draws.height * sine,
        draws.height * cosine,
    ]
    x0, y0, xx, xy, yx, yy = _moved(torch.stack(table), device)[:, :, None, None]
    line = (torch.arange(px, device=device, dtype=torch.float32) * 2 + 1) / px - 1
    row, column = line[None, None, :], line[None, :, None]
    grid = torch.empty((len(images_BCHW), px, px, 2), device=device)
    torch.add(xx * row + x0, xy * column, out=grid[..., 0])
    torch.add(yx * row + y0, yy * column, out=grid[..., 1])
    step = torch.minimum(draws.width.abs() * images_BCHW.shape[3], draws.height.abs() * images_BCHW.shape[2]) / px
    level = torch.floor(torch.log2(step.clamp(min=1))).long()
    highest = int(level.max()) if len(level) else 0
    if highest == 0:
        return F.grid_sample(images_BCHW, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    out = images_BCHW.new_empty((*images_BCHW.shape[:2], px, px))
    for current in range(highest + 1):
        chosen = _moved(torch.nonzero(level == current)[:, 0], device)
        if len(chosen):
            smaller = images_BCHW[chosen]
            if current:
                height, width = (max(1, side >> current) for side in smaller.shape[2:])
                smaller = F.adaptive_avg_pool2d(smaller, (height, width))
            out[chosen] = F.grid_sample(smaller, grid[chosen], mode="bilinear", padding_mode="reflection", align_corners=False)
    return out


# Grey is ITU-R 601 luma, as in PIL, torchvision and kornia; YIQ separates it from the plane of hue.
_RGB_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_YIQ_TO_RGB = torch.linalg.inv(_RGB_TO_YIQ)


def _rotate_hue(images_BCHW: Tensor, angle: Tensor) -> Tensor:
    """Turns colours about the grey axis at constant luma: one 3x3 product per pixel, 30 times faster than through HSV."""
    turn = torch.zeros(len(angle), 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = torch.cos(angle)
    turn[:, 2, 1] = torch.sin(angle)
    turn[:, 1, 2] = -turn[:, 2, 1]
    matrix = _moved(_YIQ_TO_RGB @ turn @ _RGB_TO_YIQ, images_BCHW.device)
    return torch.bmm(matrix, images_BCHW.flatten(2)).view_as(images_BCHW).clamp_(0, 1)


def _recolour(images_BCHW: Tensor, draws: Draws, params: ViewParams) -> Tensor:
    """Brightness, contrast, saturation and hue in this order, then grey. Images of one channel know the first two only."""
    from kornia import enhance
    from kornia.color import rgb_to_grayscale

    device, colour = images_BCHW.device, images_BCHW.shape[1] == 3
    if params.jitter > 0:
        if params.brightness > 0:
            images_BCHW = enhance.adjust_brightness_accumulative(images_BCHW, _moved(draws.brightness, device))
        if params.contrast > 0:
            images_BCHW = enhance.adjust_contrast_with_mean_subtraction(images_BCHW, _moved(draws.contrast, device))
        if params.saturation > 0 and colour:
            images_BCHW = enhance.adjust_saturation_with_gray_subtraction(images_BCHW, _moved(draws.saturation, device))
        if params.hue > 0 and colour:
            images_BCHW = _rotate_hue(images_BCHW, draws.hue)
    if params.grey > 0 and colour:
        grey = _moved(draws.grey, device)[:, None, None, None]
        images_BCHW = torch.lerp(images_BCHW, rgb_to_grayscale(images_BCHW), grey)
    return images_BCHW


def _some(images_BCHW: Tensor, flags: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the flagged images, on the CPU and on the images' device (no wait for the device: flags are drawn on
    the CPU)."""
    chosen = torch.nonzero(flags)[:, 0]
    return chosen, _moved(chosen, images_BCHW.device)


def _blur(images_BCHW: Tensor, draws: Draws, params: ViewParams) -> Tensor:
    """Gaussian blur of the flagged images, each with its own sigma, the kernel cut at three times the largest."""
    from kornia.filters import gaussian_blur2d

    chosen, there = _some(images_BCHW, draws.blur)
    if not len(chosen):
        return images_BCHW
    radius = min(math.ceil(3 * params.blur_sigma[1]), images_BCHW.shape[-1] - 1)
    sigma = draws.blur_sigma[chosen][:, None].expand(-1, 2)
    if len(chosen) == len(images_BCHW):
        return gaussian_blur2d(images_BCHW, 2 * radius + 1, sigma)
    images_BCHW[there] = gaussian_blur2d(images_BCHW[there], 2 * radius + 1, sigma)
    return images_BCHW


def _solarise(images_BCHW: Tensor, draws: Draws) -> Tensor:
    """Inversion of what is brighter than the threshold, in the flagged images."""
    from kornia.enhance import solarize

    chosen, there = _some(images_BCHW, draws.solarise)
    if len(chosen):
        additions = draws.solarise_addition[chosen] if bool(draws.solarise_addition.any()) else None
        images_BCHW[there] = solarize(images_BCHW[there], draws.solarise_threshold[chosen], additions)
    return images_BCHW


def to_unit(images_BHWC: Tensor) -> Tensor:
    """(B, H, W, C) uint8 -> (B, C, H, W) float32 in [0, 1]."""
    return images_BHWC.permute(0, 3, 1, 2).contiguous().float().div_(255)


def normalise(images_BCHW: Tensor, encoder: EncoderParams) -> Tensor:
    """Images in [0, 1] less the mean, divided by the standard deviation, per channel."""
    mean = images_BCHW.new_tensor(encoder.mean).view(1, -1, 1, 1)
    return (images_BCHW - mean).div_(images_BCHW.new_tensor(encoder.std).view(1, -1, 1, 1))


@torch.no_grad()
def augment(images_BCHW: Tensor, draws: Draws, params: ViewParams, encoder: EncoderParams) -> Tensor:
    """Stored images (B, C, H, W) in [0, 1] -> normalised views (B, C, h, w) with the parameters in `draws`."""
    view = _recolour(_sample(images_BCHW, draws, encoder.image_px), draws, params)
    return normalise(_solarise(_blur(view, draws, params), draws), encoder)


class RandomView:
    """One augmented view of each image (fine-tuning, feature banks)."""

    def __init__(self, params: ViewParams, encoder: EncoderParams, view: int = 0) -> None:
        self.params, self.encoder, self.view = params, encoder, view

    def __call__(self, images_BHWC: Tensor, *, seed: int, step: int, first: int = 0, total: int | None = None) -> Tensor:
        """(B, H, W, C) uint8 -> (B, C, h, w) float32; see :class:`TwoViews` for the arguments."""
        return _make_views(images_BHWC, self.params, self.encoder, (self.view,), (seed, step, first, total))[0]


class TwoViews:
    """Two differently augmented views of each image."""

    def __init__(self, params: ViewParams, encoder: EncoderParams) -> None:
        self.params, self.encoder = params, encoder

    def __call__(
        self, images_BHWC: Tensor, *, seed: int, step: int, first: int = 0, total: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) uint8 on any device -> two (B, C, h, w) float32 there.

        The draws depend on (seed, step) and an image's position in the global batch: `first` is the position of this rank's
        first image, `total` the size of the global batch (default: the batch given is all of it).
        """
        first_view, second_view = _make_views(images_BHWC, self.params, self.encoder, (0, 1), (seed, step, first, total))
        return first_view, second_view


def _make_views(
    images_BHWC: Tensor,
    params: ViewParams,
    encoder: EncoderParams,
    views: tuple[int, ...],
    place: tuple[int, int, int, int | None],
) -> list[Tensor]:
    seed, step, first, total = place
    count, height, width, channels = images_BHWC.shape
    if channels != encoder.channels:
        raise ValueError(f"images have {channels} channel(s), the encoder wants {encoder.channels}")
    total = count if total is None else total
    if first + count > total:
        raise ValueError(f"images {first} to {first + count} lie outside a global batch of {total}")
    unit_BCHW = to_unit(images_BHWC)
    made = []
    for view in views:
        generator = generator_for("views", seed, step, view)
        draws = draw(params, view, total, height, width, generator).rows(first, count)
        made.append(augment(unit_BCHW, draws, params, encoder))
    return made


def eval_view(images_BHWC: Tensor, encoder: EncoderParams) -> Tensor:
    """(B, H, W, C) uint8 -> (B, C, h, w) float32: the whole image, resized with antialiasing and normalised.

    The one deterministic view used for embedding, evaluation and prediction.
    """
    unit_BCHW, px = to_unit(images_BHWC), encoder.image_px
    if unit_BCHW.shape[1] != encoder.channels:
        raise ValueError(f"images have {unit_BCHW.shape[1]} channel(s), the encoder wants {encoder.channels}")
    if unit_BCHW.shape[2:] != (px, px):
        unit_BCHW = F.interpolate(unit_BCHW, size=(px, px), mode="bilinear", antialias=True, align_corners=False)
    return normalise(unit_BCHW, encoder)


def view_sheet(images_BHWC: Tensor, params: ViewParams, encoder: EncoderParams, *, seed: int = 0, draws: int = 3) -> bytes:
    """A PNG with one row per image: the image as evaluated, then `draws` pairs of first and second view."""
    from PIL import Image

    two, px, gap = TwoViews(params, encoder), encoder.image_px, 2
    columns = [eval_view(images_BHWC, encoder)]
    for step in range(draws):
        columns += two(images_BHWC, seed=seed, step=step)
    mean, std = (torch.tensor(values).view(1, 1, -1, 1, 1) for values in (encoder.mean, encoder.std))
    tiles = (torch.stack(columns, 1).cpu() * std + mean).clamp(0, 1).mul(255).round().byte()  # (B, columns, C, h, w)
    tiles = F.pad(tiles, (0, gap, 0, gap), value=255)
    rows, count, channels = tiles.shape[:3]
    sheet = tiles.permute(0, 3, 1, 4, 2).reshape(rows * (px + gap), count * (px + gap), channels)
    shown = sheet[..., :3] if channels >= 3 else sheet[..., 0]
    buffer = io.BytesIO()
    Image.fromarray(shown.contiguous().numpy()).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
