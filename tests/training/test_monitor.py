"""Watching a training: when the loop measures, that measuring changes nothing, and what the kNN monitor looks at. No Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from ranks import run_on_ranks
from torch import nn

from medssl.collectives import Process
from medssl.datasets.draws import label_draw
from medssl.errors import DataError
from medssl.networks import EncoderParams, build_encoder
from medssl.store import Store, open_store
from medssl.training import step as step_module
from medssl.training.feed import ResidentFeed, ResidentImages
from medssl.training.loop import pretrain
from medssl.training.monitor import KnnMonitor, Watched
from medssl.training.plan import PretrainPlan

STEPS_PER_EPOCH, EPOCHS, BATCH, IMAGES = 2, 5, 8, 20
CPU = Process(0, 1, torch.device("cpu"))
ENCODER = EncoderParams(name="test_resnet", image_px=32)


def plan(**changed: Any) -> PretrainPlan:
    fields: dict[str, Any] = {
        "encoder": ENCODER.canonical(), "objective": {"name": "barlow_twins", "projector": (16, 12)}, "optimiser": {},
        "schedule": {}, "views": {}, "epochs": EPOCHS, "batch_size": BATCH, "seed": 3,
    }  # fmt: skip
    return PretrainPlan.model_validate({**fields, **changed})


def resident(folder: Path, images: int = IMAGES) -> ResidentImages:
    array = np.random.default_rng(0).integers(0, 256, (images, 36, 36, 3), dtype=np.uint8)
    return ResidentImages.write(folder / "images", array, [str(k) for k in range(images)])


class Spy:
    """A monitor that draws random numbers, as a careless one would, and notes how it found the encoder."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        assert not any(module.training for module in encoder.modules()) and not torch.is_grad_enabled()
        torch.rand(7), np.random.default_rng().random()
        encoder(torch.zeros(2, 3, 32, 32))
        self.calls += 1
        return {"calls": float(self.calls), "weight": float(next(encoder.parameters()).double().sum())}


def train(process: Process, folder: str, output: str, watch: bool, every: int = 1, **changed: Any) -> int:
    """One rank's training; how often its monitor was called."""
    images, spy = resident(Path(folder)), Spy()
    feed = ResidentFeed(images, range(len(images)), BATCH, 3, process)
    options: dict[str, Any] = {"monitor": spy, "monitor_every_epochs": every} if watch else {}
    pretrain(plan(**changed), feed, process, open_store(output, create=True), log_every_steps=1, **options)
    return spy.calls


def measured(store: Store) -> dict[str, Any]:
    return {entry.key: json.loads(store.read(entry.key)) for entry in store.list("monitor/")}


@pytest.mark.parametrize(("every", "epochs"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (9, [5])])
def test_measured_after_every_so_many_epochs_and_the_last(tmp_path: Path, every: int, epochs: list[int]) -> None:
    output = open_store(str(tmp_path / "out"), create=True)
    assert train(CPU, str(tmp_path), output.uri, True, every) == len(epochs)
    found = measured(output)
    assert list(found) == [f"monitor/{epoch:05d}.json" for epoch in epochs]
    assert [value["epoch"] for value in found.values()] == epochs
    assert [value["calls"] for value in found.values()] == [float(number + 1) for number in range(len(epochs))]
    assert len({value["weight"] for value in found.values()}) == len(epochs)  # the encoder of that epoch


def test_only_rank_0_measures(tmp_path: Path) -> None:
    resident(tmp_path)
    outputs = [open_store(str(tmp_path / name), create=True) for name in ("watched", "alone")]
    calls = [
        run_on_ranks(train, 2, tmp_path / f"ranks{number}", str(tmp_path), output.uri, number == 0, 2)
        for number, output in enumerate(outputs)
    ]
    assert calls == [[3, 0], [0, 0]]
    assert list(measured(outputs[0])) == ["monitor/00002.json", "monitor/00004.json", "monitor/00005.json"]
    assert outputs[0].read("encoder.safetensors") == outputs[1].read("encoder.safetensors")


