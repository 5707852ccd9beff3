"""From a study's finished evaluations to its tables, tests and report.

Scores are the evaluations' own (their markers hold them); what they prove is computed in :mod:`medssl.comparing`.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medssl.arms import Arm
from medssl.artifacts import STUDIES, artifact_name, digest_json, folder, publish
from medssl.claims import Planned, evaluated, fix_claims
from medssl.comparing import Found, Runs, compare
from medssl.errors import MissingKey
from medssl.guards import foreign_look_alikes, look_alikes, look_warnings
from medssl.judging import judge
from medssl.metrics import SCORES
from medssl.outside import Outside
from medssl.pictures import confident_mistakes, embedding_maps, tunings
from medssl.recipe import Recipe
from medssl.recipe_file import dump
from medssl.shifting import shifted_notes, shifted_table, transfers
from medssl.stages.report import format_result_table, render, result_json
from medssl.stages.report_data import COLUMNS, Confusion, DatasetFacts, FirstList, ReportData
from medssl.stages.specs import VERSIONS, Cell, Spec
from medssl.statistics import summarise
from medssl.store import Store

if TYPE_CHECKING:
    from medssl.study import Study

_READERS = 16
_CURRENT = "current.json"
_BY_ARM = ("arms/", "outside/")
"""Where a report's files have names of the recipe: all others are written over by the next report's."""
_NOT_REPORTED = ("medssl", "medssl_version", "shards", "index")
"""Keys of a dataset card that change without changing what a report says."""


@dataclass(frozen=True, eq=False)
class StudyResult:
    """A finished study."""

    study: str
    scores: pd.DataFrame
    """One row per run and metric: arm, protocol, pretraining_seed, label_draw, head_seed, metric, value."""
    summary: pd.DataFrame
    """One row per arm, protocol and metric: mean, std over all runs and over each kind of repeat, and how many."""
    comparisons: pd.DataFrame
    """One row per claim and test: difference, interval, p, and the further columns of `report_data.COLUMNS`."""
    report_uri: str
    """URI of the HTML report."""

    def to_json(self) -> dict[str, Any]:
        """The result for machines: study, arms with values, comparisons."""
        return result_json(self.study, self.scores, self.summary, self.comparisons)

    def to_text(self) -> str:
        """The result table for a terminal."""
        return format_result_table(self.summary, self.comparisons)


def report_name(recipe: Recipe, evaluations: Sequence[str], card: dict[str, Any], index: pd.DataFrame) -> str:
    """Name of the report over these evaluations of a dataset with this card and index."""
    config = recipe.canonical()
    config.pop("compute")
    reported = {key: value for key, value in card.items() if key not in _NOT_REPORTED}
    inputs = {"evaluations": digest_json(list(evaluations)), "dataset": digest_json(reported)}
    if recipe.report.subgroups:  # further columns are in no other digest
        groups = index.loc[index["split"] == recipe.evaluation_split, list(recipe.report.subgroups)].astype(object)
        inputs["subgroups"] = digest_json([[None if pd.isna(v) else str(v) for v in row] for row in groups.to_numpy()])
    return artifact_name("report", VERSIONS["report"], config, inputs)


def load_result(store: Store, recipe: Recipe, name: str) -> StudyResult:
    """The tables of a finished report."""
    saved = json.loads(folder(store, name).read("result.json"))
    frames = {key: pd.DataFrame(saved[key], columns=saved["columns"][key]) for key in ("scores", "summary", "comparisons")}
    return StudyResult(recipe.study, report_uri=_report_uri(store, recipe), **frames)


def build_report(study: Study) -> StudyResult:
    """Computes the tables and writes the report: as an artifact, and as the study's current one under `studies/`."""
    name = study.report_name()
    assert name is not None, "the report is built after the evaluations"
    runs, away = _collect(study), _collect_shifted(study)
    planned = fix_claims(study.store, study.recipe, partial(evaluated, study))
    data = _report_data(study, runs, away, compare(study.recipe, runs | away, planned), planned)
    files = dict(render(data))
    result = StudyResult(study.recipe.study, data.scores, data.summary, data.comparisons, _report_uri(study.store, study.recipe))
    for each in study.outside.values():
        files[f"outside/{each.params.name}{Path(each.params.predictions).suffix}"] = each.content
    files["result.json"] = _dump_result(result)
    files["recipe.yaml"] = dump(study.recipe).encode()
    files |= {f"arms/{arm}.json": json.dumps(index, indent=1).encode() for arm, index in _arm_indexes(study).items()}
    config = study.recipe.canonical()
    version = VERSIONS["report"]
    publish(study.store, name, stage="report", version=version, config=config, inputs={}, files=files, anew=True)
    make_current(study.store, study.recipe.study, name, anew=True)
    return result


