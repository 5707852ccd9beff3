"""bench: images per second of ingest, decoding, feed, views and training step on this machine, on synthetic images.

Nothing is estimated: each row is timed doing what a study does. Rows are independent of each other but for the files.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medssl.datasets.synthetic import write_synthetic
from medssl.errors import MedsslError

BATCH = 128
DECODE_PX = 96
_PLAN = {
    "encoder": {"name": "resnet18", "image_px": 64},
    "objective": {"name": "barlow_twins", "projector": (1024, 1024, 1024)},
    "optimiser": {},
    "schedule": {},
    "views": {},
    "epochs": 1,
    "seed": 0,
}


def bench(images: int = 512) -> list[dict[str, Any]]:
    """Rows {"what", "images_per_second", "seconds", "detail"}; MedsslError for fewer images than a batch norm can use."""
    if images < 16:
        raise MedsslError(f"bench wants 16 images or more, got {images}: use --images 512")
    rows: list[dict[str, Any]] = []

    def timed(what: str, detail: str, count: int, body: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = body()
        rows.append(_row(what, count, time.perf_counter() - started, detail))
        return result

    with tempfile.TemporaryDirectory(prefix="medssl-bench-") as temporary:
        folder = Path(temporary)
        table = timed("draw", "synthetic JPEG files (not part of a study)", images, lambda: write_synthetic(folder, images))
        resident = _ingest_and_decode(folder, table, images, timed)
        rows += _training_rows(resident, images)
    return rows


def _ingest_and_decode(folder: Path, table: Path, images: int, timed: Callable[..., Any]) -> Any:
    from medssl.datasets.dataset import open_dataset
    from medssl.datasets.read import Decoding
    from medssl.rows import resident_images
    from medssl.stages.cluster import connected
    from medssl.stages.ingest import ingest

    target = f"file://{folder}/store/dataset"
    with connected(cpus=1):
        timed("ingest", "table to Parquet shards in a local folder", images, lambda: ingest(table, target))
        dataset = open_dataset(target)
        return timed(
            "decode", f"shards to the resident file at {DECODE_PX} px", images,
            lambda: resident_images(dataset, Decoding(DECODE_PX, "squash"), cache_dir=folder / "cache"),
        )  # fmt: skip


def _training_rows(resident: Any, images: int) -> list[dict[str, Any]]:
    import torch

    from medssl.collectives import Process
    from medssl.training.bench import measure_feed, measure_step
    from medssl.training.feed import ResidentFeed
    from medssl.training.plan import PretrainPlan

    process, batch = Process.single(), min(BATCH, images)
    feed = ResidentFeed(resident, range(images), batch, 0, process)
    began = time.perf_counter()
    feed_rate = measure_feed(feed)
    rows = [_row("feed", round(feed_rate * (time.perf_counter() - began)), time.perf_counter() - began, f"batches of {batch}")]
    where = f"{process.device.type}, {torch.get_num_threads()} threads" if process.device.type == "cpu" else "GPU"
    for precision in ("float32", "bfloat16"):
        plan = PretrainPlan.model_validate({**_PLAN, "batch_size": batch, "precision": precision})
        speed = measure_step(plan, feed, process)
        if precision == "float32":
            count = speed.steps * batch
            rows.append(_row("views", count, count / speed.views_per_second, f"both views at 64 px, {where}"))
        detail = f"ResNet-18 at 64 px, batch {batch}, {precision}, {where}"
        rows.append(_row("step", speed.steps * batch, speed.seconds, detail))
    return rows


def _row(what: str, images: int, seconds: float, detail: str) -> dict[str, Any]:
    return {"what": what, "images_per_second": images / seconds, "seconds": seconds, "detail": detail}


def render_text(rows: list[dict[str, Any]]) -> str:
    """The rows as a small table."""
    lines = [f"{'':8}{'images/s':>10}  {'seconds':>8}"]
    lines += [f"{r['what']:8}{r['images_per_second']:>10,.0f}  {r['seconds']:>8.2f}  {r['detail']}" for r in rows]
    return "\n".join(lines)
