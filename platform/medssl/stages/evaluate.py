"""Search and evaluation of one arm under one protocol: the bodies of the Tune trials, and what they leave in the store.

A search trains on the first label draw and is judged on the validation split; it never opens the test split (`_judged_rows`
is the one place that picks rows). An evaluation trains with the chosen point and saves, for each head seed, the test
images' probabilities, the scores, and what `predict` needs to apply it again: an artifact each. The validation images'
probabilities are saved too, with the temperature that fits them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from medssl.arms import Arm
from medssl.artifacts import Marker, folder, publish, read_marker
from medssl.calibration import fit_temperature
from medssl.compute import Compute
from medssl.errors import DataError
from medssl.leases import lease
from medssl.metrics import SCORES, UNKNOWN
from medssl.protocols import FineTune, Probe, Protocol
from medssl.recipe import Recipe
from medssl.stages.context import Context, Opened
from medssl.stages.progress import OnProgress
from medssl.stages.search import OnEpoch, fan_out, search, shown_point
from medssl.stages.specs import VALIDATION, Spec
from medssl.stages.tracking import key_of, tracked
from medssl.stages.trials import Halt
from medssl.store import open_store
from medssl.training.finetune import FineTuned

_WRITERS = 8
AfterEpoch = Callable[[int, FineTuned], None]


@dataclass(frozen=True)
class SearchTask:
    """A search to be made."""

    context: Context
    spec: Spec
    arm: str
    protocol: str
    features: str
    """Artifact of the features (probe) or of the encoder (fine-tuning)."""


@dataclass(frozen=True)
class EvaluateTask:
    """Head seeds of one cell to be evaluated."""

    context: Context
    arm: str
    protocol: str
    pretraining_seed: int
    label_draw: int
    specs: Mapping[int, Spec]
    """Artifact of each head seed that is missing."""
    features: str
    encoder: str | None
    """Artifact of the encoder; None for colour features."""
    point: Mapping[str, float]


@dataclass(frozen=True)
class Fitted:
    """Trained heads or networks of one cell, and what they say of the judged images."""

    probabilities_SNK: NDArray[np.float32]
    weights: list[dict[str, bytes]]
    """Files to keep, per head seed."""
    training: list[dict[str, Any]]
    """What a report may show of each head seed's training; empty for probes."""


def run_search(
    task: SearchTask, compute: Compute, on_progress: OnProgress | None = None, halt: Halt | None = None
) -> Marker:
    """Tries every point on the validation split and publishes the best."""
    opened = task.context.open()
    arm, protocol = _named(opened.recipe, task.arm, task.protocol)
    found = search(
        _Score(task), protocol.search, store=folder(opened.store, task.spec.name), name=task.spec.name, compute=compute,
        epochs=_epochs(opened, protocol), on_progress=on_progress, halt=halt,
    )  # fmt: skip
    points = [
        {**point, "score": score, **({"stopped": True} if point in found.stopped else {})} for point, score in found.points
    ]
    facts = {
        "best": dict(found.best),
        "score": found.score,
        "on_edge": found.on_edge,
        "points": points,
        "arm": arm.name,
    }
    return publish(
        opened.store, task.spec.name, stage=task.spec.stage, version=task.spec.version, config=task.spec.config,
        inputs=task.spec.inputs, files={"points.json": json.dumps(points, indent=1).encode()}, facts=facts,
    )  # fmt: skip


