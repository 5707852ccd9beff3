"""The loop: killed ranks, resumption, what lands in the store, and a loss that turns NaN. No Ray."""

from __future__ import annotations

import io
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from ranks import exit_codes, run_on_ranks, start_ranks

from medssl.checkpoint import CheckpointFolder
from medssl.collectives import Process
from medssl.networks import EncoderParams, build_encoder, load_weights, save_weights
from medssl.store import Store, open_store
from medssl.training.feed import Batch, ResidentFeed, ResidentImages
from medssl.training.loop import PretrainResult, Progress, pretrain
from medssl.training.plan import PretrainPlan

STEPS_PER_EPOCH, EPOCHS, BATCH = 3, 3, 12
CPU = Process(0, 1, torch.device("cpu"))


def plan(**changed: Any) -> PretrainPlan:
    fields: dict[str, Any] = {
        "encoder": {"name": "test_resnet", "image_px": 32},
        "objective": {"name": "barlow_twins", "projector": (32, 24)},
        "optimiser": {},
        "schedule": {"name": "warmup_cosine", "warmup_epochs": 1},
        "views": {},
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "seed": 3,
    }
    return PretrainPlan.model_validate({**fields, **changed})


def resident(folder: Path) -> ResidentImages:
    array = np.random.default_rng(0).integers(0, 256, (STEPS_PER_EPOCH * BATCH + 5, 40, 40, 3), dtype=np.uint8)
    return ResidentImages.write(folder / "images", array, [str(k) for k in range(len(array))])


def train(process: Process, folder: str, output: str, **options: Any) -> PretrainResult:
    """One rank's pretraining; `die_at=(rank, step)` sends that rank SIGKILL, `die_saving` does so before the mark;
    `stop_at=(rank, step)` has that rank say that it is enough."""
    changed, die_at, die_saving = options.pop("plan", {}), options.pop("die_at", None), options.pop("die_saving", None)
    stop_at = options.pop("stop_at", None)
    chosen = plan(**changed)
    images = resident(Path(folder))
    feed = ResidentFeed(images, range(len(images)), chosen.batch_size, chosen.seed, process)

    def progress(now: Progress) -> bool:
        if die_at == (process.rank, now.step):
            os.kill(os.getpid(), signal.SIGKILL)
        return stop_at == (process.rank, now.step)

    if die_saving is not None:
        save = CheckpointFolder.save

        def save_or_die(self: CheckpointFolder, step: int, weights: Any, state: Any) -> None:
            if step == die_saving:
                os.kill(os.getpid(), signal.SIGKILL)
            save(self, step, weights, state)

        CheckpointFolder.save = save_or_die  # type: ignore[method-assign]
    defaults = {"checkpoint_every_steps": 2, "log_every_steps": 1}
    return pretrain(chosen, feed, process, open_store(output, create=True), on_progress=progress, **{**defaults, **options})


def rows(store: Store) -> dict[tuple[int, int], dict[str, Any]]:
    """History by (rank, step); each must be there once."""
    table = pq.read_table(io.BytesIO(store.read("history.parquet"))).to_pylist()
    found = {(row["rank"], row["step"]): row for row in table}
    assert len(found) == len(table)
    return found


def assert_same_training(found: Store, expected: Store, world: int, epochs: int = EPOCHS) -> None:
    ours, theirs = rows(found), rows(expected)
    assert set(ours) == set(theirs) == {(r, s) for r in range(world) for s in range(1, STEPS_PER_EPOCH * epochs + 1)}
    for place, row in ours.items():
        assert set(row) == set(theirs[place]) > {"loss", "gradient_norm", "learning_rate", "epoch", "effective_rank"}
        for column in set(row) - {"images_per_second", "data_wait_share"}:
            assert row[column] == theirs[place][column], (place, column)
    assert found.read("encoder.safetensors") == expected.read("encoder.safetensors")
    assert found.read("views.png") == expected.read("views.png")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_killed_rank_changes_nothing(tmp_path: Path, world: int) -> None:
    resident(tmp_path)
    outputs = [open_store(str(tmp_path / name), create=True) for name in ("undisturbed", "killed")]
    victim = (world - 1, STEPS_PER_EPOCH * 2 + 2)  # in mid-epoch, two steps after the last checkpoint
    calls = [(outputs[0].uri, {}), (outputs[1].uri, {"die_at": victim})]
    killed = start_ranks(train_twice_body, world, tmp_path / "a", str(tmp_path), calls)
    codes = exit_codes(killed)
    assert codes[world - 1] == -signal.SIGKILL and 0 not in codes
    assert CheckpointFolder(outputs[1].sub("checkpoints")).latest() == STEPS_PER_EPOCH * 2
    assert not outputs[1].exists("encoder.safetensors")
    found = run_on_ranks(train_body, world, tmp_path / "b", str(tmp_path), outputs[1].uri, {})
    assert [result.status for result in found] == ["finished"] * world
    assert_same_training(outputs[1], outputs[0], world)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("step", [4, STEPS_PER_EPOCH * 2])
