"""A finished study in a store, made without Ray: a dataset of small pictures, features drawn by chance, evaluations."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from medssl.artifacts import publish
from medssl.datasets.card import CARD, Provenance, build_card
from medssl.datasets.leakage import Leakage
from medssl.datasets.rowset import build_rows
from medssl.datasets.shards import write_shard
from medssl.metrics import SCORES
from medssl.recipe import Recipe
from medssl.stages.encode import _npy
from medssl.stages.evaluate import predictions_table
from medssl.stages.ingest import _index, _parquet_bytes
from medssl.stages.specs import Spec
from medssl.store import Store, open_store
from medssl.study import Study

CLASSES = ("a", "b")
SHADES = {"a": 60, "b": 200}
"""Grey level of a class's pictures."""


def _sheet() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 60, 3), SHADES["a"], np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


SHEET = _sheet()
"""What a pretraining leaves as its sheet of augmented views: pictures of the dataset."""


def fields(**changes: Any) -> dict[str, Any]:
    """Random and colour features under a probe without a search, and a fine-tuning."""
    fixed = {"learning_rate": [0.01], "weight_decay": [0.0]}
    return {
        "study": "finished", "dataset": "datasets/squares", "encoder": {"name": "test_resnet", "image_px": 32},
        "images": {"decode_px": 32}, "arms": [{"name": "random"}, {"name": "colour", "features": "colour"}],
        "repeats": {"pretraining_seeds": 2, "label_draws": 1, "labels": 12},
        "protocols": [
            {"name": "probe", "kind": "linear_probe", "head_seeds": 2, "probe": {"vary": ["head"]}, "search": fixed},
            {"name": "tune", "kind": "fine_tune", "head_seeds": 1, "pretraining_seeds": 1, "search": fixed},
        ],
        "metrics": ["balanced_accuracy", "average_precision"],
    } | changes  # fmt: skip


def write_dataset(
    place: Path, store: Store, images: int = 80, patient: Callable[[str], str] = str, pseudonymised: Sequence[str] = (),
    blue: int = 0,
) -> None:
    """Grey pictures in two shards; image n is of patient n // 2, and of the class that n // 2 gives.

    `patient` makes another id of `p3`; `pseudonymised` columns are in the card;
    `blue` makes other pictures of them.
    """
    uris = []
    for n in range(images):
        path = place / f"{n:03d}.png"
        shade = SHADES[CLASSES[n // 2 % 2]]
        Image.fromarray(np.full((20, 30, 3), (shade, n, n + blue), np.uint8)).save(path)
        uris.append(str(path))
    rows = build_rows(
        uris, [Path(uri).name for uri in uris], labels=[[CLASSES[n // 2 % 2]] for n in range(images)],
        patient_ids=[patient(f"p{n // 2}") for n in range(images)],
        splits=[("train", "val", "test", "test")[n // 4 % 4] for n in range(images)],
        further=pa.table({"site": [f"site {n // 4 % 3}" for n in range(images)]}),
    )  # fmt: skip
    results = [write_shard(rows.slice(0, 37), store), write_shard(rows.slice(37), store)]
    index = _index(rows, results)
    data = _parquet_bytes(index)
    provenance = Provenance("squares", "CC0", True, None, None, Leakage({}, {}), False, list(pseudonymised))
    card = build_card(index, [r.entry for r in results if r.entry], "index.parquet", hashlib.sha256(data).hexdigest(), provenance)
    store.write("index.parquet", data)
    store.write(CARD, json.dumps(card).encode())


def make(place: Path, changes: Mapping[str, Any] | None = None, *, evaluated: bool = True) -> Study:
    """The study, every artifact but the report in the store at `place` (none unless `evaluated`); made once for each recipe."""
    store = open_store(str(place / "store"), create=True)
    if not store.exists("datasets/squares/card.json"):
        write_dataset(place, store.sub("datasets/squares"))
    recipe = Recipe.model_validate(fields(**(changes or {})))
    study = Study(recipe, store)
    if not evaluated:
        return study
    for arm, seed, spec in study.encoders():
        curves = {"history.parquet": history(), "views.png": SHEET} if spec.stage == "pretrain" else {}
        finish(study, spec, {"encoder.safetensors": f"{arm.name} {seed}".encode(), **curves})
    rng = np.random.default_rng(0)
    for cell in study.specs.cells():
        if cell.protocol.kind != "fine_tune":
            spec = study.embed_spec(cell.arm, cell.pretraining_seed, cell.protocol)
            assert spec is not None
            rows = study.specs.index.index.to_numpy()
            features = rng.normal(size=(len(rows), 16)) + 4 * study.specs.labels(rows)[:, None]
            finish(study, spec, {"rows.npy": _npy(rows), "features.npy": _npy(features.astype(np.float32))})
        for seed, spec in (study.evaluations(cell) or {}).items():
            evaluation(study, spec, seed, rng)
    return study


def history() -> bytes:
    """Curves of a pretraining of two logged steps."""
    frame = pd.DataFrame({
        "rank": 0, "step": [1, 2], "epoch": 0, "loss": [2.0, 1.0], "learning_rate": 0.1, "embedding_std": 0.5,
        "images_per_second": 90.0, "data_wait_share": 0.1,
    })  # fmt: skip
    return frame.to_parquet(index=False)


def finish(study: Study, spec: Spec, files: Mapping[str, bytes], facts: Mapping[str, Any] | None = None) -> None:
    """Publishes an artifact."""
    marker = publish(study.store, spec.name, stage=spec.stage, version=spec.version, config=spec.config, inputs=spec.inputs,
                     files=files, facts=facts)  # fmt: skip
    study.record(spec, marker)


def evaluation(study: Study, spec: Spec, seed: int, rng: np.random.Generator) -> None:
    """Predictions that are right in two of three."""
    rows = study.specs.rows("test")
    labels = study.specs.labels(rows)
    second = 1 / (1 + np.exp(-rng.normal(0.6 * (2 * labels - 1), 1.7)))
    probabilities = np.stack([1 - second, second], 1).astype(np.float32)
    scores = {name: float(score(probabilities.astype(float), labels, None)) for name, score in SCORES.items()}
    if seed == 1:  # as an evaluation of an earlier medssl left it
        del scores["average_precision"]
    index, classes = study.specs.index.loc[rows], study.specs.classes
    table = predictions_table(index, labels, classes, probabilities, seed)
    finish(study, spec, {"predictions.parquet": table}, {"scores": scores})


def pixels(png: bytes) -> np.ndarray:
    """A PNG as (H, W, C)."""
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


def noted_runs(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Study], threading.Event]:
    """Runs end where Ray would begin: the studies that came so far, and what is set when one does."""
    begun, came = list[Study](), threading.Event()

    class Noted:
        def __init__(self, study: Study, *rest: Any) -> None:
            begun.append(study)
            came.set()

        def run(self, **_: Any) -> None:
            pass

    monkeypatch.setattr("medssl.runner.Runner", Noted)
    return begun, came
