"""ingest: a table or a folder of images -> a dataset in the store, on Ray Data.

Rows are put in order of image id and cut into shards of equal row count. Each shard is one Ray Data task that reads,
checks, strips, hashes and writes its images; the driver sees measurements only. As shards are cut by order and not by
who is free, the same input gives the same bytes on any cluster. Shards are named by content: those that are in the
store already are left as they are. The card goes last and replaces the old one at once; until then the old dataset is
whole.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import pickle
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medssl import telemetry
from medssl.datasets.card import CARD, Provenance, build_card
from medssl.datasets.dataset import read_card
from medssl.datasets.folder import read_folder
from medssl.datasets.held_out import HeldOut
from medssl.datasets.layouts import findings_of_layout, read_layout
from medssl.datasets.leakage import Leakage
from medssl.datasets.pseudonyms import pseudonym, pseudonymise
from medssl.datasets.rowset import sorted_by_id
from medssl.datasets.shards import SHARDS, Rejected, ShardResult, index_schema, write_shard
from medssl.datasets.table import TableColumns, read_table
from medssl.errors import DataError
from medssl.exporter import export
from medssl.leases import Lease, Owner, lease
from medssl.stages.cluster import connected, import_torch
from medssl.stages.splitting import complete_splits, held_out_facts
from medssl.store import Store, open_for_writing, open_store
from medssl.streams import quiet_ray_data, user_error

SHARD_ROWS = 256
OnProgress = Callable[[int, int], None]
"""Called with images done and images in all."""


class TooManyRejected(DataError):
    """More images than the limit allows could not be used; nothing was published."""

    def __init__(self, message: str, rejected: Sequence[Rejected]) -> None:
        super().__init__(message)
        self.rejected = list(rejected)


@dataclass(frozen=True)
class IngestResult:
    """What an ingest has published."""

    uri: str
    card: dict[str, Any]
    rejected: tuple[Rejected, ...]
    """Images set aside, by image id."""
    leakage: Leakage

    @property
    def images(self) -> int:
        """Images in the dataset."""
        return int(self.card["images"])

    def to_json(self) -> dict[str, Any]:
        """Plain values for machines: the card without its list of shards, and the rejected images."""
        card = {key: value for key, value in self.card.items() if key != "shards"}
        return {
            "uri": self.uri,
            "images": self.images,
            "rejected": [asdict(each) for each in self.rejected],
            "card": card,
        }

    def to_text(self) -> str:
        """For people; the last line says how many images there are and how many were set aside."""
        card = self.card
        splits = ", ".join(f"{split} {count:,}" for split, count in card["splits"].items())
        lines = [f"{card['name']}: {len(card['classes'])} classes; {splits}"]
        if card["unknown_patients"]:
            lines.append(
                f"{card['unknown_patients']:,} images have no patient id: each is taken for a patient of its own"
            )
        if held := card.get("held_out"):
            name, value, without = held["column"], held["value"], held["without"]
            lines.append(f"test is {name}={value}; {without:,} images without {name} are among the others")
        if self.leakage:
            lines.append(f"WARNING, allowed by you: {self.leakage.describe()}")
        if card["duplicates_across_splits"]:
            twice = card["duplicates_across_splits"]
            lines.append(f"WARNING: {twice:,} images are in another split as well: medssl inspect {self.uri}")
        lines += [f"set aside: {each.uri}: {each.reason}" for each in self.rejected[:10]]
        if len(self.rejected) > 10:
            lines.append(f"... the whole list: {posixpath.join(self.uri, card['rejected_list'])}")
        lines.append(f"{self.images:,} images ingested, {len(self.rejected):,} set aside: {self.uri}")
        return "\n".join(lines)


@dataclass(frozen=True)
class IngestOptions:
    """How a source is read and what becomes of it; the defaults suit a table with the usual column names."""

    name: str | None = None
    """Name of the dataset; the last part of its URI when None."""
    layout: str | None = None
    """A public dataset's layout (`datasets.layouts.LAYOUTS`); None takes the source for a table or a folder per class."""
    partial: bool = False
    """Takes a folder that has fewer images than the public dataset."""
    columns: TableColumns = TableColumns()
    """Names of a table's columns by role."""
    root: str | None = None
    """Folder or `s3://` URI that relative image paths start from; the table's own folder when None."""
    label_separator: str | None = None
    """Splits a label into several; None takes it as one."""
    drop: tuple[str, ...] = ()
    """Columns to leave out."""
    findings: tuple[str, ...] = ()
    """Columns (or labels) that are findings: missing splits are stratified by them."""
    licence: str = ""
    """Licence text for the card."""
    seed: int = 0
    """Seed of the splits that the source does not give."""
    shares: Mapping[str, float] | None = None
    """Share of images by split, for those; None shares them as `datasets.splits.missing_shares` does."""
    held_out: HeldOut | None = None
    """Makes the images of one value of a column the test split, and splits the others into train and val."""
    allow_leakage: bool = False
    """Take given splits, or a held-out value, with a patient or bag on two sides, and record it."""
    pseudonym_key: bytes | None = field(default=None, repr=False)
    """Replace identifiers by keyed hashes; from `datasets.pseudonyms.read_key`."""
    reject_limit: float = 0.05
    """Largest share of images that may be unusable."""
    synthetic: bool = False
    """Recorded in the card: drawn by a program."""
    shard_rows: int = SHARD_ROWS
    """Images in a shard."""


