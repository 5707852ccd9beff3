"""Finished classifiers on a shifted set: what each evaluation left in the store, applied as it is; nothing is trained.

A probe's heads read the features of the shifted images, which are an artifact of their own; a fine-tuned network reads the
images. Each evaluation gives one artifact, of the same form.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medssl.artifacts import folder, publish, read_marker
from medssl.errors import DataError
from medssl.leases import lease
from medssl.metrics import SCORES
from medssl.recipe import Recipe
from medssl.shifted import restrict
from medssl.stages.context import Context, Opened
from medssl.stages.evaluate import predictions_table
from medssl.stages.predict import load_model
from medssl.stages.progress import OnProgress
from medssl.stages.specs import Spec
from medssl.stages.trials import fan_out
from medssl.store import open_store

_BATCH = 256


@dataclass(frozen=True)
class TransferTask:
    """The head seeds of one cell, to be judged on a shifted set."""

    context: Context
    """Of the shifted dataset."""
    specs: Mapping[str, Spec]
    """What is missing, by the artifact of the evaluation."""
    features: str | None
    """Artifact of the shifted images' features; None for fine-tuned networks."""
    rows: Sequence[int]
    labels: Sequence[Any]
    """Of the rows: position in `shared`, or the labels of its findings."""
    shared: Sequence[str]
    """Classes of the study that the set has."""
    seeds: Mapping[str, int]
    """Head seed by evaluation."""


def run_transfers(tasks: Sequence[TransferTask], recipe: Recipe, on_progress: OnProgress | None = None) -> None:
    """Judges all cells, one in a Tune trial."""
    if not tasks:
        return
    weights = [len(task.specs) for task in tasks]
    store = open_store(tasks[0].context.store_uri).sub(f"tune/{recipe.study}")
    store.delete_prefix("")  # what a killed run left of Tune's state; the study's lease is ours
    fan_out(transfer, tasks, compute=recipe.compute, store=store, weights=weights, seeds=weights, on_progress=on_progress)


def transfer(task: TransferTask) -> None:
    """Applies each evaluation's classifier to the shifted images; runs in a trial. What is finished, or just being made by
    another study, is not done again."""
    opened = task.context.open()
    with lease(opened.store, next(iter(task.specs.values())).name, run=opened.recipe.study):
        _transfer_missing(opened, task)


def _transfer_missing(opened: Opened, task: TransferTask) -> None:
    rows, labels = np.asarray(task.rows, dtype=np.int64), np.asarray(task.labels, dtype=np.int64)
    for name, spec in task.specs.items():
        if read_marker(opened.store, spec.name) is not None:
            continue
        classes, every_NK = _probabilities(opened, name, task.features, rows)
        columns_C = [classes.index(each) for each in task.shared]
        found_NC = every_NK[:, columns_C] if labels.ndim == 2 else restrict(every_NK, columns_C)
        scores = {metric: float(score(found_NC.astype(np.float64), labels, None)) for metric, score in SCORES.items()}
        table = predictions_table(opened.specs.index.loc[rows], labels, list(task.shared), found_NC, task.seeds[name])
        publish(
            opened.store, spec.name, stage=spec.stage, version=spec.version, config=spec.config, inputs=spec.inputs,
            files={"predictions.parquet": table}, facts={"scores": scores},
        )  # fmt: skip


def _probabilities(
    opened: Opened, name: str, features: str | None, rows: NDArray[np.int64]
) -> tuple[list[str], NDArray[np.float32]]:
    """The study's classes and an evaluation's probabilities (N, K) of them."""
    from safetensors.torch import load

    from medssl.probes.heads import PROBES, apply_heads

    if features is None:
        model = load_model(opened.store, name)
        parts = [model.probabilities(opened.images.images[rows[i : i + _BATCH]]) for i in range(0, len(rows), _BATCH)]
        return model.classes, np.concatenate(parts)
    place = folder(opened.store, name)
    applied = json.loads(place.read("model.json"))
    stored = folder(opened.store, features)
    features_NE = torch.from_numpy(np.load(io.BytesIO(stored.read("features.npy")), allow_pickle=False))
    # The artifact's name says which images these are, in this order. Their row numbers are those at the time: images of the
    # dataset that are not judged may have come or gone since.
    if len(features_NE) != len(rows):
        raise DataError(
            f"{features} has features of {len(features_NE)} images, and the shifted set has {len(rows)}: run the study again"
        )
    probe = PROBES[applied["kind"]].model_validate(applied.get("probe") or {})
    head = load(place.read("head.safetensors"))
    findings = applied.get("task") == "findings"
    found_SNK = apply_heads(probe, [head], features_NE, len(applied["classes"]), findings=findings)
    found_NK: NDArray[np.float32] = found_SNK[0].numpy()
    return applied["classes"], found_NK.astype(np.float32)
