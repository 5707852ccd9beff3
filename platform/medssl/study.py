"""A study from its recipe: which artifacts it needs, which are finished, and the making of the rest in order.

    encoders (pretrain, initialise) -> features (embed) -> search -> evaluate -> report

Every artifact's name covers what decides its content, so running a study again does only what is missing. A study holds
a lease of its name while it runs and each artifact one of its own, since two studies may share artifacts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medssl.arms import Arm
from medssl.artifacts import Marker, finished, read_marker, read_markers
from medssl.checks import check_study, digests_of_files
from medssl.claims import Detectable, detectable
from medssl.datasets.dataset import Dataset, dataset_uri, open_dataset, read_card
from medssl.errors import DataError, RecipeError, StoreError
from medssl.events import OnEvent
from medssl.given import read_given
from medssl.mixes import Source
from medssl.outside import Outside, OutsideParams, read_predictions
from medssl.protocols import Probe, Protocol
from medssl.recipe import Recipe
from medssl.recipe_file import load
from medssl.results import StudyResult, report_name
from medssl.shifted import ShiftedSet
from medssl.shifting import artifact_names, transfers
from medssl.stages.specs import Cell, Spec, Specs
from medssl.store import Store, open_for_writing
from medssl.usage import recorded


@dataclass(frozen=True)
class PlanLine:
    """One line of `medssl plan`."""

    stage: str
    label: str
    state: str
    """finished, to do, waits (its inputs are not there yet, so its name is not known), or shared: another study of the same
    recipe makes it."""
    images: int
    """Images it reads, each pass counted; 0 when nothing is to do."""
    users: int = 1
    """Arms and protocols that use it, though it is made once."""
    arm: str = ""
    """Whose it is; of the report nobody's, of a shared stage the first arm's."""
    artifact: str = ""
    """Its name, of what one artifact holds and whose inputs are known."""
    comparisons: tuple[Detectable, ...] = ()
    """Of the report: how small a difference each comparison can show. Empty for every other stage."""


@dataclass(frozen=True)
class Pending:
    """Head seeds of one cell that are not evaluated yet."""

    cell: Cell
    specs: dict[int, Spec]
    features: Marker
    encoder: str | None
    """Artifact of the encoder; None for colour features."""
    point: dict[str, float]


def _open(name: str, store: Store) -> Dataset:
    uri = dataset_uri(name, store)
    try:
        return open_dataset(uri)
    except DataError as error:
        raise DataError(f"{error}; make it with `medssl ingest ... --to {uri}` (the recipe names dataset: {name})") from None


class Study:
    """One recipe over one store, with the state of its artifacts."""

    def __init__(
        self, recipe: Recipe, store: Store, on_event: OnEvent | None = None, overrides: Sequence[str] = (),
        files: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """`files` are the digests that `Study.files` had in an earlier run: given, no file of the recipe is looked for, since
        what is here may be another, and artifacts' names are those of that run."""
        self.recipe = recipe
        self.store = store
        self.overrides = tuple(overrides)
        self.emit: OnEvent = on_event or (lambda event: None)
        self.dataset = _open(recipe.dataset, store)
        mixed = {part.dataset for arm in recipe.arms for part in arm.mix if part.dataset is not None}
        shifted = {each.dataset for each in recipe.shifted}
        self.others = {name: _open(name, store) for name in sorted(mixed | shifted)}
        """Further datasets of mixes and shifted sets, by their names in the recipe."""
        for name, dataset in self.others.items():
            if dataset.uri == self.dataset.uri:
                where, what = ("mix", "leave `dataset` out of that part of mix") if name in mixed else ("shifted", "name another")
                raise RecipeError(f"{where} names {name}, the study's own dataset: {what}")
        others = {name: dataset.index() for name, dataset in self.others.items()}
        self.files = files or digests_of_files(recipe, store)
        """Digests of weights by arm, and of the sources of a user's own encoders; artifacts that arms name by a file."""
        self.specs = Specs(
            recipe, self.dataset.index(), self.dataset.classes, dict(self.files["weights"]), others, dict(self.files["encoders"])
        )  # fmt: skip
        self.outside = {} if files else {each.name: self._read_outside(each) for each in recipe.outside}
        """Predictions from files by the arm's name."""
        if not files:
            check_study(self)
        self._finished = finished(store)
        self._markers: dict[str, Marker] = {}

    def _read_outside(self, params: OutsideParams) -> Outside:
        content = read_given(params.predictions, self.store, f"predictions of arm '{params.name}' ({params.predictions})")
        judged = self.specs.rows(self.recipe.evaluation_split)
        ids = [str(name) for name in self.specs.index["image_id"].to_numpy()[judged]]
        return read_predictions(params, content, ids, self.specs.classes, findings=self.specs.findings)

    # -- state -------------------------------------------------------------------------------------------------

    def is_finished(self, spec: Spec) -> bool:
        """Whether the artifact was whole when last looked at."""
        return spec.name in self._finished

    def is_finished_name(self, name: str) -> bool:
        """The same for an artifact known by its name."""
        return name in self._finished

    def finished_names(self, prefix: str) -> list[str]:
        """Artifacts of the whole store that were whole when last looked at."""
        return sorted(name for name in self._finished if name.startswith(prefix))

    def marker(self, spec: Spec) -> Marker | None:
        """The marker of a finished artifact, or None."""
        if spec.name not in self._markers and spec.name in self._finished:
            marker = read_marker(self.store, spec.name)
            if marker is not None:
                self._markers[spec.name] = marker
        return self._markers.get(spec.name)

    def markers(self, specs: Sequence[Spec]) -> list[Marker]:
        """Markers of finished artifacts, read side by side, in order."""
        missing = [s.name for s in specs if s.name not in self._markers]
        self._markers |= read_markers(self.store, missing)
        return [self._markers[s.name] for s in specs]

    def record(self, spec: Spec, marker: Marker) -> None:
        """Notes an artifact that has just been finished."""
        self._finished.add(spec.name)
        self._markers[spec.name] = marker

    def refresh(self) -> None:
        """Looks at the store again."""
        self._finished = finished(self.store)

    def sources(self, arm: Arm) -> list[Source]:
        """What the arm's pretraining is shown, by value; streamed."""
        found = []
        for part in self.specs.mix(arm):
            dataset = self.dataset if part.dataset is None else self.others[part.dataset]
            found.append(Source(
                dataset.uri, len(dataset), part.rows.tolist(), list(part.splits), part.times,
                tuple(part.not_shown.tolist()), tuple(dataset.shards),
            ))  # fmt: skip
        return found

    def is_of_now(self) -> bool:
        """Whether all datasets are still as they were when they were read: another run may have been waited for since."""
        return all(read_card(each.store) == each.card for each in (self.dataset, *self.others.values()))

    # -- what there is to do -----------------------------------------------------------------------------------

    def encoders(self) -> list[tuple[Arm, int, Spec]]:
        """All encoders, each artifact once."""
        seen: dict[str, tuple[Arm, int, Spec]] = {}
        for arm in self.recipe.arms:
            for seed in self.specs.pretraining_seeds(arm):
                spec = self.specs.encoder(arm, seed)
                if spec is not None:
                    seen.setdefault(spec.name, (arm, seed, spec))
        return list(seen.values())

    def embed_spec(self, arm: Arm, seed: int, protocol: Probe) -> Spec | None:
        """The features of one encoder for one probe; None while the encoder is not there."""
        encoder = self.specs.encoder(arm, seed)
        marker = self.marker(encoder) if encoder else None
        return None if encoder is not None and marker is None else self.specs.embed(arm, seed, protocol, marker)

    def features(self, arm: Arm, seed: int, protocol: Protocol) -> Marker | None:
        """What a protocol starts from: features for a probe, the encoder for fine-tuning."""
        spec = self.embed_spec(arm, seed, protocol) if protocol.kind != "fine_tune" else self.specs.encoder(arm, seed)
        return self.marker(spec) if spec else None

    def search_spec(self, arm: Arm, protocol: Protocol) -> Spec | None:
        """The search of one arm and protocol; None while its inputs are not there."""
        features = self.features(arm, 0, protocol)
        return self._alike(lambda p: self.specs.search(arm, p, features), protocol) if features else None

    def _alike(self, spec_of: Callable[[Protocol], Spec], protocol: Protocol) -> Spec:
        """Of what is alike whichever weights are kept: as the recipe says, or the other where that alone is finished."""
        asked = spec_of(protocol)
        if protocol.kind != "fine_tune" or self.is_finished(asked):
            return asked
        other = spec_of(protocol.kept_otherwise())
        return other if self.is_finished(other) else asked

    def point(self, arm: Arm, protocol: Protocol) -> dict[str, float] | None:
        """Learning rate and weight decay of an arm under a protocol, once they are known."""
        if protocol.fixed_point is not None:
            return protocol.fixed_point
        spec = self.search_spec(arm, protocol)
        marker = self.marker(spec) if spec else None
        return None if marker is None else dict(marker.facts["best"])

    def searches(self) -> list[tuple[Arm, Protocol]]:
        """Arms and protocols that need a search."""
        return [
            (arm, protocol)
            for protocol in self.recipe.protocols
            for arm in self.recipe.arms
            if protocol.search.needed and self.recipe.judges(protocol, arm)
        ]

    def evaluations(self, cell: Cell) -> dict[int, Spec] | None:
        """Specifications of a cell's head seeds; None while its inputs are not there."""
        features = self.features(cell.arm, cell.pretraining_seed, cell.protocol)
        point = self.point(cell.arm, cell.protocol)
        if features is None or point is None:
            return None
        specs = {s: self.specs.evaluate(cell, s, point, features) for s in range(1, cell.protocol.head_seeds)}
        first = self._alike(lambda p: self.specs.evaluate(replace(cell, protocol=p), 0, point, features), cell.protocol)
        return {0: first, **specs}

    def pending(self, cell: Cell) -> Pending | None:
        """What of a cell is to be done; None when nothing is."""
        specs = self.evaluations(cell)
        features = self.features(cell.arm, cell.pretraining_seed, cell.protocol)
        point = self.point(cell.arm, cell.protocol)
        if specs is None or features is None or point is None:
            raise StoreError(f"inputs of {cell.label} vanished from the store while the study ran: run it again")
        missing = {seed: spec for seed, spec in specs.items() if not self.is_finished(spec)}
        encoder = self.specs.encoder(cell.arm, cell.pretraining_seed)
        return Pending(cell, missing, features, encoder.name if encoder else None, point) if missing else None

    def report_name(self) -> str | None:
        """The report's artifact name; None while an evaluation is missing."""
        names: list[str] = []
        for cell in self.specs.cells():
            specs = self.evaluations(cell)
            if specs is None or not all(self.is_finished(s) for s in specs.values()):
                return None
            names += [s.name for s in specs.values()]
        away, given = artifact_names(self), [each.digest for each in self.outside.values()]
        return None if away is None else report_name(self.recipe, names + away + given, self.dataset.card, self.specs.index)

    def plan(self) -> list[PlanLine]:
        """The stages with their state and cost."""
        used = Counter(
            spec.name
            for arm in self.recipe.arms
            for seed in self.specs.pretraining_seeds(arm)
            if (spec := self.specs.encoder(arm, seed)) is not None
        )
        lines = [replace(self._line(spec, arm), users=used[spec.name]) for arm, _, spec in self.encoders()]
        lines += self._embed_lines()
        for arm, protocol in self.searches():
            spec = self.search_spec(arm, protocol)
            label, images = f"search {protocol.name} of {arm.name}", self.specs.search_images(protocol)
            lines.append(self._line(spec, arm) if spec else PlanLine("search", label, "waits", images, arm=arm.name))
        lines += [self._cell_line(cell) for cell in self.specs.cells()]
        lines += [self._shifted_line(cell, shifted) for shifted in self.specs.shifted.values() for cell in self.specs.cells()]
        name = self.report_name()
        state = "waits" if name is None else ("finished" if name in self._finished else "to do")
        return [*dict.fromkeys(lines), PlanLine("report", "report", state, 0, comparisons=detectable(self))]

    def _embed_lines(self) -> list[PlanLine]:
        """Features, each once."""
        found: list[PlanLine] = []
        for protocol in self.recipe.protocols:
            for arm in self.recipe.arms:
                if protocol.kind != "fine_tune" and self.recipe.judges(protocol, arm):
                    for seed in self.specs.pretraining_seeds(arm, protocol):
                        spec, label = self.embed_spec(arm, seed, protocol), f"embed {arm.name} seed {seed}"
                        images = self.specs.embed_images(protocol)
                        found.append(self._line(spec, arm) if spec else PlanLine("embed", label, "waits", images, arm=arm.name))
        return [replace(line, users=users) for line, users in Counter(found).items()]

    def _line(self, spec: Spec, arm: Arm) -> PlanLine:
        state, images = ("finished", 0) if self.is_finished(spec) else ("to do", spec.images)
        return PlanLine(spec.stage, spec.label, state, images, arm=arm.name, artifact=spec.name)

    def _cell_line(self, cell: Cell) -> PlanLine:
        specs = self.evaluations(cell)
        seed_images = self.specs.evaluation_images(cell)
        return self._seeds_line("evaluate", cell.label, cell, None if specs is None else list(specs.values()), seed_images)

    def _shifted_line(self, cell: Cell, shifted: ShiftedSet) -> PlanLine:
        found = transfers(self, cell, shifted)
        specs = None if found is None else [each.spec for each in found]
        seed_images = len(shifted.rows) if cell.protocol.kind == "fine_tune" else 0
        return self._seeds_line("transfer", f"{cell.label} on {shifted.params.name}", cell, specs, seed_images)

    def _seeds_line(self, stage: str, label: str, cell: Cell, specs: Sequence[Spec] | None, seed_images: int) -> PlanLine:
        """`seed_images` are what one seed reads."""
        seeds, arm = cell.protocol.head_seeds, cell.arm.name
        if specs is None:
            return PlanLine(stage, f"{label}: {seeds} head seeds", "waits", seeds * seed_images, arm=arm)
        missing = [s for s in specs if not self.is_finished(s)]
        state = "finished" if not missing else f"to do ({len(missing)} of {len(specs)})"
        return PlanLine(stage, f"{label}: {len(specs)} head seeds", state, sum(s.images for s in missing), arm=arm)


