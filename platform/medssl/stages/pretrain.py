"""Pretraining on Ray Train: DDP workers that each call the plain loop of `medssl.training`.

What Ray Train does here is to start the workers, to join them into a process group and to start them anew when one is
lost. Checkpoints and metrics are the loop's own, in the artifact's folder: a restarted group, or a run started after its
driver died, finds the last marked checkpoint there and goes on from it.

Ray Train would replay any exception as often as it retries. Only lost processes and lost storage are worth that, so a
worker that fails for another reason leaves a note. Where all fail, as on a bad setting, each returns it. Where one fails
alone, its peers may wait for it in a collective that nothing but their end gets them out of (NCCL's never, gloo's for half
an hour): it raises, Ray Train ends the group, and a group that is started anew finds the note and returns it at once.
"""

from __future__ import annotations

import json
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from medssl import telemetry
from medssl.artifacts import Marker, folder, publish
from medssl.bag_rows import StreamBagFeed, ensure_packed
from medssl.compute import Compute, TrackingParams
from medssl.datasets.dataset import open_dataset
from medssl.datasets.read import Decoding
from medssl.errors import MedsslError, NonFiniteLoss, StoreError
from medssl.exporter import export
from medssl.filesystem import retrying_filesystem
from medssl.mixes import Source, joined_index, shown
from medssl.rows import open_resident
from medssl.stages.cluster import require_gpus
from medssl.stages.initial import STAGED, GivenWeights, facts_of
from medssl.stages.progress import OnProgress, Report, answered, board
from medssl.stages.specs import Spec
from medssl.stages.tracking import Tracked, key_of, tracked
from medssl.stopping import Stopped, orderly_stop
from medssl.store import Store, open_store
from medssl.streams import StreamFeed, stream_sources, user_error
from medssl.training.monitor import KnnMonitor, Watched
from medssl.training.plan import PretrainPlan

if TYPE_CHECKING:
    from medssl.collectives import Process
    from medssl.training.feed import Feed

_SAMPLE = 32
_FAILURE_NOTE = "failure.json"
_FAILED_RANKS = "failed/"
_PEERS_SECONDS = 10.0
"""How long a rank that failed waits for the others to fail too."""
_RESULT = "encoder.safetensors"
"""What later stages depend on; curves and events beside it hold rates and times, which are no content."""


@dataclass(frozen=True)
class Job:
    """What a worker needs; plain values that pickle without secrets."""

    store_uri: str
    artifact: str
    plan: dict[str, Any]
    sources: list[Source]
    """What it is shown."""
    decoding: dict[str, Any]
    """Fields of `Decoding`."""
    compute: dict[str, Any]
    initial_weights: str | None
    watched: dict[str, Any] | None = None
    """Labelled images that the monitor looks at (fields of `Watched`); None watches nothing."""
    watched_images: dict[str, Any] | None = None
    """How to open the resident file that they are in."""
    packed_uri: str | None = None
    """Images that can be read singly, for streamed bags."""
    labels: list[int] | None = None
    """Labels by image number, for a method that takes them."""
    said_of: dict[str, str] = field(default_factory=dict)
    """Labels of its telemetry."""
    label: str = ""
    """What people call it."""


