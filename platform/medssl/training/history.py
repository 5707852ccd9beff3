"""Per-step measurements of a training, kept in the store so that each (rank, step) is there exactly once.

Each rank gathers rows on the device and writes them as one Parquet part before a checkpoint is marked:
`metrics/<first>-<last>-rank-<r>.parquet` for steps first..last. A resumed run deletes the parts beyond its checkpoint and
trains those steps again, so kills lose and double nothing. Steps count from 1: row s is the step that checkpoint s is after.
"""

from __future__ import annotations

import io
import re
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from medssl.store import Store

MEASURES = (
    "gradient_norm",
    "learning_rate",
    "embedding_std",
    "effective_rank",
    "alignment",
    "uniformity",
    "images_per_second",
    "data_wait_share",
)
"""Columns after step, epoch, rank, loss and the objective's terms. embedding_std to uniformity are null but at logged
steps; images_per_second (over all ranks) and data_wait_share are means since the last logged step."""

_PART = re.compile(r"(\d+)-(\d+)-rank-(\d+)\.parquet")


class History:
    """The rows of one rank since the last checkpoint, and the parts in the store."""

    def __init__(self, store: Store, rank: int, steps_per_epoch: int) -> None:
        """`store` is rooted at the folder of the parts."""
        self.store, self.rank, self.steps_per_epoch = store, rank, steps_per_epoch
        self.rows: list[dict[str, Any]] = []
        self._pending: list[tuple[int, dict[str, Tensor], float]] = []

    def add(self, step: int, scalars: dict[str, Tensor], learning_rate: float) -> None:
        """Notes a step's scalars; they stay on the device until :meth:`settle`."""
        self._pending.append((step, scalars, learning_rate))

    @property
    def unsettled(self) -> bool:
        """Whether steps were noted since the last :meth:`settle`."""
        return bool(self._pending)

    def settle(self, collapse: dict[str, Tensor] | None, rates: Callable[[], dict[str, float]]) -> dict[str, Any]:
        """Fetches the noted steps from the device in one transfer and returns the latest row.

        `collapse` (embedding_std and so on) belongs to the last step; `rates` is called once the device has caught
        up, and its values hold for all the steps.
        """
        names = list(self._pending[0][1])
        table = torch.stack([torch.stack([scalars[n].double() for n in names]) for _, scalars, _ in self._pending]).tolist()
        measured = torch.stack([value.double() for value in collapse.values()]).tolist() if collapse else []
        shared = rates()
        for (step, _, rate), values in zip(self._pending, table, strict=True):
            epoch = (step - 1) // self.steps_per_epoch
            row = {"step": step, "epoch": epoch, "rank": self.rank, **dict(zip(names, values, strict=True))}
            self.rows.append({**row, "learning_rate": rate, **shared})
        self.rows[-1].update(zip(collapse or (), measured, strict=True))
        self._pending = []
        return self.rows[-1]

    def commit(self, last_step: int | None = None) -> None:
        """Writes the settled rows, up to `last_step` where given, as one part."""
        rows = [row for row in self.rows if last_step is None or row["step"] <= last_step]
        self.rows = []
        if rows:
            name = f"{rows[0]['step']:09d}-{rows[-1]['step']:09d}-rank-{self.rank:05d}.parquet"
            self.store.write(name, _to_parquet(_table(rows)))

    def forget_after(self, step: int) -> None:
        """Deletes all ranks' parts with steps beyond `step`. One rank calls this, before any writes."""
        for entry in self.store.list():
            match = _PART.fullmatch(entry.key)
            if match and int(match[2]) > step:
                self.store.delete(entry.key)


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    integers = {"step", "epoch", "rank"}
    ordered = [n for n in names if n not in MEASURES] + list(MEASURES)
    fields = [pa.field(name, pa.int64() if name in integers else pa.float64()) for name in ordered]
    columns = [pa.array([row.get(field.name) for row in rows], field.type) for field in fields]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def _to_parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def read_history(store: Store) -> pa.Table:
    """All parts in the folder as one table, sorted by step and rank; parts that another writer is replacing excluded."""
    parts = [pq.read_table(io.BytesIO(store.read(e.key))) for e in store.list() if _PART.fullmatch(e.key)]
    if not parts:
        return _table([])
    return pa.concat_tables(parts, promote_options="default").sort_by([("step", "ascending"), ("rank", "ascending")])


def to_parquet(history: pa.Table) -> bytes:
    """The table as a Parquet file."""
    return _to_parquet(history)


def to_tensorboard(history: pa.Table) -> bytes:
    """Rank 0's rows as a TensorBoard event file: one scalar per column (`train/<column>`) and step."""
    from torch.utils.tensorboard import SummaryWriter

    rows = [row for row in history.to_pylist() if row["rank"] == 0]
    with tempfile.TemporaryDirectory() as folder:
        writer = SummaryWriter(folder, max_queue=1000)
        for row in rows:
            for name, value in row.items():
                if value is not None and name not in ("step", "epoch", "rank"):
                    # A step stands for a second: files of equal histories are then equal in content.
                    writer.add_scalar(f"train/{name}", value, row["step"], walltime=float(row["step"]))
        writer.close()
        (file,) = Path(folder).iterdir()
        return file.read_bytes()


def summarise(history: pa.Table, batch_size: int) -> dict[str, Any]:
    """Small results of a training from its history: last epoch's mean loss, rates, last collapse measures."""
    rows = [row for row in history.to_pylist() if row["rank"] == 0]
    last = [row for row in rows if row["epoch"] == rows[-1]["epoch"]]
    return {
        "steps": rows[-1]["step"],
        "images": rows[-1]["step"] * batch_size,
        "loss": statistics.fmean(row["loss"] for row in last),
        "images_per_second": statistics.harmonic_mean([row["images_per_second"] for row in rows]),
        "data_wait_share": statistics.fmean(row["data_wait_share"] for row in rows),
        "embedding_std": last[-1]["embedding_std"],
        **{name: last[-1][name] for name in ("effective_rank", "alignment", "uniformity")},
    }
