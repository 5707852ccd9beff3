"""An arm's encoder as a file for other programs, with a model card beside it.

Every file is read back by the program that it is for, and must give the features of the encoder, before it is kept.

Shapes: B images, C channels, E feature width.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

from medssl.artifacts import STUDIES, folder, forgotten_note, read_marker
from medssl.errors import DataError, MissingKey, RecipeError, nearest
from medssl.networks.encoder import EncoderParams, build_encoder, feature_width, load_weights, save_weights
from medssl.networks.own import is_own
from medssl.networks.weights import timm_arguments
from medssl.recipe_file import load
from medssl.stages.model_card import CardFacts, data_facts, render_card
from medssl.stages.predict import arm_index
from medssl.store import Store, open_store

TOLERANCE = 1e-4
"""Largest difference of a feature elsewhere, for features up to 1; in proportion above."""
ONNX_INPUT, ONNX_OUTPUT = "images", "features"

Features = Callable[[Tensor], Tensor]
"""Normalised images (B, C, px, px) -> features (B, E)."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    path: Path
    card: Path
    encoder: str
    features: int
    sha256: str
    non_commercial: tuple[str, ...]
    """Names of what the encoder was made from and may not be used commercially."""
    warning: str | None = None
    """What speaks against using it."""

    def to_json(self) -> dict[str, Any]:
        """The same for machines."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in vars(self).items()}

    def to_text(self) -> str:
        """The files, and a warning about licences where there is one."""
        lines = [f"{self.path}: {self.encoder}, {self.features} features, sha256 {self.sha256}", f"{self.card}: its model card"]
        if self.warning:
            lines.insert(0, f"warning: {self.warning}")
        if self.non_commercial:
            lines.append(f"non-commercial: {', '.join(self.non_commercial)}; the licence is inherited, see the card")
        return "\n".join(lines)


class Format(NamedTuple):
    """How a format is written, and how the program that it is for reads it."""

    suffixes: tuple[str, ...]
    write: Callable[[nn.Module, EncoderParams], bytes]
    read: Callable[[bytes, EncoderParams], Features]


def export(
    arm: str, format_: str, out: Path, *, store_uri: str, study: str | None = None, pretraining_seed: int = 0
) -> Exported:
    """Writes the encoder of one pretraining seed of an arm to `out`, and its model card to `out` + `.card.md`.

    Args:
        arm: name of an arm of a finished study in the store.
        format_: a key of `FORMATS`.

    Raises:
        MedsslError: no such arm, seed or format, the network is none of the format's, or the file cannot be written.
    """
    if format_ not in FORMATS:
        raise RecipeError(f"unknown format '{format_}': {nearest(format_, FORMATS)}")
    suffixes = FORMATS[format_].suffixes
    if out.suffix not in suffixes:
        raise RecipeError(f"--out {out}: end it in {' or '.join(suffixes)} for format {format_}")
    store = open_store(store_uri)
    index = arm_index(store, arm, study)
    artifact = _encoder_artifact(index, pretraining_seed)
    place = store.sub(f"{STUDIES}/{index['study']}")
    text = place.read("recipe.yaml").decode()
    recipe = load(yaml.safe_load(text))
    chosen = next(a for a in recipe.arms if a.name == arm)
    params = recipe.encoder_of(chosen)
    encoder = build_encoder(params, 0)
    load_weights(encoder, folder(store, artifact).read("encoder.safetensors"))
    data = convert(encoder, params, format_)
    facts = CardFacts(
        recipe=recipe, recipe_yaml=text, arm=arm, pretraining_seed=pretraining_seed, params=params,
        features=feature_width(encoder), format=format_, file=out.name, sha256=hashlib.sha256(data).hexdigest(),
        data=data_facts(store, recipe, chosen, _given(store, artifact)), result=_result(place),
    )  # fmt: skip
    card = out.with_name(f"{out.name}.card.md")
    _write(out, data)
    _write(card, render_card(facts).encode())
    return Exported(
        out, card, params.name, facts.features, facts.sha256, tuple(d.name for d in facts.data if d.non_commercial),
        forgotten_note(store, artifact),
    )


def convert(encoder: nn.Module, params: EncoderParams, format_: str) -> bytes:
    """The encoder as a file of a format, checked by reading it back as its users do; leaves it in evaluation mode.

    Raises:
        RecipeError: the network is none of the format's, or a package that writes the format is missing.
        DataError: the file gives other features.
    """
    encoder.eval()
    chosen = FORMATS[format_]
    data = chosen.write(encoder, params)
    shape = (3, params.channels, params.image_px, params.image_px)
    images_BCHW = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted_BE, found_BE = encoder(images_BCHW), chosen.read(data, params)(images_BCHW)
    if found_BE.shape != wanted_BE.shape:
        raise DataError(f"{format_} gives features of shape {tuple(found_BE.shape)}, the encoder {tuple(wanted_BE.shape)}")
    off = float((found_BE - wanted_BE).abs().max())
    if not off <= TOLERANCE * max(1.0, float(wanted_BE.abs().max())):
        raise DataError(f"{format_} gives features that are off by {off:.2g} from the encoder's: nothing was written")
    return data


# -- formats ---------------------------------------------------------------------------------------------------


def _write_own(encoder: nn.Module, params: EncoderParams) -> bytes:
    return save_weights(encoder, {"format": "pt", "encoder": json.dumps(params.canonical())})


def _read_own(data: bytes, params: EncoderParams) -> Features:
    encoder = build_encoder(params, 0)
    load_weights(encoder, data)
    return encoder.eval()


def _write_timm(encoder: nn.Module, params: EncoderParams) -> bytes:
    import timm

    if not timm.is_model(params.name):
        raise RecipeError(f"timm has no network '{params.name}': export it as safetensors or onnx")
    return save_weights(encoder, {"format": "pt"})


def _read_timm(data: bytes, params: EncoderParams) -> Features:
    import timm
    from safetensors.torch import load as load_tensors

    with torch.random.fork_rng(devices=[]):
        network = timm.create_model(params.name, num_classes=0, **timm_arguments(params.name, params))
    network.load_state_dict(load_tensors(data))
    return network.eval()


def _write_torchvision(encoder: nn.Module, params: EncoderParams) -> bytes:
    network, own = _torchvision_network(params), encoder.state_dict()
    theirs = network.state_dict()
    differing = [k for k in theirs.keys() | own.keys() if k not in own or k not in theirs or own[k].shape != theirs[k].shape]
    if differing:
        raise RecipeError(
            f"torchvision's {params.name} has other tensors ('{min(differing)}' is the first of {len(differing)} that differ; "
            "its networks take 3 channels): export as timm, safetensors or onnx"
        )
    buffer = io.BytesIO()
    torch.save({name: value.detach().cpu().contiguous() for name, value in own.items()}, buffer)
    return buffer.getvalue()


def _read_torchvision(data: bytes, params: EncoderParams) -> Features:
    network = _torchvision_network(params)
    network.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
    return network.eval()


def _torchvision_network(params: EncoderParams) -> nn.Module:
    from torchvision import models

    if is_own(params.name):
        raise RecipeError(f"torchvision has no network '{params.name}': export it as safetensors or onnx")
    if params.name not in models.list_models():
        raise RecipeError(f"torchvision has no network '{params.name}': export it as timm, safetensors or onnx")
    with torch.random.fork_rng(devices=[]):
        network = models.get_model(params.name, weights=None)
    assert isinstance(network, nn.Module)
    setattr(network, classifier_of(network), nn.Identity())
    return network


def classifier_of(network: nn.Module) -> str:
    """Name of the last part of a torchvision network, its classifier."""
    return [name for name, _ in network.named_children()][-1]


def _write_onnx(encoder: nn.Module, params: EncoderParams) -> bytes:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise RecipeError(f"format onnx needs the package(s) {', '.join(missing)}: pip install 'medssl[export]'")
    images_BCHW = torch.zeros(2, params.channels, params.image_px, params.image_px)
    program = torch.onnx.export(
        encoder, (images_BCHW,), dynamo=True, verbose=False, input_names=[ONNX_INPUT], output_names=[ONNX_OUTPUT],
        dynamic_shapes=({0: "batch"},),
    )  # fmt: skip
    assert program is not None
    data: bytes = program.model_proto.SerializeToString()
    return data


def _read_onnx(data: bytes, params: EncoderParams) -> Features:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def features(images_BCHW: Tensor) -> Tensor:
        return torch.from_numpy(session.run([ONNX_OUTPUT], {ONNX_INPUT: images_BCHW.numpy()})[0])

    return features


FORMATS = {
    "timm": Format((".safetensors",), _write_timm, _read_timm),
    "torchvision": Format((".pth", ".pt"), _write_torchvision, _read_torchvision),
    "safetensors": Format((".safetensors",), _write_own, _read_own),
    "onnx": Format((".onnx",), _write_onnx, _read_onnx),
}
"""Formats by name."""


# -- what is known of the arm ----------------------------------------------------------------------------------


def _encoder_artifact(index: dict[str, Any], seed: int) -> str:
    arm, encoders = index["arm"], index.get("encoders")
    if encoders is None:
        raise RecipeError(f"study '{index['study']}' was reported by an older medssl: run `medssl report RECIPE`, then export")
    if not encoders:
        raise RecipeError(f"arm '{arm}' has no network: colour statistics are not exported")
    if str(seed) not in encoders:
        raise RecipeError(f"arm '{arm}' has no pretraining seed {seed}; it has {', '.join(encoders)}")
    return str(encoders[str(seed)])


def _given(store: Store, artifact: str) -> dict[str, Any] | None:
    """What is known of the weights that the encoder started from; None for random ones."""
    marker = read_marker(store, artifact)
    return marker.facts.get("initial_weights") if marker else None


def _result(place: Store) -> dict[str, Any] | None:
    try:
        result: dict[str, Any] = json.loads(place.read("result.json"))
    except MissingKey:
        return None
    return result


def _write(path: Path, data: bytes) -> None:
    """The file appears whole or not at all."""
    partial = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