def ingest(
    source: str | Path,
    target: str,
    options: IngestOptions | None = None,
    *,
    address: str | None = None,
    on_progress: OnProgress | None = None,
    on_wait: Callable[[Owner], None] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> IngestResult:
    """Packs the images of `source` into a dataset at `target`, replacing the one that is there.

    Args:
        source: a table (.csv, .tsv, .parquet) or a folder with a folder per class; a path or an `s3://` URI.
        target: URI of the dataset.
        options: see `IngestOptions`.
        address: a running Ray cluster; an initialised Ray is used as it is.
        on_progress: called as shards are finished.
        on_wait: called when another ingest into the target has to be waited for.
        tell: called with lines for the user.

    Raises:
        TooManyRejected: more than the limit of the images are unusable.
        DataError: the source cannot be used as it is; the target is untouched.
        StoreError: source or target cannot be reached.
    """
    options = options or IngestOptions()
    if not 0 <= options.reject_limit <= 1:
        raise DataError(f"reject limit is {options.reject_limit:g}: give a share between 0 and 1")
    if options.shard_rows < 1:
        raise DataError(f"shard_rows is {options.shard_rows}: give 1 or more")
    if options.layout is not None and not options.findings:
        options = replace(options, findings=findings_of_layout(options.layout))
    rows, leakage, shares = complete_splits(_read_source(str(source), options), options)
    held_out = held_out_facts(rows, options.held_out)
    replaced: list[str] = []
    if options.pseudonym_key is not None:
        rows, replaced = pseudonymise(rows, options.pseudonym_key)
        rows = sorted_by_id(rows)
        if held_out is not None and held_out["column"] in replaced:
            held_out["value"] = pseudonym(options.pseudonym_key, held_out["value"])
    store = open_for_writing(target)
    provenance = Provenance(
        name=options.name or posixpath.basename(store.uri.rstrip("/")),
        licence=options.licence,
        synthetic=options.synthetic,
        split_seed=options.seed if shares is not None else None,
        split_shares=shares,
        leakage=leakage,
        leakage_allowed=bool(leakage),
        pseudonymised_columns=replaced,
        held_out=held_out,
        layout=None if options.layout is None else {"name": options.layout, "seed": options.seed},
    )
    with lease(store, "ingest", on_wait=on_wait) as held, connected(cpus=1, address=address, tell=tell):
        read_card(store)  # refuses to replace what is no dataset before any work is done
        results = _run_shards(rows, store, options, on_progress)
        telemetry.gauge("images_set_aside", sum(len(result.rejected) for result in results), dataset=provenance.name)
        return _publish(rows, results, store, provenance, held)


def _read_source(source: str, options: IngestOptions) -> pa.Table:
    table_only = options.columns != TableColumns() or options.root or options.drop or options.label_separator
    if options.layout is not None:
        if table_only:
            raise DataError(f"layout {options.layout} knows its columns: leave columns, root, drop and label separator out")
        return read_layout(
            source, options.layout, seed=options.seed, pseudonyms=options.pseudonym_key is not None, partial=options.partial
        )
    if options.partial:
        raise DataError("--partial goes with --layout: without one nothing says how many images there should be")
    table_suffixes = (".csv", ".tsv", ".txt", ".parquet", ".pq")
    if source.lower().endswith(table_suffixes) and not Path(source).is_dir():
        return read_table(
            source, options.columns, root=options.root, label_separator=options.label_separator, drop=options.drop
        )
    if table_only:
        raise DataError(
            f"{source} is taken for a folder per class: columns, root and label separator belong to a table"
        )
    return read_folder(source)


# ------------------------------------------------------------------------------------------------------------- Ray Data


def _run_shards(
    rows: pa.Table, store: Store, options: IngestOptions, on_progress: OnProgress | None
) -> list[ShardResult]:
    """All shards through Ray Data, results in shard order. Stops once the limit of rejected images is certainly
    passed.
    """
    import ray
    import ray.data

    quiet_ray_data()
    pieces = [rows.slice(start, options.shard_rows) for start in range(0, len(rows), options.shard_rows)]
    items = [{"shard": number, "rows": _to_ipc(piece)} for number, piece in enumerate(pieces)]
    results: dict[int, ShardResult] = {}
    done = 0
    refused: TooManyRejected | None = None
    stop = ray.remote(num_cpus=0)(_Stop).remote()
    # one row per shard: Ray Data may bundle or split rows as it likes without changing a shard
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _write_shards,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"store_uri": store.uri, "stop": stop},
        num_cpus=1,
    )
    try:
        for batch in dataset.iter_batches(batch_size=1, batch_format="pyarrow"):
            if refused is not None:
                continue  # a task still at work would write its shard after the cleaning: wait for all to be through
            number = batch["shard"][0].as_py()
            results[number] = pickle.loads(batch["result"][0].as_py())
            done += len(pieces[number])
            if on_progress:
                on_progress(done, len(rows))
            refused = _too_many(results, len(rows), done, options.reject_limit)
            if refused is not None:
                ray.get(stop.set.remote())
    except Exception as error:
        raise user_error(error) from error
    finally:
        ray.kill(stop)
    if refused is not None:
        _remove_unreferenced(store)
        raise refused
    return [results[number] for number in range(len(pieces))]


