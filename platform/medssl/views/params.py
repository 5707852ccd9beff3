"""The parameters of views: what a recipe says about augmentation, from a published preset or value by value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medssl.errors import nearest
from medssl.params import Params
from medssl.views.presets import PRESETS

# Fields younger than the first artifacts. At their defaults they change no view and stay out of dumps and hashes, so that
# a recipe that uses none of them keeps its artifacts' names.
_LEFT_OUT_AT_DEFAULT = ("cutout", "cutout_width", "cutout_height", "small_crops", "small_px", "small_scale")


class ViewParams(Params):
    """Augmentation of one batch into two views (and small crops), every parameter drawn per image.

    Where a pair of probabilities is given the first is for the first view, the second for the second (Barlow Twins, BYOL).
    """

    preset: str | None = Field(None, exclude=True)
    """A published set of values (`medssl.views.PRESETS`) that the other fields then override. It is resolved when read:
    only values are kept and hashed, this field is null afterwards."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Share of the stored image's area that a random resized crop keeps."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    """Aspect ratio (width / height) of the crop."""
    cutout: float = Field(0.0, ge=0, le=1)
    """Probability of a black rectangle in the view's centre, over a watermark (paper 000; black before normalisation)."""
    cutout_width: tuple[float, float] = (50 / 256, 100 / 256)
    """Range of the rectangle's width, as a share of the view's (paper 000: 50 to 100 of 256 pixels)."""
    cutout_height: tuple[float, float] = (185 / 256, 190 / 256)
    """Range of the rectangle's height, as a share of the view's (paper 000: 185 to 190 of 256 pixels)."""
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
    """Range of the blur's standard deviation in pixels of the view."""
    solarise: tuple[float, float] = (0.0, 0.2)
    """Probability of solarisation in each view."""
    solarise_threshold: tuple[float, float] = (0.5, 0.5)
    """Range of the brightness from which solarisation inverts."""
    solarise_addition: tuple[float, float] = (0.0, 0.0)
    """Range of what solarisation adds before (paper 000: -0.1 to 0.1, with thresholds 0.4 to 0.6)."""
    small_crops: int = Field(0, ge=0, le=32)
    """Small views beside the two large ones (SwAV's multi-crop); the first, third ... are augmented as the first view is,
    the others as the second."""
    small_px: int = Field(96, ge=16, le=1024)
    """Side of the small views in pixels."""
    small_scale: tuple[float, float] = (0.05, 0.14)
    """Share of the stored image's area that a small crop keeps."""

    @model_validator(mode="before")
    @classmethod
    def _resolve_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("preset") is None:
            return given
        name = given["preset"]
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"unknown preset '{name}': {nearest(str(name), PRESETS)}")
        return {**PRESETS[name], **{field: value for field, value in given.items() if field != "preset"}}

    @model_validator(mode="after")
    def _check(self) -> ViewParams:
        bounds = {
            "crop_scale": (1e-3, 1.0),
            "crop_ratio": (0.1, 10.0),
            "cutout_width": (0.0, 1.0),
            "cutout_height": (0.0, 1.0),
            "blur_sigma": (1e-3, 100.0),
            "solarise_threshold": (0.0, 1.0),
            "solarise_addition": (-0.5, 0.5),
            "small_scale": (1e-3, 1.0),
        }
        for field, (low, high) in bounds.items():
            first, last = getattr(self, field)
            if not low <= first <= last <= high:
                raise ValueError(f"{field} must be two rising values within {low} to {high}, got {first}, {last}")
        for field in ("blur", "solarise"):
            if not all(0 <= p <= 1 for p in getattr(self, field)):
                raise ValueError(f"{field} must be two probabilities, got {getattr(self, field)}")
        return self

    @model_serializer(mode="wrap")
    def _leave_out(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        for field in _LEFT_OUT_AT_DEFAULT:
            if getattr(self, field) == type(self).model_fields[field].default:
                values.pop(field, None)
        return values