@pytest.mark.parametrize("further", [{}, {"trained": "last_block"}])
def test_watching_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, further: dict[str, Any]) -> None:
    """Weights, history and each module's mode at each step are those of a training that is not watched."""
    modes: list[list[tuple[str, bool]]] = []
    step = step_module.Stepper.step

    def noting(self: Any, *args: Any) -> Any:
        modes.append([(name, module.training) for name, module in self.module.named_modules()])
        return step(self, *args)

    monkeypatch.setattr(step_module.Stepper, "step", noting)
    outputs = [open_store(str(tmp_path / name), create=True) for name in ("watched", "alone")]
    assert [train(CPU, str(tmp_path), outputs[k].uri, k == 0, further=further) for k in (0, 1)] == [EPOCHS, 0]
    half = STEPS_PER_EPOCH * EPOCHS
    assert len(modes) == 2 * half and modes[:half] == modes[half:]
    frozen = {mode for _, mode in modes[0]} == {True, False}
    assert frozen == bool(further)  # with a frozen part the modes are mixed: a plain train() would not restore them
    assert outputs[0].read("encoder.safetensors") == outputs[1].read("encoder.safetensors")
    columns = ("loss", "gradient_norm", "embedding_std", "effective_rank", "alignment", "uniformity")
    frames = [pd.read_parquet(tmp_path / name / "history.parquet")[list(columns)] for name in ("watched", "alone")]
    pd.testing.assert_frame_equal(*frames, check_exact=True)


# -- the kNN monitor ---------------------------------------------------------------------------------------------


def index(sizes: dict[str, int], labelled: float = 1.0) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    split = [name for name, count in sizes.items() for _ in range(count)]
    label = rng.choice(["a", "b", "c"], size=len(split), p=[0.7, 0.2, 0.1]).astype(object)
    label[rng.random(len(split)) > labelled] = None
    order = rng.permutation(len(split))
    columns = {"image_id": [f"i{k:05d}" for k in range(len(split))], "label": label, "split": np.array(split)[order]}
    return pd.DataFrame(columns)


def test_watched_images_are_labelled_stratified_and_never_of_the_test_split() -> None:
    frame = index({"train": 4000, "val": 1500, "test": 900, "extra": 300}, labelled=0.8)
    found = Watched.of_index(frame, ["a", "b", "c"], seed=4)
    assert (len(found.bank_rows), len(found.query_rows)) == (2000, 1000)
    for rows, labels, split in (
        (found.bank_rows, found.bank_labels, "train"),
        (found.query_rows, found.query_labels, "val"),
    ):
        assert set(frame["split"].iloc[rows]) == {split}
        assert [["a", "b", "c"][k] for k in labels] == frame["label"].iloc[rows].tolist()
        whole = frame[(frame["split"] == split) & frame["label"].notna()]["label"].value_counts(normalize=True)
        shares = frame["label"].iloc[rows].value_counts(normalize=True)
        assert (shares - whole).abs().max() < 1e-3
    assert found == Watched.of_index(frame, ["a", "b", "c"], seed=4)
    other = Watched.of_index(frame, ["a", "b", "c"], seed=5)
    assert set(other.bank_rows) != set(found.bank_rows)
    json.dumps(vars(found))  # plain values: they go to a worker
    assert found.bank_rows == label_draw(frame, labels=2000, draw=4).tolist()


def test_small_datasets_are_watched_whole_and_unlabelled_ones_refused() -> None:
    frame = index({"train": 40, "val": 20, "test": 9})
    found = Watched.of_index(frame, ["a", "b", "c"], seed=0)
    assert (len(found.bank_rows), len(found.query_rows)) == (40, 20)
    with pytest.raises(DataError, match="split 'train' has no labelled images"):
        Watched.of_index(frame.assign(label=None), ["a", "b", "c"], seed=0)


