"""Object storage by URI: whole objects under keys, in an S3 bucket (`s3://bucket/prefix`) or a folder (`file:///path`).

Both kinds of store keep the same promises, tested by one suite:

- a write is atomic: a reader gets the old bytes or the new ones, whole; nothing half-written is ever listed;
- `create` is atomic: of many at once, one is told True;
- a request goes on until the store is back (see :mod:`medssl.retry`), and a refusal is one line at once;
- a store pickles to its URI. Credentials come from the environment of each process.

Keys are names joined by '/': no empty part, no '.' or '..', no leading '/'.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from medssl.errors import MissingKey, StoreError
from medssl.retry import deadline_seconds

TEMPORARY = ".medssl-tmp-"
"""Begin of the names of files that are still being written; never listed."""
FIRST_CONTACT_SECONDS = 30.0
"""How long `open_store` waits for a server this process has not met: a mistyped endpoint should not take minutes."""

_SCHEMES = ("s3", "file")


@dataclass(frozen=True, order=True)
class Entry:
    """One object of a listing."""

    key: str
    size: int
    """Bytes."""


class Backend(Protocol):
    """What a kind of storage must be able to do, by full key."""

    def get(self, key: str) -> bytes:
        """The whole body; MissingKey."""

    def put(self, key: str, data: bytes) -> None:
        """Writes atomically, over an older body."""

    def put_new(self, key: str, data: bytes) -> bool:
        """Writes atomically if there is none; whether it did."""

    def size(self, key: str) -> int | None:
        """Bytes, or None when there is none."""

    def entries(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(key, size) of keys that begin with `prefix`."""

    def remove(self, keys: Iterable[str]) -> None:
        """Deletes; no error for missing keys."""

    def put_file(self, path: Path, key: str) -> None:
        """Writes a file's content, atomically."""

    def get_file(self, key: str, path: Path) -> None:
        """Writes into the file at `path`; MissingKey."""


class Store:
    """A place for objects under keys. Made by :func:`open_store`; cheap to copy, picklable, safe in threads."""

    def __init__(self, uri: str, backend: Backend, prefix: str = "") -> None:
        """`uri` is the normalised URI of this very place; `prefix` its key in the backend, '' or ending in '/'."""
        self.uri = uri
        self._backend = backend
        self._prefix = prefix

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and other.uri == self.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def read(self, key: str) -> bytes:
        """The object's bytes; MissingKey when there is none."""
        return self._backend.get(self._full(key))

    def write(self, key: str, data: bytes) -> None:
        """Writes the object, over an older one if there is one."""
        self._backend.put(self._full(key), bytes(data))

    def create(self, key: str, data: bytes) -> bool:
        """Writes the object if there is none; False when there is one already. Of many callers one gets True."""
        return self._backend.put_new(self._full(key), bytes(data))

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        return self._backend.size(self._full(key)) is not None

    def list(self, prefix: str = "") -> list[Entry]:
        """All objects whose key begins with `prefix` (text: 'a' finds 'ab/c'), at any depth, sorted by key."""
        start = len(self._prefix)
        found = self._backend.entries(self._prefix + prefix)
        # Keys ending in '/' are placeholders that other programs leave for folders.
        return sorted(Entry(key[start:], size) for key, size in found if not key.endswith("/"))

    def delete(self, key: str) -> None:
        """Removes the object; no error when there is none."""
        self._backend.remove([self._full(key)])

    def delete_prefix(self, prefix: str) -> None:
        """Removes the folder `prefix`: every object below `prefix/`. An empty prefix empties the store."""
        folder = prefix.rstrip("/")
        if folder:
            _check_key(folder)
            folder += "/"
        self._backend.remove([key for key, _ in self._backend.entries(self._prefix + folder)])

    def upload(self, path: Path, key: str) -> None:
        """Writes a file's content as an object, in parts when it is large; the object appears whole."""
        if not Path(path).is_file():
            raise StoreError(f"cannot upload {path}: there is no such file")
        self._backend.put_file(Path(path), self._full(key))

    def download(self, key: str, path: Path) -> None:
        """Writes an object's content as a file that appears whole (missing folders are made); MissingKey."""
        target = Path(path)
        source = self._full(key)
        with _local_errors(target, writing=True):
            _publish(target, lambda temporary: self._backend.get_file(source, temporary), _rename)

    def sub(self, prefix: str) -> Store:
        """The store rooted at the folder `prefix` of this one."""
        folder = prefix.strip("/")
        if not folder:
            return self
        _check_key(folder)
        return Store(self.uri_of(folder), self._backend, f"{self._prefix}{folder}/")

    def uri_of(self, key: str) -> str:
        """URI of an object or folder; `open_store` and `retrying_filesystem` read it."""
        _check_key(key)
        return f"{self.uri.rstrip('/')}/{key}"

    def _full(self, key: str) -> str:
        _check_key(key)
        return self._prefix + key


