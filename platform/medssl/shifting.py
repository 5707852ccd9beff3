"""What a study does on its shifted sets: which artifacts that takes, and how the scores there stand beside those at home."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medssl.metrics import SCORES, UNKNOWN
from medssl.shifted import ShiftedSet, judged_as
from medssl.stages.report_data import COLUMNS

if TYPE_CHECKING:
    from medssl.arms import Arm
    from medssl.artifacts import Marker
    from medssl.comparing import Runs
    from medssl.stages.specs import Cell, Spec
    from medssl.study import Study

    AllRuns = Mapping[tuple[str, str], Runs]


def encoder_marker(study: Study, arm: Arm, seed: int) -> tuple[bool, Marker | None]:
    """Whether the encoder of an arm is there (colour features need none), and its marker."""
    encoder = study.specs.encoder(arm, seed)
    marker = study.marker(encoder) if encoder else None
    return encoder is None or marker is not None, marker


def features(study: Study, arm: Arm, seed: int, shifted: ShiftedSet) -> Spec | None:
    """Features of a shifted set's images; None while the encoder is not there."""
    there, marker = encoder_marker(study, arm, seed)
    return study.specs.shifted_features(arm, seed, shifted, marker) if there else None


@dataclass(frozen=True)
class Transfer:
    """One evaluation on a shifted set."""

    spec: Spec
    evaluation: str
    """Artifact of the evaluation whose classifier is applied."""
    head_seed: int


def transfers(study: Study, cell: Cell, shifted: ShiftedSet) -> list[Transfer] | None:
    """What a cell leaves on a shifted set; None while one of its evaluations is not there."""
    evaluations = study.evaluations(cell)
    if evaluations is None or not all(study.is_finished(spec) for spec in evaluations.values()):
        return None
    markers = study.markers(list(evaluations.values()))
    return [
        Transfer(study.specs.transfer(spec, shifted, marker), spec.name, seed)
        for (seed, spec), marker in zip(evaluations.items(), markers, strict=True)
    ]


def artifact_names(study: Study) -> list[str] | None:
    """Artifacts of all cells on all shifted sets; None while one is missing."""
    names: list[str] = []
    for shifted in study.specs.shifted.values():
        for cell in study.specs.cells():
            found = transfers(study, cell, shifted)
            if found is None or not all(study.is_finished(each.spec) for each in found):
                return None
            names += [each.spec.name for each in found]
    return names


# -- in the report ---------------------------------------------------------------------------------------------


def shifted_table(study: Study, home: AllRuns, away: AllRuns) -> pd.DataFrame:
    """Mean scores over the runs at home and on each shifted set (columns of `COLUMNS["shifted"]`).

    At home means the study's own judged images of the classes that the set has, with probabilities restricted to these: what
    is left of the difference is the other images, not fewer classes.
    """
    records: list[tuple[Any, ...]] = []
    for name, shifted in study.specs.shifted.items():
        for (arm, protocol), run in home.items():
            there = away.get((arm, judged_as(protocol, name)))
            if there is None:  # predictions from a file are of the study's images
                continue
            inside_N, labels_N = _shared_at_home(run, shifted)
            models = run.probabilities_PDSNK.reshape(-1, *run.probabilities_PDSNK.shape[3:])
            own = [shifted.restrict(model_NK[inside_N]).astype(np.float64) for model_NK in models]
            for metric in study.recipe.metrics:
                at_home = float(np.mean([SCORES[metric](model_NC, labels_N, None) for model_NC in own]))
                records.append((name, arm, protocol, metric, at_home, float(np.mean(there.metrics[metric]))))
    return pd.DataFrame(records, columns=list(COLUMNS["shifted"]))


def _shared_at_home(run: Runs, shifted: ShiftedSet) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which of the study's judged images have a shared class or a shared finding that is known, and the labels of these."""
    if run.labels_N.ndim == 2:
        labels_NC = run.labels_N[:, shifted.columns_C]
        inside_N = (labels_NC != UNKNOWN).any(axis=1)
        return inside_N, labels_NC[inside_N]
    inside_N = np.isin(run.labels_N, shifted.columns_C)
    return inside_N, np.searchsorted(shifted.columns_C, run.labels_N[inside_N])


def shifted_notes(study: Study) -> list[str]:
    """What of each shifted set was judged, and what was left out."""
    lines = []
    for name, shifted in study.specs.shifted.items():
        findings = shifted.labels_N.ndim == 2
        if findings:
            counts = (shifted.labels_N == 1).sum(axis=0)
        else:
            counts = np.bincount(shifted.labels_N, minlength=len(shifted.shared))
        have = ", ".join(f"{count:,} {each}" for each, count in zip(shifted.shared, counts, strict=True))
        line = f"{name}: {len(shifted.rows):,} images of {shifted.params.dataset} ({', '.join(shifted.params.splits)}): {have}."
        if shifted.other_classes:
            why = "nothing of these findings being known" if findings else "their class being none of the study's or unknown"
            line += f" {shifted.other_classes:,} were left out, {why}."
        if shifted.known:
            line += f" {shifted.known:,} were left out as byte for byte the study's own."
        lines.append(line)
    return lines
