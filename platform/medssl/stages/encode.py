"""Encoders without pretraining, and the features of every encoder: Ray tasks that read the resident images.

A random encoder is not left with batch-norm statistics of zeros and ones: they are estimated on the unlabelled
pretraining images, as training would have done, so that the comparison is about the weights.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from medssl.artifacts import folder, publish, read_marker
from medssl.compute import Compute
from medssl.errors import MedsslError
from medssl.exporter import export
from medssl.leases import lease
from medssl.stages.context import Context, Opened
from medssl.stages.initial import STAGED, GivenWeights, facts_of
from medssl.stages.progress import OnProgress, Report, board
from medssl.stages.specs import TEST, TRAIN, VALIDATION, Spec
from medssl.stages.trials import concurrent_trials
from medssl.streams import user_error

_BATCH = 256


@dataclass(frozen=True)
class InitialiseTask:
    """An encoder to be made without pretraining: random, or of given weights."""

    context: Context
    spec: Spec
    arm: str
    seed: int
    given: GivenWeights | None = None
    """Weights that were put in place by `initial.stage_weights`; None for random ones."""


@dataclass(frozen=True)
class EmbedTask:
    """Features to be computed."""

    context: Context
    spec: Spec
    arm: str
    protocol: str
    encoder: str | None
    """Artifact of the encoder; None for colour features."""
    seed: int
    rows: Sequence[int] | None = None
    """Images that the features are of, without augmented passes; None takes those of the study's splits, with the passes that
    the protocol asks for."""


def run_encoding(
    tasks: Sequence[InitialiseTask | EmbedTask], compute: Compute, on_progress: OnProgress | None = None
) -> None:
    """Makes all artifacts, as many at once as the trials of the recipe.

    Raises:
        MedsslError: the first failure's.
    """
    concurrent = concurrent_trials(compute)
    with board(on_progress) as handle:
        remote = ray.remote(_encode).options(
            num_cpus=compute.trial_cpus, num_gpus=compute.gpus_per_worker or None, max_retries=compute.max_failures
        )
        for task in tasks:
            handle.post.remote(task.spec.name, Report(0, task.spec.images))
        running: list[Any] = []
        try:
            for task in tasks:
                if len(running) >= concurrent:
                    done, running = ray.wait(running, num_returns=1)
                    ray.get(done)
                running.append(remote.remote(task, compute.canonical(), handle))
            ray.get(running)
        except ray.exceptions.RayError as error:
            for task_reference in running:
                ray.cancel(task_reference, force=True)
            raise _failure(tasks[0].spec.stage, error, compute.max_failures + 1) from None


def _failure(stage: str, error: ray.exceptions.RayError, tries: int) -> MedsslError:
    """What the user is told: the reason that a task gave, or that its process was lost. Ray tries only the latter again."""
    found = user_error(error)
    if isinstance(found, MedsslError):
        return found
    if isinstance(error, ray.exceptions.RayTaskError):
        text = str(error.cause).strip().splitlines() or [""]
        return MedsslError(f"{stage}: {type(error.cause).__name__}: {text[0]}")
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return MedsslError(f"{stage}: a task was lost {tries} times: {reason}")


def _encode(task: InitialiseTask | EmbedTask, compute: dict[str, Any], handle: Any) -> None:
    export()
    opened = task.context.open()
    with lease(opened.store, task.spec.name, run=opened.recipe.study):
        if read_marker(opened.store, task.spec.name) is None:  # another study may have made it meanwhile
            _make(opened, task, Compute.model_validate(compute), handle)


def _make(opened: Opened, task: InitialiseTask | EmbedTask, settings: Compute, handle: Any) -> None:
    import torch

    torch.set_num_threads(settings.trial_cpus)
    device = torch.device("cuda" if settings.gpus_per_worker else "cpu")

    def progress(done: int, total: int) -> None:
        handle.post.remote(task.spec.name, Report(done, total))

    given = task.given if isinstance(task, InitialiseTask) else None
    make = _initialise if isinstance(task, InitialiseTask) else _embed
    files = make(opened, task, device, progress)  # type: ignore[arg-type]
    publish(
        opened.store, task.spec.name, stage=task.spec.stage, version=task.spec.version, config=task.spec.config,
        inputs=task.spec.inputs, files=files, facts=facts_of(given),
    )  # fmt: skip
    if given:
        folder(opened.store, task.spec.name).delete(STAGED)
    progress(task.spec.images, task.spec.images)


def _initialise(opened: Opened, task: InitialiseTask, device: Any, progress: Any) -> dict[str, bytes]:
    from medssl.networks.encoder import build_encoder, estimate_batch_norm, load_weights, save_weights
    from medssl.views import eval_view

    recipe = opened.recipe
    arm = next(a for a in recipe.arms if a.name == task.arm)
    params = recipe.encoder_of(arm)
    encoder = build_encoder(params, task.seed).to(device)
    if task.given is not None:
        load_weights(encoder, folder(opened.store, task.spec.name).read(STAGED))
        return {"encoder.safetensors": save_weights(encoder)}
    index = opened.specs.index
    rows = index.index[index["split"].isin(recipe.pretraining_splits)].to_numpy()

    def batches() -> Iterator[Any]:
        done = 0
        for batch in _batches(rows):
            yield eval_view(read_batch(opened, batch, device), params)
            done += len(batch)
            progress(done, len(rows))

    estimate_batch_norm(encoder, batches())
    return {"encoder.safetensors": save_weights(encoder)}


def _batches(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The rows in batches. A last one of a single image goes with the batch before: where the feature map is 1 x 1, one image
    has no variance over it, and torch refuses."""
    cuts = list(range(_BATCH, len(rows), _BATCH))
    if cuts and len(rows) - cuts[-1] == 1:
        cuts.pop()
    return np.split(rows, cuts)


def read_batch(opened: Opened, rows: NDArray[np.int64], device: Any) -> Any:
    """Images of these rows as a uint8 tensor (B, H, W, C) on the device."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(opened.images.images[rows])).to(device)


def _embed(opened: Opened, task: EmbedTask, device: Any, progress: Any) -> dict[str, bytes]:
    from medssl.stages.embed import embed

    recipe = opened.recipe
    arm = next(a for a in recipe.arms if a.name == task.arm)
    protocol = next(p for p in recipe.protocols if p.name == task.protocol)
    assert protocol.kind != "fine_tune"
    index = opened.specs.index
    rows = index.index[index["split"].isin((TRAIN, VALIDATION, TEST))].to_numpy() if task.rows is None else np.array(task.rows)
    weights = folder(opened.store, task.encoder).read("encoder.safetensors") if task.encoder else None
    features = embed(weights, recipe.encoder_of(arm), opened.images, rows, device=device, on_progress=progress)
    files = {"rows.npy": _npy(rows), "features.npy": _npy(features.astype(np.float32))}
    if task.rows is None and protocol.kind != "knn" and protocol.probe.bank_passes:
        drawn = opened.specs.drawn_rows()
        bank = embed(
            weights, recipe.encoder_of(arm), opened.images, drawn, passes=protocol.probe.bank_passes,
            views=protocol.probe.bank_views, seed=task.seed, device=device, on_progress=progress,
        )  # fmt: skip
        files |= {"bank_rows.npy": _npy(drawn), "bank.npy": _npy(bank.astype(np.float32))}
    return files


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