def coloured(folder: Path, classes: int, of_each: int) -> tuple[ResidentImages, list[int]]:
    """Images of one colour per class with a little noise."""
    rng = np.random.default_rng(2)
    labels = [k for k in range(classes) for _ in range(of_each)]
    colours = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220]])
    pixels = colours[labels][:, None, None] + rng.integers(-25, 26, (len(labels), 36, 36, 3))
    ids = [str(k) for k in range(len(labels))]
    return ResidentImages.write(folder / "coloured", pixels.clip(0, 255).astype(np.uint8), ids), labels


class Colours(nn.Module):
    """An encoder whose features are the image's mean colours, in the network's normalised numbers."""

    def forward(self, views_BCHW: torch.Tensor) -> torch.Tensor:
        assert views_BCHW.shape[1:] == (3, 32, 32) and not torch.is_grad_enabled()
        return views_BCHW.mean(dim=(2, 3))


def test_knn_monitor_measures_what_features_hold(tmp_path: Path) -> None:
    images, labels = coloured(tmp_path, 3, 30)
    rows = np.arange(len(labels))
    bank, queries = rows[rows % 3 != 0].tolist(), rows[rows % 3 == 0].tolist()
    truth = np.array(labels)

    def watched(names: np.ndarray) -> Watched:
        return Watched(bank, truth[bank].tolist(), queries, names[queries].tolist(), ["r", "g", "b"])

    monitor = KnnMonitor(images, ENCODER, watched(truth), CPU.device, k=15)
    assert monitor.note == ""
    assert monitor(Colours()) == {"knn_accuracy": 1.0, "knn_balanced_accuracy": 1.0}
    assert monitor.note == "kNN 1.000 (balanced accuracy, validation)"
    mixed = truth.copy()
    mixed[queries[:5]] = 1  # five images of the first class are said to be of the second
    found = KnnMonitor(images, ENCODER, watched(mixed), CPU.device)(Colours())
    assert found == {"knn_accuracy": pytest.approx(25 / 30), "knn_balanced_accuracy": pytest.approx((1 + 10 / 15 + 1) / 3)}
    monitor(build_encoder(ENCODER, 0).eval())  # any encoder, in the layout that training uses


def test_k_is_at_most_the_rarest_class_of_the_bank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, _ = coloured(tmp_path, 3, 30)
    bank = list(range(30)) + list(range(30, 34)) + list(range(60, 90))
    watched = Watched(bank, [k // 30 for k in bank], [40, 50], [1, 1], ["r", "green", "b"])
    monitor = KnnMonitor(images, ENCODER, watched, CPU.device)
    assert monitor.k == 4
    assert "class 'green' has 4 images in the bank" in caplog.text
    assert monitor(Colours()) == {"knn_accuracy": 1.0, "knn_balanced_accuracy": 1.0}


def test_an_encoder_gone_wrong_does_not_end_the_training(tmp_path: Path) -> None:
    images, labels = coloured(tmp_path, 3, 30)
    rows = list(range(90))
    monitor = KnnMonitor(images, ENCODER, Watched(rows, labels, rows, labels, ["r", "g", "b"]), CPU.device)

    class Broken(Colours):
        def forward(self, views_BCHW: torch.Tensor) -> torch.Tensor:
            return super().forward(views_BCHW) / 0

    assert monitor(Broken()) == {} and monitor.note == ""


def test_knn_monitor_in_the_loop(tmp_path: Path) -> None:
    images = resident(tmp_path)
    watched = Watched(list(range(12)), [0, 1] * 6, list(range(12, 20)), [0, 1] * 4, ["a", "b"])
    output = open_store(str(tmp_path / "out"), create=True)
    monitor = KnnMonitor(images, ENCODER, watched, CPU.device)
    feed = ResidentFeed(images, range(len(images)), BATCH, 3, CPU)
    pretrain(plan(epochs=2), feed, CPU, output, monitor=monitor)
    for number, value in enumerate(measured(output).values(), 1):
        assert set(value) == {"epoch", "knn_accuracy", "knn_balanced_accuracy"} and value["epoch"] == number
        assert 0 <= value["knn_balanced_accuracy"] <= 1
    assert monitor.note.startswith("kNN 0.") or monitor.note.startswith("kNN 1.")
