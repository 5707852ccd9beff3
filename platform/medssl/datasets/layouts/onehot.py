"""Labels that a table gives as one column of 0 and 1 per class, as the ISIC challenges do."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from medssl.datasets.layouts.tree import Tree, number


def one_hot_labels(tree: Tree, frame: pd.DataFrame, classes: Sequence[str], where: str) -> list[str]:
    """The class of each row, in lower case; refuses a row that has not exactly one."""
    found = []
    for place, (_, row) in enumerate(frame.iterrows()):
        named = [name for name in classes if number(row[name]) == 1]
        if len(named) != 1 or any(number(row[name]) not in (0, 1) for name in classes):
            tree.refuse(f"row {place + 1} of {where} has {len(named)} classes, one is expected")
        found.append(named[0].lower())
    return found
