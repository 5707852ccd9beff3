"""A user's own encoder, named `package.module:function`: a function that returns a torch module from images to features.

The function is called with those of `channels` and `image_px` that it has arguments for, under a seeded generator. Its module
maps (B, C, H, W) to (B, E). The file it is in has to be importable where studies run: on every node of a cluster
(`PYTHONPATH`, or a Ray runtime environment).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medssl.errors import RecipeError, nearest

if TYPE_CHECKING:
    from torch import nn

    from medssl.networks.encoder import EncoderParams


def is_own(name: str) -> bool:
    """Whether an encoder's name is of a user's own function; timm's and ours have no colon."""
    return ":" in name


def source_digest(name: str) -> str:
    """SHA-256 of the file that the function is in: artifacts of a changed network get another name. Files that it imports are
    not in it.

    Raises:
        RecipeError: there is no such module.
    """
    module = name.partition(":")[0]
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None or found.origin is None or not Path(found.origin).is_file():
        raise RecipeError(
            f"encoder '{name}': there is no module '{module}' to import: write package.module:function, and put its folder on "
            "PYTHONPATH (on every node)"
        )
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()


def build_own(params: EncoderParams) -> nn.Module:
    """The user's module, its `num_features` set to the width that it was found to have.

    Raises:
        RecipeError: what of it is not as it has to be, with what the user's code said.
    """
    import torch
    from torch import nn

    where = f"encoder '{params.name}'"
    function = _function(params.name)
    offered: dict[str, Any] = {"channels": params.channels, "image_px": params.image_px}
    try:
        network = function(**{name: value for name, value in offered.items() if name in inspect.signature(function).parameters})
    except Exception as error:
        raise RecipeError(f"{where}: the function failed: {_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise RecipeError(f"{where} returned {type(network).__name__}: it has to return a torch.nn.Module")
    training = network.training
    shape = (2, params.channels, params.image_px, params.image_px)
    try:
        with torch.no_grad():
            features_BE = network.eval()(torch.rand(shape))
    except Exception as error:
        raise RecipeError(f"{where} failed on images of shape {shape}: {_line(error)}") from error
    network.train(training)
    if not isinstance(features_BE, torch.Tensor) or features_BE.ndim != 2 or len(features_BE) != 2:
        got = tuple(features_BE.shape) if isinstance(features_BE, torch.Tensor) else type(features_BE).__name__
        raise RecipeError(f"{where} maps images of shape {shape} to {got}: it has to give features of shape (2, width)")
    if not features_BE.isfinite().all():
        raise RecipeError(f"{where} gives features that are not finite")
    object.__setattr__(network, "num_features", features_BE.shape[1])  # what `feature_width` reads; no parameter or module
    return network


def _function(name: str) -> Callable[..., Any]:
    source_digest(name)  # says so where there is no such module
    module, _, function = name.partition(":")
    try:
        loaded = importlib.import_module(module)
    except Exception as error:
        raise RecipeError(f"encoder '{name}': module '{module}' fails when imported: {_line(error)}") from error
    found = getattr(loaded, function, None)
    if not callable(found):
        there = [key for key, value in vars(loaded).items() if callable(value) and not key.startswith("_")]
        raise RecipeError(f"encoder '{name}': module '{module}' has no function '{function}': {nearest(function, there)}")
    made: Callable[..., Any] = found
    return made


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
