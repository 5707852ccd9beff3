"""The command line without Ray: help, exit codes, and one line for what is wrong."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from medssl import cli
from medssl.datasets.synthetic import write_synthetic
from medssl.recipe_file import load

COMMANDS = ["quickstart", "ingest", "inspect", "run", "plan", "report", "init", "predict", "export", "doctor", "bench"]


def call(*arguments: str) -> int:
    return cli.main(list(arguments))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        call(command, "--help")
    assert left.value.code == 0 and command in capsys.readouterr().out


def minimal(tmp_path: Path, **changes: Any) -> str:
    fields = {
        "study": "s",
        "dataset": "datasets/none",
        "arms": [{"name": "random"}],
        "protocols": [{"name": "p", "kind": "linear_probe"}],
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(fields | changes))
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nowhere.yaml"], ["nowhere.yaml"]),
        (["run", "{recipe}", "--store", "{tmp}", "--set", "repeats.labls=3"], ["did you mean 'labels'?"]),
        (["run", "{recipe}", "--store", "{tmp}"], ["datasets/none", "medssl ingest"]),
        (["plan", "{recipe}", "--store", "{tmp}"], ["datasets/none", "medssl ingest"]),
        (["inspect", "{tmp}/none"], ["no dataset"]),
        (["init", "{tmp}/none", "--out", "{tmp}/new.yaml"], ["no dataset"]),
        (["ingest", "{tmp}/none.csv", "--to", "{tmp}/d"], ["none.csv"]),
        (["ingest", "{recipe}", "--to", "{tmp}/d", "--key-file", "k"], ["--pseudonymise"]),
        (["predict", "arm", "x.jpg", "--out", "{tmp}/p.csv", "--store", "{tmp}"], ["no arm 'arm'"]),
        (["predict", "arm", "x.jpg", "--out", "{tmp}/p.txt", "--store", "{tmp}"], [".csv or .parquet"]),
        (["export", "arm", "--format", "timm", "--out", "{tmp}/e.safetensors", "--store", "{tmp}"], ["no arm 'arm'"]),
        (["export", "arm", "--format", "onnx", "--out", "{tmp}/e.pth", "--store", "{tmp}"], ["end it in .onnx"]),
        (["bench", "--images", "3"], ["16 images or more"]),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = minimal(tmp_path)
    code = call(*(a.format(recipe=recipe, tmp=tmp_path) for a in arguments))
    printed = capsys.readouterr()
    assert code == 2 and printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1 and printed.err.startswith("medssl: ")
    for word in words:
        assert word in printed.err


@pytest.fixture
def dataset(tmp_path: Path, ray_session: Any) -> str:
    from medssl.stages.ingest import ingest

    return ingest(write_synthetic(tmp_path / "drawn", images=120, seed=1), str(tmp_path / "store" / "datasets" / "mine")).uri


@pytest.mark.ray
def test_init_writes_a_recipe_that_plans(dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "study.yaml"
    assert call("init", dataset, "--out", str(path)) == 0
    assert load(path).dataset == dataset and path.read_text().startswith("#")
    assert call("init", dataset, "--out", str(path)) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert call("plan", str(path), "--store", str(tmp_path / "store")) == 0
    assert "pretrain barlow_twins seed 2" in capsys.readouterr().out
    assert call("inspect", dataset, "--json") == 0
    assert json.load(io.StringIO(capsys.readouterr().out))


@pytest.mark.ray
@pytest.mark.parametrize("missing", ["class", "split"])
def test_a_missing_class_or_split_is_one_line(
    missing: str, tmp_path: Path, ray_session: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import pandas as pd

    from medssl.stages.ingest import ingest

    table = write_synthetic(tmp_path / "drawn", images=120, seed=1)
    rows = pd.read_csv(table)
    patients = sorted(rows["patient_id"].dropna().unique())
    split_of = {patient: ("train", "val", "test")[n % 3] for n, patient in enumerate(patients)}
    rows["split"] = rows["patient_id"].map(split_of).fillna("train")
    gone = rows["split"] == "val" if missing == "split" else (rows["split"] == "val") & (rows["label"] == rows["label"].iloc[0])
    rows[~gone].to_csv(table, index=False)
    uri = ingest(table, str(tmp_path / "store" / "datasets" / "mine")).uri
    assert call("plan", minimal(tmp_path, dataset=uri), "--store", str(tmp_path / "store")) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and "'val'" in error
    assert missing != "class" or f"'{rows['label'].iloc[0]}'" in error
