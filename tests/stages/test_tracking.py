"""MLflow and Weights & Biases, told of runs: MLflow over a database, Weights & Biases into its offline files."""

from __future__ import annotations

import logging
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from medssl.cli import main
from medssl.compute import Compute, TrackingParams
from medssl.errors import MedsslError, RecipeError
from medssl.stages import tracking
from medssl.stages.tracking import check, key_of, tell_scores, tracked

mlflow = pytest.importorskip("mlflow")


def database(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def runs_of(uri: str, study: str) -> list[Any]:
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(f"medssl/{study}")
    return list(client.search_runs([experiment.experiment_id]))


def values_of(uri: str, run: Any, metric: str) -> list[tuple[int, float]]:
    history = mlflow.MlflowClient(tracking_uri=uri).get_metric_history(run.info.run_id, metric)
    return sorted((point.step, point.value) for point in history)


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a `.wandb` file: 7 bytes, then a LevelDB log (blocks of 32 KiB, chunks with a header of 7 bytes)."""
    content, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        if place + 7 + length > len(content):
            return  # still being written
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def work(uri: str, **changes: Any) -> Any:
    fields = {"study": "s", "kind": "pretrain", "name": "pretrain a", "key": key_of("a"), "config": {"optimiser": {"rate": 0.1}}}
    return tracked(TrackingParams(mlflow=uri), **fields | changes)


def test_what_is_resumed_goes_on_in_its_run(tmp_path: Path) -> None:
    uri = database(tmp_path)
    check(TrackingParams(mlflow=uri), "s")
    with pytest.raises(KeyError), work(uri) as say:
        say({"loss": 3.0, "nothing": None, "text": "x", "infinite": float("inf")}, 10)
        raise KeyError
    [run] = runs_of(uri, "s")
    assert run.info.status == "FAILED" and run.info.run_name == "pretrain a"
    assert run.data.params == {"optimiser/rate": "0.1"} and set(run.data.metrics) == {"loss"}
    with work(uri) as say:
        say({"loss": 2.0}, 20)
    with work(uri, key=key_of("b"), name="pretrain b") as say:
        say({"loss": 9.0}, 10)
    runs = {run.info.run_name: run for run in runs_of(uri, "s")}
    assert set(runs) == {"pretrain a", "pretrain b"} and {run.info.status for run in runs.values()} == {"FINISHED"}
    assert values_of(uri, runs["pretrain a"], "loss") == [(10, 3.0), (20, 2.0)]
    assert values_of(uri, runs["pretrain b"], "loss") == [(10, 9.0)]


def test_a_tracker_that_fails_is_a_warning_and_the_work_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    uri = database(tmp_path / "file")
    said = []
    with caplog.at_level(logging.WARNING), work(uri) as say:
        say({"loss": 1.0}, 1)
        said.append("here")
    assert said == ["here"]
    [warning] = [record for record in caplog.records if record.name == "medssl.stages.tracking"]
    assert "MLflow is told nothing more of this run" in warning.getMessage() and "\n" not in warning.getMessage()


def test_a_server_that_hangs_holds_up_nothing_but_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes connections and never answers."""
    monkeypatch.setattr(tracking, "END_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as deaf, caplog.at_level(logging.WARNING):
        began = time.monotonic()
        with work(f"http://127.0.0.1:{deaf.getsockname()[1]}") as say:
            for step in range(20_000):  # more than are kept for it
                say({"loss": 1.0}, step)
            within = time.monotonic() - began
        whole = time.monotonic() - began
    assert within < 5 and 1 <= whole < 10
    assert [r.getMessage() for r in caplog.records if r.name == "medssl.stages.tracking"] == [
        "MLflow does not answer: the rest of this run is not told to it"
    ]


def test_work_that_says_it_failed(tmp_path: Path) -> None:
    uri = database(tmp_path)
    check(TrackingParams(mlflow=uri), "s")
    with work(uri) as say:
        say({"loss": 1.0}, 1)
        say.failed = True
    assert [run.info.status for run in runs_of(uri, "s")] == ["FAILED"]


def test_a_run_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    uri = database(tmp_path)
    check(TrackingParams(mlflow=uri), "s")
    mlflow.set_tracking_uri(uri)
    with mlflow.start_run(run_name="mine") as mine:
        with work(uri) as say:
            say({"loss": 1.0}, 1)
        assert mlflow.active_run().info.run_id == mine.info.run_id
        mlflow.log_metric("mine", 2.0)
    own = mlflow.MlflowClient(tracking_uri=uri).get_run(mine.info.run_id)
    assert own.data.metrics == {"mine": 2.0}
    [run] = runs_of(uri, "s")
    assert run.data.metrics == {"loss": 1.0}


def test_scores_of_each_arm_are_a_run(tmp_path: Path) -> None:
    uri = database(tmp_path)
    rows = [
        {"arm": arm, "protocol": "probe @ away", "metric": "auc", "mean": mean, "std": 0.01, "n": 35}
        for arm, mean in (("a", 0.75), ("b", 0.5))
    ]
    for _ in range(2):
        tell_scores(TrackingParams(mlflow=uri), "s", pd.DataFrame(rows))
    found = {run.info.run_name: run.data.metrics for run in runs_of(uri, "s")}
    assert found == {
        f"scores of {arm}": {"probe_away/auc": mean, "probe_away/auc/std": 0.01, "probe_away/auc/n": 35}
        for arm, mean in (("a", 0.75), ("b", 0.5))
    }


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back from the file that `wandb sync` would send."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    asked = TrackingParams(wandb="group/project")
    check(asked, "s")
    with tracked(asked, study="s", kind="search", name="trial", key=key_of("t"), config={"learning_rate": 0.1}) as say:
        say({"score": 0.25}, 1)
        say({"score": 0.5, "none": None}, 2)
    [path] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    end = time.monotonic() + 600
    while not (records := [wandb_internal_pb2.Record.FromString(data) for data in wandb_records(path)]) or not any(
        record.WhichOneof("record_type") == "exit" for record in records
    ):  # its own process writes on for a moment after the run has ended
        assert time.monotonic() < end, f"{len(records)} records and no end"
        time.sleep(0.1)
    rows, began = [], None
    for record in records:
        if record.WhichOneof("record_type") == "history":
            rows.append({item.key or "/".join(item.nested_key): item.value_json for item in record.history.item})
        elif record.WhichOneof("record_type") == "run":
            began = record.run
    assert [(row["step"], row["score"]) for row in rows] == [("1", "0.25"), ("2", "0.5")]
    assert all("none" not in row for row in rows)
    assert began is not None and (began.entity, began.project, began.run_group) == ("group", "project", "s")
    assert began.run_id == key_of("t") and began.display_name == "trial" and began.job_type == "search"


def test_what_cannot_be_told_is_one_line_before_work_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MedsslError, match=r"the MLflow server http://127\.0\.0\.1:9 .*cannot be used.*tracking\.mlflow=null"):
        check(TrackingParams(mlflow="http://127.0.0.1:9"), "s")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(RecipeError, match="WANDB_API_KEY"):
        check(TrackingParams(wandb="p"), "s")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlflow": "http://me:secret@host:5000"}, "MLFLOW_TRACKING_USERNAME"),
        ({"mlflow": "host:5000"}, "scheme"),
        ({"mlflow": "ftp://host"}, "scheme"),
        ({"wandb": "a/b/c"}, "pattern"),
        ({"wandb": ""}, "pattern"),
    ],
)
def test_bad_values(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrackingParams(**fields)


def test_a_password_in_a_recipe_is_refused_and_not_repeated(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = Path(__file__).resolve().parents[2] / "jobs" / "quickstart.yaml"
    tracker = "compute.tracking.mlflow=http://me:canary@host:5000"
    assert main(["plan", str(recipe), "--store", str(tmp_path), "--set", tracker]) != 0
    said = capsys.readouterr()
    assert "MLFLOW_TRACKING_PASSWORD" in said.err and "canary" not in said.err + said.out


def test_nothing_is_tracked_unless_asked(tmp_path: Path) -> None:
    assert Compute().tracking == TrackingParams(mlflow=None, wandb=None)
    with tracked(TrackingParams(), study="s", kind="pretrain", name="n", key="k", config={}) as say:
        say({"loss": 1.0}, 1)
    tell_scores(TrackingParams(), "s", pd.DataFrame())