def open_store(uri: str, *, create: bool = False) -> Store:
    """The store at `s3://bucket[/prefix]`, `file:///folder` or a plain path.

    Asks the server once per process and bucket whether bucket, endpoint and credentials are right. `create` makes a
    missing bucket or folder. Raises StoreError, in one line, when the store cannot be used.
    """
    scheme, place = split_uri(uri)
    if scheme == "file":
        return _open_folder(Path(place), create)
    from medssl.s3 import Bucket

    bucket, _, prefix = place.partition("/")
    backend = Bucket(bucket)
    if create:
        backend.make()
    backend.meet(min(FIRST_CONTACT_SECONDS, deadline_seconds()))
    root = Store(f"s3://{bucket}", backend)
    return root.sub(prefix)


def open_for_writing(uri: str) -> Store:
    """A store that results go to: a missing folder is made, a missing bucket is an error, since it is likely mistyped."""
    return open_store(uri, create=split_uri(uri)[0] == "file")


def split_uri(uri: str) -> tuple[str, str]:
    """('s3', 'bucket/prefix') or ('file', '/absolute/path') of a store's URI or a plain path; StoreError otherwise."""
    text = str(uri).strip()
    scheme, separator, rest = text.partition("://")
    if not separator:
        if re.match(r"(?i)s3:", text):
            raise StoreError(f"store {text!r} is not a URI: write s3://bucket/folder")
        if not text:
            raise StoreError("the store's URI is empty: write s3://bucket/folder, file:///folder or a path")
        path = text.removeprefix("file:")
        return "file", _absolute(Path(path))
    scheme = scheme.lower()
    if scheme == "file":
        if not rest.startswith("/"):
            raise StoreError(f"store {text!r} has no absolute path: write file:///folder, with three slashes")
        return "file", _absolute(Path(unquote(rest)))
    if scheme != "s3":
        raise StoreError(f"store scheme {scheme!r} is unknown: did you mean '{_likely(scheme)}'? (choices: file, s3)")
    if "@" in rest.partition("/")[0]:
        raise StoreError("the store's URI holds credentials: leave them out and set the AWS variables or a profile")
    place = "/".join(part for part in rest.split("/") if part)
    if not place:
        raise StoreError(f"store {text!r} names no bucket: write s3://bucket/folder")
    return "s3", place


def _likely(scheme: str) -> str:
    close = difflib.get_close_matches(scheme, _SCHEMES, n=1, cutoff=0.0)
    return close[0]


def _absolute(path: Path) -> str:
    return os.path.abspath(path.expanduser())


def _open_folder(root: Path, create: bool) -> Store:
    with _local_errors(root):
        if create:
            root.mkdir(parents=True, exist_ok=True)
        if not root.exists():
            raise StoreError(f"store folder {root} does not exist: make it, or correct the path")
        if not root.is_dir():
            raise StoreError(f"store {root} is a file, not a folder: name a folder")
    return Store(root.as_uri(), Folder(root))


def _check_key(key: str) -> None:
    parts = key.split("/")
    if any(part in ("", ".", "..") or part.startswith(TEMPORARY) for part in parts) or "\0" in key:
        raise StoreError(f"key {key!r} is not valid: names joined by '/', none of them empty, '.' or '..'")


# --- a local folder ---


