"""The pretraining loop: plain functions that train without Ray, on one process or as one of several.

`output` (a store) receives `checkpoints/`, `metrics/`, and when finished `encoder.safetensors`, `history.parquet`, the
TensorBoard events and `views.png`. Data order, views, dropout and rates derive from (seed, epoch, step): weights, optimiser
state and the number of steps are all that a resumed run needs, and it repeats the undisturbed one exactly.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medssl.checkpoint import CheckpointFolder
from medssl.collectives import Process, agree_largest, barrier
from medssl.errors import RecipeError
from medssl.networks.encoder import save_weights
from medssl.store import Store
from medssl.training import signals
from medssl.training.feed import Batch, Feed
from medssl.training.history import History, read_history, summarise, to_parquet, to_tensorboard
from medssl.training.plan import PretrainPlan
from medssl.training.step import Stepper, collapse_measures
from medssl.views import view_sheet

EVENTS_FILE = "events.out.tfevents.0.medssl"
SHEET_FILE = "views.png"
FINDER_FILE = "finder.json"
MONITOR_FOLDER = "monitor"
_SHEET_IMAGES = 8

Monitor = Callable[[nn.Module], dict[str, float]]
"""Measures an encoder: names and values."""


@dataclass(frozen=True)
class Progress:
    """Where a training is, at a logged step or a checkpoint. Steps and epochs done; the rates are since the last one."""

    step: int
    total_steps: int
    epoch: int
    total_epochs: int
    images: int
    """Images trained on so far, over all ranks and epochs."""
    total_images: int
    loss: float
    learning_rate: float
    images_per_second: float
    data_wait_share: float
    measures: dict[str, float | None]
    """The latest row of the history."""
    collapsing: bool = False
    """Whether the features have been about one point or one direction."""

    @property
    def note(self) -> str:
        """Epoch and loss in a few words."""
        warning = ", WARNING: the representation is collapsing" if self.collapsing else ""
        return f"epoch {min(self.epoch + 1, self.total_epochs)}/{self.total_epochs}, loss {self.loss:.4g}{warning}"


@dataclass(frozen=True)
class PretrainResult:
    """How a pretraining ended; the same on every rank, but for `files`, which rank 0 knows."""

    status: Literal["finished", "non_finite", "stopped"]
    step: int
    """Steps done; of a non-finite training the first bad step (counted from 1)."""
    epochs: int
    """Whole epochs done."""
    learning_rate: float
    """Learning rate of that step."""
    last_checkpoint_step: int | None
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file written at the end, by name."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Last loss, mean images per second and other small results."""


@dataclass
class _Run:
    """What the parts of one training's loop share."""

    plan: PretrainPlan
    feed: Feed
    process: Process
    output: Store
    stepper: Stepper
    checkpoints: CheckpointFolder
    history: History
    log_every_steps: int
    checkpoint_every_epochs: int
    checkpoint_every_steps: int | None
    on_progress: Callable[[Progress], bool | None] | None
    first_bad: Tensor
    """First step whose loss or gradient was not finite, on the device; 0 while there is none."""
    resumed_at_step: int = 0
    """Steps that were done already when this process began."""
    done: int = 0
    last_checkpoint_step: int | None = None
    features: tuple[Tensor, Tensor] | None = None
    """The last step's features (B, E) of both views."""
    warned: bool = False
    """Whether the user has been told of a collapse."""
    stop: bool = False
    """Whether the training is to end before its last step; the same on every rank."""
    window_steps: int = 0
    window_started: float = 0.0
    waited: float = 0.0
    """Seconds spent waiting for batches in this window."""

    @property
    def total_epochs(self) -> int:
        """Passes over the images, a part of one counted as one."""
        return self.plan.total_epochs(self.feed.steps_per_epoch)


