"""Checkpoints in a store: uploaded first, marked last, the latest few kept, never one with NaN.

A checkpoint of step s is `step-<s>/weights.safetensors` (parameters and buffers, readable by other tools),
`step-<s>/state.pt` (optimiser and counters, loadable with `weights_only=True`) and the mark `step-<s>.json` with the digests
of both. Without its mark a checkpoint does not exist. One process writes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from medssl.errors import NonFiniteLoss, StoreError
from medssl.store import Store

_MARK = re.compile(r"step-(\d+)\.json")
_FILES = ("weights.safetensors", "state.pt")


class CheckpointFolder:
    """The checkpoints of one training."""

    def __init__(self, store: Store, keep: int = 2) -> None:
        """`store` is rooted at the folder that holds nothing else; `keep` at least 1."""
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.store, self.keep = store, keep

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, rising."""
        matches = (_MARK.fullmatch(entry.key) for entry in self.store.list("step-"))
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> int | None:
        """Step of the latest whole checkpoint, or None."""
        steps = self.steps()
        return steps[-1] if steps else None

    def save(self, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Uploads, marks, then removes older ones than the last `keep`.

        `state` holds tensors, numbers, strings and containers of them. Raises NonFiniteLoss, and writes nothing, when a
        tensor in either holds NaN or infinity.
        """
        bad = [name for name, value in _tensors({"weights": dict(weights), "state": dict(state)}) if not _finite(value)]
        if bad:
            raise NonFiniteLoss(f"checkpoint of step {step} refused: {bad[0]} holds NaN or infinity")
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        plain = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        digests = {}
        for file, data in zip(_FILES, (save_safetensors(plain), buffer.getvalue()), strict=True):
            self.store.write(f"{_name(step)}/{file}", data)
            digests[file] = hashlib.sha256(data).hexdigest()
        self.store.write(f"{_name(step)}.json", json.dumps({"step": step, "sha256": digests}).encode())
        for old in self.steps()[: -self.keep]:
            self.store.delete(f"{_name(old)}.json")  # the mark first: a half-deleted checkpoint is none
            self.store.delete_prefix(_name(old))

    def load(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and state of a checkpoint, on the CPU; StoreError when a file is not what was uploaded."""
        digests = json.loads(self.store.read(f"{_name(step)}.json"))["sha256"]
        files = {}
        for file in _FILES:
            files[file] = self.store.read(f"{_name(step)}/{file}")
            if hashlib.sha256(files[file]).hexdigest() != digests[file]:
                raise StoreError(f"checkpoint file {self.store.uri_of(f'{_name(step)}/{file}')} is damaged; delete the folder")
        weights = load_safetensors(files["weights.safetensors"])
        return weights, torch.load(io.BytesIO(files["state.pt"]), map_location="cpu", weights_only=True)


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _finite(value: Tensor | float) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    return math.isfinite(value)


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor | float]]:
    """Every tensor and float in nested containers, with its path."""
    if isinstance(value, Tensor | float):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, f"{name}/{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for position, inner in enumerate(value):
            yield from _tensors(inner, f"{name}/{position}")
