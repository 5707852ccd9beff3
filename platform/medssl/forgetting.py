"""`medssl forget`: a patient's images leave a dataset, and what was made with them is marked.

The dataset is written anew without them, shard by shard, and its card last: until then it is whole as it was. Every artifact of
every study of the store that was made with them (and would have another name without), and every one that no study names any
more, gets a mark, since weights, features and scores cannot be freed of single images; so does what started from the file of a
marked artifact, in whatever study. `predict` and `export` say so, the next run makes everything anew under new names, and
`medssl gc --delete` then removes the old. Copies outside the store are not reached: downloads, exports, decoded images in the
nodes' caches; what is said at the end names them.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medssl.artifacts import FORGOTTEN, STUDIES, finished
from medssl.datasets.card import CARD, Provenance, build_card
from medssl.datasets.dataset import Dataset, dataset_uri, open_dataset
from medssl.datasets.leakage import audit_leakage
from medssl.datasets.packed import packed_name
from medssl.datasets.pseudonyms import pseudonym
from medssl.datasets.shards import SHARDS, ShardEntry, publish_shard
from medssl.errors import DataError, MedsslError
from medssl.leases import Lease, lease
from medssl.leftovers import REMOVAL, made, stored_study
from medssl.store import Store
from medssl.study import Study

PACKED = "packed"


@dataclass(frozen=True)
class Forgotten:
    """What was removed and marked."""

    dataset: str
    images: int
    artifacts: tuple[str, ...]
    """Marked."""
    studies: tuple[str, ...]
    """Whose reports may still show the images, and have to be run again."""
    descended: tuple[str, ...]
    """Those with arms whose `initial_weights`, or predictions from outside, are a file of a marked artifact."""
    rejected_list: str | None
    """Removed list of the images that ingest had set aside, which may have named some of the patient."""
    unreadable: dict[str, str]
    """Studies of which it cannot be told whether they used the dataset, and why."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for machines."""
        return asdict(self)

    def to_text(self) -> str:
        """For people: what was done, and what is left to do."""
        lines = [f"{self.images} images removed from {self.dataset}; {len(self.artifacts)} artifacts marked"]
        if self.rejected_list is not None:
            lines.append(f"the list of images set aside at ingest names no patients and went as a whole: {self.rejected_list}")
        if self.studies:
            lines.append(f"run again, then `medssl gc --delete`: {', '.join(self.studies)}")
        if self.descended:
            lines.append(f"start from marked artifacts, name others (initial_weights, outside): {', '.join(self.descended)}")
        lines += [f"study {name}: it cannot be told whether it used them ({why})" for name, why in self.unreadable.items()]
        return "\n".join([*lines, "not reached: originals, downloads, exports, and decoded images in each node's MEDSSL_CACHE"])