def run_pretrain(
    store: Store,
    spec: Spec,
    plan: PretrainPlan,
    *,
    sources: Sequence[Source],
    decoding: Decoding,
    compute: Compute,
    initial_weights: GivenWeights | None = None,
    before_publish: Callable[[], None] | None = None,
    on_progress: OnProgress | None = None,
    watched: Watched | None = None,
    watched_images: Mapping[str, Any] | None = None,
    labels: Sequence[int] | None = None,
    said_of: Mapping[str, str] | None = None,
) -> Marker:
    """Trains (or goes on training) one encoder and publishes its artifact.

    Args:
        sources: what it is shown; all resident, or all streamed.
        decoding: how images become arrays.
        initial_weights: weights to start from, put in place by `initial.stage_weights`; their facts go into the marker.
        before_publish: called before the marker is written; raises when the run has lost its lease.
        watched: labelled images for the kNN curve, measured as `compute.monitor_every_epochs` says.
        watched_images: arguments of `rows.open_resident` for these.
        labels: places in the classes by image number, for a method that takes labels.
        said_of: study and arm, for its telemetry.

    Raises:
        NonFiniteLoss: the loss turned NaN or infinite; nothing is retried.
        MedsslError: a worker failed for a reason that retrying would not mend, or workers were lost too often.
    """
    require_gpus(compute.workers if compute.gpus_per_worker else 0)
    output = folder(store, spec.name)
    output.delete(_FAILURE_NOTE)
    output.delete_prefix(_FAILED_RANKS)
    with orderly_stop() as wanted, board(on_progress, wanted) as handle:
        uri = initial_weights.uri if initial_weights else None
        seen = asdict(watched) if watched else None
        where = dict(watched_images) if watched_images else None
        job = Job(
            store.uri, spec.name, plan.canonical(), list(sources), asdict(decoding), compute.canonical(), uri, seen, where,
            labels=None if labels is None else list(labels), said_of=dict(said_of or {}), label=spec.label,
        )  # fmt: skip
        datasets = {}
        if sources[0].resident is None and plan.pairs == "bag":
            job = replace(job, packed_uri=ensure_packed(open_dataset(sources[0].dataset_uri), store, tasks=compute.reading_cpus))
        elif sources[0].resident is None:
            datasets = {"train": stream_sources(sources, decoding, plan.seed, tasks=compute.reading_cpus)}
        outcome = _fit(store, spec.name, job, datasets, compute, handle)
    if outcome["status"] == "failed":
        raise MedsslError(f"{spec.label} failed: {outcome['error']}")
    if outcome["status"] == "stopped":
        raise Stopped(f"{spec.label} stopped after step {outcome['step']:,}, {_kept(outcome['last_checkpoint_step'])}")
    if outcome["status"] == "non_finite":
        raise NonFiniteLoss(_explain_non_finite(spec, plan, outcome))
    if before_publish is not None:
        before_publish()
    marker = publish(
        store, spec.name, stage=spec.stage, version=spec.version, config=spec.config, inputs=spec.inputs,
        present={_RESULT: outcome["files"][_RESULT]}, facts=outcome["facts"] | facts_of(initial_weights),
    )  # fmt: skip
    output.delete_prefix("checkpoints/")  # finished: the encoder is the result
    output.delete(STAGED)
    if wanted.is_set():  # it came when there was no step left to stop at
        raise Stopped(f"{spec.label} is finished, the study is stopped after it")
    return marker


def _explain_non_finite(spec: Spec, plan: PretrainPlan, outcome: dict[str, Any]) -> str:
    return (
        f"{spec.label}: the loss is not finite at step {outcome['step']} (learning rate {outcome['learning_rate']:.3g}); "
        f"{_kept(outcome['last_checkpoint_step'])}. Lower optimiser.learning_rate (peak {plan.optimiser.learning_rate:g}), "
        "lengthen the warm-up or set gradient_clip"
    )


def _kept(last: int | None) -> str:
    return f"the last checkpoint is of step {last:,}" if last is not None else "there is no checkpoint before it"


def _fit(store: Store, name: str, job: Job, datasets: dict[str, Any], compute: Compute, handle: Any) -> dict[str, Any]:
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    # Never the name of an earlier try: Ray Train would take up its state. What a killed driver left is cleared away here.
    state, run_name = store.sub(f"ray/{name}"), uuid.uuid4().hex[:12]
    state.delete_prefix("")
    filesystem, root = retrying_filesystem(state.uri)
    gpu = compute.gpus_per_worker > 0
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"job": vars(job), "board": handle},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=compute.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": compute.cpus_per_worker, **({"GPU": 1} if gpu else {})},
        ),
        run_config=RunConfig(
            name=run_name,
            storage_path=root,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=compute.max_failures, controller_failure_limit=3),
        ),
        datasets=datasets or None,
        dataset_config=DataConfig(datasets_to_split="all") if datasets else None,
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        if (note := _noted(folder(store, name))) is not None:
            return note
        causes = [user_error(cause) for cause in getattr(error, "worker_failures", {}).values()]
        told = next((cause for cause in causes if isinstance(cause, MedsslError)), causes[0] if causes else error)
        reason = (str(told).strip().splitlines() or [type(told).__name__])[0]
        raise MedsslError(f"{name}: training was given up after {compute.max_failures} restarts: {reason}") from None
    finally:
        state.delete_prefix("")
    outcome = result.return_value
    if not isinstance(outcome, dict):
        raise MedsslError(f"{name}: the workers ended without a result; Ray's logs are below /tmp/ray/session_latest/logs")
    return outcome


def _train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """The body of each Ray Train worker."""
    from medssl import collectives

    job = Job(**config["job"])
    export()
    output = folder(open_store(job.store_uri), job.artifact)
    if (note := _noted(output)) is not None:
        return note
    try:
        with telemetry.labelled(**job.said_of):
            return _train(job, output, config["board"])
    except (StoreError, ray.exceptions.RayError):
        raise  # lost storage, lost processes: Ray Train starts the group anew
    except Exception as error:
        note = _noted(output)
        if note is None:
            if collectives.peer_lost(error):
                raise
            told = {"error": _first_line(error), "traceback": traceback.format_exc()}
            output.write(_FAILURE_NOTE, json.dumps(told).encode())
            note = _noted(output)
        if note is not None and _all_failed(output, collectives.rank_index(), collectives.world_size()):
            return note
        raise


