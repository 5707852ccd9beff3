"""Makes what a study still lacks, on Ray: each step finds what is missing, does it, and notes what is finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from medssl import telemetry
from medssl.arms import Arm
from medssl.artifacts import Marker, artifact_name, digest_json, read_marker, read_markers
from medssl.claims import evaluated, fix_claims
from medssl.compute import SPARE_CPUS
from medssl.datasets.dataset import Dataset
from medssl.errors import StoreError
from medssl.events import Event, OnEvent
from medssl.leases import Lease, Owner, lease
from medssl.mixes import Source
from medssl.results import StudyResult, build_report, load_result, make_current
from medssl.shifted import ShiftedSet
from medssl.shifting import features, transfers
from medssl.stages.cluster import connected
from medssl.stages.context import Context
from medssl.stages.encode import EmbedTask, InitialiseTask, run_encoding
from medssl.stages.evaluate import EvaluateTask, SearchTask, run_evaluations, run_search
from medssl.stages.initial import GivenWeights, stage_arm, stage_weights
from medssl.stages.pretrain import run_pretrain
from medssl.stages.progress import OnProgress
from medssl.stages.search import most_at_once
from medssl.stages.shown import labels_shown
from medssl.stages.side_by_side import SideBySide
from medssl.stages.specs import TRAIN, VALIDATION, Cell, Spec
from medssl.stages.tracking import check, tell_scores
from medssl.stages.transfer import TransferTask, run_transfers
from medssl.stages.trials import shared_out, trials_held
from medssl.study import Study
from medssl.training.monitor import Watched, watch_findings
from medssl.usage import Recorder


class Runner:
    """Runs one study; Ray and the decoded images come up with the first stage that needs them."""

    def __init__(
        self, study: Study, stack: ExitStack, address: str | None, held: Lease | None = None, usage: Recorder | None = None
    ) -> None:
        self.study = study
        self._held = [held] if held else []  # the leases that must be ours when something is published
        self._stack, self._usage = stack, usage
        self._is_connected = False
        self._address = address
        self._decoded: dict[str, dict[str, Any]] = {}

    def run(self, *, rebuild_report: bool = False) -> StudyResult:
        """All stages in order; returns the tables."""
        study = self.study
        name = study.report_name()
        if name is not None and study.is_finished_name(name) and not rebuild_report:
            study.emit(Event("message", f"study '{study.recipe.study}' is finished: nothing to do"))
            make_current(study.store, study.recipe.study, name)
            return load_result(study.store, study.recipe, name)
        check(study.recipe.compute.tracking, study.recipe.study)
        fix_claims(study.store, study.recipe, partial(evaluated, study))  # before anything of it can be known
        self.encoders()
        self.embeddings()
        self.searches()
        self.evaluations()
        self.transfers()
        study.emit(Event("begin", "report"))
        result = build_report(study)
        study.emit(Event("end", "report"))
        tell_scores(study.recipe.compute.tracking, study.recipe.study, result.summary)
        return result

    # -- stages ------------------------------------------------------------------------------------------------

    def encoders(self) -> None:
        """Pretrains one encoder after the other, each on all workers; random ones are made side by side."""
        study = self.study
        missing = [entry for entry in study.encoders() if not study.is_finished(entry[2])]
        given = self._given_weights(missing)  # first of all: what does not fit is refused before hours of training
        for generation in sorted({study.recipe.generation(arm) for arm, _, _ in missing}):
            mine = [entry for entry in missing if study.recipe.generation(entry[0]) == generation]
            tasks = [
                InitialiseTask(self.context, spec, arm.name, seed, self._start(arm, seed, spec, given))
                for arm, seed, spec in mine
                if spec.stage == "initialise"
            ]
            self._encode("initialise", tasks)
            for arm, seed, spec in mine:
                if spec.stage == "pretrain":
                    self._make(spec, partial(self._pretrain, arm, seed, spec, given), arm=arm.name)

    def _given_weights(self, encoders: Sequence[tuple[Arm, int, Spec]]) -> dict[str, GivenWeights]:
        """The weights that encoders start from, by artifact; says what of their files was loaded."""
        study = self.study
        given = stage_weights(study.recipe, study.store, encoders)
        lines = [
            f"{arm.name} starts from {given[spec.name].facts['source']}: {given[spec.name].facts['summary']}"
            for arm, _, spec in encoders
            if spec.name in given
        ]
        for line in dict.fromkeys(lines):
            study.emit(Event("message", line))
        return given

    def _start(self, arm: Arm, seed: int, spec: Spec, given: Mapping[str, GivenWeights]) -> GivenWeights | None:
        """The weights that an encoder starts from; of another arm, whose encoder is finished by now, put in place here."""
        if self.study.recipe.parent(arm) is None:
            return given.get(spec.name)
        return stage_arm(self.study.specs, arm, seed, spec, self.study.store)

    def _pretrain(
        self, arm: Arm, seed: int, spec: Spec, given: Mapping[str, GivenWeights], on_progress: OnProgress
    ) -> Marker:
        study, recipe = self.study, self.study.recipe
        self._connect()
        watched = self._watched(seed)
        return run_pretrain(
            study.store, spec, study.specs.plan(arm, seed),
            sources=self._sources(arm),
            decoding=recipe.decoding,
            compute=recipe.compute,
            before_publish=self._check_leases,
            initial_weights=self._start(arm, seed, spec, given),
            on_progress=on_progress,
            watched=watched,
            watched_images=self.context.resident if watched else None,
            labels=labels_shown(study.specs.plan(arm, seed).objective, study.specs.mix(arm)),
            said_of={"study": recipe.study, "arm": arm.name},
        )  # fmt: skip

    def _sources(self, arm: Arm) -> list[Source]:
        """What an arm's pretraining is shown: streamed, or from resident files that are on every node by now."""
        sources = self.study.sources(arm)
        for part, source in zip(self.study.specs.mix(arm), sources, strict=True):
            if len(part.left_out):
                number, whose = len(part.left_out), source.dataset_uri
                text = f"{arm.name}: {number:,} images of {whose} are validation or test images of the study and are left out"
                self.study.emit(Event("message", text))
        if self.study.recipe.images.feeding == "streaming":
            return sources
        return [replace(source, resident=self._resident(source.dataset_uri)) for source in sources]

    def _watched(self, seed: int) -> Watched | None:
        """The labelled images that show how a pretraining gets on; None where the recipe does not ask for it."""
        study = self.study
        if study.recipe.compute.monitor_every_epochs is None:
            return None
        if study.specs.findings:
            labels_NF = study.specs.labels(np.arange(len(study.specs.index)))
            return watch_findings(
                study.specs.index, labels_NF, study.specs.classes, seed=seed, bank_split=TRAIN, query_split=VALIDATION
            )
        return Watched.of_index(study.specs.index, study.specs.classes, seed=seed, bank_split=TRAIN, query_split=VALIDATION)

    def embeddings(self) -> None:
        """Features of every encoder for every probe."""
        study = self.study
        tasks: dict[str, EmbedTask] = {}
        for protocol in study.recipe.protocols:
            if protocol.kind == "fine_tune":
                continue
            for arm in filter(partial(study.recipe.judges, protocol), study.recipe.arms):
                for seed in study.specs.pretraining_seeds(arm, protocol):
                    spec = study.embed_spec(arm, seed, protocol)
                    if spec is None:
                        raise StoreError(f"the encoder of {arm.name} seed {seed} vanished from the store: run the study again")
                    if not study.is_finished(spec):
                        encoder = study.specs.encoder(arm, seed)
                        tasks[spec.name] = EmbedTask(
                            self.context, spec, arm.name, protocol.name, encoder.name if encoder else None, seed
                        )
        self._encode("embed", list(tasks.values()))

    def _encode(self, label: str, tasks: Sequence[InitialiseTask | EmbedTask]) -> None:
        if not tasks:
            return
        self._connect()
        self._stage(
            label,
            [t.spec for t in tasks],
            lambda on_progress: run_encoding(tasks, self.study.recipe.compute, on_progress),
        )

    def searches(self) -> None:
        """Searches every arm and protocol: the trials of each run side by side, and several searches where trials of one leave
        room."""
        study, pending = self.study, list[tuple[Spec, SearchTask, int]]()
        for arm, protocol in study.searches():
            spec = study.search_spec(arm, protocol)
            features = study.features(arm, 0, protocol)
            if spec is None or features is None:
                raise StoreError(f"the features of {arm.name} vanished from the store: run the study again")
            if not study.is_finished(spec):
                task = SearchTask(self.context, spec, arm.name, protocol.name, features.name)
                pending.append((spec, task, most_at_once(protocol.search)))
        if not pending:
            return
        self._connect()
        runs, compute = shared_out(study.recipe.compute, [most for _, _, most in pending])
        if runs == 1:
            for spec, task, _ in pending:
                self._make(spec, partial(run_search, task, compute), arm=task.arm, protocol=task.protocol)
            return
        together = SideBySide(study.emit, f"{len(pending)} searches, {runs} at once")
        with together.under_way(runs) as start:
            for spec, task, _ in pending:
                search = partial(run_search, task, compute, halt=together.halt)
                emit = together.emit_of(spec.label)
                start(partial(self._make, spec, search, emit, arm=task.arm, protocol=task.protocol))

    def evaluations(self) -> None:
        """Evaluates what is missing, all protocols at once; a probe's head seeds of one cell train together."""
        study = self.study
        pending = [p for cell in study.specs.cells() if (p := study.pending(cell)) is not None]
        if not pending:
            return
        self._connect()
        tasks = [
            EvaluateTask(
                self.context, p.cell.arm.name, p.cell.protocol.name, p.cell.pretraining_seed, p.cell.label_draw, p.specs,
                p.features.name, p.encoder,
                p.point,
            )
            for p in pending
        ]  # fmt: skip
        specs = [spec for p in pending for spec in p.specs.values()]
        names = list(dict.fromkeys(p.cell.protocol.name for p in pending))
        label = f"evaluate {' and '.join(names)}" if len(names) < 3 else f"evaluate {len(names)} protocols"
        self._stage(label, specs, lambda on_progress: run_evaluations(tasks, study.recipe, on_progress))

    def transfers(self) -> None:
        """Judges the finished classifiers on the shifted sets."""
        for shifted in self.study.specs.shifted.values():
            self._shifted_features(shifted)
            tasks = [task for cell in self.study.specs.cells() if (task := self._transfer(cell, shifted)) is not None]
            if tasks:
                self._connect()
                specs = [spec for task in tasks for spec in task.specs.values()]
                work = partial(run_transfers, tasks, self.study.recipe)
                self._stage(f"judge on {shifted.params.name}", specs, work)

    def _shifted_features(self, shifted: ShiftedSet) -> None:
        study, tasks = self.study, dict[str, EmbedTask]()
        for cell in study.specs.cells():
            if cell.protocol.kind == "fine_tune":
                continue
            arm, seed = cell.arm, cell.pretraining_seed
            spec = features(study, arm, seed, shifted)
            if spec is None:
                raise StoreError(f"the encoder of {arm.name} seed {seed} vanished from the store: run the study again")
            if not study.is_finished(spec):
                encoder, rows = study.specs.encoder(arm, seed), shifted.rows.tolist()
                tasks[spec.name] = EmbedTask(
                    self._context_of(shifted), spec, arm.name, cell.protocol.name, encoder.name if encoder else None, seed, rows
                )
        self._encode(f"embed {shifted.params.name}", list(tasks.values()))

    def _transfer(self, cell: Cell, shifted: ShiftedSet) -> TransferTask | None:
        study, found = self.study, transfers(self.study, cell, shifted)
        if found is None:
            raise StoreError(f"evaluations of {cell.label} vanished from the store while the study ran: run it again")
        missing = [each for each in found if not study.is_finished(each.spec)]
        if not missing:
            return None
        probe = cell.protocol.kind != "fine_tune"
        spec = features(study, cell.arm, cell.pretraining_seed, shifted) if probe else None
        return TransferTask(
            self._context_of(shifted), {each.evaluation: each.spec for each in missing}, spec.name if spec else None,
            shifted.rows.tolist(), shifted.labels_N.tolist(), shifted.shared, {e.evaluation: e.head_seed for e in missing},
        )  # fmt: skip

    # -- common ------------------------------------------------------------------------------------------------

    def _make(
        self, spec: Spec, build: Callable[[OnProgress], Marker], emit: OnEvent | None = None, **said_of: str
    ) -> None:
        """Makes one artifact under its lease, unless another study has made it meanwhile; `said_of` labels its telemetry."""
        study, emit = self.study, emit or self.study.emit
        with lease(study.store, spec.name, on_wait=self._waiting(spec.label, emit)) as held:
            marker = read_marker(study.store, spec.name)
            if marker is None:
                emit(Event("begin", spec.label))
                self._held.append(held)
                with telemetry.labelled(study=study.recipe.study, stage=spec.stage, **said_of):
                    marker = build(self._progress(spec.label, emit))
                self._held.remove(held)
                emit(Event("end", spec.label))
            study.record(spec, marker)

    def _check_leases(self) -> None:
        """Raises when another run has taken over what this one works on."""
        for held in self._held:
            held.check()

    def _stage(self, label: str, specs: list[Spec], work: Callable[[OnProgress], None]) -> None:
        """Makes many artifacts under one lease of them all."""
        study = self.study
        name = artifact_name("many", 1, {"specs": digest_json(sorted(s.name for s in specs))}, {})
        self._check_leases()
        with lease(study.store, name, on_wait=self._waiting(label)):
            study.emit(Event("begin", label))
            with telemetry.labelled(study=study.recipe.study, stage=label, arm=""):
                work(self._progress(label))
            study.emit(Event("end", label))
        markers = read_markers(study.store, [s.name for s in specs])
        for spec in specs:
            if spec.name not in markers:
                raise StoreError(f"{spec.label} left no marker in the store: run the study again")
            study.record(spec, markers[spec.name])

    def _progress(self, label: str, emit: OnEvent | None = None) -> OnProgress:
        def show(done: int, total: int, note: str = "") -> None:
            (emit or self.study.emit)(Event("progress", label, done, total, note))

        return show

    def _waiting(self, label: str, emit: OnEvent | None = None) -> Callable[[Owner], None]:
        said = emit or self.study.emit
        return lambda owner: said(Event("message", f"{label} is being made by {owner}; waiting for it"))

    def _connect(self) -> None:
        if not self._is_connected:
            compute = self.study.recipe.compute
            needed = compute.needed(pretrains=any(arm.objective is not None for arm in self.study.recipe.arms))
            ray = connected(
                cpus=int(needed["CPU"]) - SPARE_CPUS, gpus=needed["GPU"], address=self._address,
                wait_minutes=compute.wait_for_nodes_minutes, tell=lambda line: self.study.emit(Event("message", line)),
            )  # fmt: skip
            self._stack.enter_context(ray)
            self._is_connected = True
            if self._usage is not None:
                self._usage.slots = trials_held(compute)

    @cached_property
    def context(self) -> Context:
        """What tasks need; brings the decoded images onto every node."""
        return self._context(self.study.dataset)

    def _context_of(self, shifted: ShiftedSet) -> Context:
        return self._context(self.study.others[shifted.params.dataset])

    def _context(self, dataset: Dataset) -> Context:
        study, digest = self.study, digest_json(dataset.card["digests"])
        return Context(study.store.uri, dataset.uri, digest, study.recipe.canonical(), self._resident(dataset.uri))

    def _resident(self, uri: str) -> dict[str, Any]:
        """Brings a dataset's decoded images onto every node, once; returns the arguments of `rows.open_resident`."""
        from medssl.rows import ensure_resident_on_nodes

        if uri not in self._decoded:
            self._connect()
            study, recipe = self.study, self.study.recipe
            dataset = next(d for d in (study.dataset, *study.others.values()) if d.uri == uri)
            label = f"decode {len(dataset):,} images of {dataset.name} at {recipe.images.decode_px} px"
            self.study.emit(Event("begin", label))
            self._decoded[uri] = ensure_resident_on_nodes(
                dataset, recipe.decoding,
                progress=lambda done, total: self.study.emit(Event("progress", label, done, total)),
            )  # fmt: skip
            self.study.emit(Event("end", label))
        return self._decoded[uri]
