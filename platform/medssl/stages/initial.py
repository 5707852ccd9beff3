"""The weights that an arm starts from: found, fitted to its encoder, and put where every worker can read them.

`initial_weights` is `random`, `timm` (the encoder's own pretrained weights), `timm:NAME`, `arm:NAME` (the encoder that another
arm of the study makes), `function` (the weights that a user's own encoder comes with, see networks/own.py), or a file: a URI, an
absolute path, or a relative one, which is taken from the current folder if the file is there and else from the store. Only the
driver looks: workers on other nodes have another current folder, other disks, and perhaps no way to the network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medssl.arms import Arm
from medssl.artifacts import digest_json, folder, read_marker
from medssl.errors import DataError, RecipeError, StoreError
from medssl.given import artifact_of, read_given
from medssl.networks.encoder import EncoderParams
from medssl.recipe import Recipe
from medssl.stages.specs import Spec, Specs
from medssl.store import Store

if TYPE_CHECKING:
    from torch import nn

ENCODER = "encoder.safetensors"
"""File of a finished encoder in its artifact's folder."""
STAGED = "initial.safetensors"
"""File in the artifact's folder with the fitted weights while the artifact is being made."""
FUNCTION = "function"
"""Value of `initial_weights` that keeps the weights of a user's own encoder."""
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".tar", ".bin")


@dataclass(frozen=True)
class GivenWeights:
    """Weights that an encoder starts from, in our own strict layout."""

    uri: str
    """Where they are for the time of the making."""
    facts: dict[str, Any]
    """For the artifact's marker: source, its digest and licence as far as known, what was loaded, dropped and missing."""


def facts_of(given: GivenWeights | None) -> dict[str, Any]:
    """What the marker of an artifact that starts from given weights says of them; nothing for random ones."""
    return {"initial_weights": given.facts} if given else {}


def weights_digests(recipe: Recipe, store: Store) -> dict[str, str]:
    """Digest of the weights that arms start from, by the arm's name; random ones have none.

    Of a file its SHA-256; of timm's weights one of their name and place, so that planning downloads nothing; of a user's own
    encoder one of the weights that its function gives.

    Raises:
        MedsslError: the file or timm's weights do not exist.
    """
    return {
        arm.name: _digest(arm.initial_weights, recipe.encoder_of(arm), store)
        for arm in recipe.arms
        if arm.initial_weights != "random" and recipe.parent(arm) is None
    }


def given_artifacts(recipe: Recipe, store: Store) -> dict[str, str]:
    """Artifacts of the store that a recipe names by a file: weights that an arm starts from, predictions; by the arm's name."""
    files = {arm.name: arm.initial_weights for arm in recipe.arms} | {each.name: each.predictions for each in recipe.outside}
    return {name: found for name, given in files.items() if (found := artifact_of(given, store)) is not None}


def stage_weights(recipe: Recipe, store: Store, encoders: Iterable[tuple[Arm, int, Spec]]) -> dict[str, GivenWeights]:
    """Fits the weights of all encoders that start from given ones and puts them in the artifacts' folders; by artifact.

    Raises:
        MedsslError: they cannot be read, do not fit the encoder, or are others than when the study was planned.
    """
    return {
        spec.name: _stage(arm, recipe.encoder_of(arm), seed, spec, store)
        for arm, seed, spec in encoders
        if arm.initial_weights != "random" and recipe.parent(arm) is None
    }


def stage_arm(specs: Specs, arm: Arm, seed: int, spec: Spec, store: Store) -> GivenWeights:
    """Puts the finished encoder of the arm that another one starts from into that one's folder.

    Raises:
        StoreError: it is not there any more.
    """
    parent = specs.recipe.parent(arm)
    assert parent is not None
    start = specs.encoder(parent, specs.parent_seed(parent, seed))
    marker = read_marker(store, start.name) if start else None
    if start is None or marker is None:
        raise StoreError(f"the encoder of {parent.name} vanished from the store: run the study again")
    tensors = folder(store, start.name).read(ENCODER)
    root = marker.facts.get("initial_weights")
    summary = f"all weights of {start.label}" + (f", which started from {root['source']}" if root else "")
    place = folder(store, spec.name)
    place.write(STAGED, tensors)
    facts = {
        "source": arm.initial_weights, "source_digest": marker.digest, "sha256": hashlib.sha256(tensors).hexdigest(),
        "licence": root["licence"] if root else "", "summary": summary,
    }  # fmt: skip
    return GivenWeights(place.uri_of(STAGED), facts)


def _stage(arm: Arm, encoder: EncoderParams, seed: int, spec: Spec, store: Store) -> GivenWeights:
    from medssl.networks.weights import encoder_weights, find_timm, load_timm, read_weights

    given = arm.initial_weights
    licence = note = ""
    try:
        if _is_timm(given):
            found = find_timm(given, encoder)
            tensors = load_timm(found, encoder)
            source, licence = f"timm:{found.name}", found.licence
            if found.channels != encoder.channels:
                note = f"; timm fitted the first convolution from {found.channels} to {encoder.channels} channel(s)"
        elif given == FUNCTION:
            tensors, source = dict(_of_function(encoder).state_dict()), encoder.name
        else:
            data, source = _read(given, store), given
            if hashlib.sha256(data).hexdigest() != spec.inputs["initial_weights"]:
                raise DataError("the file changed while the study ran: run the study again")
            tensors = read_weights(data)
        fitted, report = encoder_weights(encoder, tensors, seed)
    except DataError as error:
        raise DataError(f"arm '{arm.name}', encoder {encoder.name}, initial_weights '{given}': {error}") from None
    place = folder(store, spec.name)
    place.write(STAGED, fitted)
    facts = {
        "source": source, "source_digest": spec.inputs["initial_weights"], "sha256": hashlib.sha256(fitted).hexdigest(),
        "licence": licence, "summary": report.describe() + note, **report.facts(),
    }  # fmt: skip
    return GivenWeights(place.uri_of(STAGED), facts)


def _digest(given: str, encoder: EncoderParams, store: Store) -> str:
    if given == FUNCTION:
        from medssl.networks.encoder import save_weights

        return hashlib.sha256(save_weights(_of_function(encoder))).hexdigest()
    if not _is_timm(given):
        return hashlib.sha256(_read(given, store)).hexdigest()
    from medssl.networks.weights import find_timm

    found = find_timm(given, encoder)
    return digest_json({"timm": found.name, "place": found.place})


def _of_function(encoder: EncoderParams) -> nn.Module:
    from medssl.networks.encoder import build_encoder
    from medssl.networks.own import is_own

    if not is_own(encoder.name):
        raise RecipeError(
            f"initial_weights 'function': encoder {encoder.name} is no function of yours (package.module:function): give "
            "`random`, `timm`, `timm:NAME` or a file"
        )
    return build_encoder(encoder, 0)


def _is_timm(given: str) -> bool:
    return given.partition(":")[0] == "timm" and "://" not in given


def _read(given: str, store: Store) -> bytes:
    """The file's bytes."""
    if not given.startswith(("http://", "https://")) and not given.endswith(SUFFIXES):
        choices = ", ".join(SUFFIXES)
        known = "`random`, `timm`, `timm:NAME`, `arm:NAME`, `function`"
        raise RecipeError(f"initial_weights '{given}': give {known}, or a file that ends in {choices}")
    return read_given(given, store, f"initial_weights '{given}'")

