"""Encoders: a timm network without classifier, mapping images to features.

Shapes: B batch, C channels, H, W height and width, E feature width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from medssl.errors import DataError, RecipeError, nearest
from medssl.networks.own import build_own, is_own, own_width
from medssl.networks.wide_resnet import WIDE_RESNETS, build_wide_resnet
from medssl.params import Params


class EncoderParams(Params):
    """Which network maps images to features, and at what size and normalisation it sees them."""

    name: str = "resnet18"
    """Name of a timm model, of one of SimCLR's wide ResNets (resnet50_2x, resnet50_4x, resnet152_2x, ...), or a function of your
    own that returns a torch module from images to features: package.module:function."""
    image_px: int = Field(64, ge=16, le=1024)
    """Side in pixels of the square image (view) that the encoder sees."""
    channels: int = Field(3, ge=1, le=4)
    """Input channels."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Per-channel mean subtracted from images in [0, 1] (ImageNet's by default)."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation that images are divided by."""

    @model_validator(mode="after")
    def _check(self) -> EncoderParams:
        for field in ("mean", "std"):
            values = getattr(self, field)
            if len(values) != self.channels:
                raise ValueError(f"{field} has {len(values)} values for {self.channels} channel(s)")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {min(self.std)}")
        return self


def build_encoder(params: EncoderParams, seed: int) -> nn.Module:
    """A network with random weights drawn from `seed`, mapping (B, C, H, W) to (B, E).

    Torch's global generator is left as it was. Raises RecipeError for a name that neither timm nor
    :mod:`medssl.networks.wide_resnet` knows, and for a user's own function (:mod:`medssl.networks.own`) that gives no encoder.
    """
    if is_own(params.name):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_own(params)
    import timm  # loads for seconds, and the command line validates without it

    wide = params.name in WIDE_RESNETS
    if not wide and not timm.is_model(params.name):
        choices = [*WIDE_RESNETS, *_common(timm.list_models())]
        raise RecipeError(f"encoder '{params.name}' is no timm model; {nearest(params.name, choices)}")
    config = timm.get_pretrained_cfg(params.name)
    sized: dict[str, Any] = {"img_size": params.image_px} if config is not None and config.fixed_input_size else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if wide:
            return build_wide_resnet(params.name, params.channels)
        network = timm.create_model(params.name, pretrained=False, num_classes=0, in_chans=params.channels, **sized)
    assert isinstance(network, nn.Module)
    return network


def _common(names: list[str]) -> list[str]:
    """Names short enough to print as choices; the nearest-name search keeps the rest out of an error's line."""
    return [name for name in names if name.startswith(("resnet", "vit_", "convnext", "efficientnet", "densenet"))]


def feature_width(encoder: nn.Module) -> int:
    """E, the width of the encoder's features: timm's pooled output, which in some families (VGG, MobileNetV3, GhostNet) is
    a layer behind the `num_features` of their last feature map; of a user's own encoder it was measured."""
    return own_width(encoder) or int(getattr(encoder, "head_hidden_size", None) or encoder.num_features)  # type: ignore[arg-type]


def save_weights(encoder: nn.Module, metadata: dict[str, str] | None = None) -> bytes:
    """All parameters and buffers as a safetensors file."""
    from safetensors.torch import save

    return save({k: v.detach().cpu().contiguous() for k, v in encoder.state_dict().items()}, metadata)


def load_weights(encoder: nn.Module, data: bytes) -> None:
    """Sets all parameters and buffers from what :func:`save_weights` wrote; DataError when names or shapes differ."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        weights = load(data)
    except SafetensorError as error:
        raise DataError(f"encoder weights are no safetensors file: {error}") from error
    wanted = encoder.state_dict()
    differing = sorted(
        k for k in wanted.keys() | weights.keys() if k not in wanted or k not in weights or wanted[k].shape != weights[k].shape
    )
    if differing:
        raise DataError(
            f"encoder weights do not fit: {len(differing)} of {len(wanted)} tensors differ in name or shape, "
            f"the first is '{differing[0]}'; was the encoder another one?"
        )
    encoder.load_state_dict(weights)


@torch.no_grad()
def estimate_batch_norm(encoder: nn.Module, batches: Iterable[Tensor]) -> None:
    """Sets the batch norms' running statistics to their average over `batches` of (B, C, H, W), in order; weights stay.

    A randomly initialised network evaluated with its untouched statistics (mean 0, variance 1) is weaker than it need be,
    so comparisons with one estimate them on the unlabelled images first. The encoder is left in evaluation mode.
    """
    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's name for the cumulative average
    encoder.train()
    try:
        for images_BCHW in batches:
            encoder(images_BCHW)
    finally:
        encoder.eval()
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
    if norms and not all(math.isfinite(float(norm.running_var.sum())) for norm in norms if norm.running_var is not None):
        raise DataError("batch-norm statistics are not finite: an image batch held NaN or infinite values")
