"""The job server of a Ray cluster, over HTTP: what it says of its nodes and jobs, and errors that a user understands.

The address is the dashboard's (`http://head:8265`). A request names the token that Ray's own tools use: RAY_AUTH_TOKEN, the
file RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token. Ray's client says "failed to connect" after 20 seconds whether the host is
away or the token is wrong; here a cluster is asked first, with a limit of five seconds, and the two are told apart.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from medssl.errors import MedsslError, RecipeError

PROBE_SECONDS = 5.0
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
FINAL = ("SUCCEEDED", "FAILED", "STOPPED")
"""States of a job that has ended."""


class ClusterError(MedsslError):
    """A cluster cannot be reached, refuses the token, lacks resources, or does not know the job."""

    exit_code = 5


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it."""

    id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str
    metadata: Mapping[str, str]
    started_ms: int | None
    ended_ms: int | None
    exit_code: int | None
    """Of the command; None while it runs, and where it was lost."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.status in FINAL


def server_address(given: str | None) -> str:
    """The job server's address: `given`, or what the environment names.

    Raises:
        RecipeError: there is none, or it is not an HTTP address.
    """
    named = given or next((os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)), None)
    if named is None:
        raise RecipeError("no cluster is named: give --address http://HEAD:8265 (its dashboard), or set RAY_API_SERVER_ADDRESS")
    try:
        parts = urlsplit(named)
        plain = named.isprintable() and " " not in named and (parts.path + parts.query + parts.fragment).isascii()
        host = (parts.hostname or "").encode("idna") if parts.port != 0 else b""
    except ValueError:  # brackets that do not match, a port that is no number, a name that no host can have (UnicodeError)
        plain, host = False, b""
    if not plain or not host or parts.scheme not in ("http", "https"):
        shown = re.sub(r"://[^/]*@", "://***@", named)
        raise RecipeError(f"address '{shown}' is not a job server's: give the Ray dashboard's address, as http://HEAD:8265")
    if parts.username or parts.password:
        raise RecipeError("the address holds credentials: leave them out and set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH")
    return named.rstrip("/")


def read_token() -> str | None:
    """The user's token, or None; never part of a message.

    Raises:
        RecipeError: what is there cannot be one.
    """
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    source, token = "RAY_AUTH_TOKEN", os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if not token:
        try:
            source, token = str(path), path.read_text(encoding="utf-8").strip()
        except OSError:
            return None
        except UnicodeDecodeError:
            token = "\n"
    if token and not (token.isascii() and token.isprintable()):
        raise RecipeError(f"what {source} holds is no token: it has to be one line of plain characters")
    return token or None


class JobServer:
    """One cluster's job server. Every method may raise :class:`ClusterError`."""

    def __init__(self, address: str, token: str | None = None) -> None:
        self.address = address
        self._token = token

    @property
    def headers(self) -> dict[str, str]:
        """What a request carries: the token, where there is one."""
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    def probe(self) -> str:
        """The cluster's version of Ray; answers or fails within about five seconds.

        Raises:
            ClusterError: nobody answers there, something else answers, or the token is missing or refused.
        """
        found = self._get("/api/version")
        if not isinstance(found, dict) or "ray_version" not in found:
            raise ClusterError(f"{self.address} answers, but is no Ray job server: give the Ray dashboard's address")
        return str(found["ray_version"])

    def is_open(self) -> bool:
        """Whether it answers without a token: anybody who reaches it can then run programs on the cluster."""
        try:
            JobServer(self.address)._get("/api/version")
        except ClusterError:
            return False
        return True

    def resources(self) -> dict[str, float]:
        """What all living nodes have together: CPU, GPU, ..."""
        answer = self._get("/api/v0/nodes?limit=10000&detail=true", seconds=30)
        nodes = answer["data"]["result"]["result"]
        found: dict[str, float] = {}
        for node in nodes:
            if node.get("state") == "ALIVE":
                for name, amount in (node.get("resources_total") or {}).items():
                    found[name] = found.get(name, 0.0) + float(amount)
        return found

    def jobs(self) -> list[Job]:
        """All submitted jobs, the latest first."""
        found = [_job(fields) for fields in self._get("/api/jobs/", seconds=30) if fields.get("submission_id")]
        return sorted(found, key=lambda job: job.started_ms or 0, reverse=True)

    def job(self, name: str) -> Job:
        """The job of this submission id."""
        return _job(self._get(f"/api/jobs/{quote(name, safe='')}", seconds=30, missing=self._missing(name)))

    def logs(self, name: str) -> str:
        """All that a job has printed so far."""
        return str(self._get(f"/api/jobs/{quote(name, safe='')}/logs", seconds=60, missing=self._missing(name)).get("logs") or "")

    def stop(self, name: str) -> None:
        """Has the job sent SIGTERM; it may take its time to end."""
        self._request("POST", f"/api/jobs/{quote(name, safe='')}/stop", 30, self._missing(name))

    def _missing(self, name: str) -> str:
        return f"no job '{name}' on {self.address}: `medssl jobs` lists them"

    def _get(self, path: str, seconds: float = PROBE_SECONDS, missing: str | None = None) -> Any:
        body = self._request("GET", path, seconds, missing)
        try:
            return json.loads(body)
        except ValueError:
            raise ClusterError(f"{self.address} answers, but is no Ray job server: give the Ray dashboard's address") from None

    def _request(self, method: str, path: str, seconds: float, missing: str | None = None) -> bytes:
        request = urllib.request.Request(self.address + path, headers=self.headers, method=method)
        opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler())
        try:
            with opener.open(request, timeout=seconds) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            raise self._refused(error, missing) from None
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ClusterError(
                f"no Ray cluster answers at {self.address} ({reason}): check the address and that the dashboard's port can be "
                "reached from here (a tunnel: kubectl port-forward, ray dashboard, ssh -L)"
            ) from None

    def _refused(self, error: urllib.error.HTTPError, missing: str | None) -> ClusterError:
        if error.code in (401, 403):
            if self._token is None:
                return ClusterError(f"the cluster at {self.address} asks for a token: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH")
            return ClusterError(
                f"the cluster at {self.address} refuses your token (from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or "
                "~/.ray/auth_token): ask who runs the cluster for the right one"
            )
        if error.code == 404 and missing is not None:
            return ClusterError(missing)
        said = error.read().decode("utf-8", "replace").strip().splitlines()
        return ClusterError(f"{self.address} answered {error.code} ({(said or [error.reason])[-1][:200]})")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token is not carried to another host."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        """Refuses; the redirection becomes an HTTPError."""


def _job(fields: Mapping[str, Any]) -> Job:
    return Job(
        id=str(fields["submission_id"]), status=str(fields["status"]), message=str(fields.get("message") or ""),
        metadata={str(k): str(v) for k, v in (fields.get("metadata") or {}).items()},
        started_ms=fields.get("start_time"), ended_ms=fields.get("end_time"), exit_code=fields.get("driver_exit_code"),
    )  # fmt: skip