def _noted(output: Store) -> dict[str, Any] | None:
    """What a worker returns where one of them has failed for a reason that a restart would not mend."""
    return {"status": "failed", **json.loads(output.read(_FAILURE_NOTE))} if output.exists(_FAILURE_NOTE) else None


def _all_failed(output: Store, rank: int, world: int) -> bool:
    """Notes that this rank has failed, and whether all the others do too."""
    output.write(f"{_FAILED_RANKS}{rank}", b"")
    end = time.monotonic() + _PEERS_SECONDS
    while len(output.list(_FAILED_RANKS)) < world:
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _train(job: Job, output: Store, handle: Any) -> dict[str, Any]:
    import torch
    from ray import train

    from medssl import collectives
    from medssl.training.loop import pretrain

    compute = Compute(**job.compute)
    torch.set_num_threads(compute.cpus_per_worker)
    device = train.torch.get_device()
    process = collectives.current_process(device)
    plan = PretrainPlan.model_validate(job.plan)
    feed = _open_feed(job, plan, process)

    monitor: KnnMonitor | None = None
    if process.rank == 0 and job.watched is not None and job.watched_images is not None:
        monitor = KnnMonitor(open_resident(**job.watched_images), plan.encoder, Watched(**job.watched), process.device)

    answer: Any = None

    def post(progress: Any, say: Tracked) -> bool:
        """Reports; whether the answer to the last report was to stop. Nothing waits for an answer that is under way."""
        nonlocal answer
        if process.rank != 0:
            return False
        wanted = answer is not None and answered(answer)
        note = f"{progress.note}, {monitor.note}" if monitor and monitor.note else progress.note
        answer = handle.post.remote("pretrain", Report(progress.images, progress.total_images, note))
        say({name: value for name, value in progress.measures.items() if name not in {"step", "rank"}}, progress.step)
        return wanted

    with tracked(
        compute.tracking if process.is_main else TrackingParams(), study=job.said_of.get("study", ""), kind="pretrain",
        name=job.label, key=key_of(job.artifact), config=job.plan,
    ) as say:  # fmt: skip
        result = pretrain(
            plan, feed, process, output,
            checkpoint_every_epochs=compute.checkpoint_every_epochs,
            checkpoint_every_steps=compute.checkpoint_every_steps if feed.starts_within_epoch else None,
            keep_checkpoints=compute.keep_checkpoints,
            on_progress=partial(post, say=say),
            initial_encoder=_read_weights(job.initial_weights),
            sample_BHWC=_sample(job) if plan.surgery is not None else None,
            monitor=monitor,
            monitor_every_epochs=compute.monitor_every_epochs or 1,
            labels_N=None if job.labels is None else torch.tensor(job.labels),
        )  # fmt: skip
        say.failed = result.status != "finished"
    return asdict(result)


def _open_feed(job: Job, plan: PretrainPlan, process: Process) -> Feed:
    """What feeds this worker: resident or streamed, single images or pairs of a bag."""
    from ray import train

    from medssl.training.bags import Bags, ResidentBagFeed
    from medssl.training.feed import JoinedImages, ResidentFeed

    numbers, decoding = shown(job.sources), Decoding(**job.decoding)
    opened = [open_resident(**source.resident) for source in job.sources if source.resident is not None]
    images = opened[0] if len(opened) == 1 else JoinedImages(opened) if opened else None
    if plan.pairs == "bag":
        uris = [source.dataset_uri for source in job.sources]
        index = joined_index([open_dataset(uri).index() for uri in uris], uris)
        bags = Bags.of_index(index, numbers)
        if images is not None:
            return ResidentBagFeed(images, bags, plan.batch_size, plan.seed, process)
        assert job.packed_uri is not None
        tasks = Compute.model_validate(job.compute).reading_cpus
        return StreamBagFeed(job.packed_uri, bags, plan.batch_size, plan.seed, process, decoding, tasks)
    if images is not None:
        return ResidentFeed(images, numbers, plan.batch_size, plan.seed, process)
    shard = train.get_dataset_shard("train")
    return StreamFeed(shard, len(numbers), plan.batch_size, plan.seed, process, decoding)


def _sample(job: Job) -> Any:
    """A few of the shown images, uint8 (B, H, W, C), the same on every rank; None where images are streamed."""
    import torch

    source = next((source for source in job.sources if source.rows), None)  # all of a part may be left out
    if source is None or source.resident is None:
        return None
    rows = source.rows[:: max(1, len(source.rows) // _SAMPLE)][:_SAMPLE]
    return open_resident(**source.resident).take(torch.tensor(rows))


def _read_weights(uri: str | None) -> bytes | None:
    if uri is None:
        return None
    parent, _, key = uri.rpartition("/")
    return open_store(parent).read(key)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
