"""The built wheel, installed elsewhere, runs `quickstart` from an empty folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]


def test_quickstart_from_the_wheel(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheels, site, empty = tmp_path / "wheels", tmp_path / "site", tmp_path / "empty"
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(ROOT)], check=True, cwd=tmp_path)
    wheel = next(wheels.glob("medssl-*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    empty.mkdir()
    environment = tiny.environment() | {"PYTHONPATH": str(site), "MEDSSL_CACHE": str(tmp_path / "cache")}
    printed: dict[str, Any] = {"cwd": empty, "env": environment, "capture_output": True, "text": True}
    smaller = ["arms.barlow_twins.epochs=1", "repeats.pretraining_seeds=1", "protocols.linear_probe.head_seeds=3",
               "protocols.fine_tune.head_seeds=1", "compute.concurrent_trials=1"]  # fmt: skip
    command = tiny.command("quickstart", "--json", *(word for value in smaller for word in ("--set", value)))
    done = subprocess.run(command, timeout=900, check=False, **printed)
    assert done.returncode == 0, done.stderr
    arms = {(a["arm"], a["protocol"]): a["n"] for a in json.loads(done.stdout)["arms"] if a["metric"] == "balanced_accuracy"}
    assert arms["barlow_twins", "linear_probe"] == arms["random", "linear_probe"] == 2 * 3
    assert arms["barlow_twins", "fine_tune"] == arms["random", "fine_tune"] == 1
    assert (empty / "medssl-quickstart" / "studies" / "quickstart" / "report.html").stat().st_size > 10_000
    where = subprocess.run([sys.executable, "-c", "import medssl; print(medssl.__file__)"], check=False, **printed)
    assert where.stdout.startswith(str(site))