def make_current(store: Store, study: str, name: str, *, anew: bool = False) -> None:
    """Makes a finished report the one under `studies/`: what people open, and where `predict` finds the arms.

    Does nothing when it is already, unless `anew`. `current.json` is written last: a copy that was broken off is done again.
    """
    place, source = store.sub(f"{STUDIES}/{study}"), folder(store, name)
    try:
        if not anew and json.loads(place.read(_CURRENT))["report"] == name:
            return
        place.delete(_CURRENT)
    except MissingKey:
        pass
    paths = [entry.key for entry in source.list()]
    for path in paths:
        place.write(path, source.read(path))
    for entry in (entry for prefix in _BY_ARM for entry in place.list(prefix)):
        if entry.key not in paths:  # of an arm of an earlier recipe
            place.delete(entry.key)
    place.write(_CURRENT, json.dumps({"report": name}).encode())


def _report_uri(store: Store, recipe: Recipe) -> str:
    return store.uri_of(f"{STUDIES}/{recipe.study}/report.html")


# -- reading the runs ------------------------------------------------------------------------------------------


def _collect(study: Study) -> dict[tuple[str, str], Runs]:
    """By arm and protocol."""
    rows = study.specs.rows(study.recipe.evaluation_split)
    known = study.specs.index["patient_id"].astype(object)
    judged = _Judged(
        study.specs.labels(rows), known.where(known.notna(), None).to_numpy()[rows].tolist(), len(study.specs.classes)
    )  # fmt: skip
    found = {
        key: _runs(study, key, cells, [study.evaluations(cell) or {} for cell in cells], judged)
        for key, cells in _cells(study).items()
    }
    for protocol in dict.fromkeys(name for _, name in found):
        for name, outside in study.outside.items():
            found[name, protocol] = _outside_runs(study, name, protocol, outside, judged)
    return found


def _outside_runs(study: Study, name: str, protocol: str, outside: Outside, judged: _Judged) -> Runs:
    """An outside arm's models as pretraining seeds of one label draw and one head each."""
    models_MNK = outside.probabilities_MNK
    wide = [model_NK.astype(np.float64) for model_NK in models_MNK]
    scores = {
        metric: np.array([SCORES[metric](model_NK, judged.labels_N, None) for model_NK in wide])[:, None, None]
        for metric in study.recipe.metrics
    }
    return Runs(name, protocol, scores, models_MNK[:, None, None], judged.labels_N, judged.patients_N)


def _collect_shifted(study: Study) -> dict[tuple[str, str], Runs]:
    """By arm and protocol as judged on a shifted set."""
    found = {}
    for shifted in study.specs.shifted.values():
        judged = _Judged(shifted.labels_N, shifted.patients_N, len(shifted.shared))
        for (arm, protocol), cells in _cells(study).items():
            specs = [{each.head_seed: each.spec for each in transfers(study, cell, shifted) or ()} for cell in cells]
            key = arm, shifted.protocol(protocol)
            found[key] = _runs(study, key, cells, specs, judged)
    return found


@dataclass(frozen=True, eq=False)
class _Judged:
    """Images that predictions were made for."""

    labels_N: NDArray[np.int64]
    patients_N: list[str | None]
    classes: int


def _cells(study: Study) -> dict[tuple[str, str], list[Cell]]:
    cells: dict[tuple[str, str], list[Cell]] = {}
    for cell in study.specs.cells():
        cells.setdefault((cell.arm.name, cell.protocol.name), []).append(cell)
    return cells


