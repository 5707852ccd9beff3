"""Which part of a pretraining is trained: nothing of the encoder, its last block, or all of it."""

from __future__ import annotations

from typing import Literal

from torch import nn

from medssl.errors import RecipeError

BatchNormMode = Literal["fixed", "statistics", "affine"]
_BatchNorm = nn.modules.batchnorm._BatchNorm
_STAGES = ("layer4", "blocks", "stages", "layers", "features")
"""Names that timm's families give to the sequence which ends with the last block."""


def last_block(encoder: nn.Module) -> nn.Module:
    """The last block of the encoder's body: layer4's last block of a ResNet, the last transformer block, and so on.

    Raises RecipeError for an encoder without blocks.
    """
    for name in _STAGES:
        found = getattr(encoder, name, None)
        while isinstance(found, nn.Module):
            inner = getattr(found, "blocks", None)
            if isinstance(inner, nn.Sequential | nn.ModuleList) and len(inner):
                found = inner
            if not isinstance(found, nn.Sequential | nn.ModuleList) or not len(found):
                break
            if isinstance(found[-1], nn.Identity):
                found = None
            else:
                found = found[-1]
        if isinstance(found, nn.Module) and any(True for _ in found.parameters()):
            return found
    raise RecipeError(
        f"further.trained is last_block, but {type(encoder).__name__} has no blocks ({', '.join(_STAGES)}): use `all`, or an "
        "encoder with blocks such as resnet50"
    )


def train_part(encoder: nn.Module, part: Literal["nothing", "last_block", "all"], batch_norm: BatchNormMode) -> None:
    """Sets what of the encoder has gradients, and the mode of its batch norms, for the steps to come.

    Where nothing in front of a layer has gradients, autograd keeps no activations of it: with `fixed` batch norm the frozen
    part of an encoder costs a forward pass and no memory.
    """
    trained: set[int] = set()
    if part != "nothing":
        trained = {id(module) for module in (encoder if part == "all" else last_block(encoder)).modules()}
    encoder.train()
    for module in encoder.modules():
        frozen, is_norm = id(module) not in trained, isinstance(module, _BatchNorm)
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(not frozen or (is_norm and batch_norm == "affine"))
        if frozen and is_norm and batch_norm == "fixed":
            module.eval()


def sees_the_batch(module: nn.Module) -> bool:
    """Whether a batch norm in it uses the statistics of the batch."""
    return any(isinstance(m, _BatchNorm) and m.training for m in module.modules())
