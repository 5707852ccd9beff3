"""What a pretraining is shown of its datasets, and for a method that takes labels which classes and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medssl.objectives import ObjectiveParams, SupervisedParams
from medssl.training.plan import PretrainPlan

if TYPE_CHECKING:
    from medssl.arms import MixPart


@dataclass(frozen=True, eq=False)
class ShownPart:
    """Images of one dataset that a pretraining is shown."""

    dataset: str | None
    """As the recipe names it; None is the study's own."""
    index: pd.DataFrame
    rows: NDArray[np.int64]
    splits: tuple[str, ...]
    times: int
    left_out: NDArray[np.int64]
    """Rows of the splits that are not shown, since the study judges or chooses by their images."""

    @property
    def not_shown(self) -> NDArray[np.int64]:
        """All rows of the splits that are not shown: `left_out`, those of other classes, and without a label those that need
        one."""
        of_splits = self.index.index[self.index["split"].isin(self.splits)].to_numpy(dtype=np.int64)
        return np.setdiff1d(of_splits, self.rows)


def candidates(index: pd.DataFrame, part: MixPart, objective: ObjectiveParams | None) -> NDArray[np.int64]:
    """Rows of the part's splits and classes; for a method that takes labels those whose label it tells apart."""
    wanted = index["split"].isin(part.splits)
    if part.classes is not None:
        wanted &= index["label"].isin(part.classes)
    if isinstance(objective, SupervisedParams):
        wanted &= index["label"].notna() if objective.classes is None else index["label"].isin(objective.classes)
    return index.index[wanted].to_numpy(dtype=np.int64)


def with_classes(plan: PretrainPlan, parts: Sequence[ShownPart]) -> PretrainPlan:
    """The plan; of a method that takes labels with the classes named, where the recipe leaves them to the images."""
    if not isinstance(plan.objective, SupervisedParams) or plan.objective.classes is not None:
        return plan
    there = {str(label) for part in parts for label in part.index.loc[part.rows, "label"]}
    objective = plan.objective.model_copy(update={"classes": tuple(sorted(there))})
    return plan.model_copy(update={"objective": objective})


def shown_otherwise(parts: Sequence[ShownPart], *, streamed: bool, bags: bool) -> dict[str, str]:
    """What sets apart the name of an encoder that an earlier release, under the same recipe, showed something else."""
    found = {}
    if streamed and not bags and any(len(part.not_shown) > len(part.left_out) for part in parts):
        found["streamed"] = "the chosen images"  # it showed those of all classes
    if bags and len({part.dataset for part in parts}) < len(parts):
        found["told_apart"] = "by dataset"  # a patient of two parts was two
    return found


def labels_shown(objective: ObjectiveParams, parts: Sequence[ShownPart]) -> list[int] | None:
    """Place in the classes by image number (see medssl.mixes), -1 for labels that are none; None for a method without labels."""
    if not isinstance(objective, SupervisedParams):
        return None
    places = {name: place for place, name in enumerate(objective.classes or ())}
    return [places.get(str(label), -1) for part in parts for label in part.index["label"]]