def _runs(
    study: Study, key: tuple[str, str], cells: list[Cell], by_cell: Sequence[Mapping[int, Spec]], judged: _Judged
) -> Runs:  # fmt: skip
    seeds, draws = (1 + max(getattr(c, part) for c in cells) for part in ("pretraining_seed", "label_draw"))
    shape = (seeds, draws, cells[0].protocol.head_seeds)
    specs = [spec for specs in by_cell for spec in specs.values()]
    positions = [(c.pretraining_seed, c.label_draw, s) for c, specs in zip(cells, by_cell, strict=True) for s in specs]
    scores = {metric: np.full(shape, np.nan) for metric in study.recipe.metrics}
    probabilities = np.zeros((*shape, len(judged.labels_N), judged.classes), dtype=np.float32)
    temperatures = np.full(shape, np.nan)
    with ThreadPoolExecutor(_READERS) as pool:
        tables = pool.map(lambda s: read_probabilities(study.store, s.name), specs)
        for position, marker, read in zip(positions, study.markers(specs), tables, strict=True):
            probabilities[position] = read
            temperatures[position] = marker.facts.get("temperature") or np.nan
            stored = marker.facts["scores"]
            for metric, values in scores.items():  # an evaluation of an earlier medssl lacks what is newer than it
                if metric in stored:
                    values[position] = stored[metric]
                else:
                    values[position] = SCORES[metric](read.astype(np.float64), judged.labels_N, None)
    return Runs(*key, scores, probabilities, judged.labels_N, judged.patients_N, temperatures)


def read_probabilities(store: Store, name: str) -> NDArray[np.float32]:
    """Class probabilities (N, K) that an evaluation stored, in the order of the test rows."""
    table = pq.read_table(io.BytesIO(folder(store, name).read("predictions.parquet")))
    columns = [c for c in table.column_names if c.startswith("p_")]
    return np.stack([table[c].to_numpy() for c in columns], axis=1).astype(np.float32)


# -- tables ----------------------------------------------------------------------------------------------------


def _scores_frame(runs: dict[tuple[str, str], Runs]) -> pd.DataFrame:
    records = [
        (run.arm, run.protocol, p, d, s, metric, float(values[p, d, s]))
        for run in runs.values()
        for metric, values in run.metrics.items()
        for p, d, s in np.ndindex(values.shape)
    ]
    return pd.DataFrame(records, columns=list(COLUMNS["scores"]))


def _summary_frame(runs: dict[tuple[str, str], Runs]) -> pd.DataFrame:
    records = []
    for run in runs.values():
        for metric, values in run.metrics.items():
            spread = summarise(values)
            records.append({
                "arm": run.arm, "protocol": run.protocol, "metric": metric, "mean": spread.mean, "std": spread.std,
                "std_head": spread.head_seed.std, "std_draw": spread.label_draw.std,
                "std_pretraining": spread.pretraining_seed.std,
                "n": values.size, "n_pretraining": values.shape[0], "n_draw": values.shape[1], "n_head": values.shape[2],
            })  # fmt: skip
    return pd.DataFrame(records, columns=list(COLUMNS["summary"]))


def _confusions(study: Study, runs: Mapping[tuple[str, str], Runs]) -> dict[tuple[str, str], Confusion]:
    sets = study.specs.shifted.values()
    shared = {each.protocol(protocol.name): each.shared for each in sets for protocol in study.recipe.protocols}
    found = {}
    for key, run in runs.items():
        if run.labels_N.ndim == 2:  # of findings the counts are a table of their own
            continue
        classes = shared.get(key[1], study.specs.classes)
        predicted = run.probabilities_PDSNK.argmax(axis=-1).reshape(-1, len(run.labels_N))
        flat = (run.labels_N[None] * len(classes) + predicted).ravel()
        counts = np.bincount(flat, minlength=len(classes) ** 2).reshape(len(classes), -1) / len(predicted)
        found[key] = Confusion(classes, counts)
    return found