def test_a_stopped_training_goes_on_from_the_very_step(tmp_path: Path, world: int, step: int) -> None:
    """One rank says so: all end after that step, with a checkpoint of it, in mid-epoch as at an epoch's end."""
    resident(tmp_path)
    outputs = [open_store(str(tmp_path / name), create=True) for name in ("undisturbed", "stopped")]
    options = {"checkpoint_every_steps": None, "checkpoint_every_epochs": 5}
    run_on_ranks(train_body, world, tmp_path / "a", str(tmp_path), outputs[0].uri, options)
    stop_at = {"stop_at": (0, step), **options}
    stopped = run_on_ranks(train_body, world, tmp_path / "b", str(tmp_path), outputs[1].uri, stop_at)
    assert {(r.status, r.step, r.last_checkpoint_step) for r in stopped} == {("stopped", step, step)}
    assert CheckpointFolder(outputs[1].sub("checkpoints")).latest() == step
    assert not outputs[1].exists("encoder.safetensors")
    found = run_on_ranks(train_body, world, tmp_path / "c", str(tmp_path), outputs[1].uri, options)
    assert {(r.status, r.facts.get("resumed_at_step", step)) for r in found} == {("finished", step)}
    assert_same_training(outputs[1], outputs[0], world)


@pytest.mark.parametrize("world", [1, 2])
def test_a_stop_after_an_update_to_infinity_ends_on_all_ranks(tmp_path: Path, world: int) -> None:
    """Loss and gradient are finite at that step, the weights after it are not: there is no checkpoint to stop with."""
    resident(tmp_path)
    output = open_store(str(tmp_path / "output"), create=True)
    options = {
        "plan": {"optimiser": {"name": "sgd", "learning_rate": 3e38}, "schedule": {"name": "constant"}},
        "checkpoint_every_steps": None, "stop_at": (0, 1),
    }  # fmt: skip
    found = run_on_ranks(train_body, world, tmp_path / "ranks", str(tmp_path), output.uri, options)
    assert {(r.status, r.step, r.last_checkpoint_step) for r in found} == {("non_finite", 1, None)}
    parts = [pq.read_table(io.BytesIO(output.read(entry.key))).to_pylist() for entry in output.list("metrics/")]
    assert len(parts) == world and all(len(part) == 1 and np.isfinite(part[0]["loss"]) for part in parts)
    assert all(np.isfinite(part[0]["gradient_norm"]) for part in parts) and not output.list("checkpoints/")


def test_a_stop_at_the_last_step_finishes_the_training(tmp_path: Path) -> None:
    output = open_store(str(tmp_path / "output"), create=True)
    resident(tmp_path)
    assert train(CPU, str(tmp_path), output.uri, stop_at=(0, STEPS_PER_EPOCH * EPOCHS)).status == "finished"
    assert output.exists("encoder.safetensors")