class _Stop:
    """A Ray actor: tells tasks that have not begun that their shards are not wanted any more."""

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set


def _write_shards(batch: pa.Table, *, store_uri: str, stop: Any) -> Iterator[pa.Table]:
    """The Ray Data task; a generator, since Ray Data loses the cause of an error in a plain function (2.60)."""
    import ray

    if ray.get(stop.is_set.remote()):
        yield pa.table({"shard": batch["shard"], "result": pa.nulls(len(batch), pa.binary())})
        return
    export()
    import_torch().set_num_threads(1)  # a task has one CPU
    store = open_store(store_uri)
    results = [pickle.dumps(write_shard(_from_ipc(rows.as_py()), store)) for rows in batch["rows"]]
    yield pa.table({"shard": batch["shard"], "result": pa.array(results, pa.binary())})


def _too_many(results: dict[int, ShardResult], total: int, done: int, limit: float) -> TooManyRejected | None:
    rejected = [each for number in sorted(results) for each in results[number].rejected]
    if len(rejected) <= limit * total:
        return None
    examples = "; ".join(f"{each.uri}: {each.reason}" for each in rejected[:3])
    seen = f"of {total:,}" if done == total else f"of the first {done:,} (of {total:,})"
    return TooManyRejected(
        f"{len(rejected):,} {seen} images cannot be used, more than the limit of {limit:.1%} of all ({examples}); "
        "nothing was published: mend the images, or raise --reject-limit",
        rejected,
    )


