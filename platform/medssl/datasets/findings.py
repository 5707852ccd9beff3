"""Findings: what an image can have several of at once, each known to be there, known not to be, uncertain or not mentioned.

Labels of findings are (N, F): 1 there, 0 not, UNKNOWN. How an uncertain or a missing one counts is the user's to say, as for
CheXpert (Irvin et al. 2019), whose U-Ignore, U-Zeros and U-Ones are `uncertain: ignore`, `zeros` and `ones`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from medssl.errors import DataError, nearest
from medssl.metrics import UNKNOWN
from medssl.params import Params

if TYPE_CHECKING:
    import pandas as pd

Policy = Literal["ignore", "zeros", "ones"]
_LABEL: Mapping[Policy, int] = {"ignore": UNKNOWN, "zeros": 0, "ones": 1}
_UNCERTAIN, _MISSING = -2, -3
"""Of a cell, before a policy has turned it into a label."""
_WORDS = {"true": 1, "yes": 1, "false": 0, "no": 0, "uncertain": _UNCERTAIN}
_NUMBERS = {1.0: 1, 0.0: 0, -1.0: _UNCERTAIN}


class FindingsParams(Params):
    """Several findings an image in place of one class."""

    names: tuple[str, ...] = Field(min_length=1)
    """Findings, in the order of tables: further columns of the dataset that hold 1, 0, -1 for uncertain, or nothing; or labels of
    images that may have several, whose absence from an image's labels says that it has not the finding."""
    uncertain: Policy = "ignore"
    """What an uncertain finding counts as in training. Where images are judged it is always left out."""
    missing: Policy = "ignore"
    """What a finding counts as of which nothing is said, in training and where images are judged; zeros where a report that does
    not mention a finding means that there is none."""

    @field_validator("names")
    @classmethod
    def _differ(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"finding '{twice}' is named twice")
        return names


def finding_labels(
    index: pd.DataFrame, params: FindingsParams, *, train: str = "train", columns: Mapping[str, str] | None = None
) -> NDArray[np.int64]:
    """Labels (N, F) of all images of an index.

    Args:
        index: `Dataset.index()`.
        train: split whose uncertain findings count as the parameters say; those of other splits are UNKNOWN.
        columns: name of a finding in this index where it is another one.

    Raises:
        DataError: a finding that the dataset does not have, or a cell that says neither of the four.
    """
    cells = [_cells(index, (columns or {}).get(name, name)) for name in params.names]
    labels_NF = np.stack(cells, axis=1)
    training_N = (index["split"] == train).to_numpy()
    uncertain_NF = labels_NF == _UNCERTAIN
    labels_NF[labels_NF == _MISSING] = _LABEL[params.missing]
    labels_NF[uncertain_NF] = UNKNOWN
    labels_NF[uncertain_NF & training_N[:, None]] = _LABEL[params.uncertain]
    return labels_NF


def finding_strata(rows: pd.DataFrame, names: Sequence[str]) -> list[str | None]:
    """What each row of a dataset to be is stratified by: the rarest finding that it has, or that it has none of them; None where
    nothing is known.

    Raises:
        DataError: as :func:`finding_labels`.
    """
    labels_NF = finding_labels(rows, FindingsParams(names=tuple(names)))
    there_NF = labels_NF == 1
    by_rarity = np.argsort(there_NF.sum(axis=0), kind="stable")
    rarest_N = by_rarity[there_NF[:, by_rarity].argmax(axis=1)]
    return [
        names[rarest_N[n]] if there_NF[n].any() else "" if (labels_NF[n] == 0).any() else None for n in range(len(labels_NF))
    ]


def findings_of(index: pd.DataFrame) -> list[str]:
    """Names that a finding of this index can have: its further columns, then the labels of its images."""
    from medssl.datasets.rowset import RESERVED_COLUMNS

    further = [str(column) for column in index.columns if column not in RESERVED_COLUMNS]
    return [*further, *sorted({str(label) for labels in index["labels"] if labels is not None for label in labels})]


def _cells(index: pd.DataFrame, name: str) -> NDArray[np.int64]:
    known = findings_of(index)
    if name not in known:
        raise DataError(f"finding '{name}' is neither a further column nor a label of the images: {nearest(name, known)}")
    if name in index.columns:
        return np.array([_cell(value, name, i, index) for i, value in enumerate(index[name].tolist())], dtype=np.int64)
    said = [set() if labels is None else set(labels) for labels in index["labels"]]
    return np.array([int(name in labels) if labels else _MISSING for labels in said], dtype=np.int64)


def _cell(value: Any, name: str, row: int, index: pd.DataFrame) -> int:
    if value is None or value != value or value == "":  # noqa: PLR0124  NaN differs from itself
        return _MISSING
    found = _WORDS.get(value.strip().lower()) if isinstance(value, str) else None
    if found is None:
        try:
            found = _NUMBERS.get(float(value))
        except (TypeError, ValueError):
            found = None
    if found is None:
        image = index["image_id"].iloc[row]
        raise DataError(
            f"finding '{name}' of image '{image}' is {value!r}: write 1 (or true, yes), 0 (false, no), -1 (uncertain), or nothing"
        )
    return found
