"""Facts that a report states beside its scores: arms, dataset, curves, searches, versions, warnings."""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from medssl.arms import Arm
from medssl.artifacts import Marker, folder
from medssl.datasets.dataset import Dataset
from medssl.errors import MissingKey
from medssl.metrics import UNKNOWN
from medssl.outside import Outside
from medssl.protocols import Protocol
from medssl.recipe import Recipe
from medssl.stages.report_data import COLUMNS, NO_LABEL, ArmFacts, DatasetFacts, PublishedFacts
from medssl.stages.specs import VALIDATION, Spec, Specs
from medssl.store import Store
from medssl.training.finder import RangeTest

_READERS = 16

Encoders = Sequence[tuple[Arm, int, Spec]]


def arm_facts(recipe: Recipe, arm: Arm) -> ArmFacts:
    """How a report names an arm."""
    if arm.features == "colour":
        return ArmFacts(arm.name, "colour and intensity statistics of the image, no network", "colour")
    encoder = recipe.encoder_of(arm)
    parent = recipe.parent(arm)
    given = f"the encoder of {parent.name}" if parent else f"weights of {arm.initial_weights.rpartition('/')[2]}"
    begin = "random weights" if arm.initial_weights == "random" else given
    if arm.objective is None and not arm.is_random:
        return ArmFacts(arm.name, f"{encoder.name} at {encoder.image_px} px, {begin}, no pretraining here")
    if arm.objective is None:
        return ArmFacts(
            arm.name,
            f"{encoder.name} at {encoder.image_px} px, {begin}, batch-norm statistics from the images",
            "random",
        )
    words = arm.objective.name.replace("_", " ")
    return ArmFacts(
        arm.name,
        f"{encoder.name} at {encoder.image_px} px, {begin}, {words}{_mix(arm)}, {arm.duration}, batch {arm.batch_size}",
    )


def outside_facts(outside: Outside) -> ArmFacts:
    """An arm that is predictions from a file."""
    models = len(outside.probabilities_MNK)
    what = f"predictions from {outside.params.predictions}" + (f", {models} models" if models > 1 else "")
    return ArmFacts(outside.params.name, f"{what} (SHA-256 {outside.digest[:16]})", "outside")


def _mix(arm: Arm) -> str:
    """In words, what an arm's pretraining is shown, where that is not the study's own images."""
    parts = [
        f"{part.times} x {part.dataset.rpartition('/')[2] if part.dataset else 'the dataset'} ({part.described})"
        for part in arm.mix
    ]
    return f" on {' + '.join(parts)}" if parts else ""


def dataset_facts(dataset: Dataset, recipe: Recipe) -> DatasetFacts:
    """What the dataset card says, and how many bags have how many images where the recipe pretrains on bags."""
    card, index = dataset.card, dataset.index()
    labels = index["label"].astype(object).where(index["label"].notna(), NO_LABEL)
    counts = {
        str(s): {str(k): int(v) for k, v in group.value_counts().items()} for s, group in labels.groupby(index["split"])
    }
    unknown = index["patient_id"].isna()
    groups = {str(split): patients(ids) for split, ids in index.groupby("split")["patient_id"]}
    leakage = card.get("leakage") or {}
    return DatasetFacts(
        name=dataset.name, counts=counts, groups=groups, licence=card.get("licence") or "", synthetic=bool(card.get("synthetic")),
        leakage_allowed=bool(leakage.get("allowed")), leakage_patients=_count(leakage.get("patients")),
        unknown_patients=int(unknown.sum()), rejected=_count(card.get("rejected")), pseudonymised=bool(card.get("pseudonymised")),
        split_seed=card.get("split_seed"),
        digest=f"images {card['digests']['images'][:16]}, labels {card['digests']['labels'][:16]}",
        bags=bag_counts(recipe, index),
    )  # fmt: skip


def patients(ids: pd.Series) -> int:
    """How many patients these images are of, each unknown one counted as one."""
    return int(ids.nunique() + ids.isna().sum())


