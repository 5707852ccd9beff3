"""Arms that come in from outside as predictions: a file of class probabilities of images that the study judges too.

In a recipe they stand among the arms, `{name: clinic, predictions: FILE}`. Nothing of them is trained or searched for; they are
judged and tested like the others, beside every protocol.

Shapes: M models (the column `model` tells them apart; without it there is one), N judged images, K classes.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from medssl.errors import DataError, nearest
from medssl.params import Params
from medssl.protocols import NAME

if TYPE_CHECKING:
    import pandas as pd

_TOLERANCE = 1e-3
_MODEL = "model"


class OutsideParams(Params):
    """Predictions of a classifier that was made elsewhere."""

    name: str = Field(pattern=NAME)
    """Name of the arm in tables and comparisons."""
    predictions: str
    """CSV or Parquet file, a path or a URI: `image_id`, a column of probabilities for each class (its name, or p_ and its name),
    and `model` where there are several, which count as pretraining seeds."""


@dataclass(frozen=True, eq=False)
class Outside:
    """Predictions of an outside arm for the images that the study judges."""

    params: OutsideParams
    digest: str
    """SHA-256 of the file as it was given."""
    probabilities_MNK: NDArray[np.float32]
    content: bytes
    """What of the file is kept with the report: the judged images, in the columns that were read."""


def split_arms(fields: Any) -> Any:
    """The fields of a recipe with its outside arms in a list of their own; what is no such recipe is returned as it is."""
    arms = fields.get("arms") if isinstance(fields, Mapping) else None
    if not isinstance(arms, list | tuple):
        return fields
    outside = [arm for arm in arms if isinstance(arm, Mapping) and "predictions" in arm]
    if not outside:
        return fields
    return {**fields, "arms": [arm for arm in arms if arm not in outside], "outside": [*fields.get("outside", ()), *outside]}


def read_predictions(
    params: OutsideParams, content: bytes, image_ids: Sequence[str], classes: Sequence[str], *, findings: bool = False
) -> Outside:
    """Checks and orders the predictions in a file's content; rows of other images are left out.

    Args:
        image_ids, classes: of the judged images, and of the study; the axes N and K.
        findings: whether the classes are findings, whose probabilities need not sum to 1.

    Raises:
        DataError: not a table, a column or an image missing, an image twice, or numbers that are no probabilities.
    """
    where = f"predictions of arm '{params.name}' ({params.predictions})"
    table = _read_table(params, content, where)
    if "image_id" not in table:
        raise DataError(f"{where} have no column image_id; their columns: {', '.join(map(str, table.columns))}")
    columns = [_column(table, name, where) for name in classes]
    models = [("", table)] if _MODEL not in table else [(str(name), rows) for name, rows in table.groupby(_MODEL, sort=True)]
    found = [
        _model(rows, columns, image_ids, where + (f", model {name}" if name else ""), findings=findings) for name, rows in models
    ]
    read = ["image_id", *columns, *([_MODEL] if _MODEL in table else [])]
    kept = table.loc[_of(table, image_ids), read]  # a file may hold other patients, and more of each, than the study has
    return Outside(params, hashlib.sha256(content).hexdigest(), np.stack(found), _write_table(params, kept))


def _read_table(params: OutsideParams, content: bytes, where: str) -> pd.DataFrame:
    import pandas as pd

    try:
        if _is_parquet(params):
            return pd.read_parquet(io.BytesIO(content))
        return pd.read_csv(io.BytesIO(content), dtype={"image_id": str, _MODEL: str})
    except Exception as error:  # pandas and pyarrow raise many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{where} cannot be read ({reason}): give a CSV file, or a Parquet file that ends in .parquet") from None


def _write_table(params: OutsideParams, table: pd.DataFrame) -> bytes:
    """As the file that the table is from."""
    written: bytes = table.to_parquet(index=False) if _is_parquet(params) else table.to_csv(index=False).encode()
    return written


def _is_parquet(params: OutsideParams) -> bool:
    return params.predictions.endswith(".parquet")


def _of(table: pd.DataFrame, image_ids: Sequence[str]) -> pd.Series:
    """Which rows are of these images."""
    return table["image_id"].astype(str).isin(set(image_ids))


def _column(table: pd.DataFrame, name: str, where: str) -> str:
    column = next((each for each in (f"p_{name}", name) if each in table), None)
    if column is None:
        raise DataError(f"{where} have no column for class '{name}' (p_{name}): {nearest(f'p_{name}', map(str, table.columns))}")
    import pandas as pd

    if not pd.api.types.is_numeric_dtype(table[column]):
        raise DataError(f"column {column} of the {where} holds {table[column].iloc[0]!r}, not numbers")
    return column


def _model(
    rows: pd.DataFrame, columns: Sequence[str], image_ids: Sequence[str], where: str, *, findings: bool
) -> NDArray[np.float32]:
    mine = rows[_of(rows, image_ids)]
    judged = mine.set_axis(mine["image_id"].astype(str), axis=0)
    if judged.index.has_duplicates:
        twice = judged.index[judged.index.duplicated()][0]
        raise DataError(f"{where} have image '{twice}' twice: give each image once, or tell models apart in a column '{_MODEL}'")
    missing = [name for name in image_ids if name not in judged.index]
    if missing:
        raise DataError(f"{where} lack {len(missing):,} of {len(image_ids):,} judged images, the first is '{missing[0]}'")
    found_NK = judged.loc[list(image_ids), list(columns)].to_numpy(dtype=np.float64)
    total_N = np.ones(len(found_NK)) if findings else found_NK.sum(axis=1)
    bad = ~(((found_NK >= 0) & (found_NK <= 1 + _TOLERANCE)).all(axis=1) & (np.abs(total_N - 1) <= _TOLERANCE))  # NaN is neither
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        values = ", ".join(f"{value:g}" for value in found_NK[first])
        raise DataError(
            f"{where}: image '{image_ids[first]}' has {values}, which are no probabilities: "
            + ("each between 0 and 1" if findings else f"0 or more, with a sum of 1 (to {_TOLERANCE:g})")
        )
    shares_NK: NDArray[np.float32] = (found_NK / total_N[:, None]).astype(np.float32)
    return shares_NK
