"""A sheet of augmented views, for a person to look at before hours are spent on them."""

from __future__ import annotations

import io

import torch
from torch import Tensor
from torch.nn import functional as F

from medssl.networks.encoder import EncoderParams
from medssl.views.make import MultiViews, eval_view
from medssl.views.params import ViewParams

_GAP = 2  # white pixels between tiles


def view_sheet(images_BHWC: Tensor, params: ViewParams, encoder: EncoderParams, *, seed: int = 0, draws: int = 3) -> bytes:
    """A PNG with one row per image (B, H, W, C): the image as evaluated, then `draws` times the first and the second view
    and the small crops, these padded with white to the large views' size."""
    from PIL import Image

    multi, px = MultiViews(params, encoder), encoder.image_px
    columns = [eval_view(images_BHWC, encoder)]
    for step in range(draws):
        columns += multi(images_BHWC, seed=seed, step=step)
    tiles = torch.stack([_tile(view, encoder) for view in columns], 1)  # (B, columns, C, h, w)
    rows, count, channels = tiles.shape[:3]
    sheet = tiles.permute(0, 3, 1, 4, 2).reshape(rows * (px + _GAP), count * (px + _GAP), channels)
    shown = sheet[..., :3] if channels >= 3 else sheet[..., 0]
    buffer = io.BytesIO()
    Image.fromarray(shown.contiguous().numpy()).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _tile(view_BCHW: Tensor, encoder: EncoderParams) -> Tensor:
    """A normalised view as bytes on the CPU, with white to its right and below."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (encoder.mean, encoder.std))
    shown = (view_BCHW.cpu() * std + mean).clamp(0, 1).mul(255).round().byte()
    rest = encoder.image_px - shown.shape[3] + _GAP
    return F.pad(shown, (0, rest, 0, rest), value=255)
