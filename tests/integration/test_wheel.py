"""The built wheel, installed elsewhere, has all files and runs `quickstart` from an empty folder."""

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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the package, installed from its wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheels, site = folder / "wheels", folder / "site"
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(ROOT)], check=True, cwd=folder)
    wheel = next(wheels.glob("medssl-*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    return site


def shell(site: Path, empty: Path) -> dict[str, Any]:
    """How a user of the installed package runs a command from an empty folder."""
    empty.mkdir()
    environment = tiny.environment() | {"PYTHONPATH": str(site), "MEDSSL_CACHE": str(empty / "cache")}
    return {"cwd": empty, "env": environment, "capture_output": True, "text": True}


def test_the_wheel_has_every_file_and_runs_a_command(site: Path, tmp_path: Path) -> None:
    def files(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}

    assert files(site / "medssl") == files(ROOT / "platform" / "medssl")
    printed = shell(site, tmp_path / "empty")
    done = subprocess.run(tiny.command("quickstart", "--json", "--set", "arms.barlow_twins.epoch=1"), check=False, **printed)
    assert done.returncode == 2 and "epochs" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    where = subprocess.run([sys.executable, "-c", "import medssl; print(medssl.__file__)"], check=False, **printed)
    assert where.stdout.startswith(str(site))


@pytest.mark.acceptance
def test_quickstart_from_the_wheel(site: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    printed = shell(site, empty)
    smaller = ["arms.barlow_twins.epochs=1", "repeats.pretraining_seeds=1", "protocols.linear_probe.head_seeds=3",
               "protocols.fine_tune.head_seeds=1", "compute.concurrent_trials=1"]  # fmt: skip
    command = tiny.command("quickstart", "--json", *(word for value in smaller for word in ("--set", value)))
    done = subprocess.run(command, timeout=900, check=False, **printed)
    assert done.returncode == 0, done.stderr
    arms = {(a["arm"], a["protocol"]): a["n"] for a in json.loads(done.stdout)["arms"] if a["metric"] == "balanced_accuracy"}
    assert arms["barlow_twins", "linear_probe"] == arms["random", "linear_probe"] == 2 * 3
    assert arms["barlow_twins", "fine_tune"] == arms["random", "fine_tune"] == 1
    assert (empty / "medssl-quickstart" / "studies" / "quickstart" / "report.html").stat().st_size > 10_000