def pretrain(
    plan: PretrainPlan,
    feed: Feed,
    process: Process,
    output: Store,
    *,
    checkpoint_every_epochs: int = 1,
    checkpoint_every_steps: int | None = None,
    keep_checkpoints: int = 2,
    log_every_steps: int = 10,
    on_progress: Callable[[Progress], bool | None] | None = None,
    initial_encoder: bytes | None = None,
    sample_BHWC: Tensor | None = None,
    monitor: Monitor | None = None,
    monitor_every_epochs: int = 1,
    labels_N: Tensor | None = None,
) -> PretrainResult:
    """Trains as `plan` says, going on from the last checkpoint in `output`; every rank calls it alike.

    Checkpoints are written at the end of every `checkpoint_every_epochs` epochs and of the last and, where given, every
    `checkpoint_every_steps` steps (the feed must then be able to start within an epoch). `on_progress` is called on every
    rank at every logged step; where one says True the training ends with status stopped, after a checkpoint where the feed can
    start within an epoch. A loss or gradient that is not finite ends the training with that status on all ranks; it is
    no exception, and no checkpoint holds it. On `sample_BHWC`, stored uint8 images, the plan's surgery measures how far it
    moves features. `monitor` is called on rank 0 with the encoder in evaluation mode after every `monitor_every_epochs`
    epochs and the last; what it returns goes to `monitor/<epoch>.json`. `labels_N` are the labels by image number, for a
    method that takes them.
    """
    if feed.batch_size != plan.batch_size:
        raise ValueError(f"the feed gives batches of {feed.batch_size}, the plan wants {plan.batch_size}")
    run = _Run(
        plan,
        feed,
        process,
        output,
        Stepper(plan, process, feed.steps_per_epoch, initial_encoder, sample_BHWC, labels_N),
        CheckpointFolder(output.sub("checkpoints"), keep_checkpoints),
        History(output.sub("metrics"), process.rank, feed.steps_per_epoch),
        log_every_steps,
        checkpoint_every_epochs,
        checkpoint_every_steps,
        on_progress,
        torch.zeros((), dtype=torch.int64, device=process.device),
    )
    _continue_from_checkpoint(run)
    result = _trained(run, monitor, monitor_every_epochs)
    if process.is_main:
        signals.at_end(result.status == "non_finite")
    return result


def _trained(run: _Run, monitor: Monitor | None, monitor_every_epochs: int) -> PretrainResult:
    for images_BHWC in _remaining_batches(run):
        _train_step(run, images_BHWC)
        bad_step = _first_bad_step(run)
        if bad_step:
            return _non_finite(run, bad_step)
        if _log_due(run):
            _log(run)
        stops_between = run.stop and run.feed.starts_within_epoch and not _checkpoint_due(run)
        if stops_between and not _all_finite(run):  # its checkpoint is one that `_first_bad_step` did not see coming
            return _non_finite(run, run.done)
        if monitor is not None:
            _monitor(run, monitor, monitor_every_epochs)
        if stops_between or _checkpoint_due(run):
            _save_checkpoint(run)
        if run.stop and run.done < run.stepper.total_steps:
            return _stopped(run)
    return _finish(run)


def _continue_from_checkpoint(run: _Run) -> None:
    latest = (run.checkpoints.latest() or 0) if run.process.is_main else 0
    run.done = run.resumed_at_step = agree_largest(latest, run.process.device)
    if run.done:
        run.stepper.restore(*run.checkpoints.load(run.done), run.done)
        run.last_checkpoint_step = run.done
    if run.process.is_main:
        run.history.forget_after(run.done)
        signals.at_start()
    barrier()  # before any rank writes the parts anew
    _start_window(run)