def finding_facts(specs: Specs) -> dict[str, dict[str, tuple[int, int, int]]]:
    """Images with each finding, without it, and of which it is not known, by split."""
    found = {}
    for split, rows in specs.index.groupby("split").groups.items():
        labels_NF = specs.labels(rows.to_numpy(dtype=np.int64))
        with_it, without, unknown = ((labels_NF == label).sum(axis=0) for label in (1, 0, UNKNOWN))
        found[str(split)] = {
            name: (int(with_it[f]), int(without[f]), int(unknown[f])) for f, name in enumerate(specs.classes)
        }
    return found


def bag_counts(recipe: Recipe, index: pd.DataFrame) -> dict[int, int]:
    """Number of bags by number of images among the pretraining splits, ascending; empty where no arm pairs images of bags.

    An image without a bag id is a bag of its own.
    """
    if not any(arm.objective is not None and arm.pairs == "bag" and not arm.mix for arm in recipe.arms):
        return {}
    bag_ids = index[index["split"].isin(recipe.pretraining_splits)]["bag_id"]
    counts = {int(str(size)): int(bags) for size, bags in bag_ids.value_counts().value_counts().items()}
    alone = int(bag_ids.isna().sum())
    counts |= {1: counts.get(1, 0) + alone} if alone else {}
    return dict(sorted(counts.items()))


def histories(store: Store, encoders: Encoders) -> dict[str, pd.DataFrame]:
    """Training curves of the pretrained arms: rank 0 of every seed."""
    frames: dict[str, list[pd.DataFrame]] = {}
    for arm, seed, spec in encoders:
        if spec.stage != "pretrain":
            continue
        frame = pq.read_table(io.BytesIO(folder(store, spec.name).read("history.parquet"))).to_pandas()
        frame = frame[frame["rank"] == 0].drop(columns="rank").assign(seed=seed)
        frames.setdefault(arm.name, []).append(frame)
    return {name: pd.concat(parts, ignore_index=True) for name, parts in frames.items()}


def monitors(store: Store, encoders: Encoders) -> dict[str, pd.DataFrame]:
    """What the pretrained arms' monitors measured, every seed; arms that were not watched are not in it."""
    frames: dict[str, list[pd.DataFrame]] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        for arm, seed, spec in encoders:
            place = folder(store, spec.name)
            keys = [entry.key for entry in place.list("monitor/")] if spec.stage == "pretrain" else []
            if keys:
                frame = pd.DataFrame([json.loads(data) for data in pool.map(place.read, keys)])
                frames.setdefault(arm.name, []).append(frame.assign(seed=seed))
    return {name: pd.concat(parts, ignore_index=True) for name, parts in frames.items()}


def range_tests(store: Store, encoders: Encoders) -> dict[tuple[str, int], RangeTest]:
    """Range tests by arm and pretraining seed, of the arms whose learning rate was found by one."""
    found: dict[tuple[str, int], RangeTest] = {}
    for arm, seed, spec in encoders:
        if spec.stage == "pretrain" and arm.learning_rate_finder:
            try:
                found[arm.name, seed] = RangeTest.from_json(folder(store, spec.name).read("finder.json"))
            except MissingKey:
                continue
    return found


def view_sheets(store: Store, encoders: Encoders) -> dict[str, bytes]:
    """A sheet of augmented views per pretrained arm, of its first seed: pictures of the dataset's images, whole ones too."""
    sheets: dict[str, bytes] = {}
    for arm, _, spec in encoders:
        if spec.stage == "pretrain" and arm.name not in sheets:
            try:
                sheets[arm.name] = folder(store, spec.name).read("views.png")
            except MissingKey:  # a plain loop without a sheet
                continue
    return sheets


def searches(found: Iterable[tuple[Arm, Protocol, Marker | None]]) -> pd.DataFrame:
    """One row per point of every search."""
    records = []
    for arm, protocol, marker in found:
        if marker is None:
            continue
        best, edge = marker.facts["best"], bool(marker.facts["on_edge"])
        for point in marker.facts["points"]:
            chosen = all(point[key] == best[key] for key in ("learning_rate", "weight_decay"))
            records.append(
                (
                    arm.name,
                    protocol.name,
                    point["learning_rate"],
                    point["weight_decay"],
                    point["score"],
                    chosen,
                    chosen and edge,
                    bool(point.get("stopped", False)),
                )
            )
    return pd.DataFrame(records, columns=list(COLUMNS["searches"]))


