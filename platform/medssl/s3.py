"""One S3 bucket: requests with retries of our own, whole bodies only, atomic create, and errors in one line.

A :class:`Bucket` holds its name only. Why not boto3's retries: it gives up after a few attempts, within seconds, and
does not retry a body that is cut short (12 of 200 reads failed through a proxy that cuts bodies, six attempts allowed).
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from medssl import telemetry
from medssl.errors import MissingKey, StoreError
from medssl.retry import deadline_seconds, patiently
from medssl.s3_client import client, environment_key, is_aws
from medssl.s3_errors import CutShort, error_code, explain, http_status, is_missing, is_of_request, is_transient

T = TypeVar("T")

PART_BYTES = 16 * 2**20
"""Files above this go up and come down in parts of this size, each part retried by itself."""
MOST_PARTS = 10_000
THREADS = 4
TOKEN = "medssl-write"
"""Metadata entry that tells our own writes apart: a create or completion whose answer was lost is recognised by it."""

_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_met: set[tuple[tuple[int, str], str]] = set()
"""Buckets that have answered this process, and with which variables."""


def check_bucket_name(bucket: str) -> None:
    """StoreError when no S3 bucket can have this name."""
    if not _BUCKET_NAME.fullmatch(bucket):
        raise StoreError(
            f"bucket name {bucket!r} is not valid: 3 to 63 characters of a-z, 0-9, '-' and '.', "
            "first and last a letter or digit, as in s3://my-bucket/folder"
        )


class Bucket:
    """Requests on one bucket, by full key. Pickles to its name."""

    def __init__(self, name: str) -> None:
        check_bucket_name(name)
        self.name = name

    def __repr__(self) -> str:
        return f"Bucket({self.name!r})"

    def __reduce__(self) -> tuple[type[Bucket], tuple[str]]:
        return Bucket, (self.name,)

    def _request(self, what: str, key: str | None, attempt: Callable[[], T], deadline: float | None = None) -> T:
        """`attempt` with patience; its last error in one line."""
        try:
            return patiently(attempt, is_transient=is_transient, what=f"{what} s3://{self.name}/{key or ''}", deadline=deadline)
        except Exception as error:
            if key is not None and is_missing(error):
                raise MissingKey(f"s3://{self.name}/{key} does not exist") from None
            if isinstance(error, StoreError) or not is_of_request(error):
                raise
            if not is_transient(error):  # a transient one that was given up has been counted
                telemetry.count("store_errors")
            raise explain(error, self.name, key) from None

    def check(self, deadline: float | None = None) -> None:
        """One listing of one key: StoreError when bucket, endpoint or credentials are wrong."""
        self._request("check", None, lambda: client().list_objects_v2(Bucket=self.name, MaxKeys=1), deadline)

    def meet(self, deadline: float) -> None:
        """`check`, once per process and environment."""
        key = (environment_key(), self.name)
        if key not in _met:
            self.check(deadline)
            _met.add(key)

    def make(self) -> None:
        """Creates the bucket where it is missing; one that can be listed is not touched, a key may lack that right."""

        def attempt() -> None:
            from botocore.exceptions import ClientError

            try:
                client().list_objects_v2(Bucket=self.name, MaxKeys=1)
                return
            except ClientError as error:
                if error_code(error) != "NoSuchBucket":
                    raise

            region = client().meta.region_name
            elsewhere = region != "us-east-1" and is_aws(client().meta.endpoint_url)
            options = {"CreateBucketConfiguration": {"LocationConstraint": region}} if elsewhere else {}
            try:
                client().create_bucket(Bucket=self.name, **options)
            except ClientError as error:
                if error_code(error) != "BucketAlreadyOwnedByYou":
                    raise

        self._request("make", None, attempt)

    def get(self, key: str) -> bytes:
        """The whole body; MissingKey."""
        seen: set[str] = set()

        def attempt() -> bytes:
            answer = client().get_object(Bucket=self.name, Key=key)
            data = _whole(answer)
            _check_etag(answer, data, seen)
            telemetry.count("store_read_bytes", len(data))
            return data

        return self._request("read", key, attempt)

    def put(self, key: str, data: bytes) -> None:
        """Writes the whole body; readers see the old one or the new one."""
        digest = _content_md5(data)
        self._request("write", key, lambda: client().put_object(Bucket=self.name, Key=key, Body=data, ContentMD5=digest))
        telemetry.count("store_written_bytes", len(data))

    def put_new(self, key: str, data: bytes) -> bool:
        """Writes the body if there is no such key; False if there is one, unless a lost answer of ours wrote it."""
        from botocore.exceptions import ClientError

        token = uuid.uuid4().hex
        digest = _content_md5(data)
        attempts = 0

        def attempt() -> bool:
            nonlocal attempts
            attempts += 1
            try:
                client().put_object(
                    Bucket=self.name, Key=key, Body=data, ContentMD5=digest, IfNoneMatch="*", Metadata={TOKEN: token}
                )
            except ClientError as error:
                if error_code(error) != "PreconditionFailed" and http_status(error) != 412:
                    raise
                # An earlier attempt may have been carried out though its answer never came.
                return attempts > 1 and self._token(key) == token
            telemetry.count("store_written_bytes", len(data))
            return True

        return self._request("create", key, attempt)

    def _token(self, key: str) -> str | None:
        try:
            found = self._request("look", key, lambda: client().head_object(Bucket=self.name, Key=key))
        except MissingKey:
            return None
        token: str | None = found.get("Metadata", {}).get(TOKEN)
        return token

    def size(self, key: str) -> int | None:
        """Length of the body in bytes, or None when there is no such key."""
        try:
            found = self._request("look", key, lambda: client().head_object(Bucket=self.name, Key=key))
        except MissingKey:
            self.meet(deadline_seconds())  # a HEAD has no body to tell a missing bucket from a missing key
            return None
        return int(found["ContentLength"])

    def entries(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(key, size) of all keys that begin with `prefix`, sorted; placeholders of folders included."""
        request: dict[str, Any] = {"Bucket": self.name, "Prefix": prefix}
        while True:
            page = self._request("list", prefix, lambda: client().list_objects_v2(**request))
            for entry in page.get("Contents", []):
                yield entry["Key"], int(entry["Size"])
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def remove(self, keys: Iterable[str]) -> None:
        """Deletes keys, many at once; no error for those that are not there."""
        pending = list(keys)
        if len(pending) == 1:
            self._request("delete", pending[0], lambda: client().delete_object(Bucket=self.name, Key=pending[0]))
            return
        for start in range(0, len(pending), 1000):
            self._remove_batch(pending[start : start + 1000])

    def _remove_batch(self, keys: list[str]) -> None:
        from botocore.exceptions import ClientError

        left = keys

        def attempt() -> None:
            nonlocal left
            answer = client().delete_objects(Bucket=self.name, Delete={"Objects": [{"Key": key} for key in left], "Quiet": True})
            failed = answer.get("Errors", [])
            if failed:
                left = [entry["Key"] for entry in failed if "Key" in entry]
                code = failed[0].get("Code", "InternalError")
                raise ClientError({"Error": {"Code": code, "Message": ""}}, "DeleteObjects")

        self._request("delete", keys[0], attempt)

    # --- files, in parts when they are large ---

    def put_file(self, path: Path, key: str) -> None:
        """Uploads a file; the key appears with its last byte."""
        size = path.stat().st_size
        if size <= PART_BYTES:
            self.put(key, path.read_bytes())
            return
        part = max(PART_BYTES, -(-size // MOST_PARTS))
        token = uuid.uuid4().hex
        started = self._request(
            "upload",
            key,
            lambda: client().create_multipart_upload(Bucket=self.name, Key=key, Metadata={TOKEN: token}),
        )
        upload = started["UploadId"]
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                numbers = range(1, -(-size // part) + 1)
                etags = list(pool.map(lambda number: self._put_part(path, key, upload, number, part), numbers))
            self._complete(key, upload, token, etags)
        except BaseException:
            self._abort(key, upload)
            raise

    def _put_part(self, path: Path, key: str, upload: str, number: int, part: int) -> str:
        with path.open("rb") as file:
            file.seek((number - 1) * part)
            data = file.read(part)
        digest = _content_md5(data)
        answer = self._request(
            "upload",
            key,
            lambda: client().upload_part(
                Bucket=self.name, Key=key, UploadId=upload, PartNumber=number, Body=data, ContentMD5=digest
            ),
        )
        telemetry.count("store_written_bytes", len(data))
        return str(answer["ETag"])

    def _complete(self, key: str, upload: str, token: str, etags: list[str]) -> None:
        from botocore.exceptions import ClientError

        parts: Any = {"Parts": [{"PartNumber": i, "ETag": etag} for i, etag in enumerate(etags, start=1)]}

        def attempt() -> None:
            try:
                client().complete_multipart_upload(Bucket=self.name, Key=key, UploadId=upload, MultipartUpload=parts)
            except ClientError as error:
                # Completed by an earlier attempt whose answer was lost.
                if error_code(error) != "NoSuchUpload" or self._token(key) != token:
                    raise

        self._request("upload", key, attempt)

    def _abort(self, key: str, upload: str) -> None:
        try:
            client().abort_multipart_upload(Bucket=self.name, Key=key, UploadId=upload)
        except Exception:
            return  # the upload's own error is the one to tell; the server's life-cycle rules remove the parts

    def get_file(self, key: str, path: Path) -> None:
        """Downloads into an existing or new file at `path`, not atomically (the caller renames); MissingKey."""
        found = self._request("look", key, lambda: client().head_object(Bucket=self.name, Key=key))
        size, etag = int(found["ContentLength"]), found["ETag"]
        if size <= PART_BYTES:
            path.write_bytes(self.get(key))
            return
        with path.open("wb") as file, ThreadPoolExecutor(THREADS) as pool:
            file.truncate(size)

            def fetch(start: int) -> None:
                stop = min(start + PART_BYTES, size)
                data = self._get_range(key, start, stop, etag)
                os.pwrite(file.fileno(), data, start)

            list(pool.map(fetch, range(0, size, PART_BYTES)))

    def _get_range(self, key: str, start: int, stop: int, etag: str) -> bytes:
        """Bytes start..stop-1 of the body that has this ETag; StoreError when it was overwritten meanwhile."""

        def attempt() -> bytes:
            answer = client().get_object(Bucket=self.name, Key=key, Range=f"bytes={start}-{stop - 1}", IfMatch=etag)
            data = _whole(answer)
            if len(data) != stop - start:
                raise CutShort
            telemetry.count("store_read_bytes", len(data))
            return data

        return self._request("read", key, attempt)


def _whole(answer: Any) -> bytes:
    """The body of an answer, CutShort unless it has the announced length."""
    data: bytes = answer["Body"].read()
    if len(data) != int(answer["ContentLength"]):
        raise CutShort
    return data


def _check_etag(answer: Any, data: bytes, seen: set[str]) -> None:
    """CutShort when the ETag is an MD5 and not the body's.

    Not every server's ETag is one (encryption, other servers' own ways): a second whole body that equals the first is
    accepted, so `seen` keeps the digests of the attempts.
    """
    etag = str(answer.get("ETag", "")).strip('"')
    if not re.fullmatch(r"[0-9a-f]{32}", etag) or answer.get("SSEKMSKeyId") or answer.get("SSECustomerAlgorithm"):
        return
    digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if digest != etag and digest not in seen:
        seen.add(digest)
        raise CutShort


def _content_md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
