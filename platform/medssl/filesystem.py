"""The pyarrow filesystem that Ray Data, Train and Tune use for the store: S3 with the store's own patience.

A plain `pyarrow.fs.S3FileSystem` fails a run when the store is away for 20 seconds, and hands on bodies that were cut
short. This one repeats every request until the deadline of :mod:`medssl.retry`, reopens a file that breaks while it is
read and goes on at the same position, and sends a written file whole when it is closed, as often as that takes.

It pickles to its type alone. Endpoint, region and credentials are read from the environment of each process: keys given
to an `S3FileSystem` end up in the pickles that Tune leaves in the bucket. A folder store needs none of this and gets
pyarrow's own LocalFileSystem.
"""

from __future__ import annotations

import io
import os
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from medssl import telemetry
from medssl.errors import StoreError
from medssl.retry import patiently
from medssl.s3 import PART_BYTES, Bucket
from medssl.s3_client import (
    CONNECT_SECONDS,
    READ_SECONDS,
    endpoint_and_region,
    environment_key,
    is_aws,
    prefer_plain_checksums,
)
from medssl.s3_errors import CutShort
from medssl.store import split_uri

T = TypeVar("T")

_REFUSALS = (
    "ACCESS_DENIED",
    "NO_SUCH_BUCKET",
    "NO_SUCH_KEY",
    "NO_SUCH_UPLOAD",
    "RESOURCE_NOT_FOUND",
    "INVALID_ACCESS_KEY_ID",
    "INVALID_CLIENT_TOKEN_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "MISSING_AUTHENTICATION_TOKEN",
    "INVALID_SIGNATURE",
    "UNRECOGNIZED_CLIENT",
    "VALIDATION",
    "HTTP status 400",
    "HTTP status 401",
    "HTTP status 403",
    "HTTP status 404",
    "HTTP status 411",
    "HTTP status 412",
    "HTTP status 501",
)


def retrying_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a store's URI and the path in it (`bucket/prefix`, or the folder), as pyarrow and Ray want."""
    scheme, place = split_uri(uri)
    if scheme == "file":
        return fs.LocalFileSystem(), place
    return fs.PyFileSystem(RetryingS3()), place


def _is_transient(error: Exception) -> bool:
    """Whether another attempt can help. pyarrow tells S3's errors by their text only."""
    if isinstance(error, CutShort):
        return True
    if not isinstance(error, OSError) or isinstance(error, (FileNotFoundError, PermissionError)):
        return False
    text = str(error)
    return "AWS Error" in text and not any(refusal in text for refusal in _REFUSALS)