def versions() -> dict[str, str]:
    """Versions of what computed the numbers."""
    found = {"python": platform.python_version()}
    for name in ("medssl", "torch", "torchvision", "timm", "kornia", "ray", "optuna"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def warnings(recipe: Recipe) -> list[str]:
    """What a reader must know before believing the numbers, beyond what dataset, scores and curves themselves say."""
    own = [part for arm in recipe.arms if arm.objective is not None for part in recipe.mix(arm) if part.dataset is None]
    used = {split for part in own for split in part.splits}
    if VALIDATION in used and recipe.evaluation_split != VALIDATION:
        return ["Validation images were used in pretraining (without labels): what is chosen on them may not be the best."]
    return []


def leaks(recipe: Recipe) -> list[str]:
    """What makes scores too good, and was allowed."""
    arms = recipe.judged_in_pretraining
    if not arms:
        return []
    return [
        f"The images of split {recipe.evaluation_split}, on which the scores are measured, were used in the pretraining of "
        f"{', '.join(arms)}, or of an encoder that these start from (the recipe allows it): their scores are too good."
    ]


def neighbour_warnings(recipe: Recipe, specs: Specs) -> list[str]:
    """Of kNN protocols whose k drowns the rarest class, in the draw that has fewest of one."""
    import torch

    from medssl.probes.knn import k_warning, largest_useful_k

    found = []
    for p in recipe.protocols:
        if p.kind == "knn":
            banks = [torch.from_numpy(specs.labels(specs.draw(d, p))) for d in range(recipe.draws_of(p))]
            text = k_warning(p.probe.k, min(banks, key=lambda bank: largest_useful_k(bank, len(specs.classes))), specs.classes)
            found += [] if text is None else [f"{p.name}: {text}"]
    return found


def published_tables(recipe: Recipe) -> list[PublishedFacts]:
    """Tables of papers, with Welch's tests of their means."""
    return [
        PublishedFacts(
            table.source, table.metric, table.runs, table.scores, table.arms,
            {row: name for row in table.arms if (name := table.protocol_of(row)) is not None}, table.recomputed,
        )
        for table in recipe.published
    ]  # fmt: skip


def label_curves(recipe: Recipe, specs: Specs) -> dict[str, dict[str, int]]:
    """Labelled images in one draw by protocol, ascending, by label curve."""
    curves: dict[str, dict[str, int]] = {}
    for protocol in recipe.protocols:
        if protocol.curve is not None:
            curves.setdefault(protocol.curve, {})[protocol.name] = len(specs.draw(0, protocol))
    return {name: dict(sorted(points.items(), key=lambda point: point[1])) for name, points in curves.items()}


def mix_notes(arms: Iterable[Arm], specs: Specs) -> list[str]:
    """How many images of other datasets were not shown because the study judges by them."""
    return [
        f"{arm.name}: {len(part.left_out):,} images of {part.dataset} are validation or test images of this study too, and were "
        "not shown"
        for arm in arms
        if arm.mix
        for part in specs.mix(arm)
        if len(part.left_out)
    ]


def hardware() -> str:
    """The machine that made the report, in a line."""
    import os

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    line = f"{os.cpu_count()} CPU cores ({platform.machine()}), {memory:.0f} GiB of memory"
    import torch

    if torch.cuda.is_available():
        line += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return line


def feeding(recipe: Recipe, curves: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Rates of the pretrainings by arm: images per second, the share of time that the loop waited for data, hours over all seeds
    (steps at the mean time of the logged ones; start, checkpoints and what a crash made again are not in them)."""
    records = []
    batches = {arm.name: arm.batch_size for arm in recipe.arms}
    for arm, frame in curves.items():
        rates = frame.dropna(subset=["images_per_second"])
        if len(rates):
            hours = len(frame) * batches[arm] * float((1 / rates["images_per_second"]).mean()) / 3600
            median, waited = float(rates["images_per_second"].median()), float(rates["data_wait_share"].mean())
            records.append((arm, recipe.images.feeding, median, waited, frame["seed"].nunique(), hours))
    columns = ["arm", "feeding", "images/s (median)", "share of time waiting for data", "pretrainings", "hours"]
    return pd.DataFrame(records, columns=columns)


def _count(value: Any) -> int:
    return value if isinstance(value, int) else len(value or ())
