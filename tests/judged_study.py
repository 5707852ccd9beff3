"""A study's predictions drawn by chance: recipe, index of a dataset and the runs of every arm, without a store."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from medssl.metrics import SCORES
from medssl.recipe import Recipe
from medssl.results import Runs
from medssl.stages.specs import Specs

CLASSES = ["bcc", "mel", "nv"]
SHARES = (0.2, 0.15, 0.65)
SKILL = {"pretrained": 2.0, "random": 1.0}


def recipe(**report: Any) -> Recipe:
    """Two arms under a weighted probe and an unweighted fine-tuning; the fields of `report` as given."""
    return Recipe.model_validate({
        "study": "judged", "dataset": "datasets/d", "arms": [{"name": name} for name in SKILL],
        "protocols": [
            {"name": "probe", "kind": "linear_probe", "head_seeds": 2},
            {"name": "tune", "kind": "fine_tune", "head_seeds": 1, "label_draws": 1, "training": {"class_weights": "none"}},
        ],
        "repeats": {"pretraining_seeds": 2, "label_draws": 2, "labels": 60}, "metrics": list(SCORES), "report": report,
    })  # fmt: skip


def index(images: int = 420, seed: int = 0) -> pd.DataFrame:
    """Patients of one to three images in one or two lesions; the columns that `Dataset.index()` has."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(images), rng.integers(1, 4, images))[:images]
    bag = patient * 2 + (rng.random(images) < 0.2)
    of_bag = rng.choice(CLASSES, 2 * images, p=SHARES)
    of_patient = rng.random(images)
    return pd.DataFrame({
        "image_id": [f"image {n:04d}" for n in range(images)],
        "patient_id": [None if of_patient[p] < 0.1 else f"p{p}" for p in patient],
        "bag_id": [f"b{b}" for b in bag],
        "label": of_bag[bag],
        "split": np.where(of_patient[patient] < 0.4, "train", np.where(of_patient[patient] < 0.5, "val", "test")),
        "sha256": [f"{n:064d}" for n in range(images)],
        "site": rng.choice(["north", "south", "<b>east</b>"], images, p=(0.6, 0.36, 0.04))[patient],
        "age": np.where(rng.random(images)[patient] < 0.1, np.nan, rng.integers(20, 90, images)[patient]),
    })  # fmt: skip


def study(images: int = 420, heads: int = 2, **report: Any) -> tuple[Recipe, Specs, dict[tuple[str, str], Runs]]:
    """Recipe, specifications and runs. The probe's probabilities are those of evenly frequent classes."""
    chosen = recipe(**report)
    specs = Specs(chosen, index(images), CLASSES)
    rows = specs.rows("test")
    labels, rng = specs.labels(rows), np.random.default_rng(1)
    known = specs.index.loc[rows, "patient_id"]
    patients = known.astype(object).where(known.notna(), None).tolist()
    runs = {}
    for protocol, shape in (("probe", (2, 2, heads)), ("tune", (2, 1, 1))):
        for arm, skill in SKILL.items():
            evidence = rng.normal(size=(*shape, len(labels), 3)) + rng.normal(size=(len(labels), 3))
            evidence[..., np.arange(len(labels)), labels] += skill
            evidence *= skill / 2  # the likelihood ratio of two unit normals added up: probabilities are as they should be
            evidence += 0.0 if protocol == "probe" else np.log(SHARES)
            probabilities = np.exp(evidence) / np.exp(evidence).sum(axis=-1, keepdims=True)
            scores = {m: np.empty(shape) for m in chosen.metrics}
            for place in np.ndindex(shape):
                for m, values in scores.items():
                    values[place] = SCORES[m](probabilities[place], labels, None)
            temperatures = rng.uniform(0.5, 2, shape) if protocol == "probe" else np.full(shape, np.nan)
            runs[arm, protocol] = Runs(arm, protocol, scores, probabilities.astype(np.float32), labels, patients, temperatures)
    return chosen, specs, runs
