"""What an S3 server's refusals and a network's failures mean: worth another attempt or not, and one line for the user.

Nothing in a message comes from the credentials, and the endpoint is printed without a user and password in it.
"""

from __future__ import annotations

import os
import re
from typing import Any

from medssl.errors import StoreError
from medssl.s3_client import named_endpoint

_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 507})
_TRANSIENT_CODES = frozenset(
    {
        "BadDigest",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "RequestThrottled",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "XAmzContentSHA256Mismatch",
    }
)

_ANOTHER_REGION = "bucket {bucket!r} is in another region: set AWS_REGION to the bucket's region"
_EXPIRED = "{at} refuses the session token: renew the AWS credentials"
_UNKNOWN_KEY = "{at} does not know the access key id: check AWS_ACCESS_KEY_ID (or AWS_PROFILE)"
_FULL = "{name}: the store at {at} is full: free space or raise the quota"
_DENIED = "{name}: access denied at {at}: these credentials lack the right; check the bucket's policy"
_NO_S3_SERVER = "what answers at {at} is not an S3 server: check AWS_ENDPOINT_URL"
_OF_CODE = {
    "NoSuchBucket": "bucket {bucket!r} does not exist at {at}: make it, or correct the store's URI",
    "InvalidAccessKeyId": _UNKNOWN_KEY,
    "InvalidClientTokenId": _UNKNOWN_KEY,
    "SignatureDoesNotMatch": "{at} refuses the secret key: check AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)",
    "ExpiredToken": _EXPIRED,
    "InvalidToken": _EXPIRED,
    "RequestTimeTooSkewed": "{at} refuses the request: the clocks differ too much; set this machine's clock",
    "PermanentRedirect": _ANOTHER_REGION,
    "AuthorizationHeaderMalformed": _ANOTHER_REGION,
    "301": _ANOTHER_REGION,
    "AccessDenied": _DENIED,
    "403": _DENIED,
    "QuotaExceeded": _FULL,
    "XMinioStorageFull": _FULL,
    "BucketAlreadyExists": "bucket {bucket!r} belongs to someone else at {at}: choose another name",
    "PreconditionFailed": "{name} was overwritten while it was read: run again",
}


class CutShort(Exception):
    """A body came with fewer bytes than announced, or with other bytes than its checksum says."""


def error_code(error: Any) -> str:
    """The S3 error code of a ClientError, e.g. NoSuchKey; the status as text when the answer had no body."""
    return str(error.response.get("Error", {}).get("Code", ""))


def http_status(error: Any) -> int:
    """The HTTP status of a ClientError, 0 when unknown."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_transient(error: Exception) -> bool:
    """Whether another attempt can help: lost connections, 5xx, throttling, bodies cut short; never refusals."""
    from botocore import exceptions as e
    from botocore.parsers import ResponseParserError

    if isinstance(error, CutShort):
        return True
    if isinstance(error, e.ClientError):
        return error_code(error) in _TRANSIENT_CODES or http_status(error) in _TRANSIENT_STATUS
    if isinstance(error, e.SSLError):
        return "CERTIFICATE_VERIFY_FAILED" not in str(error) and "WRONG_VERSION_NUMBER" not in str(error)
    lost = (e.HTTPClientError, e.ConnectionError, e.ResponseStreamingError, e.IncompleteReadError)
    return isinstance(error, (*lost, ResponseParserError, ConnectionError, TimeoutError))


def is_missing(error: Exception) -> bool:
    """Whether the answer says that the key is missing (a HEAD answers 404 without a code)."""
    from botocore.exceptions import ClientError

    return isinstance(error, ClientError) and error_code(error) in ("NoSuchKey", "404")


def is_of_request(error: Exception) -> bool:
    """Whether an exception comes from the request and not from a defect of the caller."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    bad_endpoint = isinstance(error, ValueError) and "endpoint" in str(error).lower()
    return bad_endpoint or isinstance(error, (BotoCoreError, ClientError, ResponseParserError, CutShort, OSError))


def explain(error: Exception, bucket: str, key: str | None) -> StoreError:
    """One line that says what the server refused or what failed, and what to do."""
    from botocore.exceptions import ClientError

    name = f"s3://{bucket}/{key}" if key else f"s3://{bucket}"
    if isinstance(error, ClientError):
        template = _of_answer(error_code(error), http_status(error))
    else:
        template = _of_failure(error)
    return StoreError(
        template.format(
            name=name,
            bucket=bucket,
            at=named_endpoint(),
            kind=type(error).__name__,
            code=error_code(error) if isinstance(error, ClientError) else "",
            status=http_status(error) if isinstance(error, ClientError) else 0,
            profile=os.environ.get("AWS_PROFILE", ""),
        )
    )


def _of_answer(code: str, status: int) -> str:
    if code in _OF_CODE:
        return _OF_CODE[code]
    if status == 403:
        return _DENIED
    if code in _TRANSIENT_CODES or status in _TRANSIENT_STATUS:
        return "{name}: {at} kept answering HTTP status {status} ({code}): look at the server's state and log"
    return "{name}: {at} answered {code} (HTTP status {status})" if re.match("[A-Z]", code) else _NO_S3_SERVER


def _of_failure(error: Exception) -> str:
    from botocore import exceptions as e
    from botocore.parsers import ResponseParserError

    kinds: list[tuple[type[Exception] | tuple[type[Exception], ...], str]] = [
        (
            (e.NoCredentialsError, e.PartialCredentialsError),
            "no AWS credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
            "or run where an instance role gives them",
        ),
        (
            e.ProfileNotFound,
            "AWS_PROFILE={profile!r} is not in the AWS configuration files: correct it or add it there",
        ),
        (ValueError, "endpoint {at!r} is not a URL: set AWS_ENDPOINT_URL to one like http://host:9000"),
        (
            e.SSLError,
            "no secure connection to {at}: check http:// or https:// in AWS_ENDPOINT_URL, "
            "and AWS_CA_BUNDLE for a certificate of one's own",
        ),
        (
            (CutShort, e.ResponseStreamingError, e.IncompleteReadError),
            "{name}: every body from {at} came cut short or damaged: check the network in between",
        ),
        (
            (e.HTTPClientError, e.ConnectionError, OSError),
            "no S3 server answers at {at} ({kind}): check AWS_ENDPOINT_URL, "
            "and that the server runs and can be reached from this machine",
        ),
        (ResponseParserError, _NO_S3_SERVER),
    ]
    for kind, template in kinds:
        if isinstance(error, kind):
            return template
    return "{name}: the request to {at} failed ({kind})"
