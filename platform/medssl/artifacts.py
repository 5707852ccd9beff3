"""Names of what each stage leaves in the store, and the markers that say it is whole.

An artifact `<stage>-<hash>` is a folder of files under `artifacts/` and one marker `markers/<stage>-<hash>.json`, written
last: with a marker the artifact is finished and never written again, without one whatever lies in its folder may be resumed
or overwritten. The hash covers the stage's part of the recipe, the digests of its inputs and the stage's version number:
everything that changes the result, and nothing that only says where it ran. One listing of `markers/` tells all that is
finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from medssl.errors import MissingKey
from medssl.store import Store

ARTIFACTS = "artifacts"
MARKERS = "markers"
STUDIES = "studies"
DATASETS = "datasets"
FORGOTTEN = "forgotten"
"""Marks of artifacts that were made with images since removed."""

_HASH_CHARACTERS = 20


def digest_json(value: Any) -> str:
    """SHA-256 (hex) of a JSON value in canonical form: sorted keys, no white space, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def artifact_name(stage: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """`<stage>-<hash>` for a stage at `version`, its part of the recipe, and input digests by role."""
    whole = {"stage": stage, "version": version, "config": dict(config), "inputs": dict(inputs)}
    return f"{stage}-{digest_json(whole)[:_HASH_CHARACTERS]}"


@dataclass(frozen=True)
class Marker:
    """What a finished artifact says of itself."""

    name: str
    stage: str
    version: int
    config: dict[str, Any]
    """The stage's part of the recipe."""
    inputs: dict[str, str]
    """Digest of each input, by role."""
    files: dict[str, str]
    """SHA-256 of each file, by its path in the artifact's folder."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Small results worth having without opening a file (best score, steps, images)."""

    @property
    def digest(self) -> str:
        """Content digest of the artifact: of the files that count as its content."""
        return digest_json(self.files)

    def to_json(self) -> bytes:
        """The marker as stored."""
        return json.dumps(asdict(self), sort_keys=True, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Marker:
        """The marker that `to_json` wrote."""
        return cls(**json.loads(data))


def marker_key(name: str) -> str:
    """Key of an artifact's marker."""
    return f"{MARKERS}/{name}.json"


def folder(store: Store, name: str) -> Store:
    """The store rooted at an artifact's folder."""
    return store.sub(f"{ARTIFACTS}/{name}")


def finished(store: Store) -> set[str]:
    """Names of all finished artifacts (one listing)."""
    prefix = f"{MARKERS}/"
    return {e.key[len(prefix) : -len(".json")] for e in store.list(prefix) if e.key.endswith(".json")}


def read_marker(store: Store, name: str) -> Marker | None:
    """The marker of a finished artifact, or None."""
    try:
        return Marker.from_json(store.read(marker_key(name)))
    except MissingKey:
        return None


def forgotten_note(store: Store, *names: str) -> str | None:
    """A warning where one of these artifacts was made with images that `medssl forget` has removed since."""
    for name in names:
        try:
            mark = json.loads(store.read(f"{FORGOTTEN}/{name}.json"))
        except MissingKey:
            continue
        return (
            f"{name} was made with {mark['images']} images of {mark['dataset']} that were removed on {mark['day']} "
            "(medssl forget): run the study again"
        )
    return None


def read_markers(store: Store, names: Iterable[str], threads: int = 32) -> dict[str, Marker]:
    """Markers of many finished artifacts, read side by side; unfinished ones are left out."""
    ordered = list(names)
    with ThreadPoolExecutor(min(threads, max(1, len(ordered)))) as pool:
        markers = list(pool.map(lambda name: read_marker(store, name), ordered))
    return {name: marker for name, marker in zip(ordered, markers, strict=True) if marker is not None}


def publish(
    store: Store,
    name: str,
    *,
    stage: str,
    version: int,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    files: Mapping[str, bytes] | None = None,
    present: Mapping[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
    anew: bool = False,
) -> Marker:
    """Writes `files` into the artifact's folder, then its marker; a finished artifact is left as it is, unless `anew`.

    `present` names files (path -> SHA-256) that the stage has uploaded itself. Only what is named in either belongs to the
    content digest; scratch such as old checkpoints does not.
    """
    existing = None if anew else read_marker(store, name)
    if existing is not None:
        return existing
    target = folder(store, name)
    digests = dict(present or {})
    for path, data in (files or {}).items():
        target.write(path, data)
        digests[path] = hashlib.sha256(data).hexdigest()
    marker = Marker(name, stage, version, dict(config), dict(inputs), digests, dict(facts or {}))
    if anew:
        store.write(marker_key(name), marker.to_json())
    elif not store.create(marker_key(name), marker.to_json()):  # another run was faster: later stages rest on its marker
        return read_marker(store, name) or marker
    return marker