def _to_ipc(table: pa.Table) -> bytes:
    out = io.BytesIO()
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return out.getvalue()


def _from_ipc(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


# ---------------------------------------------------------------------------------------------------- publishing


def _publish(
    rows: pa.Table, results: Sequence[ShardResult], store: Store, provenance: Provenance, held: Lease
) -> IngestResult:
    """Writes index, list of rejected images and, last, the card; then removes what no card names any more."""
    rejected = tuple(each for result in results for each in result.rejected)
    index = _index(rows, results)
    if not len(index):
        raise TooManyRejected("not one image could be used; nothing was published", rejected)
    data = _parquet_bytes(index)
    sha256 = hashlib.sha256(data).hexdigest()
    index_path = f"index-{sha256[:20]}.parquet"
    store.write(index_path, data)
    rejected_list = None
    if rejected:
        named = provenance.layout is not None and provenance.layout["name"] == "dicom"  # its paths often hold names
        listing = _rejected_csv(rejected, with_paths=not (provenance.pseudonymised_columns or named))
        rejected_list = f"rejected-{hashlib.sha256(listing).hexdigest()[:20]}.csv"
        store.write(rejected_list, listing)
    provenance = replace(provenance, rejected=len(rejected), rejected_list=rejected_list)
    entries = [result.entry for result in results if result.entry is not None]
    card = build_card(index, entries, index_path, sha256, provenance)
    held.check()  # not when another ingest has taken over meanwhile
    store.write(CARD, json.dumps(card, indent=1, ensure_ascii=False).encode())
    _remove_unreferenced(store)
    return IngestResult(store.uri, card, rejected, provenance.leakage)


def _index(rows: pa.Table, results: Sequence[ShardResult]) -> pa.Table:
    """The rows that have an image, with its measurements."""
    measured = {each.image_id: each for result in results for each in result.measured}
    kept = rows.filter(pc.is_in(rows["image_id"], pa.array(list(measured), pa.string())))
    facts = [measured[name] for name in kept["image_id"].to_pylist()]
    for name, kind in (("width", pa.int32()), ("height", pa.int32()), ("sha256", pa.string()), ("phash", pa.string())):
        kept = kept.append_column(pa.field(name, kind), pa.array([getattr(each, name) for each in facts], kind))
    return kept.select(index_schema(rows.schema).names)


def _parquet_bytes(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()


def _rejected_csv(rejected: Sequence[Rejected], *, with_paths: bool) -> bytes:
    """Paths can hold what pseudonyms hide, so they stay out of the store then; the caller's result has them."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["image_id", *(["uri"] if with_paths else []), "reason"])
    writer.writerows([[each.image_id, *([each.uri] if with_paths else []), each.reason] for each in rejected])
    return out.getvalue().encode()


def _remove_unreferenced(store: Store) -> None:
    """Deletes shards, indexes and lists that the card does not name: leftovers of an older card or of a broken
    ingest.
    """
    card = read_card(store)
    kept: set[str] = set()
    if card is not None:
        kept = {entry["path"] for entry in card["shards"]}
        kept |= {card["index"]["path"], card["rejected_list"]}
    for prefix in (f"{SHARDS}/", "index-", "rejected-"):
        for entry in store.list(prefix):
            if entry.key not in kept:
                store.delete(entry.key)
