"""Augmented views of a batch, made on the worker's device from the stored uint8 images.

All random numbers of a step are tables drawn on the CPU from (seed, step, view) for the whole GLOBAL batch, of which each
rank takes its columns. So the views do not depend on the number of workers, nor on device or resumption.

    presets.py  what each paper does, as flat values
    params.py   ViewParams: a preset, or value by value
    draws.py    random parameters per image
    kernels.py  what they do to the pixels
    make.py     one, two or many views of a batch; the evaluation view
    sheet.py    a picture of them
"""

from __future__ import annotations

from medssl.views.draws import Cutout, Draws, draw, draw_cutout, generator_for
from medssl.views.kernels import normalise, to_unit
from medssl.views.make import ContentView, MultiViews, RandomView, TwoViews, augment, eval_view
from medssl.views.params import ViewParams
from medssl.views.presets import PRESETS
from medssl.views.sheet import view_sheet

__all__ = [
    "PRESETS",
    "ContentView",
    "Cutout",
    "Draws",
    "MultiViews",
    "RandomView",
    "TwoViews",
    "ViewParams",
    "augment",
    "draw",
    "draw_cutout",
    "eval_view",
    "generator_for",
    "normalise",
    "to_unit",
    "view_sheet",
]
