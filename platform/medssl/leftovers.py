"""What no study of a store needs any more, and its removal: `medssl gc`.

The studies of a store are those below `studies/`. Each keeps the recipe it was last started with (`wanted.json`) and digests of
the files that it named, from which its artifacts' names follow as they do for a run, wherever one is. What is finished or
half-made, and named by none of them, is left over: from recipes since changed, from labels since mended, from studies that were
dropped. Datasets are never touched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from medssl.artifacts import ARTIFACTS, FORGOTTEN, STUDIES, finished, marker_key
from medssl.errors import LeaseHeld, MedsslError, MissingKey, RecipeError, StoreError, nearest
from medssl.events import Event
from medssl.leases import Lease, Owner, lease
from medssl.recipe import Recipe
from medssl.shifting import features, transfers
from medssl.stages.initial import given_artifacts
from medssl.stages.specs import VERSIONS, Spec
from medssl.store import Store
from medssl.study import Study

WANTED = "wanted.json"
_CURRENT = "current.json"
REMOVAL = "removal"
"""Lease of who removes something from the store; taken by a run for the moment in which it begins."""


@dataclass(frozen=True)
class Artifact:
    """An artifact in the store."""

    name: str
    size: int
    """Bytes of all its files."""
    is_finished: bool

    @property
    def stage(self) -> str:
        """What made it."""
        return self.name.rpartition("-")[0]


@dataclass(frozen=True)
class Leftovers:
    """What could be removed, and what stands against it."""

    artifacts: tuple[Artifact, ...]
    studies: tuple[str, ...]
    """Whose artifacts are kept."""
    dropped: tuple[str, ...]
    unreadable: dict[str, str]
    """Studies whose needs cannot be told, and why: nothing is removed while there is one."""
    running: dict[str, str]
    """Studies under way whose later artifacts have no names yet, and who runs them: nothing is removed either."""

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(artifact.size for artifact in self.artifacts)


def remember(study: Study) -> None:
    """Keeps the recipe that a study is started with, before anything is made for it."""
    kept = {"recipe": study.recipe.canonical(), "files": study.files}
    data = json.dumps(kept, sort_keys=True, indent=1).encode()
    study.store.write(f"{STUDIES}/{study.recipe.study}/{WANTED}", data)


@contextmanager
def under_way(make: Callable[[], Study]) -> Iterator[tuple[Study, Lease]]:
    """A study that is being run, and its lease; made anew where its datasets changed while another run was waited for."""
    study = make()  # what is wrong with it is said before anything is waited for

    def waiting(owner: Owner) -> None:
        study.emit(Event("message", f"study '{study.recipe.study}' is being run by {owner}; waiting for it to end"))

    def removing(owner: Owner) -> None:
        study.emit(Event("message", f"artifacts or images are being removed from the store by {owner}; waiting for it to end"))

    with lease(study.store, f"study-{study.recipe.study}", on_wait=waiting) as held:
        with lease(study.store, REMOVAL, on_wait=removing):  # which lists the studies once, and this one may be new to the store
            if not study.is_of_now():
                study = make()
            remember(study)  # before anything is looked at: from now on nothing of it is taken for left over
            study.refresh()
        yield study, held


def find_leftovers(store: Store, drop: Sequence[str] = (), held: Sequence[str] = ()) -> Leftovers:
    """What is left over in a store, were the studies `drop` dropped; `held` are studies whose leases the caller has.

    Raises:
        RecipeError: there is no study of such a name to drop.
    """
    there = list(_artifacts(store))  # first of all: what is made from now on is in no list
    names = sorted({entry.key.split("/")[1] for entry in store.list(f"{STUDIES}/") if entry.key.count("/") >= 2})
    for name in drop:
        if name not in names:
            raise RecipeError(f"--drop {name}: the store has no such study: {nearest(name, names)}")
    needed: set[str] = set()
    unreadable, running = {}, {}
    kept = [name for name in names if name not in drop]
    for name in names:
        owner = None if name in held else _owner(store, name)
        if name in drop:
            if owner is not None:
                running[name] = owner
            continue
        try:
            study = stored_study(store, name)
        except MedsslError as error:
            unreadable[name] = str(error)
            continue
        if study is None:  # the page of several, which has no artifacts of its own
            continue
        names_of_it, complete = needs(study)
        needed |= names_of_it
        if owner is not None and not complete:
            running[name] = owner
    left = tuple(artifact for artifact in there if artifact.name not in needed)
    return Leftovers(left, tuple(kept), tuple(drop), unreadable, running)


def remove(store: Store, found: Leftovers) -> int:
    """Removes the artifacts, and what the store has of dropped studies; how many objects' folders went.

    Runs that begin meanwhile wait, of whatever study; what one that began before has come to need since stays.

    Raises:
        LeaseHeld: something else is being removed from the store, or a run is just beginning, or one of a dropped study goes on.
        StoreError: a study cannot be read, or is being run, so that what it needs cannot be told; nothing was removed.
    """
    for name, reason in found.unreadable.items():
        raise StoreError(
            f"nothing was removed: what study '{name}' needs cannot be told ({reason}); mend that, or give --drop {name}"
        )
    for name, owner in found.running.items():
        raise StoreError(f"nothing was removed: study '{name}' is being run by {owner}: wait for it, or stop it")
    with lease(store, REMOVAL, wait=False, observe=True), ExitStack() as stack:
        held = []
        for name in (*found.studies, *found.dropped):
            try:
                stack.enter_context(lease(store, f"study-{name}", wait=False))
                held.append(name)
            except LeaseHeld:
                if name in found.dropped:
                    raise
        now = find_leftovers(store, found.dropped, held)
        for new in set(now.studies) - set(found.studies) | set(now.unreadable) | set(now.running):
            raise StoreError(f"nothing was removed: study '{new}' was started or changed meanwhile: list what is left over again")
        still = {artifact.name for artifact in now.artifacts}
        gone = [artifact for artifact in found.artifacts if artifact.name in still]
        for artifact in gone:
            store.delete(marker_key(artifact.name))  # first: without its marker an artifact is none
            store.delete_prefix(f"{ARTIFACTS}/{artifact.name}")
            store.delete(f"{FORGOTTEN}/{artifact.name}.json")
        for name in found.dropped:
            store.delete_prefix(f"{STUDIES}/{name}")
    return len(gone)


def needs(study: Study) -> tuple[set[str], bool]:
    """Names of all artifacts that a study has, will have, or starts from, and that its published report refers to, as far as they
    are known; and whether all are."""
    names, complete = made(study)
    return names | set(study.files["artifacts"].values()) | _published(study), complete


def made(study: Study, arms: Collection[str] | None = None) -> tuple[set[str], bool]:
    """Names of all artifacts that a study makes (of these arms: the others' are left out), as far as they are known; and whether
    all are."""
    recipe, specs = study.recipe, list[Spec | None]()
    chosen = [arm for arm in recipe.arms if arms is None or arm.name in arms]
    for arm in chosen:
        if arm.features == "encoder":
            specs += [study.specs.encoder(arm, seed) for seed in study.specs.pretraining_seeds(arm)]
    for protocol in recipe.protocols:
        for arm in chosen:
            if protocol.kind != "fine_tune" and recipe.judges(protocol, arm):
                specs += [study.embed_spec(arm, seed, protocol) for seed in study.specs.pretraining_seeds(arm, protocol)]
    specs += [study.search_spec(arm, protocol) for arm, protocol in study.searches() if arm in chosen]
    for cell in study.specs.cells():
        if cell.arm not in chosen:
            continue
        evaluations = study.evaluations(cell)
        specs += [None] if evaluations is None else list(evaluations.values())
        for shifted in study.specs.shifted.values():
            found = transfers(study, cell, shifted)
            specs += [None] if found is None else [each.spec for each in found]
            if cell.protocol.kind != "fine_tune":
                specs.append(features(study, cell.arm, cell.pretraining_seed, shifted))
    names = {spec.name for spec in specs if spec is not None}
    report = study.report_name()  # of all arms, whichever are asked for
    return names | ({report} if report is not None else set()), None not in specs


def _published(study: Study) -> set[str]:
    """The current report and what its arms name for `predict` and `export`: of an earlier recipe until the next report."""
    place = study.store.sub(f"{STUDIES}/{study.recipe.study}")
    names = set[str]()
    for key in (_CURRENT, *(entry.key for entry in place.list("arms/"))):
        try:
            kept = json.loads(place.read(key))
            names |= {str(kept["report"])} if key == _CURRENT else _of_arm(kept)
        except (MissingKey, ValueError, KeyError, TypeError):  # replaced just now, or not as medssl wrote it
            continue
    return names


def _of_arm(index: dict[str, Any]) -> set[str]:
    encoders = index.get("encoders") or {}  # earlier versions named none
    return {*map(str, encoders.values()), *(str(run["artifact"]) for run in index["evaluations"])}


def stored_study(store: Store, name: str) -> Study | None:
    """The study as it was last started; None for the page of a recipe with several datasets."""
    place = store.sub(f"{STUDIES}/{name}")
    try:
        kept = json.loads(place.read(WANTED))
        recipe = Recipe.model_validate(kept["recipe"])
        files = {name: dict(kept["files"][name]) for name in ("weights", "encoders")}
        # Kept since a relative path is of the folder where the study was run; earlier versions kept none.
        files["artifacts"] = dict(kept["files"].get("artifacts", given_artifacts(recipe, store)))
    except MissingKey:
        if not place.exists("planned.json"):
            return None
        raise StoreError("it was last run by a version that kept no recipe: run it once more") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{place.uri_of(WANTED)} is not as medssl wrote it ({str(error).splitlines()[0]})") from None
    return Study(recipe, store, files=files)


def _owner(store: Store, name: str) -> str | None:
    """Who runs a study now; None where nobody does."""
    try:
        with lease(store, f"study-{name}", wait=False, observe=True):  # a run that died elsewhere is no reason to refuse
            return None
    except LeaseHeld as error:
        return str(error.owner)


def _artifacts(store: Store) -> Iterator[Artifact]:
    """Every artifact of a stage, finished or not."""
    sizes: dict[str, int] = {}
    done = finished(store)
    for entry in store.list(f"{ARTIFACTS}/"):
        name = entry.key.split("/")[1]
        sizes[name] = sizes.get(name, 0) + entry.size
    for name in sorted(set(sizes) | done):
        if name.rpartition("-")[0] in VERSIONS:
            yield Artifact(name, sizes.get(name, 0), name in done)
