"""The long runs on real images through a real S3 server: `pytest -m acceptance`. Two hours on two free cores."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import tiny

from medssl.artifacts import finished, read_markers
from medssl.store import Store, open_store

pytestmark = [pytest.mark.acceptance, pytest.mark.s3]

RECIPE = str(Path(__file__).resolve().parents[2] / "jobs" / "ham10000-laptop.yaml")
COPIES = 10


@pytest.fixture(scope="module")
def images(shared_data: Path) -> Path:
    return shared_data / "skin_ham10000"


@pytest.fixture(scope="module")
def store(s3_server: Any, images: Path) -> Store:
    """A store with the ingested images; a lesion is a bag."""
    made = open_store(f"s3://ham-{uuid.uuid4().hex[:8]}/lab", create=True)
    tiny.process("ingest", str(images / "manifest.csv"), "--to", made.uri_of("datasets/ham10000"), "--bag-column", "patient_id",
                "--licence", "CC BY-NC 4.0")  # fmt: skip
    return made


def rates(store: Store) -> list[dict[str, Any]]:
    """Images/s and share of time waiting for data of every finished pretraining."""
    trained = read_markers(store, [name for name in finished(store) if name.startswith("pretrain-")]).values()
    keys = ("steps", "images_per_second", "data_wait_share", "resumed_at_step")
    return [{key: marker.facts[key] for key in keys if key in marker.facts} for marker in trained]


def own(memory: Any) -> int:
    """Bytes of a process without what it shares: libraries, and the pages of the object store that it has looked at."""
    return int(memory.rss - memory.shared)


def stages(names: set[str]) -> Counter[str]:
    return Counter(name.rpartition("-")[0] for name in names)


def test_the_laptop_study(store: Store, images: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    done = tiny.process("run", RECIPE, "--store", store.uri, "--json", timeout=3600)
    minutes = (time.monotonic() - started) / 60
    result = json.loads(done.stdout)
    arms = {a["arm"]: a for a in result["arms"] if (a["protocol"], a["metric"]) == ("linear_probe", "balanced_accuracy")}
    claim = next(
        c for c in result["comparisons"]
        if c["test"] == "nested bootstrap" and (c["than"], c["protocol"]) == ("random", "linear_probe")
    )  # fmt: skip
    print(f"{minutes:.1f} minutes; {claim}; {[(n, a['mean'], a['std'], a['n']) for n, a in arms.items()]}; {rates(store)}")
    assert {name: arm["n"] for name, arm in arms.items()} == {"barlow_twins": 315, "random": 315, "colour": 105}
    assert claim["low"] > 0.03
    assert arms["barlow_twins"]["mean"] > arms["colour"]["mean"]
    assert minutes < 45

    before = finished(store)
    started = time.monotonic()
    again = tiny.process("run", RECIPE, "--store", store.uri)
    assert "nothing to do" in again.stderr and time.monotonic() - started < 30 and finished(store) == before

    tiny.process("run", RECIPE, "--store", store.uri, "--set", "protocols.linear_probe.head_seeds=40", timeout=3600)
    assert stages(finished(store) - before) == {"evaluate": 5 * (9 + 9 + 3), "report": 1}

    table = pd.read_csv(images / "manifest.csv")
    row = table.index[(table["split"] == "test") & (table["label"] == "nv")][0]
    table.loc[row, "label"] = "mel"
    table.to_csv(tmp_path / "mended.csv", index=False)
    tiny.process("ingest", str(tmp_path / "mended.csv"), "--root", str(images), "--to", store.uri_of("datasets/ham10000"),
                "--bag-column", "patient_id", "--licence", "CC BY-NC 4.0")  # fmt: skip
    lines = json.loads(tiny.process("plan", RECIPE, "--store", store.uri, "--json").stdout)
    assert {line["state"] for line in lines if line["stage"] not in ("evaluate", "report")} == {"finished"}
    assert not [line for line in lines if line["stage"] == "evaluate" and line["state"] == "finished"]


@pytest.fixture
def small_cluster(store: Store) -> Iterator[str]:
    """A Ray whose object store holds 300 MB."""
    ray = str(Path(sys.executable).with_name("ray"))
    head = subprocess.Popen(
        [ray, "start", "--head", "--port=0", "--num-cpus=5", "--object-store-memory=300000000", "--include-dashboard=false",
         f"--temp-dir=/tmp/medssl-ray-{os.getpid()}", "--block"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=tiny.environment(),
    )  # fmt: skip
    assert head.stdout is not None
    address = next(m.group(1) for line in head.stdout if (m := re.search(r"--address='([\d.]+:\d+)'", line)))
    yield address
    members = psutil.Process(head.pid).children(recursive=True)
    for process in [psutil.Process(head.pid), *members]:
        process.kill()


def test_streaming_ten_copies_through_a_small_object_store(
    store: Store, images: Path, small_cluster: str, tmp_path: Path
) -> None:
    table = pd.read_csv(images / "manifest.csv")
    stem = table["image"].map(lambda path: Path(path).stem)
    copies = [table.assign(image_id=stem + f"-{n}") for n in range(COPIES)]
    pd.concat(copies).to_csv(tmp_path / "copies.csv", index=False)
    tiny.process("ingest", str(tmp_path / "copies.csv"), "--root", str(images), "--to", store.uri_of("datasets/copies"),
                "--image-id-column", "image_id", "--bag-column", "patient_id", timeout=1800)  # fmt: skip

    resident: list[tuple[float, int]] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(5):
            everyone = [p.info for p in psutil.process_iter(["cmdline", "memory_info"])]
            trained = [own(info["memory_info"]) for info in everyone if "RayTrainWorker" in " ".join(info["cmdline"] or [])]
            if trained:
                resident.append((time.monotonic(), max(trained)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    cheap = [
        "study=streaming", "dataset=datasets/copies", "images.feeding=streaming", "arms.barlow_twins.epochs=2",
        "repeats.pretraining_seeds=1", "repeats.label_draws=1", "protocols.fine_tune.pretraining_seeds=1",
        "protocols.fine_tune.head_seeds=2", "protocols.fine_tune.training.epochs=1",
    ]  # fmt: skip
    overrides = [part for field in cheap for part in ("--set", field)]
    try:
        tiny.process("run", RECIPE, "--store", store.uri, "--address", small_cluster, *overrides, timeout=3600)
    finally:
        stop.set()
        watcher.join()
    # flat: each half of the run has an epoch and its checkpoint, and the second takes no more, give or take the allocator's slack
    print(rates(store))
    middle = resident[len(resident) // 2][0]
    early, late = (max(size for at, size in resident if (at <= middle) is first) for first in (True, False))
    print(f"largest worker: {early / 2**20:.0f} MiB in the first half, {late / 2**20:.0f} MiB in the second")
    assert late < early * 1.1


def test_a_written_recipe_runs_unchanged(s3_server: Any, shared_data: Path, tmp_path: Path) -> None:
    """Chest X-rays as a user has them: given splits, patients with several images, some images without a label."""
    store = open_store(f"s3://cxr-{uuid.uuid4().hex[:8]}/lab", create=True)
    uri, recipe = store.uri_of("datasets/cxr"), str(tmp_path / "study.yaml")
    images = shared_data / "cxr_covid"
    tiny.process("ingest", str(images / "manifest.csv"), "--to", uri, "--patient-column", "patient_id",
                "--licence", "CC BY-NC-SA 4.0")  # fmt: skip
    tiny.process("init", uri, "--out", recipe)
    done = tiny.process("run", recipe, "--store", store.uri, "--json", timeout=3600)
    result = json.loads(done.stdout)
    scores = {(arm["arm"], arm["protocol"]): arm for arm in result["arms"] if arm["metric"] == "auc"}
    print([(name, arm["mean"], arm["std"], arm["n"]) for name, arm in scores.items()], rates(store))
    probes = {"barlow_twins": 3, "random": 3, "colour": 1}
    assert {name: arm["n"] for name, arm in scores.items()} == {
        **{(name, "linear_probe"): 35 * seeds for name, seeds in probes.items()},
        **{(name, "fine_tune"): 3 * 5 for name in ("barlow_twins", "random")},
    }
    assert len(result["comparisons"]) >= 6
    out = tmp_path / "predictions.csv"
    tiny.process("predict", "barlow_twins", str(images / "images"), "--out", str(out), "--store", store.uri)
    assert len(pd.read_csv(out)) == 370
    assert "nothing to do" in tiny.process("run", recipe, "--store", store.uri).stderr