def _prepare(
    recipe: Recipe | str | Path | Mapping[str, Any], store: Store | str, overrides: Sequence[str]
) -> tuple[Recipe, Store]:
    if isinstance(recipe, Recipe) and overrides:
        raise RecipeError(f"overrides ({overrides[0]}) go with a recipe's file or fields: this one is loaded already")
    loaded = recipe if isinstance(recipe, Recipe) else load(recipe, overrides)
    return loaded, open_for_writing(store) if isinstance(store, str) else store


def plan(recipe: Recipe | str | Path | Mapping[str, Any], store: Store | str, *, overrides: Sequence[str] = ()) -> list[PlanLine]:
    """Which stages a study has, which are finished, what each will cost in images, and what the comparisons can show."""
    return Study(*_prepare(recipe, store, overrides)).plan()


def run(
    recipe: Recipe | str | Path | Mapping[str, Any],
    store: Store | str,
    *,
    overrides: Sequence[str] = (),
    on_event: OnEvent | None = None,
    address: str | None = None,
    rebuild_report: bool = False,
    told: Sequence[str] = (),
) -> StudyResult:
    """Runs a study, or what is missing of it, and returns its tables.

    Args:
        recipe: a recipe, the path of its YAML file, or its fields.
        store: the store or its URI (s3://bucket/prefix, file:///folder).
        overrides: `path.to.field=value`, applied to a recipe that is not yet loaded.
        on_event: called with what happens, from one thread at a time.
        address: address of a running Ray cluster; None uses RAY_ADDRESS or starts a local Ray.
        rebuild_report: make the report again although it is finished.
        told: overrides that a loaded recipe had, for its report to name.

    Raises:
        MedsslError: with a message for the user.
    """
    from medssl.leftovers import under_way
    from medssl.runner import Runner

    loaded, opened = _prepare(recipe, store, overrides)
    with under_way(lambda: Study(loaded, opened, on_event, overrides or told)) as (study, held), ExitStack() as stack:
        recorder = stack.enter_context(recorded(study.store, loaded.study, loaded.compute, study.emit))
        study.emit = recorder.on_event
        return Runner(study, stack, address, held, recorder).run(rebuild_report=rebuild_report)


def report(
    recipe: Recipe | str | Path | Mapping[str, Any],
    store: Store | str,
    *,
    overrides: Sequence[str] = (),
    on_event: OnEvent | None = None,
    told: Sequence[str] = (),
) -> StudyResult:
    """Makes the report of a finished study again.

    Raises:
        RecipeError: an evaluation of the study is missing.
    """
    from medssl.results import build_report

    loaded, opened = _prepare(recipe, store, overrides)
    study = Study(loaded, opened, on_event, overrides or told)
    if study.report_name() is None:
        todo = sum(line.state != "finished" for line in study.plan()) - 1
        raise RecipeError(
            f"study '{loaded.study}' is not finished ({todo} stages to do): run `medssl run` first, `medssl plan` lists them"
        )
    return build_report(study)


__all__ = ["Pending", "PlanLine", "Study", "plan", "report", "run"]
