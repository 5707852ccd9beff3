"""Files that a recipe names: weights, predictions."""

from __future__ import annotations

from pathlib import Path

from medssl.errors import DataError, MissingKey, RecipeError
from medssl.store import Store, open_store


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


def _read_key(place: Store, key: str, absent: str) -> bytes:
    try:
        return place.read(key)
    except MissingKey:
        raise DataError(absent) from None
