"""A finished arm applied to new images: the head, the encoder and the preprocessing all come from its artifact."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from medssl.artifacts import ARTIFACTS, STUDIES, folder, forgotten_note, read_marker
from medssl.calibration import apply_temperature
from medssl.datasets.read import Decoding
from medssl.errors import DataError, MissingKey, RecipeError, nearest
from medssl.networks.encoder import EncoderParams
from medssl.probes.heads import PROBES, Head, ProbeParams, apply_heads
from medssl.store import Store, open_store
from medssl.training.finetune import FineTuneParams

_BATCH = 128
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")


@dataclass(frozen=True)
class Predictions:
    """What a prediction wrote."""

    path: Path
    images: int
    rejected: list[tuple[str, str]]
    """Images that could not be read, with the reason."""
    warning: str | None = None
    """What speaks against using it."""

    def to_text(self) -> str:
        """A warning where there is one, one line per rejected image, then the count."""
        lines = [f"warning: {self.warning}"] if self.warning else []
        lines += [f"not predicted: {path}: {reason}" for path, reason in self.rejected]
        return "\n".join([*lines, f"{self.images} images predicted, {len(self.rejected)} set aside: {self.path}"])


def predict(
    arm: str,
    images: Sequence[str],
    out: Path,
    *,
    store_uri: str,
    study: str | None = None,
    protocol: str | None = None,
    pretraining_seed: int = 0,
    label_draw: int = 0,
    head_seed: int = 0,
    calibrated: bool = False,
) -> Predictions:
    """Writes image, predicted class and the probability of each class for image files (or folders of them).

    Of findings: those with a probability above one half, joined by `|`, and the probability of each.

    Args:
        arm: name of an arm of a finished study in the store, or the name (or URI) of an evaluate artifact in it.
        out: .csv or .parquet; written whole or not at all.
        calibrated: divide the logits by the temperature that was fitted on the study's validation images.

    Raises:
        MedsslError: no such arm or run, no images, or the run's weights were not kept.
    """
    if out.suffix not in (".csv", ".parquet"):
        raise RecipeError(f"--out {out}: end it in .csv or .parquet")
    last = arm.rstrip("/").rpartition("/")[2]
    arm = last if last.startswith("evaluate-") else arm
    store = open_store(store_uri)
    name = (
        arm
        if arm.startswith("evaluate-")
        else _find(store, arm, study, protocol, pretraining_seed, label_draw, head_seed)
    )
    model = load_model(store, name)
    if calibrated and model.temperature is None:
        raise DataError(
            f"{name} has no temperature: its study judges by the validation images, so none are left to fit one on; leave "
            "--calibrated out"
        )
    paths = list(_files(images))
    if not paths:
        raise DataError(f"no images ({', '.join(SUFFIXES)}) in {', '.join(images)}")
    kept: list[str] = []
    rejected: list[tuple[str, str]] = []
    parts: list[NDArray[np.float32]] = []
    for start in range(0, len(paths), _BATCH):
        batch = []
        for path in paths[start : start + _BATCH]:
            try:
                batch.append(model.decode(path.read_bytes()))
                kept.append(str(path))
            except (DataError, OSError) as error:
                rejected.append((str(path), str(error)))
        if batch:
            parts.append(model.probabilities(np.stack(batch)))
    if not parts:
        raise DataError(f"none of the {len(paths)} images could be read; the first: {rejected[0][0]}: {rejected[0][1]}")
    found_NK = np.concatenate(parts)
    if calibrated and model.temperature is not None:
        found_NK = apply_temperature(found_NK, model.temperature, findings=model.findings).astype(np.float32)
    _write(out, kept, found_NK, model.classes, findings=model.findings)
    return Predictions(out, len(kept), rejected, forgotten_note(store, name))


@dataclass(frozen=True)
class Model:
    """A finished arm, ready to apply."""

    classes: list[str]
    features: str
    encoder_params: EncoderParams | None
    decoding: Decoding
    encoder: torch.nn.Module | None
    head: Head
    probe: ProbeParams | None
    """How the head is applied to features; None where the network was fine-tuned with it."""
    training: FineTuneParams | None
    """How the network was fine-tuned: it says whether images are taken in augmented passes."""
    temperature: float | None
    """Fitted on the study's validation images; None where there were none apart."""
    findings: bool
    """Whether `classes` are findings, several of which an image can have."""

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """An encoded image as the study decoded its own: (H, W, C) uint8."""
        return self.decoding.decode(data)

    def probabilities(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities (B, K) of classes or findings."""
        from medssl.probes.colour import colour_features
        from medssl.views import eval_view

        if self.probe is None and self.encoder is not None and self.encoder_params is not None:
            return self._by_network(self.encoder, self.encoder_params, images_BHWC)
        assert self.probe is not None
        if self.encoder is None or self.encoder_params is None:
            features_BE = torch.from_numpy(colour_features(images_BHWC))
        else:
            with torch.inference_mode():
                features_BE = self.encoder(eval_view(torch.from_numpy(images_BHWC), self.encoder_params)).float()
        found_SBK = apply_heads(self.probe, [self.head], features_BE, len(self.classes), findings=self.findings)
        probabilities: NDArray[np.float32] = found_SBK[0].numpy()
        return probabilities

    def _by_network(
        self, encoder: torch.nn.Module, params: EncoderParams, images_BHWC: NDArray[np.uint8]
    ) -> NDArray[np.float32]:
        from medssl.training.finetune import probabilities

        head = torch.nn.Linear(self.head["weight"].shape[1], len(self.classes))
        head.load_state_dict(dict(self.head))
        network = torch.nn.Sequential(encoder, head)
        stored_BHWC, training = torch.from_numpy(images_BHWC), self.training or FineTuneParams()
        found_BK = probabilities(network, stored_BHWC, params, training, findings=self.findings)
        found: NDArray[np.float32] = found_BK.numpy()
        return found


def load_model(store: Store, name: str) -> Model:
    """The model of an evaluate artifact.

    Raises:
        DataError: the artifact is not finished, or its weights were not kept.
    """
    from safetensors.torch import load, save

    from medssl.networks.encoder import build_encoder, load_weights

    if read_marker(store, name) is None:
        raise DataError(f"{store.uri_of(f'{ARTIFACTS}/{name}')} is not a finished evaluation")
    place = folder(store, name)
    facts = json.loads(place.read("model.json"))
    params = EncoderParams.model_validate(facts["encoder"]) if facts["encoder"] else None
    encoder, probe, training = None, None, None
    if facts["kind"] in PROBES:
        probe = PROBES[facts["kind"]].model_validate(facts.get("probe") or {})
        head = load(place.read("head.safetensors"))
        weights = _encoder_weights(store, name, facts["encoder_artifact"]) if facts["encoder_artifact"] else None
    else:
        training = FineTuneParams.model_validate(facts.get("training") or {})
        try:
            tensors = load(place.read("model.safetensors"))
        except MissingKey:
            raise DataError(
                f"the weights of {name} were not kept: take head seed 0, or set training.keep_weights: all"
            ) from None
        head = {key.removeprefix("head."): value for key, value in tensors.items() if key.startswith("head.")}
        weights = save({k.removeprefix("encoder."): v for k, v in tensors.items() if k.startswith("encoder.")})
    if params is not None and weights is not None:
        encoder = build_encoder(params, 0)
        load_weights(encoder, weights)
        encoder.eval()
    return Model(
        facts["classes"], facts["features"], params, Decoding(**facts["images"]), encoder, head, probe, training,
        facts.get("temperature"), facts.get("task") == "findings",
    )  # fmt: skip


def _encoder_weights(store: Store, name: str, encoder: str) -> bytes:
    """Weights of the encoder that an evaluation's head was trained on.

    Given weights that are not trained get a new artifact of the same content where a study's pretraining images change, and `gc`
    removes the one that the evaluation names: a study that has the evaluation names the new one.
    """
    prefix = f"{STUDIES}/"
    if read_marker(store, encoder) is None:
        for key in (entry.key for entry in store.list(prefix)):
            if key.removeprefix(prefix).split("/")[1:-1] != ["arms"]:
                continue
            index = json.loads(store.read(key))
            seeds = [str(run["pretraining_seed"]) for run in index["evaluations"] if run["artifact"] == name]
            present = [found for seed in seeds if (found := index.get("encoders", {}).get(seed)) and read_marker(store, found)]
            if present:
                encoder = present[0]
                break
    try:
        return folder(store, encoder).read("encoder.safetensors")
    except MissingKey:
        raise DataError(
            f"the encoder {encoder} of {name} is not in {store.uri} any more, and no finished study names another: run its study "
            "again"
        ) from None


def _find(
    store: Store,
    arm: str,
    study: str | None,
    protocol: str | None,
    pretraining_seed: int,
    label_draw: int,
    head_seed: int,
) -> str:
    index = arm_index(store, arm, study)
    runs = index["evaluations"]
    if not runs:
        raise RecipeError(f"arm '{arm}' was not evaluated by any protocol of its study, so it has no head to predict with")
    protocols = list(dict.fromkeys(run["protocol"] for run in runs))
    chosen = protocol or protocols[0]
    if chosen not in protocols:
        raise RecipeError(f"arm '{arm}' has no protocol '{chosen}': {nearest(chosen, protocols)}")
    wanted = {"protocol": chosen, "pretraining_seed": pretraining_seed, "label_draw": label_draw, "seed": head_seed}
    for run in runs:
        if all(run[key] == value for key, value in wanted.items()):
            return str(run["artifact"])
    last = {key: max(run[key] for run in runs if run["protocol"] == chosen) for key in wanted if key != "protocol"}
    limits = ", ".join(f"{key.replace('_', ' ')} 0 to {value}" for key, value in last.items())
    raise RecipeError(f"arm '{arm}' has no such run under {chosen}; it has {limits}")


def arm_index(store: Store, arm: str, study: str | None) -> dict[str, Any]:
    """The arm's index of the one study that has it (evaluations, encoders); RecipeError when none or several have."""
    prefix = f"{STUDIES}/"
    found: dict[str, list[str]] = {}
    for entry in store.list(prefix):
        parts = entry.key.removeprefix(prefix).split("/")
        if len(parts) == 3 and parts[1] == "arms":
            found.setdefault(parts[2].removesuffix(".json"), []).append(parts[0])
    if arm not in found:
        known = nearest(arm, found) if found else "it has no finished study"
        raise RecipeError(f"no arm '{arm}' in {store.uri}: {known}")
    studies = found[arm]
    if study is None and len(studies) > 1:
        raise RecipeError(f"arm '{arm}' is in several studies, name one with --study: {', '.join(studies)}")
    chosen = study or studies[0]
    if chosen not in studies:
        raise RecipeError(f"study '{chosen}' has no arm '{arm}': {nearest(chosen, studies)}")
    index: dict[str, Any] = json.loads(store.read(f"{prefix}{chosen}/arms/{arm}.json"))
    return index


def _files(images: Sequence[str]) -> Iterator[Path]:
    for given in images:
        path = Path(given)
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        elif path.exists():
            yield path
        else:
            raise DataError(f"no image or folder at {path}")


def _write(
    out: Path, paths: list[str], probabilities_NK: NDArray[np.float32], classes: list[str], *, findings: bool
) -> None:
    if findings:
        predicted = ["|".join(name for name, p in zip(classes, row_K, strict=True) if p > 0.5) for row_K in probabilities_NK]
    else:
        predicted = [classes[k] for k in probabilities_NK.argmax(axis=1)]
    table = pd.DataFrame({
        "image": paths,
        "predicted": predicted,
        **{f"p_{name}": probabilities_NK[:, k] for k, name in enumerate(classes)},
    })  # fmt: skip
    partial = out.with_name(f".{out.stem}-{uuid.uuid4().hex[:8]}{out.suffix}")
    try:
        if out.suffix == ".csv":
            table.to_csv(partial, index=False)
        else:
            table.to_parquet(partial, index=False)
        os.replace(partial, out)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