def _remaining_batches(run: _Run) -> Iterator[Batch]:
    """This rank's batches from the step after the last one done to the last; notes the time waited."""
    sheet_wanted = run.process.is_main and not run.output.exists(SHEET_FILE)
    for epoch in range(run.done // run.feed.steps_per_epoch, run.total_epochs):
        batches = run.feed.batches(epoch, run.done - epoch * run.feed.steps_per_epoch)
        while run.done < run.stepper.total_steps or run.done % run.feed.steps_per_epoch == 0:  # whole epochs are read out
            started = time.perf_counter()
            batch = next(batches, None)
            run.waited += time.perf_counter() - started
            if batch is None:
                break
            if sheet_wanted:
                sheet = view_sheet(batch.images_BHWC[:_SHEET_IMAGES], run.plan.views, run.plan.encoder, seed=run.plan.seed)
                run.output.write(SHEET_FILE, sheet)
                sheet_wanted = False
            yield batch


def _train_step(run: _Run, batch: Batch) -> None:
    if run.plan.learning_rate_finder and run.done == run.stepper.head_steps:
        _find_rate(run)
    outcome = run.stepper.step(batch, run.done)
    run.done += 1
    run.window_steps += 1
    run.features = outcome.features_BE, outcome.features2_BE
    finite = torch.isfinite(outcome.scalars["loss"]) & torch.isfinite(outcome.scalars["gradient_norm"])
    run.first_bad = torch.where(finite | (run.first_bad > 0), run.first_bad, run.done)
    run.history.add(run.done, outcome.scalars, outcome.learning_rate)


def _find_rate(run: _Run) -> None:
    """The range test in front of the main phase; a run that is resumed here repeats it, from the same weights and batches."""
    epoch, steps = run.done // run.feed.steps_per_epoch, itertools.count()
    batches = itertools.chain.from_iterable(run.feed.batches(epoch + number) for number in steps)
    try:
        test = run.stepper.find_rate(batches, run.done)
    except ValueError as error:
        raise RecipeError(f"learning_rate_finder: {error}: give optimiser.learning_rate instead") from None
    if run.process.is_main:
        run.output.write(FINDER_FILE, test.to_json())
    _start_window(run)


def _first_bad_step(run: _Run) -> int:
    """The first step that was not finite, or 0. Reading a GPU waits for it, so there it is read before logs and
    checkpoints only; on the CPU at every step."""
    if _checkpoint_due(run):  # a huge but finite gradient can leave weights or averages that are not
        run.first_bad = torch.where(run.stepper.is_finite() | (run.first_bad > 0), run.first_bad, run.done)
    elif not _log_due(run) and run.process.device.type != "cpu":
        return 0
    return agree_largest(int(run.first_bad), run.process.device)


def _all_finite(run: _Run) -> bool:
    """Whether weights and averages are finite on every rank: rank 0 alone would find it out while the others wait."""
    return not agree_largest(int(not run.stepper.is_finite()), run.process.device)


def _log_due(run: _Run) -> bool:
    return run.done % run.log_every_steps == 0 or _checkpoint_due(run)


def _checkpoint_due(run: _Run) -> bool:
    every = run.checkpoint_every_steps
    epoch, rest = divmod(run.done, run.feed.steps_per_epoch)
    at_epoch_end = (rest == 0 and epoch % run.checkpoint_every_epochs == 0) or run.done == run.stepper.total_steps
    return at_epoch_end or (every is not None and run.done % every == 0)


def _start_window(run: _Run) -> None:
    run.window_steps, run.waited, run.window_started = 0, 0.0, time.perf_counter()


def _log(run: _Run) -> None:
    """Fetches the rows since the last log from the device, adds rates and collapse measures, reports progress."""
    assert run.features is not None
    row = run.history.settle(collapse_measures(*run.features), lambda: _window_rates(run))
    if run.process.is_main and not run.warned:
        run.warned = signals.warn_of_collapse(run.done, row)
    progress = _progress(run, row)
    if run.process.is_main:
        signals.at_log(progress)
    wanted = run.on_progress is not None and bool(run.on_progress(progress))
    run.stop = bool(agree_largest(int(wanted), run.process.device))
    _start_window(run)


def _window_rates(run: _Run) -> dict[str, float]:
    seconds = max(time.perf_counter() - run.window_started, 1e-9)
    images = run.window_steps * run.feed.batch_size
    return {"images_per_second": images / seconds, "data_wait_share": run.waited / seconds}


def _progress(run: _Run, row: dict[str, Any]) -> Progress:
    return Progress(
        step=run.done,
        total_steps=run.stepper.total_steps,
        epoch=run.done // run.feed.steps_per_epoch,
        total_epochs=run.total_epochs,
        images=run.done * run.feed.batch_size,
        total_images=run.stepper.total_steps * run.feed.batch_size,
        loss=row["loss"],
        learning_rate=row["learning_rate"],
        images_per_second=row["images_per_second"],
        data_wait_share=row["data_wait_share"],
        measures=row,
        collapsing=run.warned,
    )


def _save_checkpoint(run: _Run) -> None:
    """All ranks' rows first, then the checkpoint and its mark: a marked checkpoint has its history."""
    run.history.commit()
    barrier()
    if run.process.is_main:
        module, state = run.stepper.module, run.stepper.state()
        signals.timed_checkpoint(lambda: run.checkpoints.save(run.done, module.state_dict(), state))
    run.last_checkpoint_step = run.done
    _start_window(run)


def _monitor(run: _Run, monitor: Monitor, every_epochs: int) -> None:
    """At the end of an epoch, on rank 0; the others wait in the next collective. A resumed run writes the same again."""
    epoch, rest = divmod(run.done, run.feed.steps_per_epoch)
    at_end = run.done == run.stepper.total_steps
    if not run.process.is_main or (not at_end and (rest or epoch % every_epochs)):
        return
    epoch = run.total_epochs if at_end else epoch
    encoder = run.stepper.module.encoder
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    with torch.no_grad():
        measured = monitor(encoder)
    for module, mode in modes.items():
        module.training = mode
    run.output.write(f"{MONITOR_FOLDER}/{epoch:05d}.json", json.dumps({"epoch": epoch, **measured}).encode())
    _start_window(run)


def _non_finite(run: _Run, bad_step: int) -> PretrainResult:
    if run.history.unsettled:  # nothing is where the step was just logged
        run.history.settle(None, lambda: _window_rates(run))
    run.history.commit(last_step=bad_step)
    return PretrainResult(
        "non_finite",
        bad_step,
        (bad_step - 1) // run.feed.steps_per_epoch,
        run.stepper.learning_rate(bad_step - 1),
        run.last_checkpoint_step,
    )


def _stopped(run: _Run) -> PretrainResult:
    rate, epochs = run.stepper.learning_rate(run.done - 1), run.done // run.feed.steps_per_epoch
    barrier()  # no rank leaves before the checkpoint is whole
    return PretrainResult("stopped", run.done, epochs, rate, run.last_checkpoint_step)


def _finish(run: _Run) -> PretrainResult:
    rate = run.stepper.learning_rate(run.done - 1)
    files: dict[str, str] = {}
    facts: dict[str, Any] = {}
    barrier()
    if run.process.is_main:
        files, facts = _write_results(run)
    barrier()
    return PretrainResult("finished", run.done, run.total_epochs, rate, run.last_checkpoint_step, files, facts)


def _write_results(run: _Run) -> tuple[dict[str, str], dict[str, Any]]:
    history = read_history(run.output.sub("metrics"))
    metadata = {"encoder": json.dumps(run.plan.encoder.canonical(), sort_keys=True)}
    contents = {
        "encoder.safetensors": save_weights(run.stepper.module.encoder, metadata),
        "history.parquet": to_parquet(history),
        EVENTS_FILE: to_tensorboard(history),
    }
    for name, data in contents.items():
        run.output.write(name, data)
    files = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    files[SHEET_FILE] = hashlib.sha256(run.output.read(SHEET_FILE)).hexdigest()
    facts = summarise(history, run.feed.batch_size) | {"resumed_at_step": run.resumed_at_step}
    if run.plan.learning_rate_finder:
        facts["found_learning_rate"] = run.stepper.peak_rate
    if run.stepper.module.surgery is not None:
        facts["surgery"] = run.stepper.module.surgery
    return files, facts
