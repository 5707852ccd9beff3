"""What a run says of itself: names, labels, and what the pretraining loop and the store's requests tell."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from medssl import telemetry
from medssl.collectives import Process
from medssl.errors import MissingKey, StoreError
from medssl.filesystem import retrying_filesystem
from medssl.retry import DEADLINE_VARIABLE, patiently
from medssl.s3 import PART_BYTES
from medssl.store import Store, open_store
from medssl.training.feed import ResidentFeed, ResidentImages
from medssl.training.loop import PretrainResult, pretrain
from medssl.training.plan import PretrainPlan


class Recorder:
    def __init__(self) -> None:
        self.gauges: dict[tuple[str, str], list[float]] = {}
        self.counters: dict[str, float] = {}
        self.labels: list[dict[str, str]] = []

    def gauge(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self.gauges.setdefault((name, labels.get("term", "")), []).append(value)
        self.labels.append(dict(labels))

    def count(self, name: str, by: float, labels: Mapping[str, str]) -> None:
        self.counters[name] = self.counters.get(name, 0.0) + by


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    telemetry._waiting.clear()
    made = Recorder()
    telemetry.send_to(made)
    yield made
    telemetry.send_to(None)


def test_labels_are_the_blocks_and_the_threads() -> None:
    made = Recorder()
    telemetry.send_to(made)
    try:
        with telemetry.labelled(study="s", arm="a", stage="x"):
            telemetry.gauge("loss", 1)
            with telemetry.labelled(arm="b"):
                telemetry.gauge("loss_term", 2, term="t")
            other = threading.Thread(target=lambda: telemetry.gauge("loss", 3))
            other.start()
            other.join()
        telemetry.gauge("loss", 4)
    finally:
        telemetry.send_to(None)
    nothing = {"study": "", "arm": ""}
    assert made.labels == [{"study": "s", "arm": "a"}, {"study": "s", "arm": "b", "term": "t"}, nothing, nothing]


def test_what_is_counted_before_anybody_listens_is_not_lost() -> None:
    telemetry._waiting.clear()
    telemetry.send_to(None)
    telemetry.count("store_requests")
    telemetry.count("store_requests", 2)
    telemetry.gauge("loss", 1.0)  # a gauge is of the moment
    made = Recorder()
    telemetry.send_to(made)
    telemetry.count("store_requests")
    telemetry.send_to(None)
    assert made.counters == {"store_requests": 4.0} and not made.gauges
    later = Recorder()
    telemetry.send_to(later)
    telemetry.send_to(None)
    assert not later.counters, "what was sent on is not sent again"


def test_other_names_kinds_and_labels_are_refused(recorder: Recorder) -> None:
    for wrong in (
        lambda: telemetry.gauge("store_requests", 1),
        lambda: telemetry.count("loss"),
        lambda: telemetry.count("store_requests", patient="p"),
    ):
        with pytest.raises((ValueError, KeyError)):
            wrong()


def test_every_metric_is_described_and_has_few_labels() -> None:
    for name, metric in telemetry.METRICS.items():
        assert metric.description.endswith(".") and len(metric.labels) <= 3 and name == name.lower()
        assert not set(metric.labels) - {"study", "stage", "arm", "term", "protocol", "dataset"}


IMAGES, BATCH = 40, 12


@pytest.fixture
def images(tmp_path: Path) -> ResidentImages:
    array = torch.randint(0, 256, (IMAGES, 40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    return ResidentImages.write(tmp_path / "images", array, [str(k) for k in range(IMAGES)])


def train(images: ResidentImages, output: Path, feed: type[ResidentFeed] = ResidentFeed, **options: Any) -> PretrainResult:
    """Nine steps, three to an epoch."""
    fields = {
        "encoder": {"name": "test_resnet", "image_px": 32}, "objective": {"name": "barlow_twins", "projector": (16, 16)},
        "optimiser": {}, "schedule": {}, "views": {}, "epochs": 3, "batch_size": BATCH, "seed": 0,
    }  # fmt: skip
    process = Process(0, 1, torch.device("cpu"))
    fed = feed(images, range(IMAGES), BATCH, 0, process)
    plan = PretrainPlan.model_validate(fields)
    return pretrain(plan, fed, process, open_store(str(output), create=True), log_every_steps=1, **options)


def test_a_pretraining_whose_first_step_never_comes_is_seen(tmp_path: Path, images: ResidentImages, recorder: Recorder) -> None:
    """What the alerts go by is there before the first batch is asked for, when it begins and when it is taken up again."""
    before = time.time()
    train(images, tmp_path / "out", on_progress=lambda now: now.step == 4)  # stopped, with a checkpoint of step 4
    recorder.gauges.clear()

    class Stalled(ResidentFeed):
        def batches(self, epoch: int, start_step: int = 0) -> Any:
            raise TimeoutError

    for place, done in (("new", 0), ("out", 4)):
        with pytest.raises(TimeoutError):
            train(images, tmp_path / place, Stalled)
        told = {name: values for (name, _), values in recorder.gauges.items()}
        recorder.gauges.clear()
        assert told["running"] == [1.0], done
        for name in ("progress_time_seconds", "checkpoint_time_seconds"):
            (since,) = told[name]
            assert before < since <= time.time(), (done, name)


def test_the_loop_tells_what_its_history_has(tmp_path: Path, images: ResidentImages, recorder: Recorder) -> None:
    seen = []
    train(images, tmp_path / "out", on_progress=lambda now: bool(seen.append(now)))
    told = {name: values for (name, term), values in recorder.gauges.items() if not term}
    assert told["loss"] == [now.loss for now in seen] and len(seen) == 9
    for name in ("learning_rate", "effective_rank", "embedding_std", "data_wait_share"):
        assert told[name] == [now.measures[name] for now in seen]
    assert told["epochs"] == [3.0] * 9 and told["epochs_done"] == pytest.approx([step / 3 for step in range(1, 10)])
    assert told["step_seconds"] == pytest.approx([12 / now.images_per_second for now in seen])
    assert told["running"] == [1.0] * 10 + [0.0]
    assert len(told["checkpoint_time_seconds"]) == 1 + len(told["checkpoint_upload_seconds"]) == 4
    terms = {term for name, term in recorder.gauges if name == "loss_term"}
    assert terms == set(seen[0].measures) & {"invariance", "redundancy", "on_diagonal", "off_diagonal"} and terms
    unchanged = {"loss", "progress_time_seconds", "expected_end_time_seconds", "images_per_second", "non_finite_steps"}
    assert unchanged - {"non_finite_steps"} <= set(told) and "non_finite_steps" not in recorder.counters


def test_requests_retries_and_errors_are_counted(recorder: Recorder) -> None:
    failures = [ConnectionError(), ConnectionError()]

    def attempt() -> str:
        if failures:
            raise failures.pop()
        return "answer"

    assert patiently(attempt, is_transient=lambda error: True, what="read x") == "answer"
    assert recorder.counters == {"store_requests": 3.0, "store_retries": 2.0}

    def away() -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        patiently(away, is_transient=lambda error: True, what="read x", deadline=0.0)
    assert recorder.counters["store_errors"] == 1.0


@pytest.mark.s3
def test_bytes_and_refusals_of_a_real_server(s3_store: Store, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_store.write("a", b"x" * 1000)
    assert s3_store.create("b", b"y" * 10)
    assert s3_store.read("a") == b"x" * 1000
    with pytest.raises(MissingKey):
        s3_store.read("none")
    assert recorder.counters["store_written_bytes"] == 1010 and recorder.counters["store_read_bytes"] == 1000
    assert "store_errors" not in recorder.counters
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError):
        s3_store.read("a")
    assert recorder.counters["store_errors"] == 1


@pytest.mark.s3
def test_bytes_and_refusals_on_every_way_to_the_server(
    s3_store: Store, tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts, and through the filesystem that Ray Data, Train and Tune use: most of the traffic."""
    size = PART_BYTES + 1000
    (tmp_path / "large").write_bytes(bytes(size))
    s3_store.upload(tmp_path / "large", "large")
    assert recorder.counters["store_written_bytes"] == size
    s3_store.download("large", tmp_path / "again")
    assert recorder.counters["store_read_bytes"] == size
    filesystem, root = retrying_filesystem(s3_store.uri)
    with filesystem.open_input_file(f"{root}/large") as file:
        file.read_at(500, 100)
    assert recorder.counters["store_read_bytes"] == size + 500
    with filesystem.open_output_stream(f"{root}/small") as out:
        out.write(b"x" * 70)
    assert recorder.counters["store_written_bytes"] == size + 70
    with pytest.raises(FileNotFoundError):
        filesystem.open_input_file(f"{root}/none")
    assert "store_errors" not in recorder.counters
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(OSError, match="AWS Error"):
        filesystem.open_input_file(f"{root}/large")
    assert recorder.counters["store_errors"] == 1
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv(DEADLINE_VARIABLE, "0")
    with pytest.raises(OSError, match="AWS Error"):
        filesystem.open_input_file(f"{root}/large")
    assert recorder.counters["store_errors"] == 2, "what was given up is counted once"
