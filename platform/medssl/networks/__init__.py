"""Encoders and heads."""

from __future__ import annotations

from medssl.networks.encoder import (
    EncoderParams,
    build_encoder,
    estimate_batch_norm,
    feature_width,
    load_weights,
    save_weights,
)

__all__ = ["EncoderParams", "build_encoder", "estimate_batch_norm", "feature_width", "load_weights", "save_weights"]
