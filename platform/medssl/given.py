"""Files that a recipe names: weights, predictions."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from medssl.artifacts import ARTIFACTS
from medssl.errors import DataError, MissingKey, RecipeError, StoreError
from medssl.store import Store, open_store, split_uri


def read_given(given: str, store: Store, what: str) -> bytes:
    """The bytes of a file: a URI, a path, or where there is no such path a key of the study's store.

    Args:
        what: field and value for an error, as `initial_weights 'weights.pth'`.

    Raises:
        RecipeError: a web address.
        DataError: there is no such file.
    """
    if given.startswith(("http://", "https://")):
        raise RecipeError(f"{what}: web addresses are not read; download the file and give its path or URI")
    if "://" in given:
        parent, _, key = given.rpartition("/")
        return _read_key(open_store(parent), key, f"{what}: there is no such file")
    path = Path(given).expanduser()
    if path.is_file():
        return _read_key(open_store(str(path.absolute().parent)), path.name, f"{what}: there is no such file")
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{what}: there is no such file")
    return _read_key(store, path.as_posix(), f"{what}: there is no such file in {Path.cwd()} or in {store.uri}")


def artifact_of(given: str, store: Store) -> str | None:
    """Name of the artifact in whose folder of `store` a file lies that `read_given` would read; None where in none."""
    scheme, root = split_uri(store.uri)
    path = Path(given).expanduser()
    try:
        if "://" in given:
            of, place = split_uri(given)
        elif path.is_absolute() or path.is_file():
            of, place = "file", str(path.absolute())
        else:
            of, place = scheme, f"{root}/{given}"
    except StoreError:  # of no kind that is read
        return None
    if of == "file":  # the same folder by other ways: links, ..
        root, place = os.path.realpath(root), os.path.realpath(place)
    inside = PurePosixPath(place)
    if of != scheme or not inside.is_relative_to(root):
        return None
    parts = inside.relative_to(root).parts
    return parts[1] if len(parts) > 2 and parts[0] == ARTIFACTS else None


def _read_key(place: Store, key: str, absent: str) -> bytes:
    try:
        return place.read(key)
    except MissingKey:
        raise DataError(absent) from None