SWAV = {"name": "swav", "projector": (32, 24), "prototypes": 9, "queue": 2 * BATCH, "queue_start_epoch": 1}
METHODS: dict[str, dict[str, Any]] = {
    "simclr": {"objective": {"name": "simclr", "projector": (32, 24)}},
    "dcl": {"objective": {"name": "dcl", "projector": (32, 24)}},
    "simsiam": {"objective": {"name": "simsiam", "projector": (32, 24), "predictor_width": 8}},
    "vicreg": {"objective": {"name": "vicreg", "projector": (32, 24)}},
    "byol": {"objective": {"name": "byol", "projector": (32, 24), "predictor_width": 8}},
    "swav": {"objective": {**SWAV, "freeze_prototypes_steps": 5}, "views": {"small_crops": 2, "small_px": 16}},
    "further, with finder": {
        "further": {"head_only_epochs": 1, "trained": "last_block"}, "learning_rate_finder": True,
        "optimiser": {"name": "sgd"}, "schedule": {"name": "one_cycle"},
    },
}  # fmt: skip


STATEFUL = {"byol", "swav", "further, with finder"}  # the others keep nothing that Barlow Twins has not


@pytest.mark.parametrize(
    "name", [name if name in STATEFUL else pytest.param(name, marks=pytest.mark.acceptance) for name in METHODS]
)
def test_killed_rank_changes_nothing_of_any_method(tmp_path: Path, name: str) -> None:
    """Teacher, queue, prototypes, phases and the rate that was found: all of them outlive the kill."""
    resident(tmp_path)
    options = {"plan": METHODS[name]}
    epochs = plan(**METHODS[name]).total_epochs(1)
    outputs = [open_store(str(tmp_path / part), create=True) for part in ("undisturbed", "killed")]
    victim = (1, STEPS_PER_EPOCH * epochs - 1)
    calls = [(outputs[0].uri, options), (outputs[1].uri, {**options, "die_at": victim})]
    codes = exit_codes(start_ranks(train_twice_body, 2, tmp_path / "a", str(tmp_path), calls))
    assert codes[1] == -signal.SIGKILL and 0 not in codes
    found = run_on_ranks(train_body, 2, tmp_path / "b", str(tmp_path), outputs[1].uri, options)
    assert [result.status for result in found] == ["finished"] * 2 and found[0].facts["resumed_at_step"] > 0
    assert_same_training(outputs[1], outputs[0], 2, epochs)


def train_body(process: Process, folder: str, output: str, options: dict[str, Any]) -> PretrainResult:
    return train(process, folder, output, **options)


