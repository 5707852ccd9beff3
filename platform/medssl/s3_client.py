"""The boto3 client of a process: endpoint, region and credentials from the AWS variables, profile or role only.

Clients live in a cache of the process and are built at the first request; they are never pickled, and a forked child
builds its own.
"""

from __future__ import annotations

import hashlib
import os
import threading
from typing import Any
from urllib.parse import urlsplit, urlunsplit

CONNECT_SECONDS = 5
READ_SECONDS = 30
CONNECTIONS = 64
DEFAULT_REGION = "us-east-1"

_VARIABLES_OF_CLIENT = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
    "AWS_CA_BUNDLE",
    "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
)


def is_aws(endpoint: str) -> bool:
    """Whether an endpoint is one of Amazon's own."""
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def without_user(endpoint: str) -> str:
    """An endpoint fit for messages: a user and password in it are left out."""
    parts = urlsplit(endpoint)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def named_endpoint() -> str:
    """The endpoint for messages: what the variables name, else AWS."""
    named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return without_user(named) if named else "the endpoint of AWS or of the profile"


def environment_key() -> tuple[int, str]:
    """Tells processes and settings of the AWS variables apart (by a digest: no secret is kept)."""
    facts = "\0".join(os.environ.get(name, "") for name in _VARIABLES_OF_CLIENT)
    return os.getpid(), hashlib.sha256(facts.encode()).hexdigest()


class _Clients:
    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._lock = threading.Lock()
        self._built: dict[tuple[int, str], Any] = {}

    def get(self) -> Any:
        key = environment_key()
        with self._lock:
            if key not in self._built:
                self._built[key] = _build_client()
            return self._built[key]


_clients = _Clients()
os.register_at_fork(after_in_child=_clients.reset)


def client() -> Any:
    """The process's S3 client for the present variables. Raises botocore's errors or ValueError (a bad endpoint)."""
    return _clients.get()


def endpoint_and_region() -> tuple[str | None, str]:
    """The endpoint (None: Amazon's own) and the region, from the variables, else the profile."""
    import boto3

    return _endpoint_and_region(boto3.session.Session())


def _endpoint_and_region(session: Any) -> tuple[str | None, str]:
    # botocore itself does not read AWS_REGION.
    region = os.environ.get("AWS_REGION") or session.region_name or DEFAULT_REGION
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return endpoint or session._session.get_scoped_config().get("endpoint_url"), region


def prefer_plain_checksums() -> None:
    """Asks AWS clients of this process for checksums only where the protocol requires them.

    Servers other than Amazon's refuse the checksum trailers that recent clients send by default (HTTP 411). A variable
    set by the user stays.
    """
    os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")


def _build_client() -> Any:
    import boto3
    from botocore.config import Config

    session = boto3.session.Session()
    endpoint, region = _endpoint_and_region(session)
    options: dict[str, Any] = {}
    if endpoint and not is_aws(endpoint):
        # Addressed by path: a host name for each bucket needs DNS entries that such servers seldom have.
        options["s3"] = {"addressing_style": "path"}
        options["request_checksum_calculation"] = _setting("AWS_REQUEST_CHECKSUM_CALCULATION")
        options["response_checksum_validation"] = _setting("AWS_RESPONSE_CHECKSUM_VALIDATION")
    config = Config(
        retries={"total_max_attempts": 1},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=CONNECTIONS,
        signature_version="s3v4",
        **options,
    )
    return session.client("s3", region_name=region, endpoint_url=endpoint, config=config)


def _setting(variable: str) -> str:
    return os.environ.get(variable, "").lower() or "when_required"
