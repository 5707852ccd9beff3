"""Facts that a report states beside its scores: arms, dataset, curves, searches, versions, warnings."""

from __future__ import annotations

import io
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from medssl.artifacts import Marker, folder
from medssl.datasets.dataset import Dataset
from medssl.errors import MissingKey
from medssl.recipe import Arm, Protocol, Recipe
from medssl.stages.report_data import COLUMNS, ArmFacts, DatasetFacts
from medssl.stages.specs import TEST, VALIDATION, Spec
from medssl.store import Store

# Effective rank below this share of the projector's batch-limited rank means that views are mapped to few directions.
_COLLAPSE_STD = 0.01

Encoders = Sequence[tuple[Arm, int, Spec]]


def arm_facts(recipe: Recipe, arm: Arm) -> ArmFacts:
    """How a report names an arm."""
    if arm.features == "colour":
        return ArmFacts(arm.name, "colour and intensity statistics of the image, no network", "colour")
    encoder = recipe.encoder_of(arm)
    begin = "random weights" if arm.initial_weights == "random" else "given weights"
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
        f"{encoder.name} at {encoder.image_px} px, {begin}, {words}, {arm.epochs} epochs, batch {arm.batch_size}",
    )


def dataset_facts(dataset: Dataset) -> DatasetFacts:
    """What the dataset card says."""
    card, index = dataset.card, dataset.index()
    labels = index["label"].astype(object).where(index["label"].notna(), "(no label)")
    counts = {
        str(s): {str(k): int(v) for k, v in group.value_counts().items()} for s, group in labels.groupby(index["split"])
    }
    unknown = index["patient_id"].isna()
    groups = {
        str(split): int(rows["patient_id"].nunique() + rows["patient_id"].isna().sum())
        for split, rows in index.groupby("split")
    }
    leakage = card.get("leakage") or {}
    return DatasetFacts(
        name=dataset.name, counts=counts, groups=groups, licence=card.get("licence") or "", synthetic=bool(card.get("synthetic")),
        leakage_allowed=bool(leakage.get("allowed")), leakage_patients=_count(leakage.get("patients")),
        unknown_patients=int(unknown.sum()), rejected=_count(card.get("rejected")), pseudonymised=bool(card.get("pseudonymised")),
        split_seed=card.get("split_seed"),
        digest=f"images {card['digests']['images'][:16]}, labels {card['digests']['labels'][:16]}",
    )  # fmt: skip


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


def view_sheets(store: Store, encoders: Encoders) -> dict[str, bytes]:
    """A sheet of augmented views per pretrained arm, of its first seed."""
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


def warnings(recipe: Recipe, curves: Mapping[str, pd.DataFrame]) -> list[str]:
    """What a reader must know before believing the numbers, beyond what the dataset and the scores themselves say."""
    found = []
    judged = [split for split in recipe.pretraining_splits if split in (VALIDATION, TEST)]
    if judged:
        names = " and ".join(judged)
        found.append(f"images of the splits {names} were used in pretraining (without labels): scores are too good")
    for arm, frame in curves.items():
        last = frame.dropna(subset=["embedding_std"]).groupby("seed")["embedding_std"].last()
        collapsed = last[last < _COLLAPSE_STD]
        if len(collapsed):
            found.append(f"pretraining of {arm} collapsed: embedding std {collapsed.iloc[0]:.2g} in seed {collapsed.index[0]}")
    return found


def hardware() -> str:
    """The machine that made the report, in a line."""
    import os

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    line = f"{os.cpu_count()} CPU cores ({platform.machine()}), {memory:.0f} GiB of memory"
    import torch

    if torch.cuda.is_available():
        line += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return line


def feeding(mode: str, curves: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Rates of the pretrainings by arm: images per second and the share of time that the loop waited for data."""
    records = []
    for arm, frame in curves.items():
        rates = frame.dropna(subset=["images_per_second"])
        if len(rates):
            records.append((arm, mode, float(rates["images_per_second"].median()), float(rates["data_wait_share"].mean())))
    return pd.DataFrame(records, columns=["arm", "feeding", "images/s (median)", "share of time waiting for data"])


def _count(value: Any) -> int:
    return value if isinstance(value, int) else len(value or ())