def forget(patient: str, dataset: str, store: Store, key: bytes | None = None) -> Forgotten:
    """Removes the images of a patient from a dataset and marks what studies of `store` made of it.

    Args:
        patient: the id as the dataset has it; with `key` as it was before it was replaced by a keyed hash.
        dataset: URI, or name in the store.

    Raises:
        DataError: there is no such dataset, or no image of the patient in it, or no other image would be left.
        LeaseHeld: a study that uses the dataset is being run, or just beginning, or something is being removed from the store.
    """
    found = open_dataset(dataset_uri(dataset, store))
    name = pseudonym(key, patient) if key is not None else patient
    # A run of a study that no list of studies has yet must not begin with the images while they go: see `under_way`.
    with lease(found.store, "ingest") as held, lease(store, REMOVAL, wait=False, observe=True), ExitStack() as stack:
        found = open_dataset(found.uri)  # as it is now that nobody else writes it
        gone = set(found.index().loc[found.index()["patient_id"] == name, "image_id"])
        if not gone:
            _sweep(found.store)  # of a removal that was broken off
            hint = "" if key is not None or not found.card["pseudonymised"] else ": its ids are keyed hashes, give the key"
            raise DataError(f"no image in {found.uri} is of this patient{hint}")
        if len(gone) == len(found):
            raise DataError(f"all images in {found.uri} are of this patient: delete the folder")
        uses, unreadable = _uses(found, store)
        own, elsewhere = _names(uses, of_dataset=True), _names(uses, of_dataset=False)
        # What no study names is of recipes since changed: it may know the images, and a mark too many is no harm.
        artifacts = _with_descent(own | finished(store) - elsewhere, uses)
        # A run that has the images in its memory, or weights that know them, would publish what nobody marks.
        for study in (use.study for use in uses if use.of_dataset or use.descends(artifacts)):
            stack.enter_context(lease(store, f"study-{study}", wait=False, observe=True))
        _unpack(store, uses)
        artifacts = _with_descent(artifacts | finished(store) - elsewhere, uses)  # with what was made until the leases were there
        _mark(store, found, len(gone), artifacts)  # before the images go: a removal may be broken off
        _rewrite(found, gone, held)
        uses = _uses(open_dataset(found.uri), store)[0]
        # Named as before, it is of other images and what it would be made again; but not where it starts from what is not.
        named = _names(uses, of_dataset=True) | _names(uses, of_dataset=False)
        kept = _with_descent(artifacts - named, uses)
        for same in artifacts - kept:
            store.delete(f"{FORGOTTEN}/{same}.json")
    studies = tuple(use.study for use in uses if use.of_dataset)
    descended = tuple(use.study for use in uses if use.descends(kept))
    return Forgotten(found.uri, len(gone), tuple(sorted(kept)), studies, descended, found.card["rejected_list"], unreadable)


@dataclass(frozen=True)
class _Use:
    """What a study has made, and of what."""

    study: str
    of_dataset: bool
    """Whether the study knows the dataset."""
    artifacts: set[str]
    """All that it names and has finished."""
    packed: set[str]
    """Names of the copies for streamed bags of the other datasets that it knows."""
    descent: dict[str, set[str]]
    """Of those what was made from an artifact that an arm names by a file, by that artifact."""

    def descends(self, artifacts: set[str]) -> bool:
        """Whether something of it was made from one of these artifacts, which it names by a file."""
        return not artifacts.isdisjoint(self.descent)


def _uses(dataset: Dataset, store: Store) -> tuple[list[_Use], dict[str, str]]:
    """What each study has made, in the order of their names, and the studies that cannot be read."""
    uses, unreadable = list[_Use](), dict[str, str]()
    for name in sorted({entry.key.split("/")[1] for entry in store.list(f"{STUDIES}/") if entry.key.count("/") >= 2}):
        try:
            study = stored_study(store, name)
        except MedsslError as error:
            unreadable[name] = str(error)
            continue
        if study is None:
            continue
        known = (study.dataset, *study.others.values())
        others = [each for each in known if each.uri != dataset.uri]
        descent = {each: _finished(study, _starting_from(study, each)) for each in set(study.files["artifacts"].values())}
        uses.append(_Use(name, len(others) < len(known), _finished(study), {packed_name(each) for each in others}, descent))
    return uses, unreadable


def _finished(study: Study, arms: set[str] | None = None) -> set[str]:
    return {name for name in made(study, arms)[0] if study.is_finished_name(name)}


def _starting_from(study: Study, artifact: str) -> set[str]:
    """Arms that start from an artifact's file, themselves or by another arm."""
    files, found = study.files["artifacts"], set[str]()
    for arm in study.recipe.arms:
        first, parent = arm, study.recipe.parent(arm)
        while parent is not None:
            first, parent = parent, study.recipe.parent(parent)
        if files.get(first.name) == artifact:
            found.add(arm.name)
    return found


def _names(uses: Iterable[_Use], *, of_dataset: bool) -> set[str]:
    return set[str]().union(*(use.artifacts for use in uses if use.of_dataset == of_dataset))


