"""From stored images to views: draws, then kernels, for one, two or many views.

Shapes: B images of this rank, C channels, H, W stored height and width, h, w the view's.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from medssl.errors import RecipeError
from medssl.networks.encoder import EncoderParams
from medssl.views.draws import Cutout, Draws, draw, draw_cutout, generator_for
from medssl.views.kernels import blur, cut_out, normalise, recolour, sample, solarise, to_unit
from medssl.views.params import ViewParams


class _Place(NamedTuple):
    """What decides the draws beside the parameters: seed and step, and where in the global batch this rank's images are."""

    seed: int
    step: int
    first: int
    total: int


@torch.no_grad()
def augment(
    images_BCHW: Tensor, draws: Draws, params: ViewParams, encoder: EncoderParams, cutout: Cutout | None = None
) -> Tensor:
    """Stored images (B, C, H, W) in [0, 1] -> normalised views (B, C, h, w) with the parameters in `draws` and `cutout`."""
    view = sample(images_BCHW, draws, encoder.image_px)
    if cutout is not None:
        view = cut_out(view, cutout)
    view = recolour(view, draws, params)
    return normalise(solarise(blur(view, draws, params), draws), encoder)


class RandomView:
    """One augmented view of each image (fine-tuning, feature banks).

    Raises RecipeError where the parameters ask for small crops, which only :class:`MultiViews` makes.
    """

    def __init__(self, params: ViewParams, encoder: EncoderParams, view: int = 0) -> None:
        _refuse_small_crops(params)
        self.params, self.encoder, self.view = params, encoder, view

    def __call__(self, images_BHWC: Tensor, *, seed: int, step: int, first: int = 0, total: int | None = None) -> Tensor:
        """(B, H, W, C) uint8 -> (B, C, h, w) float32; see :class:`TwoViews` for the arguments."""
        unit_BCHW, place = _open(images_BHWC, self.encoder, seed, step, first, total)
        return _make(unit_BCHW, self.params, self.encoder, self.view, place)


class ContentView:
    """Augmented views whose draws come from each image's own bytes (test-time augmentation): no matter what others are with it.

    Raises RecipeError where the parameters ask for small crops.
    """

    def __init__(self, params: ViewParams, encoder: EncoderParams) -> None:
        _refuse_small_crops(params)
        self.params, self.encoder = params, encoder

    def __call__(self, images_BHWC: Tensor, number: int) -> Tensor:
        """(B, H, W, C) uint8 -> view `number` of each, (B, C, h, w) float32."""
        _check_channels(images_BHWC, self.encoder)
        unit_BCHW = to_unit(images_BHWC)
        height, width = unit_BCHW.shape[2:]
        keys = [hashlib.sha256(image.numpy()).hexdigest() for image in images_BHWC.cpu().contiguous()]
        draws = [draw(self.params, 0, 1, height, width, generator_for("content", key, number)) for key in keys]
        cutouts = [draw_cutout(self.params, 1, generator_for("content cutout", key, number)) for key in keys]
        return augment(
            unit_BCHW, Draws._make(map(torch.cat, zip(*draws, strict=True))), self.params, self.encoder,
            Cutout._make(map(torch.cat, zip(*cutouts, strict=True))) if self.params.cutout > 0 else None,
        )  # fmt: skip


