"""Data sets that finished classifiers are judged on as they are: another camera, site or population (zero-shot, paper 004).

A shifted set seldom has the study's classes, all of them and under the same names. Classes that both have are judged: of a
prediction the probabilities of these are divided by their sum, so that a class which cannot occur takes none. Images of other
classes, and images that the study itself has (byte for byte, in any split), are left out and counted. Of findings those that
both data sets have are judged, each by itself.

Shapes: N judged images, K classes or findings of the study, C shared ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from medssl.datasets.findings import FindingsParams, finding_labels, findings_of
from medssl.errors import RecipeError, nearest
from medssl.metrics import UNKNOWN
from medssl.mixes import check_splits, seen_elsewhere
from medssl.params import Params
from medssl.protocols import NAME

if TYPE_CHECKING:
    import pandas as pd


class ShiftedParams(Params):
    """A dataset that the study's finished classifiers are judged on without further training."""

    name: str = Field(pattern=NAME)
    """Name in tables and comparisons."""
    dataset: str
    """Its path in the store, or a URI."""
    splits: tuple[str, ...] = Field(("test",), min_length=1)
    """Splits whose labelled images are judged; nothing of it is trained on here, so it may be all."""
    classes: dict[str, str] | None = None
    """The study's class (or finding) for each class (or finding) of that dataset, several classes to one if need be; images of
    classes that are not named are left out. null: those of the same name."""


@dataclass(frozen=True, eq=False)
class ShiftedSet:
    """The judged images of a shifted set."""

    params: ShiftedParams
    index: pd.DataFrame
    rows: NDArray[np.int64]
    """Of the index, ascending."""
    labels_N: NDArray[np.int64]
    """Position in `shared`; of findings labels (N, C)."""
    shared: list[str]
    """Classes of the study that it has images of, in the study's order."""
    columns_C: list[int]
    """Their positions among the study's classes."""
    other_classes: int
    """Images left out since their class is none of the study's, or not known."""
    known: int
    """Images left out since the study has them."""

    def protocol(self, name: str) -> str:
        """What a protocol is called where it is judged on this set."""
        return judged_as(name, self.params.name)

    def restrict(self, probabilities_NK: NDArray[Any]) -> NDArray[np.float32]:
        """Probabilities (N, C) of the shared classes, see :func:`restrict`; those of findings stay as they are."""
        if self.labels_N.ndim == 2:
            return probabilities_NK[:, self.columns_C].astype(np.float32)
        return restrict(probabilities_NK, self.columns_C)

    @property
    def patients_N(self) -> list[str | None]:
        """Patient ids; None where unknown."""
        known = self.index["patient_id"].astype(object)
        return [None if p is None else str(p) for p in known.where(known.notna(), None).to_numpy()[self.rows]]


def judged_as(protocol: str, on: str | None) -> str:
    """Name of a protocol's scores in tables: on a shifted set they carry its name too."""
    return protocol if on is None else f"{protocol} on {on}"


def restrict(probabilities_NK: NDArray[Any], columns_C: Sequence[int]) -> NDArray[np.float32]:
    """Probabilities (N, C) given that the class is one of `columns_C`; alike where all of these are 0 in float32."""
    chosen_NC = probabilities_NK[:, list(columns_C)].astype(np.float64)
    total_N1 = chosen_NC.sum(axis=1, keepdims=True)
    even = 1 / len(columns_C)
    return np.where(total_N1 > 0, chosen_NC / np.where(total_N1 > 0, total_N1, 1.0), even).astype(np.float32)


def shifted_set(
    params: ShiftedParams, uri: str, index: pd.DataFrame, own_index: pd.DataFrame, own_classes: Sequence[str],
    findings: FindingsParams | None = None,
) -> ShiftedSet:  # fmt: skip
    """The images of a dataset that a study's classifiers can be judged on.

    Args:
        uri, index: of the shifted dataset.
        own_index, own_classes: of the study's dataset.
        findings: the study's, where `own_classes` are findings.

    Raises:
        DataError: a split without images.
        RecipeError: a class that the dataset or the study does not have, or fewer than two shared classes with images.
    """
    where = f"shifted set '{params.name}'"
    check_splits(uri, index, params.splits)
    has = sorted({str(label) for label in index["label"].dropna()}) if findings is None else findings_of(index)
    meaning = {name: name for name in has if name in own_classes} if params.classes is None else params.classes
    for theirs, ours in meaning.items():
        if theirs not in has:
            raise RecipeError(f"{where}: classes names '{theirs}', which {uri} does not have: {nearest(theirs, has)}")
        if ours not in own_classes:
            raise RecipeError(f"{where}: classes gives '{ours}' for '{theirs}': {nearest(ours, own_classes)}")
    rows = index.index[index["split"].isin(params.splits)].to_numpy(dtype=np.int64)
    known = seen_elsewhere(index, rows, set(own_index["sha256"]))
    fresh = np.setdiff1d(rows, known)
    if findings is not None:
        return _shifted_findings(params, index, fresh, meaning, findings, len(known))
    labels = index["label"].astype(object).to_numpy()[fresh]
    named = [meaning.get(label) if isinstance(label, str) else None for label in labels]
    is_judged = np.array([name is not None for name in named], dtype=bool)
    judged = [name for name in named if name is not None]
    shared = [name for name in own_classes if name in judged]
    if len(shared) < 2:
        found = f"only {shared[0]}" if shared else "none"
        raise RecipeError(
            f"{where}: of the study's classes ({', '.join(own_classes)}) {uri} has {found} in {', '.join(params.splits)}: name "
            f"the study's class for each of its own ({', '.join(has) or 'it has no labels'}) in classes"
        )
    position = {name: number for number, name in enumerate(shared)}
    labels_N = np.array([position[name] for name in judged], dtype=np.int64)
    columns_C = [list(own_classes).index(name) for name in shared]
    return ShiftedSet(
        params, index, fresh[is_judged], labels_N, shared, columns_C, int((~is_judged).sum()), len(known)
    )  # fmt: skip


def _shifted_findings(
    params: ShiftedParams, index: pd.DataFrame, rows: NDArray[np.int64], meaning: Mapping[str, str], findings: FindingsParams,
    known: int,
) -> ShiftedSet:  # fmt: skip
    """The same of findings: images of which a shared one is known."""
    theirs = {ours: name for name, ours in meaning.items()}
    if len(theirs) < len(meaning):
        ours = next(ours for ours in theirs if list(meaning.values()).count(ours) > 1)
        raise RecipeError(f"shifted set '{params.name}': classes gives finding '{ours}' to two of its own: name one")
    shared = [name for name in findings.names if name in theirs]
    if not shared:
        own = ", ".join(findings.names)
        raise RecipeError(
            f"shifted set '{params.name}': it has none of the study's findings ({own}): name the study's finding for each of its "
            "own in classes"
        )
    judged = findings.model_copy(update={"names": tuple(shared)})
    labels_NC = finding_labels(index, judged, train="", columns=theirs)[rows]  # nothing of it is trained on
    there = (labels_NC != UNKNOWN).any(axis=1)
    columns_C = [findings.names.index(name) for name in shared]
    return ShiftedSet(params, index, rows[there], labels_NC[there], shared, columns_C, int((~there).sum()), known)