def _with_descent(artifacts: set[str], uses: Sequence[_Use]) -> set[str]:
    """These, what was made from them by their files, and so on."""
    while True:
        further = set[str]().union(*(made for use in uses for source, made in use.descent.items() if source in artifacts))
        if further <= artifacts:
            return artifacts
        artifacts = artifacts | further


def _unpack(store: Store, uses: Iterable[_Use]) -> None:
    """Deletes copies for streamed bags, of whatever images there once were (made again when needed), but not those of other
    datasets that studies have: one may be streaming from it."""
    others = set[str]().union(*(use.packed for use in uses))
    for name in {entry.key.split("/")[1] for entry in store.list(f"{PACKED}/")} - others:
        store.delete_prefix(f"{PACKED}/{name}")


def _mark(store: Store, dataset: Dataset, images: int, artifacts: set[str]) -> None:
    """The mark tells of how many images and when, not of whom."""
    day = time.strftime("%Y-%m-%d", time.gmtime())
    data = json.dumps({"dataset": dataset.name, "images": images, "day": day}).encode()
    for name in artifacts:
        store.write(f"{FORGOTTEN}/{name}.json", data)


def _rewrite(dataset: Dataset, gone: set[str], held: Lease) -> None:
    store, card = dataset.store, dataset.card
    index = pq.read_table(io.BytesIO(store.read(card["index"]["path"])))
    kept = index.filter(pc.invert(pc.is_in(index["image_id"], pa.array(sorted(gone), pa.string()))))
    entries = [entry for shard in card["shards"] if (entry := _without(store, shard, gone)) is not None]
    out = io.BytesIO()
    pq.write_table(kept, out, compression="zstd")
    sha256 = hashlib.sha256(out.getvalue()).hexdigest()
    path = f"index-{sha256[:20]}.parquet"
    store.write(path, out.getvalue())
    columns = {name: kept[name].to_pylist() for name in ("patient_id", "bag_id", "split")}
    provenance = Provenance(
        name=card["name"], licence=card["licence"], synthetic=card["synthetic"], split_seed=card["split_seed"],
        split_shares=card["split_shares"], leakage=audit_leakage(columns["patient_id"], columns["bag_id"], columns["split"]),
        leakage_allowed=card["leakage"]["allowed"], pseudonymised_columns=card["pseudonymised_columns"],
        rejected=card["rejected"], rejected_list=None,  # it names images and often paths, and cannot tell whose they are
        held_out=card.get("held_out"), layout=card.get("layout"),
    )  # fmt: skip
    held.check()
    store.write(CARD, json.dumps(build_card(kept, entries, path, sha256, provenance), indent=1, ensure_ascii=False).encode())
    if card["index"]["path"] != path:
        store.delete(card["index"]["path"])
    _sweep(store)


def _sweep(store: Store) -> None:
    """Deletes shards, indexes and lists that the card does not name."""
    card = json.loads(store.read(CARD))
    named = {shard["path"] for shard in card["shards"]} | {card["index"]["path"], card["rejected_list"]}
    for entry in (*store.list(f"{SHARDS}/"), *store.list("index-"), *store.list("rejected-")):
        if entry.key not in named:
            store.delete(entry.key)


def _without(store: Store, shard: dict[str, Any], gone: set[str]) -> ShardEntry | None:
    """The shard without these images: itself where it has none of them, None where it has no others."""
    entry = ShardEntry(**shard)
    table = pq.read_table(io.BytesIO(store.read(entry.path)))
    left = table.filter(pc.invert(pc.is_in(table["image_id"], pa.array(sorted(gone), pa.string()))))
    if len(left) == len(table):
        return entry
    if not len(left):
        return None
    with tempfile.TemporaryDirectory(prefix="medssl-shard-") as scratch:
        path = Path(scratch) / "shard.parquet"
        names = [name for name in left.schema.names if name != "image"]
        pq.write_table(left, path, compression="zstd", use_dictionary=names, write_statistics=names)
        return publish_shard(path, len(left), store)
