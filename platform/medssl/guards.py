"""What may make a study's scores too good without anyone having meant it: look-alikes across splits, looks at the test split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medssl.artifacts import read_markers
from medssl.datasets.duplicates import connected, near_pairs
from medssl.stages.inspect import NEAR_BITS
from medssl.stages.report_text import plural
from medssl.stages.report_words import FEW_LOOK_ALIKES
from medssl.stages.specs import TEST

if TYPE_CHECKING:
    from medssl.study import Study

def look_alikes(index: pd.DataFrame, split: str, judged: NDArray[np.int64]) -> tuple[int, int]:
    """How many of the judged images, rows of a split, have a copy, byte for byte, and how many a look-alike, among the images of
    other splits.

    Look-alikes of look-alikes count, as in `medssl inspect`; copies are look-alikes too.
    """
    inside_N = (index["split"] == split).to_numpy()
    copies = int(index.loc[judged, "sha256"].isin(set(index.loc[~inside_N, "sha256"])).sum())
    judged_N = np.isin(np.arange(len(index)), judged)
    near = 0
    for group in connected(near_pairs(index["phash"].tolist(), NEAR_BITS), len(index)):
        near += 0 if inside_N[group].all() else int(judged_N[group].sum())
    return copies, max(near, copies)


def foreign_look_alikes(study: Study) -> list[str]:
    """Says so where other datasets and the study's own share look-alikes: of judged images in what a pretraining is shown, and
    of training images in a shifted set. (Copies, byte for byte, are left out of both.)"""
    specs, index, found = study.specs, study.specs.index, dict[str, str]()
    judged = index.loc[specs.rows(study.recipe.evaluation_split), "phash"].tolist()
    seen: dict[str, set[int]] = {}
    for arm in (arm for arm in study.recipe.arms if arm.objective is not None):
        for part in specs.mix(arm):
            if part.dataset is not None:
                seen.setdefault(part.dataset, set()).update(part.rows.tolist())
    for uri, rows in seen.items():
        other = study.others[uri]
        alike = near_across(judged, other.index()["phash"].iloc[sorted(rows)].tolist())
        if alike > FEW_LOOK_ALIKES * len(judged):
            found[uri] = (
                f"{plural(alike, 'judged image')} of {len(judged):,} look nearly like images of {other.name}, which a "
                "pretraining was shown (without labels of the study): they may be other pictures of the same patients."
            )
    lines = list(found.values())
    trained = index.loc[index["split"] != study.recipe.evaluation_split, "phash"].tolist()
    for shifted in specs.shifted.values():
        alike = near_across(shifted.index["phash"].iloc[shifted.rows].tolist(), trained)
        if alike > FEW_LOOK_ALIKES * len(shifted.rows):
            lines.append(
                f"{plural(alike, 'image')} of {len(shifted.rows):,} of the shifted set {shifted.params.name} look nearly like "
                "images of the study that were trained on or chosen by: scores there may be too high."
            )
    return lines


def near_across(these: Sequence[str], those: Sequence[str]) -> int:
    """How many of these hashes have a near one among those, themselves or through look-alikes of look-alikes."""
    near = 0
    for group in connected(near_pairs([*these, *those], NEAR_BITS), len(these) + len(those)):
        here = sum(place < len(these) for place in group)
        near += here if here < len(group) else 0
    return near


def further_looks(study: Study) -> int:
    """Finished evaluations in the store that judged the study's test images and are not the study's own; 0 where it judges by
    the validation split."""
    if study.recipe.evaluation_split != TEST:
        return 0
    own = {spec.name: spec for cell in study.specs.cells() for spec in (study.evaluations(cell) or {}).values()}
    judged = {spec.inputs["test"] for spec in own.values()}
    others = [name for name in study.finished_names("evaluate-") if name not in own]
    return sum(marker.inputs.get("test") in judged for marker in read_markers(study.store, others).values())


def look_warnings(study: Study) -> list[str]:
    """Says so where the test images were judged more often than the study's repeats."""
    looks = further_looks(study)
    if not looks:
        return []
    return [
        f"The test images were judged by {plural(looks, 'further evaluation')} in this store, of other recipes or settings. "
        "Choosing between them by their test scores makes the chosen one look too good: choose on the validation split."
    ]