def _epochs(opened: Opened, protocol: Protocol) -> int | None:
    """Epochs of a fine-tuning after the head's own."""
    if protocol.kind != "fine_tune":
        return None
    per_epoch, steps = protocol.training.steps_for(len(opened.specs.draw(0, protocol)))
    return -(-steps // per_epoch)


class _Score:
    """The validation score of one point; called in a trial."""

    def __init__(self, task: SearchTask) -> None:
        self.task = task

    def __call__(self, point: Mapping[str, float], on_epoch: OnEpoch | None = None) -> float:
        """Mean score over the search's head seeds; `on_epoch` is told the first one's after each epoch of a fine-tuning."""
        opened = self.task.context.open()
        arm, protocol = _named(opened.recipe, self.task.arm, self.task.protocol)
        rows = _judged_rows(opened, "search")
        seeds = range(protocol.search.head_seeds)
        labels = opened.specs.labels(rows)
        metric = SCORES[protocol.search.metric]

        def after_epoch(epoch: int, tuned: FineTuned) -> None:
            assert on_epoch is not None
            score = float(metric(tuned.predict(opened.images, rows).astype(np.float64), labels, None))
            say({"validation_score": score}, epoch)
            on_epoch(epoch, score)

        with tracked(
            opened.recipe.compute.tracking, study=opened.recipe.study, kind="search",
            name=f"{self.task.spec.label}: {shown_point(point)}", key=key_of(self.task.spec.name, shown_point(point)),
            config={"arm": arm.name, "protocol": protocol.name, "metric": protocol.search.metric, **point},
        ) as say:  # fmt: skip
            fitted = _fit(opened, arm, protocol, 0, self.task.features, seeds, point, rows, after_epoch if on_epoch else None)
            score = float(np.mean([metric(p.astype(np.float64), labels, None) for p in fitted.probabilities_SNK]))
            say({"score": score}, 0)
        return score


def run_evaluations(tasks: Sequence[EvaluateTask], recipe: Recipe, on_progress: OnProgress | None = None) -> None:
    """Evaluates all cells: a probe's head seeds of one cell in one trial, each fine-tuning seed in a trial of its own."""
    split = [
        EvaluateTask(
            t.context, t.arm, t.protocol, t.pretraining_seed, t.label_draw, part, t.features, t.encoder, t.point
        )
        for t in tasks
        for part in _parts(_named(recipe, t.arm, t.protocol)[1], t.specs)
    ]
    weights = [max(1, sum(s.images for s in t.specs.values())) for t in split]
    store = open_store(tasks[0].context.store_uri).sub(f"tune/{recipe.study}")
    store.delete_prefix("")  # what a killed run left of Tune's state; the study's lease is ours
    seeds = [len(t.specs) for t in split]
    fan_out(evaluate, split, compute=recipe.compute, store=store, weights=weights, seeds=seeds, on_progress=on_progress)


def _parts(protocol: Protocol, specs: Mapping[int, Spec]) -> list[Mapping[int, Spec]]:
    return [specs] if protocol.kind != "fine_tune" else [{seed: spec} for seed, spec in specs.items()]


def evaluate(task: EvaluateTask) -> None:
    """Trains and judges the head seeds of one task; runs in a trial. What is finished already is not done again, and what another
    study is just doing is waited for: who needs more head seeds needs the first one too."""
    opened = task.context.open()
    with lease(opened.store, task.specs[min(task.specs)].name, run=opened.recipe.study):
        _evaluate_missing(opened, task)


def _evaluate_missing(opened: Opened, task: EvaluateTask) -> None:
    arm, protocol = _named(opened.recipe, task.arm, task.protocol)
    missing = {seed: spec for seed, spec in task.specs.items() if read_marker(opened.store, spec.name) is None}
    if not missing:
        return
    rows = _judged_rows(opened, "evaluate")
    by_validation = opened.recipe.evaluation_split == VALIDATION
    validation = rows[:0] if by_validation else opened.specs.rows(VALIDATION)  # what a temperature is fitted on
    both = np.concatenate([rows, validation])
    fitted = _fit(opened, arm, protocol, task.label_draw, task.features, list(missing), task.point, both)
    with ThreadPoolExecutor(_WRITERS) as pool:
        jobs = [
            pool.submit(
                _publish, opened, arm, protocol, task, spec, seed, fitted, position, rows, validation
            )
            for position, (seed, spec) in enumerate(missing.items())
        ]
        for job in jobs:
            job.result()


def _judged_rows(opened: Opened, purpose: Literal["search", "evaluate"]) -> NDArray[np.int64]:
    """Rows that predictions are made for. The test split is opened by evaluate alone, if by any."""
    return opened.specs.rows(VALIDATION if purpose == "search" else opened.recipe.evaluation_split)


def _fit(
    opened: Opened, arm: Arm, protocol: Protocol, draw: int, features: str, seeds: Sequence[int], point: Mapping[str, float],
    judged: NDArray[np.int64], after_epoch: AfterEpoch | None = None,
) -> Fitted:  # fmt: skip
    rows = opened.specs.draw(draw, protocol)
    if np.intersect1d(rows, judged).size:
        raise DataError("images to train on are among those to be judged: the dataset's splits overlap")
    if protocol.kind != "fine_tune":
        return _fit_probe(opened, protocol, rows, features, seeds, point, judged)
    return _fit_network(opened, arm, protocol, rows, features, seeds, point, judged, after_epoch)


def _fit_probe(
    opened: Opened, protocol: Probe, rows: NDArray[np.int64], features: str, seeds: Sequence[int],
    point: Mapping[str, float], judged: NDArray[np.int64],
) -> Fitted:  # fmt: skip
    from medssl.probes.heads import apply_heads, fit_heads

    place = folder(opened.store, features)
    table, position = _load(place.read("features.npy")), _positions(_load(place.read("rows.npy")))
    bank = None
    if protocol.probe.bank_passes:
        bank_position = _positions(_load(place.read("bank_rows.npy")))
        bank = torch.from_numpy(_load(place.read("bank.npy"))[:, bank_position(rows)])
    labels, classes = torch.from_numpy(opened.specs.labels(rows)), len(opened.specs.classes)
    heads = fit_heads(protocol.probe, torch.from_numpy(table[position(rows)]), labels, classes, list(seeds), point, bank)
    judged_NE, findings = torch.from_numpy(table[position(judged)]), opened.specs.findings
    probabilities = apply_heads(protocol.probe, heads, judged_NE, classes, findings=findings)
    files = [{"head.safetensors": _head_bytes(head)} for head in heads]
    return Fitted(probabilities.numpy().astype(np.float32), files, [{} for _ in heads])


def _fit_network(
    opened: Opened, arm: Arm, protocol: FineTune, rows: NDArray[np.int64], encoder: str, seeds: Sequence[int],
    point: Mapping[str, float], judged: NDArray[np.int64], after_epoch: AfterEpoch | None = None,
) -> Fitted:  # fmt: skip
    from medssl.training.finetune import finetune
    from medssl.training.labelled import Labels

    validation = opened.specs.rows(VALIDATION)
    device = torch.device("cuda" if torch.cuda.is_available() and opened.recipe.compute.gpus_per_worker else "cpu")
    weights = folder(opened.store, encoder).read("encoder.safetensors")
    probabilities, files, training = [], [], []
    for seed in seeds:
        tuned = finetune(
            weights, opened.recipe.encoder_of(arm), opened.images, rows, opened.specs.labels(rows), len(opened.specs.classes),
            protocol.training, learning_rate=point["learning_rate"], weight_decay=point["weight_decay"], seed=seed, device=device,
            validation=Labels(validation, opened.specs.labels(validation)),
            after_epoch=after_epoch if seed == seeds[0] else None,
        )  # fmt: skip
        training.append(tuned.facts())
        probabilities.append(tuned.predict(opened.images, judged))
        keep = protocol.training.keep_weights == "all" or seed == 0
        files.append({"model.safetensors": tuned.weights()} if keep else {})
    return Fitted(np.stack(probabilities).astype(np.float32), files, training)


def _publish(
    opened: Opened, arm: Arm, protocol: Protocol, task: EvaluateTask, spec: Spec, seed: int,
    fitted: Fitted, position: int, rows: NDArray[np.int64], validation: NDArray[np.int64],
) -> None:  # fmt: skip
    labels, probabilities_NK = opened.specs.labels(rows), fitted.probabilities_SNK[position, : len(rows)]
    validated_NK, validation_labels = fitted.probabilities_SNK[position, len(rows) :], opened.specs.labels(validation)
    temperature = fit_temperature(validated_NK, validation_labels) if len(validation) else None
    wide = probabilities_NK.astype(np.float64)
    scores = {name: float(metric(wide, labels, None)) for name, metric in SCORES.items()}  # the report takes its own
    application = {
        "kind": protocol.kind,
        "probe": None if protocol.kind == "fine_tune" else protocol.probe.canonical(),
        "training": protocol.training.canonical() if protocol.kind == "fine_tune" else None,
        "features": arm.features,
        "encoder": opened.recipe.encoder_of(arm).canonical() if arm.features == "encoder" else None,
        "encoder_artifact": task.encoder if protocol.kind != "fine_tune" else None,
        "images": asdict(opened.recipe.decoding),
        "classes": opened.specs.classes,
        "task": "findings" if opened.specs.findings else "classes",
        "temperature": temperature,
    }
    index, classes = opened.specs.index, opened.specs.classes
    files = {"predictions.parquet": predictions_table(index.loc[rows], labels, classes, probabilities_NK, seed)}
    if len(validation):
        table = predictions_table(index.loc[validation], validation_labels, classes, validated_NK, seed)
        files["validation.parquet"] = table
    publish(
        opened.store, spec.name, stage=spec.stage, version=spec.version, config=spec.config, inputs=spec.inputs,
        files={**files, "model.json": json.dumps(application, indent=1).encode(), **fitted.weights[position]},
        facts={
            "scores": scores, "temperature": temperature,
            **({"training": fitted.training[position]} if fitted.training[position] else {}),
        },
    )  # fmt: skip


def predictions_table(
    index: pd.DataFrame, labels: NDArray[np.int64], classes: list[str], probabilities_NK: NDArray[np.float32], seed: int
) -> bytes:
    """Predictions as stored: image, patient, true class, head seed, and `p_k` for each class.

    Of findings `y_k` of each stands in place of the class: 1 there, 0 not, null where it is not known.
    """
    if labels.ndim == 2:
        known_NF = labels != UNKNOWN
        truth = {f"y_{k}": pa.array(labels[:, k], pa.int8(), mask=~known_NF[:, k]) for k in range(len(classes))}
    else:
        truth = {"label": pa.array(labels, pa.int32()), "label_name": pa.array([classes[k] for k in labels], pa.string())}
    table = pa.table({
        "image_id": pa.array(index["image_id"].tolist(), pa.string()),
        "patient_id": pa.array([None if pd.isna(p) else str(p) for p in index["patient_id"]], pa.string()),
        **truth,
        "seed": pa.array(np.full(len(labels), seed), pa.int32()),
        **{f"p_{k}": pa.array(probabilities_NK[:, k], pa.float32()) for k in range(len(classes))},
    })  # fmt: skip
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _named(recipe: Recipe, arm: str, protocol: str) -> tuple[Arm, Protocol]:
    return next(a for a in recipe.arms if a.name == arm), next(p for p in recipe.protocols if p.name == protocol)


def _load(data: bytes) -> NDArray[Any]:
    array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    return array


def _positions(known: NDArray[np.int64]) -> Any:
    """A function from row numbers to their positions in the sorted `known`."""

    def positions(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        found = np.searchsorted(known, rows)
        if not np.array_equal(known[np.minimum(found, len(known) - 1)], rows):
            raise DataError("features were made for other images than the study's: run the study again")
        return found.astype(np.int64)

    return positions


def _head_bytes(head: Mapping[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: value.contiguous() for name, value in head.items()})
