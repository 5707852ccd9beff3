"""The plain way to run a study as a job: the documented command, and the entry point as the process that Ray starts."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from medssl.submit import STOP_SECONDS

ROOT = Path(__file__).resolve().parents[2]
ENTRY = ROOT / "jobs" / "run_study.py"


def documented(path: Path) -> list[str]:
    """The words of the one `ray job submit` in a file."""
    text = re.sub(r"\\\n *", "", path.read_text())
    (command,) = re.findall(r"^[ `]*ray job submit (.*?)`?$", text, re.M)
    return shlex.split(command)


@pytest.mark.parametrize("path", [ROOT / "cluster" / "README.md", ENTRY], ids=lambda path: path.name)
def test_the_documented_command_gives_a_stopped_job_its_time(path: Path) -> None:
    """Ray kills a job three seconds after its stop, unless its runtime environment says otherwise."""
    from ray.dashboard.modules.job.cli import submit

    said = submit.make_context("submit", documented(path)).params
    assert json.loads(said["runtime_env_json"])["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
    assert said["working_dir"] == "jobs" and said["entrypoint"][:2] == ("python", ENTRY.name) and "--store" in said["entrypoint"]


def test_a_rayjob_gives_it_the_same_time() -> None:
    (job,) = yaml.safe_load_all((ROOT / "cluster" / "kuberay" / "rayjob.yaml").read_text())
    given = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    assert given == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.yaml", "--store", "somewhere"], "none.yaml"),
        (["wrong.yaml", "--store", "somewhere"], "wrong.yaml"),
        (["wrong.yaml", "--stroe", "somewhere"], "--stroe"),
        ([], "recipe"),
    ],
)
def test_what_it_cannot_run_is_said_and_left_with_a_code(arguments: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("study: x\nsedes: 3\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run(
        [sys.executable, ENTRY, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert words in lines[-1] and "Traceback" not in done.stderr
    assert len(lines) == 1 or lines[0].startswith("usage: "), done.stderr
