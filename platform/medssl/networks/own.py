"""A user's own encoder: a function `package.module:function` that returns a torch module.

The function is called with those of `channels` and `image_px` that it takes, and its module maps images (B, C, H, W) to
features (B, E). It runs wherever an encoder is built, so its module must be importable by Ray's workers too. Random weights
have to come from torch's generator, which is seeded before each call; a function that loads weights goes with
`initial_weights: function`.

Shapes: B batch, C channels, H, W height and width, E feature width.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from medssl.errors import RecipeError, nearest

if TYPE_CHECKING:
    from medssl.networks.encoder import EncoderParams

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_WIDTH = "medssl_feature_width"


def is_own(name: str) -> bool:
    """Whether an encoder's name stands for a user's function."""
    return ":" in name


def build_own(params: EncoderParams) -> nn.Module:
    """The module that the function returns, on the CPU, with the measured width of its features noted in it.

    Raises:
        RecipeError: there is no such module or function, it fails or returns no torch module, or the module does not map
            (B, C, H, W) to finite (B, E).
    """
    function = _function(params.name)
    arguments = _arguments(function, params)
    with torch.device("cpu"):
        try:
            network = function(**arguments)
        except Exception as error:
            called = ", ".join(f"{name}={value}" for name, value in arguments.items())
            raise _refusal(params, f"{params.name.partition(':')[2]}({called}) failed with {_line(error)}") from error
        if not isinstance(network, nn.Module):
            raise _refusal(params, f"the function returned {type(network).__name__}: it must return a torch.nn.Module")
        setattr(network, _WIDTH, _measured_width(network, params))
    return network


def own_width(encoder: nn.Module) -> int | None:
    """E as `build_own` measured it; None for an encoder of another kind."""
    width = getattr(encoder, _WIDTH, None)
    return None if width is None else int(width)


def source_digest(name: str) -> str:
    """SHA-256 of the file that the function's module is in: of that file alone, not of what it imports."""
    _function(name)
    path = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return hashlib.sha256(Path(path).read_bytes() if path else name.encode()).hexdigest()


def check_own(params: EncoderParams, *, random: bool) -> None:
    """Refuses a function whose weights do not follow the seed.

    Args:
        random: whether its weights are taken as random ones; equal ones would then be counted as several seeds.

    Raises:
        RecipeError: as `build_own`; weights that cannot be kept, differ from call to call, or are the same for each seed.
    """
    from medssl.networks.encoder import build_encoder, save_weights

    def weights(seed: int) -> bytes:
        try:
            return save_weights(build_encoder(params, seed))
        except RuntimeError as error:  # tensors that share memory
            raise _refusal(params, f"its weights cannot be kept as safetensors: {_line(error)}") from error

    first = weights(0)
    if weights(0) != first:
        raise _refusal(params, "two calls with one seed gave different weights: draw them from torch's own generator")
    if random and weights(1) == first:
        raise _refusal(
            params,
            "it gives the same weights for every seed, which are no random ones: set initial_weights: function where it loads "
            "weights, and leave torch's seed alone where it draws them",
        )


def _function(name: str) -> Callable[..., Any]:
    if not _NAME.fullmatch(name):
        raise RecipeError(f"encoder '{name}': write an encoder of your own as package.module:function")
    module_name, _, function_name = name.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise RecipeError(
                f"encoder '{name}': Python finds no module '{error.name}': install it, or put its folder into PYTHONPATH"
            ) from None
        raise RecipeError(f"encoder '{name}': importing {module_name} failed with {_line(error)}") from error
    except Exception as error:
        raise RecipeError(f"encoder '{name}': importing {module_name} failed with {_line(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = nearest(function_name, functions)
        raise RecipeError(f"encoder '{name}': {module_name} has no function '{function_name}': {near}")
    found: Callable[..., Any] = function
    return found


def _arguments(function: Callable[..., Any], params: EncoderParams) -> dict[str, int]:
    offered = {"channels": params.channels, "image_px": params.image_px}
    try:
        taken = inspect.signature(function).parameters.values()
    except ValueError:  # built in, without a signature
        return {}
    if any(each.kind is each.VAR_KEYWORD for each in taken):
        return offered
    wanted = {each.name for each in taken if each.default is each.empty and each.kind is not each.VAR_POSITIONAL}
    unknown = sorted(wanted - set(offered))
    if unknown:
        raise _refusal(params, f"the function needs '{unknown[0]}': it is given channels and image_px alone, give it a default")
    return {name: value for name, value in offered.items() if name in {each.name for each in taken}}


@torch.no_grad()
def _measured_width(network: nn.Module, params: EncoderParams) -> int:
    """E, from a pass over two images in evaluation mode."""
    was_training = network.training
    images_BCHW = torch.rand(2, params.channels, params.image_px, params.image_px)
    what = f"images of shape {tuple(images_BCHW.shape)}"
    try:
        features = network.eval()(images_BCHW)
    except Exception as error:
        raise _refusal(params, f"{what} fail with {_line(error)}") from error
    finally:
        network.train(was_training)
    if not isinstance(features, torch.Tensor):
        raise _refusal(params, f"it gives {type(features).__name__} for images: features must be a tensor (B, E)")
    if features.ndim != 2 or len(features) != 2 or features.shape[1] == 0:
        raise _refusal(params, f"{what} give {tuple(features.shape)}: features must be (B, E), here (2, E)")
    if not torch.isfinite(features).all():
        raise _refusal(params, "its features of images between 0 and 1 are not finite: mend its weights or normalisation")
    return features.shape[1]


def _refusal(params: EncoderParams, text: str) -> RecipeError:
    return RecipeError(f"encoder '{params.name}': {text}")


def _line(error: BaseException) -> str:
    """The error as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
