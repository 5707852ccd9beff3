"""A tiny study on synthetic lesions, small enough to be run again and again, and the command line as a user calls it.

The command runs in this process and in the session's Ray where there is one, whose workers it finds warm: a process and a
Ray of its own take a minute on a slow machine, and are for the tests that kill it or change its environment (`process`).
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import yaml

from medssl.cli import main

IMAGES = 150
PYTHON_PATH = str(Path(__file__).resolve().parents[2] / "platform")


def recipe(**changes: Any) -> dict[str, Any]:
    """Barlow Twins, random and colour, two pretraining seeds, two draws, both protocols."""
    views = {"grey": 0.0, "blur": [0.0, 0.0], "solarise": [0.0, 0.0], "jitter": 0.5}
    return {
        "study": "tiny",
        "dataset": "datasets/lesions",
        "images": {"decode_px": 32},
        "encoder": {"name": "test_resnet", "image_px": 32},  # timm's smallest: checkpoints are written in no time
        "arms": [
            {
                "name": "barlow_twins",
                "objective": {"name": "barlow_twins", "projector": [32, 32]},
                "epochs": 2,
                "batch_size": 24,
                "optimiser": {"learning_rate": 1e-3},
                "views": views,
            },
            {"name": "random"},
            {"name": "colour", "features": "colour"},
        ],
        "repeats": {"pretraining_seeds": 2, "label_draws": 2, "labels": 40},
        "protocols": [
            {
                "name": "linear_probe",
                "kind": "linear_probe",
                "head_seeds": 3,
                "probe": {"vary": ["head", "order"], "epochs": 5},
                "search": {"learning_rate": [0.001, 0.01], "weight_decay": [0.01], "head_seeds": 2},
            },
            {
                "name": "fine_tune",
                "kind": "fine_tune",
                "head_seeds": 2,
                "pretraining_seeds": 1,
                "label_draws": 1,
                "training": {"epochs": 1},
                "search": {"learning_rate": [0.001], "weight_decay": [0.0]},
            },
        ],
        "comparisons": [{"better": "barlow_twins", "than": "random", "protocol": "linear_probe"}],
        "bootstrap": {"replicates": 200},
        "compute": {"workers": 1, "checkpoint_every_steps": 2, "concurrent_trials": 1},
    } | changes


def pretraining_only(**changes: Any) -> dict[str, Any]:
    """One Barlow Twins encoder of two workers and the cheapest evaluation: for tests that disturb the pretraining."""
    whole = recipe()
    probe = whole["protocols"][0] | {"head_seeds": 1, "search": {"learning_rate": [0.01], "weight_decay": [0.01]}}
    return (
        whole
        | {
            "arms": whole["arms"][:1],
            "repeats": {"pretraining_seeds": 1, "label_draws": 1, "labels": 40},
            "protocols": [probe],
            "comparisons": [],
            "compute": whole["compute"] | {"workers": 2},
        }
        | changes
    )


def write(path: Path, fields: Mapping[str, Any]) -> Path:
    """The recipe as a YAML file."""
    path.write_text(yaml.safe_dump(dict(fields)))
    return path


def command(*arguments: str) -> list[str]:
    """The command line of `medssl ...` with this interpreter."""
    return [sys.executable, "-m", "medssl.cli", *arguments]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a user's shell with the package importable."""
    path = os.pathsep.join(filter(None, [PYTHON_PATH, os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | changes


def medssl(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs `medssl ...` in this process to its end; with `check`, a failure shows what it printed."""
    assert arguments[0] not in ("run", "ingest", "quickstart") or ray.is_initialized(), "the test asks for no ray_session"
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            code = main(arguments)
        except SystemExit as usage:
            code = int(usage.code or 0)
    return _checked(subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue()), check)


def process(*arguments: str, check: bool = True, timeout: float = 900, **changes: str) -> subprocess.CompletedProcess[str]:
    """Runs `medssl ...` as a process with a Ray of its own, some variables of its environment changed."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=timeout, env=environment(**changes), check=False
    )
    return _checked(done, check)


def _checked(done: subprocess.CompletedProcess[str], check: bool) -> subprocess.CompletedProcess[str]:
    if check and done.returncode:
        raise AssertionError(f"medssl {' '.join(done.args)} left with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def ingest(folder: Path, to: str, images: int = IMAGES, options: Sequence[str] = ()) -> Path:
    """Draws lesions below `folder` and ingests them; returns the table."""
    from medssl.datasets.synthetic import write_synthetic

    table = write_synthetic(folder, images=images, seed=0)
    ingest_table(table, to, options)
    return table


def ingest_table(table: Path, to: str, options: Sequence[str] = ()) -> None:
    """`medssl ingest` of a table as `write_synthetic` makes it."""
    medssl("ingest", str(table), "--to", to, "--patient-column", "patient_id", "--bag-column", "bag_id", *options)