class TwoViews:
    """Two differently augmented views of each image.

    Raises RecipeError where the parameters ask for small crops, which only :class:`MultiViews` makes.
    """

    def __init__(self, params: ViewParams, encoder: EncoderParams) -> None:
        _refuse_small_crops(params)
        self.params, self.encoder = params, encoder

    def __call__(
        self, images_BHWC: Tensor, *, seed: int, step: int, first: int = 0, total: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) uint8 on any device -> two (B, C, h, w) float32 there.

        The draws depend on (seed, step) and an image's position in the global batch: `first` is the position of this rank's
        first image, `total` the size of the global batch (default: the batch given is all of it).
        """
        unit_BCHW, place = _open(images_BHWC, self.encoder, seed, step, first, total)
        first_view, second_view = (_make(unit_BCHW, self.params, self.encoder, view, place) for view in (0, 1))
        return first_view, second_view


class MultiViews:
    """Two large views and any number of small ones (SwAV's multi-crop), of one image or of two images of a bag (MICLe).

    As in SwAV's code a small crop differs from a large one in size and scale alone. Where the two large views differ in
    their probabilities of blur and solarisation (Barlow Twins, BYOL), small crops take them in turn: the first, third ...
    follow the first view, the others the second. With `small_crops` 0 and no second image the views are, bit for bit, those
    of :class:`TwoViews`. Raises RecipeError where small views are larger than the large ones.
    """

    def __init__(self, params: ViewParams, encoder: EncoderParams) -> None:
        if params.small_crops and params.small_px > encoder.image_px:
            raise RecipeError(
                f"views.small_px {params.small_px} is above encoder.image_px {encoder.image_px}:"
                f" set small_px to {encoder.image_px} or less, or small_crops to 0"
            )
        self.params, self.encoder = params, encoder
        self.small_params = params.model_copy(update={"crop_scale": params.small_scale})
        self.small_encoder = encoder.model_copy(update={"image_px": params.small_px})

    def __call__(
        self,
        images_BHWC: Tensor,
        *,
        second_BHWC: Tensor | None = None,
        seed: int,
        step: int,
        first: int = 0,
        total: int | None = None,
    ) -> list[Tensor]:
        """(B, H, W, C) uint8 on any device -> two (B, C, h, w) and `small_crops` (B, C, small_px, small_px) float32 there.

        Args:
            images_BHWC: source of the first view and of the small crops number 0, 2, 4 ...
            second_BHWC: source of the second view and of the small crops between: another image of each image's bag, of the
                same shape. None takes the same images.
            seed: of the pretraining; with `step` and the view's number it decides all draws.
            step: number of the optimiser step.
            first: position of this rank's first image in the global batch.
            total: size of the global batch; None where the batch given is all of it.

        Raises:
            ValueError: the second images have another shape or device, the encoder wants other channels, or the images lie
                outside the global batch.
        """
        unit_BCHW, place = _open(images_BHWC, self.encoder, seed, step, first, total)
        sources = (unit_BCHW, unit_BCHW)
        if second_BHWC is not None:
            if second_BHWC.shape != images_BHWC.shape or second_BHWC.device != images_BHWC.device:
                raise ValueError(
                    f"second images are {tuple(second_BHWC.shape)} on {second_BHWC.device}, the first"
                    f" {tuple(images_BHWC.shape)} on {images_BHWC.device}: they must match"
                )
            sources = (unit_BCHW, to_unit(second_BHWC))
        views = [_make(sources[view], self.params, self.encoder, view, place) for view in (0, 1)]
        for view in range(2, 2 + self.params.small_crops):
            views.append(_make(sources[view % 2], self.small_params, self.small_encoder, view, place))
        return views


def eval_view(images_BHWC: Tensor, encoder: EncoderParams) -> Tensor:
    """(B, H, W, C) uint8 -> (B, C, h, w) float32: the whole image, resized with antialiasing and normalised.

    The one deterministic view used for embedding, evaluation and prediction.
    """
    _check_channels(images_BHWC, encoder)
    unit_BCHW, px = to_unit(images_BHWC), encoder.image_px
    if unit_BCHW.shape[2:] != (px, px):
        unit_BCHW = F.interpolate(unit_BCHW, size=(px, px), mode="bilinear", antialias=True, align_corners=False)
    return normalise(unit_BCHW, encoder)


def _refuse_small_crops(params: ViewParams) -> None:
    if params.small_crops:
        raise RecipeError(f"views.small_crops is {params.small_crops}, and no small crops are made here: set small_crops to 0")


def _check_channels(images_BHWC: Tensor, encoder: EncoderParams) -> None:
    if images_BHWC.shape[3] != encoder.channels:
        raise ValueError(f"images have {images_BHWC.shape[3]} channel(s), the encoder wants {encoder.channels}")


def _open(
    images_BHWC: Tensor, encoder: EncoderParams, seed: int, step: int, first: int, total: int | None
) -> tuple[Tensor, _Place]:
    """Images in [0, 1] and their place in the global batch."""
    _check_channels(images_BHWC, encoder)
    count = len(images_BHWC)
    total = count if total is None else total
    if first + count > total:
        raise ValueError(f"images {first} to {first + count} lie outside a global batch of {total}")
    return to_unit(images_BHWC), _Place(seed, step, first, total)


def _make(unit_BCHW: Tensor, params: ViewParams, encoder: EncoderParams, view: int, place: _Place) -> Tensor:
    """View number `view` (0 and 1 the large ones, then the small) of this rank's images."""
    count, _, height, width = unit_BCHW.shape
    generator = generator_for("views", place.seed, place.step, view)
    draws = draw(params, view % 2, place.total, height, width, generator).rows(place.first, count)
    cutout = None
    if params.cutout > 0:
        generator = generator_for("cutout", place.seed, place.step, view)
        cutout = draw_cutout(params, place.total, generator).rows(place.first, count)
    return augment(unit_BCHW, draws, params, encoder, cutout)
