"""Features of images under one encoder, or their colour statistics: plain, or in augmented passes (a bank).

Shapes: N images asked for, P passes, B batch, H, W stored height and width, C channels, E feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medssl.networks.encoder import EncoderParams, build_encoder, feature_width, load_weights
from medssl.probes.colour import COLOUR_WIDTH, colour_features
from medssl.views import RandomView, ViewParams, eval_view

if TYPE_CHECKING:
    from medssl.training.feed import ResidentImages

_BATCH = 256


def embed(
    encoder_weights: bytes | None,
    encoder: EncoderParams,
    images: ResidentImages,
    rows: Sequence[int] | NDArray[np.int64],
    *,
    passes: int = 0,
    views: ViewParams | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Features (N, E) of the images in `rows`; with `passes` a bank (P, N, E) of augmented ones instead.

    Args:
        encoder_weights: safetensors of the encoder; None gives colour and intensity statistics.
        encoder: the network, its image size and normalisation; for colour statistics only the size of augmented views.
        passes: augmented passes over the images; 0 takes each image whole, as in evaluation and prediction.
        views: augmentation of the passes. A pass's draws depend on (seed, pass) and an image's position in `rows`.
        on_progress: called with (images done, images in all), each pass counted.

    Raises:
        DataError: the weights do not fit the network.
    """
    if passes and views is None:
        raise ValueError("augmented passes need views")
    chosen, device = np.asarray(rows, dtype=np.int64), torch.device(device)
    network = None if encoder_weights is None else _load(encoder_weights, encoder, device)
    width = COLOUR_WIDTH if network is None else feature_width(network)
    out_PNE = np.empty((max(passes, 1), len(chosen), width), np.float32)
    view = RandomView(views, encoder) if passes and views is not None else None
    done, total = 0, len(chosen) * len(out_PNE)
    for number, out_NE in enumerate(out_PNE):
        for start in range(0, len(chosen), _BATCH):
            part = slice(start, min(start + _BATCH, len(chosen)))
            stored_BHWC = np.ascontiguousarray(images.images[chosen[part]])
            views_BCHW = None
            if view is not None:
                stored = torch.from_numpy(stored_BHWC).to(device)
                views_BCHW = view(stored, seed=seed, step=number, first=start, total=len(chosen))
            if network is None:
                colours_BHWC = stored_BHWC if views_BCHW is None else _as_stored(views_BCHW, encoder)
                out_NE[part] = colour_features(colours_BHWC)
            else:
                out_NE[part] = _features(network, stored_BHWC, views_BCHW, encoder, device)
            done += part.stop - part.start
            if on_progress is not None:
                on_progress(done, total)
    return out_PNE if passes else out_PNE[0]


def _load(weights: bytes, encoder: EncoderParams, device: torch.device) -> nn.Module:
    network = build_encoder(encoder, 0)
    load_weights(network, weights)
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval()


@torch.inference_mode()
def _features(
    network: nn.Module, stored_BHWC: NDArray[np.uint8], views_BCHW: Tensor | None, encoder: EncoderParams, device: torch.device
) -> NDArray[np.float32]:
    if views_BCHW is None:
        views_BCHW = eval_view(torch.from_numpy(stored_BHWC).to(device), encoder)
    features: Tensor = network(views_BCHW.contiguous(memory_format=torch.channels_last))
    array: NDArray[np.float32] = features.float().cpu().numpy()
    return array


def _as_stored(views_BCHW: Tensor, encoder: EncoderParams) -> NDArray[np.uint8]:
    """Normalised views back to uint8 images (B, H, W, C)."""
    mean, std = (views_BCHW.new_tensor(values).view(1, -1, 1, 1) for values in (encoder.mean, encoder.std))
    bytes_BHWC = ((views_BCHW * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    array: NDArray[np.uint8] = bytes_BHWC.contiguous().cpu().numpy()
    return array