def train_twice_body(process: Process, folder: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    for output, options in calls:
        train(process, folder, output, **options)


def test_killed_between_metrics_and_mark(tmp_path: Path) -> None:
    """The rows of steps 3 and 4 are stored, their checkpoint is not: both are trained again and stored once."""
    outputs = [open_store(str(tmp_path / name), create=True) for name in ("undisturbed", "killed")]
    train(CPU, str(tmp_path), outputs[0].uri)
    ranks = start_ranks(train_body, 1, tmp_path / "ranks", str(tmp_path), outputs[1].uri, {"die_saving": 4})
    assert exit_codes(ranks) == [-signal.SIGKILL]
    assert outputs[1].exists("metrics/000000004-000000004-rank-00000.parquet")
    assert CheckpointFolder(outputs[1].sub("checkpoints")).latest() == 3
    run_on_ranks(train_body, 1, tmp_path / "ranks", str(tmp_path), outputs[1].uri, {})
    assert_same_training(outputs[1], outputs[0], 1)


def test_what_a_finished_training_leaves(tmp_path: Path) -> None:
    output = open_store(str(tmp_path / "out"), create=True)
    seen: list[Progress] = []
    images = resident(tmp_path)
    feed = ResidentFeed(images, range(len(images)), BATCH, 3, CPU)
    result = pretrain(plan(), feed, CPU, output, log_every_steps=2, keep_checkpoints=1, on_progress=seen.append)
    total = STEPS_PER_EPOCH * EPOCHS
    assert (result.status, result.step, result.epochs, result.last_checkpoint_step) == ("finished", total, EPOCHS, total)
    assert set(result.files) == {"encoder.safetensors", "history.parquet", "events.out.tfevents.0.medssl", "views.png"}
    assert result.facts["images"] == total * BATCH
    assert CheckpointFolder(output.sub("checkpoints")).steps() == [total]
    encoder = build_encoder(EncoderParams(name="test_resnet", image_px=32), 0)
    load_weights(encoder, output.read("encoder.safetensors"))
    Image.open(io.BytesIO(output.read("views.png"))).verify()
    assert [progress.step for progress in seen] == [2, 3, 4, 6, 8, 9]  # every second, and the epochs' ends
    assert seen[-1].images == seen[-1].total_images == total * BATCH
    history = rows(output)
    logged = {step for (_, step), row in history.items() if row["effective_rank"] is not None}
    assert logged == {2, 3, 4, 6, 8, 9}
    for row in history.values():
        assert row["loss"] == pytest.approx(row["invariance"] + 0.0051 * row["redundancy"], rel=1e-5)
        assert row["images_per_second"] > 0 and 0 <= row["data_wait_share"] <= 1 and row["gradient_norm"] > 0
    assert history[0, 1]["learning_rate"] == 0 and history[0, 4]["learning_rate"] == pytest.approx(1.5e-3)
    # A second call trains nothing more and leaves the same encoder.
    before = output.read("encoder.safetensors")
    again = pretrain(plan(), feed, CPU, output, on_progress=lambda _: pytest.fail("trained again"))
    assert again.step == total and output.read("encoder.safetensors") == before


def test_checkpoints_every_so_many_epochs_and_after_the_last(tmp_path: Path) -> None:
    feed, measured = ResidentFeed(resident(tmp_path), range(36), BATCH, 3, CPU), []
    output = open_store(str(tmp_path / "out"), create=True)

    def monitor(encoder: torch.nn.Module) -> dict[str, float]:
        measured.append(CheckpointFolder(output.sub("checkpoints"), 9).latest())
        return {}

    options: dict[str, Any] = {"keep_checkpoints": 9, "checkpoint_every_epochs": 2, "monitor": monitor}
    pretrain(plan(epochs=5), feed, CPU, output, **options)
    kept = [entry.key for entry in output.list("checkpoints/") if entry.key.endswith(".json")]
    assert [int(re.findall(r"\d+", key)[0]) for key in kept] == [2 * STEPS_PER_EPOCH, 4 * STEPS_PER_EPOCH, 5 * STEPS_PER_EPOCH]
    assert measured == [None, None, 6, 6, 12]  # the monitor keeps to its own epochs


def test_a_collapse_is_said_in_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An encoder whose last batch norms have weight 0 and bias 1 gives every image the same features."""
    encoder = build_encoder(EncoderParams(name="test_resnet", image_px=32), seed=0)
    for name, value in encoder.state_dict().items():
        if value.ndim == 1 and name.endswith("weight"):
            value.zero_()
        elif value.ndim == 1 and name.endswith("bias"):
            value.fill_(1)
    feed = ResidentFeed(resident(tmp_path), range(36), BATCH, 3, CPU)

    def run(name: str, **options: Any) -> list[Progress]:
        seen: list[Progress] = []
        output = open_store(str(tmp_path / name), create=True)
        pretrain(plan(epochs=1), feed, CPU, output, log_every_steps=1, on_progress=seen.append, **options)
        return seen

    collapsed = run("collapsed", initial_encoder=save_weights(encoder))
    assert len(collapsed) == STEPS_PER_EPOCH and all(now.collapsing for now in collapsed)
    assert all("the representation is collapsing" in now.note for now in collapsed)
    [warning] = [record.getMessage() for record in caplog.records if "collapsing" in record.getMessage()]
    assert "at step 1" in warning and "lower the learning rate" in warning
    healthy = run("healthy")
    assert len(healthy) == STEPS_PER_EPOCH and not any("collapsing" in now.note for now in healthy)


def test_tensorboard_events_hold_the_history(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = open_store(str(tmp_path / "out"), create=True)
    train(CPU, str(tmp_path), output.uri)
    output.download("events.out.tfevents.0.medssl", tmp_path / "events" / "events.out.tfevents.0.medssl")
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    scalars = {event.step: event.value for event in events.Scalars("train/loss")}
    expected = {step: row["loss"] for (_, step), row in rows(output).items()}
    assert scalars == {step: pytest.approx(value) for step, value in expected.items()}


DIVERGING = {"optimiser": {"name": "sgd", "learning_rate": 1e30}, "schedule": {"name": "warmup_cosine", "warmup_epochs": 1}}


@pytest.mark.parametrize("world", [1, 2])
def test_non_finite_stops_everywhere_and_is_never_kept(tmp_path: Path, world: int) -> None:
    resident(tmp_path)
    output = open_store(str(tmp_path / "out"), create=True)
    options = {"plan": DIVERGING, "checkpoint_every_steps": 1, "log_every_steps": 50}
    found = run_on_ranks(train_body, world, tmp_path / "a", str(tmp_path), output.uri, options)
    first = found[0]
    assert all(result == first for result in found)
    assert first.status == "non_finite" and 1 < first.step <= STEPS_PER_EPOCH
    assert first.learning_rate == pytest.approx(1e30 * (first.step - 1) / STEPS_PER_EPOCH)
    folder = CheckpointFolder(output.sub("checkpoints"))
    assert first.last_checkpoint_step == folder.latest() == first.step - 1
    weights, _ = folder.load(first.step - 1)
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    assert not output.exists("encoder.safetensors")
    assert f"{first.step:09d}" in "".join(entry.key for entry in output.list("metrics/"))
    again = run_on_ranks(train_body, world, tmp_path / "b", str(tmp_path), output.uri, options)
    assert again == found  # the same end from the last good checkpoint


def test_nan_without_checkpoints_names_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medssl.training import step as step_module

    views = step_module.Stepper.make_views
    poison = 5

    def poisoned(self: Any, batch: Batch, done: int) -> list[torch.Tensor]:
        first, second = views(self, batch, done)
        return [first * float("nan") if done == poison - 1 else first, second]

    monkeypatch.setattr(step_module.Stepper, "make_views", poisoned)
    output = open_store(str(tmp_path / "out"), create=True)
    result = train(CPU, str(tmp_path), output.uri, checkpoint_every_steps=None, log_every_steps=100)
    assert (result.status, result.step, result.epochs, result.last_checkpoint_step) == ("non_finite", poison, 1, 3)


def test_a_duration_in_steps_ends_within_an_epoch_and_is_resumed(tmp_path: Path) -> None:
    """At a constant rate its steps are those of a longer training in epochs; a broken-off one goes on to the same end."""
    constant = {"schedule": {"name": "constant"}}
    short = {"epochs": None, "steps": STEPS_PER_EPOCH + 1, **constant}
    output, longer, broken = (open_store(str(tmp_path / name), create=True) for name in ("short", "longer", "broken"))
    result = train(CPU, str(tmp_path), output.uri, plan=short, checkpoint_every_steps=None)
    assert (result.status, result.step, result.epochs, result.last_checkpoint_step) == ("finished", 4, 2, 4)
    train(CPU, str(tmp_path), longer.uri, plan={"epochs": 2, **constant})
    mine, theirs = rows(output), rows(longer)
    assert [key[1] for key in mine] == [1, 2, 3, 4] and all(mine[key]["loss"] == theirs[key]["loss"] for key in mine)

    class Stop(Exception):
        pass

    def stop(now: Progress) -> None:
        if now.step == STEPS_PER_EPOCH:
            raise Stop

    images, chosen = resident(tmp_path), plan(**short)
    feed = ResidentFeed(images, range(len(images)), BATCH, chosen.seed, CPU)
    with pytest.raises(Stop):
        pretrain(chosen, feed, CPU, broken, checkpoint_every_steps=2, log_every_steps=1, on_progress=stop)
    assert train(CPU, str(tmp_path), broken.uri, plan=short).step == 4
    assert broken.read("encoder.safetensors") == output.read("encoder.safetensors")


def test_a_plan_has_one_duration_and_is_named_as_before() -> None:
    for wrong in ({"epochs": None}, {"epochs": 2, "steps": 5}):
        with pytest.raises(ValueError, match="give one of them"):
            plan(**wrong)
    assert "steps" not in plan().canonical()
    further = plan(epochs=None, steps=10, further={"head_only_epochs": 1}, batch_size=4)
    assert (further.total_steps(3), further.total_epochs(3), further.total_images(13)) == (13, 5, 53)
    assert plan(further={"head_only_epochs": 1}).total_images(13) == 52
