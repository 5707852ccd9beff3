"""Arms that start from what another arm of the study has pretrained (`initial_weights: arm:NAME`): the rules of such chains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medssl.errors import nearest

if TYPE_CHECKING:
    from medssl.arms import Arm
    from medssl.recipe import Recipe

ARM = "arm:"
"""Before the name of the arm in `initial_weights`."""


def check_lineage(recipe: Recipe, arm: Arm) -> None:
    """Raises ValueError where an arm cannot start from the arm that it names; nothing for other initial weights."""
    if not arm.initial_weights.startswith(ARM):
        return
    parent = recipe.parent(arm)
    where = f"arm '{arm.name}' starts from {arm.initial_weights}"
    if parent is None:
        others = [each.name for each in recipe.arms if each.name != arm.name]
        raise ValueError(f"{where}, and there is no such arm: {nearest(arm.initial_weights.removeprefix(ARM), others)}")
    _check_circle(recipe, arm, where)
    if parent.features != "encoder":
        raise ValueError(f"{where}, which has no network: name an arm with an encoder")
    if arm.objective is None and recipe.encoder_of(arm).image_px == recipe.encoder_of(parent).image_px:
        raise ValueError(
            f"{where} and pretrains nothing, so it is the same encoder: give it an objective or another image_px, or leave it out"
        )
    mine, given = (recipe.encoder_of(each).model_copy(update={"image_px": 0}) for each in (arm, parent))
    if mine != given:
        raise ValueError(f"{where}, whose encoder is {given.name} of other fields: give both the same, image_px aside")
    # fewer starts than seeds would count pretrainings from one and the same start as independent
    seeds, theirs = arm.pretraining_seeds or recipe.seeds_of(arm), recipe.seeds_of(parent)
    if theirs not in (1, seeds) and theirs < seeds:
        raise ValueError(f"{where}, which has {theirs} pretraining seeds for its {seeds}: give it one, or {seeds} or more")


def _check_circle(recipe: Recipe, arm: Arm, where: str) -> None:
    seen, at = [arm.name], recipe.parent(arm)
    while at is not None:
        if at.name in seen:
            raise ValueError(f"{where}, and so in the end from itself: {' from '.join([*seen, at.name])}")
        seen.append(at.name)
        at = recipe.parent(at)
