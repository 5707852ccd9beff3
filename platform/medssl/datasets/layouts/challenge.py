"""What the folders of the ISIC challenges have in common: parts with a folder of images each, labels as one column per class."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

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


def challenge_parts(tree: Tree, folder: str, parts: Collection[str]) -> dict[str, list[str]]:
    """Images of each part that is there; `folder` is the name of a part's folder with `{}` for the part.

    Refuses a download without its first part, and images that lie in no part. Ground truth, which other tasks of a challenge give
    as images, is left out.
    """
    found = {part: [path for path in tree.images if folder.format(part) in path.split("/")[:-1]] for part in parts}
    first = next(iter(parts))
    if not found[first]:
        tree.refuse(f"there is no {folder.format(first)} with images")
    known = {path for images in found.values() for path in images}
    strangers = [path for path in tree.images if path not in known and "GroundTruth" not in path]
    if strangers:
        tree.refuse(f"{len(strangers):,} images are in no folder of the challenge (the first: {strangers[0]})")
    return {part: images for part, images in found.items() if images}


def official_split(part: str, there: Collection[str], splits: Mapping[str, str]) -> str | None:
    """The split of a part of the challenge. None for the training part of a download without all parts: what it lacks is then
    made from it."""
    return splits[part] if splits[part] != "train" or len(there) == len(splits) else None