class Folder:
    """Objects as files of a folder. Writes go to a temporary file of the same folder, are synced, then renamed."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, key: str) -> bytes:
        """The whole file; MissingKey."""
        path = self._path(key)
        with _local_errors(path):
            return path.read_bytes()

    def put(self, key: str, data: bytes) -> None:
        """Replaces the file at once."""
        path = self._path(key)
        with _local_errors(path, writing=True):
            _publish(path, lambda temporary: temporary.write_bytes(data), _rename)

    def put_new(self, key: str, data: bytes) -> bool:
        """Links a whole temporary file to its name, which fails when the name is taken."""
        path = self._path(key)
        with _local_errors(path, writing=True):
            return _publish(path, lambda temporary: temporary.write_bytes(data), _link)

    def size(self, key: str) -> int | None:
        """Bytes of the file, or None."""
        path = self._path(key)
        with _local_errors(path):
            try:
                return path.stat().st_size if path.is_file() else None
            except FileNotFoundError:
                return None

    def entries(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(key, size) of files whose key begins with `prefix`."""
        folder = prefix.rpartition("/")[0]
        with _local_errors(self.root / folder):
            yield from self._walk(self.root / folder if folder else self.root, f"{folder}/" if folder else "", prefix)

    def _walk(self, folder: Path, base: str, prefix: str) -> Iterator[tuple[str, int]]:
        try:
            found = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in found:
            key = base + entry.name
            if entry.name.startswith(TEMPORARY) or not (key.startswith(prefix) or prefix.startswith(f"{key}/")):
                continue
            if entry.is_dir():
                yield from self._walk(Path(entry.path), f"{key}/", prefix)
                continue
            with contextlib.suppress(FileNotFoundError):  # deleted since the folder was read
                yield key, entry.stat().st_size

    def remove(self, keys: Iterable[str]) -> None:
        """Deletes files, and the folders that this leaves empty."""
        folders = set()
        for key in keys:
            path = self._path(key)
            with _local_errors(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
                folders.add(path.parent)
        for folder in folders:
            self._prune(folder)

    def _prune(self, folder: Path) -> None:
        """Removes a folder and those above it as long as they are empty."""
        while folder != self.root:
            try:
                folder.rmdir()
            except OSError:  # not empty, or gone
                return
            folder = folder.parent

    def put_file(self, path: Path, key: str) -> None:
        """Copies a file in."""
        target = self._path(key)
        with _local_errors(target, writing=True):
            _publish(target, lambda temporary: shutil.copyfile(path, temporary), _rename)

    def get_file(self, key: str, path: Path) -> None:
        """Copies a file out."""
        source = self._path(key)
        with _local_errors(source):
            shutil.copyfile(source, path)

    def _path(self, key: str) -> Path:
        return self.root / key


# --- atomic files ---


def _link(temporary: Path, path: Path) -> bool:
    """Gives the file its name unless the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    return True


def _rename(temporary: Path, path: Path) -> bool:
    """Gives the file its name, over another."""
    os.replace(temporary, path)
    return True


def _publish(path: Path, fill: Callable[[Path], object], place: Callable[[Path, Path], bool]) -> bool:
    """`fill` writes a temporary file beside `path`; once synced, `place` gives it the name. Returns place's answer."""
    temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    _touch(temporary)
    try:
        fill(temporary)
        _sync(temporary)
        placed = place(temporary, path)
        _sync(path.parent)
        return placed
    finally:
        temporary.unlink(missing_ok=True)


def _touch(temporary: Path) -> None:
    """Makes the temporary file and its folder, which another process may just be removing because it was empty."""
    for _ in range(100):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            temporary.touch(exist_ok=False)
            return
    raise FileNotFoundError(temporary)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _local_errors(path: Path, writing: bool = False) -> Iterator[None]:
    """Turns the operating system's refusals at `path` into one-line errors of the store."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError):
        if writing:
            raise StoreError(f"cannot write {path}: a file or folder of that name is in the way") from None
        raise MissingKey(f"{path} does not exist") from None
    except PermissionError as error:
        raise StoreError(f"no permission for {error.filename or path}: change its rights or use another folder") from None
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or type(error).__name__}: free space or use another folder") from error