def _report_data(
    study: Study, runs: dict[tuple[str, str], Runs], away: dict[tuple[str, str], Runs], found: Found, planned: Planned
) -> ReportData:  # fmt: skip
    from medssl.stages.report_facts import (
        arm_facts,
        feeding,
        hardware,
        histories,
        label_curves,
        leaks,
        mix_notes,
        monitors,
        neighbour_warnings,
        outside_facts,
        published_tables,
        range_tests,
        searches,
        versions,
        view_sheets,
        warnings,
    )

    encoders = study.encoders()
    curves = histories(study.store, encoders)
    recipe = study.recipe
    main_protocol = recipe.comparisons[0].protocol if recipe.comparisons else recipe.protocols[0].name
    return ReportData(
        study=recipe.study,
        description=recipe.description,
        split=recipe.evaluation_split,
        main_metric=recipe.comparisons[0].metric if recipe.comparisons else recipe.metrics[0],
        main_protocol=main_protocol,
        interval_level=recipe.bootstrap.level,
        arms=[*(arm_facts(recipe, arm) for arm in recipe.arms), *map(outside_facts, study.outside.values())],
        datasets=[_own_facts(study), *_shifted_facts(study)],
        scores=_scores_frame(runs | away),
        summary=_summary_frame(runs | away),
        comparisons=pd.DataFrame(found.rows, columns=list(COLUMNS["comparisons"])),
        searches=searches([(a, p, study.marker(s)) for a, p in study.searches() if (s := study.search_spec(a, p))]),
        search_metrics={p.name: p.search.metric for p in recipe.protocols},
        histories=curves,
        monitors=monitors(study.store, encoders),
        tunings=tunings(study),
        range_tests=range_tests(study.store, encoders),
        confusions=_confusions(study, runs | away),
        published=published_tables(recipe),
        tables=recipe.tables,
        figures=recipe.figures,
        label_curves=label_curves(recipe, study.specs),
        shifted=shifted_table(study, runs, away),
        shifted_notes=shifted_notes(study),
        **judge(recipe, study.specs, runs),
        embeddings=embedding_maps(study),
        mistakes=confident_mistakes(study, runs, main_protocol),
        view_sheets=view_sheets(study.store, encoders) if recipe.report.images else {},
        recipe_yaml=dump(recipe),
        overrides=study.overrides,
        versions=versions(),
        leaks=leaks(recipe),
        warnings=[
            *warnings(recipe), *neighbour_warnings(recipe, study.specs), *look_warnings(study), *foreign_look_alikes(study),
        ],
        hardware=hardware(),
        feeding=feeding(recipe, curves),
        same_against_same=found.same,
        first_list=FirstList(planned.recipe, planned.evaluated_before),
        notes=[*found.notes, *mix_notes(recipe.arms, study.specs)],
    )


def _own_facts(study: Study) -> DatasetFacts:
    from medssl.stages.report_facts import dataset_facts, finding_facts, patients

    index, judged = study.specs.index, study.specs.rows(study.recipe.evaluation_split)
    copies, alike = look_alikes(index, study.recipe.evaluation_split, judged)
    return replace(
        dataset_facts(study.dataset, study.recipe),
        judged_images=len(judged),
        judged_patients=patients(index.loc[judged, "patient_id"]),
        copies=copies,
        look_alikes=alike,
        findings=finding_facts(study.specs) if study.specs.findings else {},
    )


def _shifted_facts(study: Study) -> list[DatasetFacts]:
    """Of the shifted sets' datasets, each once."""
    from medssl.stages.report_facts import dataset_facts

    names = dict.fromkeys(each.dataset for each in study.recipe.shifted)
    found = [dataset_facts(study.others[name], study.recipe) for name in names]
    return [replace(facts, role="shifted set", evaluated=False, bags={}) for facts in found]


def _arm_indexes(study: Study) -> dict[str, dict[str, Any]]:
    """Where `predict` finds the evaluations of each arm, and `export` its encoders, by pretraining seed."""
    indexes: dict[str, dict[str, Any]] = {
        arm.name: {"study": study.recipe.study, "arm": arm.name, "encoders": _encoders(study, arm), "evaluations": []}
        for arm in study.recipe.arms
    }
    for cell in study.specs.cells():
        for seed, spec in (study.evaluations(cell) or {}).items():
            indexes[cell.arm.name]["evaluations"].append({
                "protocol": cell.protocol.name, "pretraining_seed": cell.pretraining_seed, "label_draw": cell.label_draw,
                "seed": seed, "artifact": spec.name,
            })  # fmt: skip
    return indexes


def _encoders(study: Study, arm: Arm) -> dict[str, str]:
    specs = {seed: study.specs.encoder(arm, seed) for seed in study.specs.pretraining_seeds(arm)}
    return {str(seed): spec.name for seed, spec in specs.items() if spec is not None}


def _dump_result(result: StudyResult) -> bytes:
    frames = {"scores": result.scores, "summary": result.summary, "comparisons": result.comparisons}
    saved: dict[str, Any] = {
        key: [[_plain(v) for v in row] for row in frame.to_numpy().tolist()] for key, frame in frames.items()
    }
    saved["columns"] = {key: list(frame.columns) for key, frame in frames.items()}
    return json.dumps(saved, allow_nan=False).encode()


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
