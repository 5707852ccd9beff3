"""From telemetry to what Prometheus scrapes, on a real local Ray."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from medssl import bag_rows, rows, streams, telemetry
from medssl.datasets.dataset import Dataset, open_dataset
from medssl.datasets.packed import open_packed
from medssl.datasets.read import Decoding
from medssl.datasets.synthetic import write_synthetic
from medssl.exporter import export
from medssl.mixes import Source
from medssl.stages import ingest as ingesting
from medssl.stages.ingest import IngestOptions, ingest
from medssl.store import open_store

pytestmark = pytest.mark.ray
DECODING = Decoding(24, "squash", 3)


@pytest.fixture(scope="module")
def dataset(ray_session: Any, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("exporter")
    write_synthetic(root, images=12, seed=1, px=48)
    ingest(root / "table.csv", str(root / "dataset"), IngestOptions(shard_rows=6))
    return open_dataset(str(root / "dataset"))


Work = Callable[[], Iterable[Any] | None]


def silent_after(works: dict[str, Work]) -> list[str]:
    """Which of these leave this process without an exporter."""
    silent = []
    for name, work in works.items():
        telemetry.send_to(None)
        for _ in work() or ():
            pass
        if telemetry._sink is None:
            silent.append(name)
    return silent


def tasks_of(dataset: Dataset, folder: Path, ray: Any) -> dict[str, Work]:
    """Each task of ours that goes to the store, as Ray calls it."""
    shard, packed_uri = dataset.shards[0], str(folder / "packed")
    piece = pa.table({"shard": [0], "path": [shard.path], "rows": [shard.rows], "first_row": [0]})
    given = {"source": 0, "path": shard.path, "rows": shard.rows, "first_row": 0}
    decoded = {name: np.array([value]) for name, value in given.items()}
    source = Source(dataset.uri, len(dataset), rows=[], splits=None)
    packed = open_packed(open_store(bag_rows.ensure_packed(dataset, open_store(packed_uri, create=True))))
    assert packed is not None
    streamed = pa.table({"rows": [np.arange(2).tobytes()], "places": [pickle.dumps(packed.take([0, 1]))]})
    stop = ray.remote(num_cpus=0)(ingesting._Stop).remote()
    nothing = pa.table({"shard": pa.array([], pa.int64()), "rows": pa.array([], pa.binary())})
    return {
        "ingest": lambda: ingesting._write_shards(nothing, store_uri=str(folder / "target"), stop=stop),
        "stream": lambda: streams._decode_shards(decoded, sources=[source], decoding=DECODING),
        "pack": lambda: bag_rows._pack_shards(piece, dataset_uri=dataset.uri, target_uri=str(folder / "again")),
        "bags": lambda: bag_rows._decode_rows(streamed, decoding=DECODING),
        "resident": lambda: rows._build_on_node(dataset.uri, DECODING, str(folder / "cache")),
    }


def test_every_task_that_goes_to_the_store_exports(dataset: Dataset, tmp_path: Path, ray_session: Any) -> None:
    """What it counts would wait in its process for ever; images are read nowhere else."""
    open_store(str(tmp_path / "target"), create=True)
    works = tasks_of(dataset, tmp_path, ray_session)
    assert ray_session.get(ray_session.remote(silent_after).remote(works), timeout=600) == []


class Counting:
    """An actor that counts, like a pretraining at its last step."""

    def count(self) -> None:
        export()
        with telemetry.labelled(study="ends", arm="a"):
            telemetry.count("non_finite_steps")


DRIVER = """
import sys
from medssl import telemetry
from medssl.stages.cluster import connected
with connected(cpus=1, address=sys.argv[1]):
    telemetry.gauge("images_set_aside", 3, dataset="ends")
"""


def test_what_is_counted_just_before_a_process_ends_is_scraped(ray_session: Any) -> None:
    """Ray hands on the metrics of a worker that it kills, and of a driver that leaves; the node then keeps a counter for good
    and a gauge for two reports of 10 s, which a scrape every 10 s meets."""
    worker = ray_session.remote(num_cpus=0)(Counting).remote()
    ray_session.get(worker.count.remote(), timeout=600)
    ray_session.kill(worker)
    address = ray_session.get_runtime_context().gcs_address
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(place for place in sys.path if place)}
    subprocess.run([sys.executable, "-c", DRIVER, address], env=path, check=True, timeout=600)
    end = time.monotonic() + 600
    shown, counted = list[float](), list[float]()
    while not (shown and counted):
        assert time.monotonic() < end, f"scraped so far: {shown} and {counted}"
        shown = shown or scraped(ray_session, "images_set_aside", 'dataset="ends"')
        counted = counted or scraped(ray_session, "non_finite_steps_total", 'study="ends"')
        time.sleep(0.5)
    assert counted == [1.0] and shown == [3.0]


def scraped(ray: Any, name: str, label: str) -> list[float]:
    """Values of this metric with this label at this node's agent."""
    (node,) = [node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id()]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=60) as answer:
        text = answer.read().decode()
    found = re.findall(rf"^ray_medssl_{name}{{([^}}]*)}} (\S+)$", text, re.MULTILINE)
    return [float(value) for labels, value in found if label in labels]