class RetryingS3(fs.FileSystemHandler):  # type: ignore[misc]
    """pyarrow's S3FileSystem with patience; built anew in each process from the AWS variables."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._built: dict[tuple[int, str], fs.S3FileSystem] = {}

    def __reduce__(self) -> tuple[type[RetryingS3], tuple[()]]:
        return RetryingS3, ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RetryingS3)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(RetryingS3)

    def __repr__(self) -> str:
        return "RetryingS3()"

    @property
    def inner(self) -> fs.S3FileSystem:
        """The filesystem that does the work, in this process and with the present AWS variables."""
        key = environment_key()
        with self._lock:
            if key not in self._built:
                # Two keys, because building may set the checksum variables.
                built = _build()
                self._built[key] = self._built[environment_key()] = built
            return self._built[key]

    def get_type_name(self) -> str:
        """A name for pyarrow's messages."""
        return "medssl-s3"

    def normalize_path(self, path: str) -> str:
        """The path as S3FileSystem writes it."""
        return str(self.inner.normalize_path(path))

    # --- looking ---

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        """Type and size of each path."""
        return _retry("look at", paths[0] if paths else "", lambda: self.inner.get_file_info(paths))

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        """Type and size of what lies below a folder."""
        return _retry("list", selector.base_dir, lambda: self.inner.get_file_info(selector))

    # --- changing; a repeated request may find its work done ---

    def create_dir(self, path: str, recursive: bool) -> None:
        """Leaves the placeholder of a folder."""
        _retry("make", path, lambda: self.inner.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        """Deletes a folder and what is in it."""
        _retry_once_done("delete", path, lambda: self.inner.delete_dir(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """Deletes what is in a folder."""
        _retry("empty", path, lambda: self.inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:
        """Refused: it would delete every bucket."""
        raise StoreError("refusing to delete every bucket of the store: name a folder")

    def delete_file(self, path: str) -> None:
        """Deletes a file; FileNotFoundError."""
        _retry_once_done("delete", path, lambda: self.inner.delete_file(path))

    def move(self, src: str, dest: str) -> None:
        """Copies a file, then deletes the source."""
        _retry("copy", src, lambda: self.inner.copy_file(src, dest))
        self.delete_file(src)

    def copy_file(self, src: str, dest: str) -> None:
        """Copies a file."""
        _retry("copy", src, lambda: self.inner.copy_file(src, dest))

    # --- files ---

    def open_input_stream(self, path: str) -> pa.PythonFile:
        """A file to read from the start."""
        return pa.PythonFile(_Reader(self, path), mode="r")

    def open_input_file(self, path: str) -> pa.PythonFile:
        """A file to read anywhere."""
        return pa.PythonFile(_Reader(self, path), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.PythonFile:
        """A file to write; it appears, whole, when it is closed. `metadata` is not kept."""
        return pa.PythonFile(_Writer(path), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.PythonFile:
        """Refused: objects are written whole."""
        raise NotImplementedError(f"cannot append to {path}: objects are written whole")


def _build() -> fs.S3FileSystem:
    endpoint, region = endpoint_and_region()
    options: dict[str, Any] = {}
    if endpoint:
        parts = urlsplit(endpoint)
        options = {"endpoint_override": parts.netloc + parts.path.rstrip("/"), "scheme": parts.scheme}
        if not is_aws(endpoint):
            prefer_plain_checksums()
    return fs.S3FileSystem(
        region=region,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=READ_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
        **options,
    )


def _retry(what: str, path: str, attempt: Callable[[], T]) -> T:
    try:
        return patiently(attempt, is_transient=_is_transient, what=f"{what} s3://{path}")
    except OSError as error:
        if not isinstance(error, FileNotFoundError) and not _is_transient(error):  # one that was given up has been counted
            telemetry.count("store_errors")
        raise


def _retry_once_done(what: str, path: str, attempt: Callable[[], None]) -> None:
    """`attempt` with patience, where finding nothing is success if an earlier attempt may have deleted it."""
    attempts = 0

    def counted() -> None:
        nonlocal attempts
        attempts += 1
        try:
            attempt()
        except FileNotFoundError:
            if attempts == 1:
                raise

    _retry(what, path, counted)


class _Reader(io.RawIOBase):
    """A file of the store, read in pieces that are asked for again, in a newly opened file, until they come whole."""

    def __init__(self, handler: RetryingS3, path: str) -> None:
        self._handler = handler
        self._path = path
        self._position = 0
        self._file: Any = None
        self._size = -1
        _retry("open", path, self._open)

    def _open(self) -> None:
        file = self._handler.inner.open_input_file(self._path)
        size = file.size()
        if self._size not in (-1, size):
            raise StoreError(f"s3://{self._path} was overwritten while it was read: run again")
        self._file, self._size = file, size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        sizes = [min(PART_BYTES, wanted - start) for start in range(0, wanted, PART_BYTES)]
        pieces = [_retry("read", self._path, partial(self._piece, size)) for size in sizes]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _piece(self, wanted: int) -> bytes:
        """The next `wanted` bytes, or an error; after one the file is opened anew."""
        try:
            if self._file is None:
                self._open()
            data: bytes = self._file.read_at(wanted, self._position)
            if len(data) != wanted:
                raise CutShort(f"s3://{self._path}: {len(data)} of {wanted} bytes came")
        except Exception:
            self._file = None
            raise
        telemetry.count("store_read_bytes", wanted)
        self._position += wanted
        return data

    def close(self) -> None:
        self._file = None
        super().close()


class _Writer(io.RawIOBase):
    """Keeps what is written, in memory or when large in a temporary file, and sends it as one object when closed."""

    def __init__(self, path: str) -> None:
        bucket, _, self._key = path.partition("/")
        if not self._key:
            raise StoreError(f"cannot write s3://{path}: it names a bucket, not an object in it")
        self._bucket = Bucket(bucket)
        self._memory: io.BytesIO | None = io.BytesIO()
        self._file: Any = None
        self._written = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._written

    def write(self, data: Any) -> int:
        if self._memory is not None and self._written + len(data) > PART_BYTES:
            self._file = tempfile.NamedTemporaryFile(prefix="medssl-upload-")  # noqa: SIM115 - closed in close()
            self._file.write(self._memory.getbuffer())
            self._memory = None
        target = self._file if self._memory is None else self._memory
        target.write(data)
        self._written += len(data)
        return len(data)

    def close(self) -> None:
        if self.closed:
            return
        try:
            if self._memory is not None:
                self._bucket.put(self._key, self._memory.getvalue())
            else:
                self._file.flush()
                self._bucket.put_file(Path(self._file.name), self._key)
        finally:
            self._memory = None
            if self._file is not None:
                self._file.close()
            super().close()
