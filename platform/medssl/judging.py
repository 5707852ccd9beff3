"""From a study's saved predictions to what its report says of them beside the scores: class by class, how far probabilities
can be believed, per patient, by subgroup.

Everything is computed for each run and averaged over all runs of an arm under a protocol, so a number here is about a typical
run and never about the runs' mean prediction.

Labels are of classes (N,) or of findings (N, F), as in `medssl.metrics`, and every number here is of either.

Shapes: M runs of an arm, N judged images, K classes or F findings, P, D, S pretraining seeds, label draws, head seeds (M = P *
D * S). How often a class occurs is (K,); how often a finding is not there, and is, (F, 2): written K in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medssl.calibration import Reliability, apply_temperature, brier_score, change_prior, decision_curve, reliability_counts
from medssl.errors import RecipeError, nearest
from medssl.influence import SLOPES, mean_influence
from medssl.metrics import (
    SCORES,
    UNKNOWN,
    average_precision_per_class,
    counts,
    expected_calibration_error,
    per_patient,
    roc_auc_per_class,
    sensitivity_at_specificity,
    torn_groups,
)
from medssl.metrics import class_scores as scores_of_classes
from medssl.protocols import Protocol
from medssl.recipe import Recipe
from medssl.stages.report_data import COLUMNS, DecisionCurves, UnitFacts
from medssl.stages.specs import Specs
from medssl.subgroups import groups_of, patient_interval

if TYPE_CHECKING:
    from medssl.comparing import Runs

    AllRuns = Mapping[tuple[str, str], Runs]

_THRESHOLDS = np.arange(1, 100) / 100
_UNITS = {"patient": "patient_id", "bag": "bag_id"}


def check_report(recipe: Recipe, specs: Specs) -> None:
    """Refuses what the dataset cannot answer; RecipeError with one line."""
    wanted, classes = recipe.report, specs.classes
    if wanted.decision_class is not None and wanted.decision_class not in classes:
        raise RecipeError(f"report.decision_class is '{wanted.decision_class}': {nearest(wanted.decision_class, classes)}")
    if wanted.deployment_prior is not None:
        unknown = sorted(set(wanted.deployment_prior) - set(classes))
        if unknown:
            raise RecipeError(f"report.deployment_prior names class '{unknown[0]}': {nearest(unknown[0], classes)}")
        missing = [name for name in classes if name not in wanted.deployment_prior]
        if missing:
            raise RecipeError(f"report.deployment_prior lacks class '{missing[0]}': give every class's frequency (0 if none)")
    further = further_columns(specs.index)
    for name in wanted.subgroups:
        if name not in further:
            has = nearest(name, further) if further else "the dataset has no further columns (ingest a table with site, sex ...)"
            raise RecipeError(f"report.subgroups names column '{name}': {has}")
        try:
            groups_of(name, specs.index.loc[specs.rows(recipe.evaluation_split), name], wanted.bands.get(name, ()))
        except ValueError as error:
            raise RecipeError(f"report.subgroups: {error}") from None


def further_columns(index: pd.DataFrame) -> list[str]:
    """Columns of a dataset's index that its owner added: what images can be grouped by."""
    from medssl.datasets.rowset import RESERVED_COLUMNS

    return [str(name) for name in index.columns if name not in RESERVED_COLUMNS]


def judge(recipe: Recipe, specs: Specs, runs: AllRuns) -> dict[str, Any]:
    """Fields of `ReportData` that follow from the predictions of all runs, by (arm, protocol)."""
    protocols = {protocol.name: protocol for protocol in recipe.protocols}
    draws = {
        name: [_frequencies(specs.labels(specs.draw(d, p)), len(specs.classes)) for d in range(recipe.draws_of(p))]
        for name, p in protocols.items()
    }
    outside = [arm.name for arm in recipe.outside]
    trained = {
        key: unknown_priors(draws[key[1]], run) if key[0] in outside else trained_priors(protocols[key[1]], draws[key[1]], run)
        for key, run in runs.items()
    }
    return {
        "findings": specs.findings,
        "class_scores": class_scores(runs, specs.classes, recipe.report.specificity),
        "finding_calls": finding_calls(runs, specs.classes),
        "specificity": recipe.report.specificity,
        **_calibration(runs, draws, trained),
        **_priors(recipe, specs, runs, trained),
        "decisions": _decisions(recipe, specs, runs, draws, trained),
        **_units(recipe, specs, runs),
        "subgroups": _subgroups(recipe, specs, runs),
        "smallest_group": recipe.report.smallest_group,
    }


def _frequencies(labels_N: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Images of each class (K,), or without and with each finding (F, 2)."""
    if labels_N.ndim == 2:
        return np.stack([(labels_N == side).sum(axis=0) for side in (0, 1)], axis=1)
    return np.bincount(labels_N, minlength=classes)


def models_of(run: Runs) -> NDArray[np.float32]:
    """Probabilities (M, N, K) of all runs, in the order of pretraining seeds, then draws, then head seeds."""
    return run.probabilities_PDSNK.reshape(-1, *run.probabilities_PDSNK.shape[3:])


def _draw_of_models(run: Runs) -> NDArray[np.int64]:
    """Label draw of each run, (M,)."""
    seeds, draws, heads = run.probabilities_PDSNK.shape[:3]
    return np.tile(np.repeat(np.arange(draws), heads), seeds)


def trained_priors(protocol: Protocol, draws: list[NDArray[np.int64]], run: Runs) -> NDArray[np.float64]:
    """Class frequencies (M, K) that each run's training saw: even ones under class weights or over-sampling, else those of its
    label draw."""
    if protocol.kind == "knn":
        balanced = protocol.probe.balanced
    elif protocol.kind == "fine_tune":
        balanced = protocol.training.class_weights == "balanced" or protocol.training.over_sample
    else:
        balanced = protocol.probe.class_weights == "balanced"
    counts_DK = np.stack(draws).astype(np.float64)
    seen_DK = np.ones_like(counts_DK) if balanced else counts_DK
    return seen_DK[_draw_of_models(run)]


def unknown_priors(draws: list[NDArray[np.int64]], run: Runs) -> NDArray[np.float64]:
    """The same for models from outside, of whose training nothing is known: they are taken for trained at these frequencies."""
    return np.stack(draws).astype(np.float64)[_draw_of_models(run)]


# -- class by class --------------------------------------------------------------------------------------------


def class_scores(runs: AllRuns, classes: list[str], specificity: float) -> pd.DataFrame:
    """Scores of each class against the rest, mean over the runs that have them (columns of `COLUMNS["class_scores"]`)."""
    records = []
    for (arm, protocol), run in runs.items():
        labels_N, found = run.labels_N, []
        for model_NK in models_of(run):
            wide_NK = model_NK.astype(np.float64)
            each = scores_of_classes(counts(wide_NK, labels_N))
            found.append([
                each.support, each.precision, each.recall, each.f1, roc_auc_per_class(wide_NK, labels_N),
                average_precision_per_class(wide_NK, labels_N),
                sensitivity_at_specificity(wide_NK, labels_N, specificity=specificity),
            ])  # fmt: skip
        means_KF = _mean_known(np.array(found)).T
        records += [(arm, protocol, name, *values.tolist()) for name, values in zip(classes, means_KF, strict=True)]
    return pd.DataFrame(records, columns=list(COLUMNS["class_scores"]))


def finding_calls(runs: AllRuns, names: list[str]) -> pd.DataFrame:
    """Images in which each finding is there and named, there and not named, and so on (columns of `COLUMNS["finding_calls"]`)."""
    records = []
    for (arm, protocol), run in runs.items():
        if run.labels_N.ndim == 1:
            continue
        found = []
        for model_NF in models_of(run):
            each = counts(model_NF, run.labels_N)
            absent, rejected = each.rejected
            found.append([each.hits, each.support - each.hits, absent - rejected, rejected])
        means_F4 = np.mean(found, axis=0).T
        records += [(arm, protocol, name, *values.tolist()) for name, values in zip(names, means_F4, strict=True)]
    return pd.DataFrame(records, columns=list(COLUMNS["finding_calls"]))


def _mean_known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the first axis of what is not NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    number = known.sum(axis=0)
    return np.where(number > 0, np.where(known, values, 0.0).sum(axis=0) / np.maximum(number, 1), np.nan)


# -- can the probabilities be believed ---------------------------------------------------------------------------


def _calibration(
    runs: AllRuns, draws: Mapping[str, list[NDArray[np.int64]]], trained: Mapping[tuple[str, str], NDArray[np.float64]]
) -> dict[str, Any]:
    records, reliabilities = [], {}
    for key, run in runs.items():
        models_MNK, labels_N = models_of(run), run.labels_N
        plain = _believed(models_MNK, labels_N)
        put_back = _put_back(run, draws[key[1]], trained[key])
        back = _believed(put_back, labels_N) if put_back is not None else None
        curve, images = plain[0], plain[0].images_B.sum()
        confidence, right = ((part * curve.images_B).sum() / images for part in (curve.confidence_B, curve.accuracy_B))
        records.append((*key, confidence, right, *plain[1:], *(back[1:] if back else (float("nan"),) * 2), *_scaled(run)))
        reliabilities[key] = (curve, back[0] if back else None)
    return {"calibration": pd.DataFrame(records, columns=list(COLUMNS["calibration"])), "reliabilities": reliabilities}


def _scaled(run: Runs) -> tuple[float, float, float]:
    """Mean temperature, and calibration error and Brier score after it; NaN where a run has none."""
    if run.temperatures_PDS is None or not np.isfinite(run.temperatures_PDS).all():
        return (float("nan"),) * 3
    temperatures_M = run.temperatures_PDS.ravel()
    findings = run.labels_N.ndim == 2
    models = (
        apply_temperature(p_NK, float(t), findings=findings) for p_NK, t in zip(models_of(run), temperatures_M, strict=True)
    )
    return float(temperatures_M.mean()), *_believed(models, run.labels_N)[1:]


def _put_back(run: Runs, draws: list[NDArray[np.int64]], trained_MK: NDArray[np.float64]) -> Iterator[NDArray[np.float64]] | None:
    """Probabilities (N, K) of each run with the class frequencies of its labelled images, where class weights or
    over-sampling took them out; None where neither did.
    """
    seen_MK = np.stack(draws)[_draw_of_models(run)]
    if np.allclose(_shares(trained_MK), _shares(seen_MK)):
        return None
    return (change_prior(*given) for given in zip(models_of(run), trained_MK, seen_MK, strict=True))


def _believed(models: Iterable[NDArray[Any]], labels_N: NDArray[np.int64]) -> tuple[Reliability, float, float]:
    """Reliability of all runs' predictions together, and the mean over runs of calibration error and Brier score."""
    kept = [(reliability_counts(p_NK, labels_N), expected_calibration_error(p_NK, labels_N), brier_score(p_NK, labels_N))
            for p_NK in models]  # fmt: skip
    together = Reliability.of_counts(np.sum([counts_3B for counts_3B, _, _ in kept], axis=0))
    return together, float(np.mean([error for _, error, _ in kept])), float(np.mean([brier for _, _, brier in kept]))


def _shares(counts_MK: NDArray[Any]) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = counts_MK / counts_MK.sum(axis=-1, keepdims=True)
    return shares


def _priors(
    recipe: Recipe, specs: Specs, runs: AllRuns, trained: Mapping[tuple[str, str], NDArray[np.float64]]
) -> dict[str, Any]:
    """Scores where classes are as frequent as `report.deployment_prior` says, images of a class looking as they do here.

    Each image counts by how much more frequent its class is there; the probabilities are those of the runs, and those after
    Bayes' rule has exchanged the frequencies that the training saw.
    """
    if recipe.report.deployment_prior is None:
        return {}
    there_K = np.array([recipe.report.deployment_prior[name] for name in specs.classes], dtype=np.float64)
    there_K /= there_K.sum()
    records = []
    for key, run in runs.items():
        labels_N = run.labels_N
        weights_N = (there_K / np.bincount(labels_N, minlength=len(there_K)))[labels_N]
        for metric in recipe.metrics:
            found = []
            for model_NK, seen_K in zip(models_of(run), trained[key], strict=True):
                changed_NK = change_prior(model_NK, seen_K, there_K)
                found.append([SCORES[metric](p.astype(np.float64), labels_N, weights_N) for p in (model_NK, changed_NK)])
            records.append((*key, metric, float(np.mean(run.metrics[metric])), *np.mean(found, axis=0).tolist()))
    return {
        "deployment_prior": dict(zip(specs.classes, there_K.tolist(), strict=True)),
        "priors": pd.DataFrame(records, columns=list(COLUMNS["priors"])),
    }


def _decisions(
    recipe: Recipe,
    specs: Specs,
    runs: AllRuns,
    draws: Mapping[str, list[NDArray[np.int64]]],
    trained: Mapping[tuple[str, str], NDArray[np.float64]],
) -> DecisionCurves | None:
    """Net benefit with class frequencies put back: a threshold is a probability, so the probabilities have to be some."""
    name = recipe.report.decision_class
    if name is None:
        return None
    position = specs.classes.index(name)
    models, all_T, share = {}, np.zeros(len(_THRESHOLDS)), 0.0
    for key, run in runs.items():
        put_back = _put_back(run, draws[key[1]], trained[key])
        models_NK = models_of(run) if put_back is None else put_back
        if run.labels_N.ndim == 2:
            known_N, positive_N = run.labels_N[:, position] != UNKNOWN, run.labels_N[:, position] == 1
        else:
            known_N, positive_N = np.ones(len(run.labels_N), bool), run.labels_N == position
        positive_N = positive_N[known_N]
        curves = [decision_curve(model_NK[known_N, position], positive_N, _THRESHOLDS) for model_NK in models_NK]
        models[key] = np.mean([curve.model_T for curve in curves], axis=0)
        all_T, share = curves[0].all_T, float(positive_N.mean())
    return DecisionCurves(name, share, _THRESHOLDS, all_T, models)


# -- per patient, by subgroup ------------------------------------------------------------------------------------


def _units(recipe: Recipe, specs: Specs, runs: AllRuns) -> dict[str, Any]:
    """Scores of patients, and of bags where they are others, by the mean probability over their images."""
    rows = specs.rows(recipe.evaluation_split)
    labels_N = specs.labels(rows)
    facts: list[UnitFacts] = []
    records: list[tuple[Any, ...]] = []
    grouped: list[list[int]] = []
    for unit, column in _UNITS.items():
        ids = specs.index.loc[rows, column].astype(object)
        units = ids.where(ids.notna(), None).tolist()
        numbers: dict[object, int] = {}
        unit_N = [numbers.setdefault(n if name is None else (name,), len(numbers)) for n, name in enumerate(units)]
        if len(numbers) == len(unit_N) or unit_N in grouped:
            continue
        grouped.append(unit_N)
        kept_N, found = _whole(unit, np.array(unit_N), labels_N)
        facts.append(found)
        if found.several:
            names = [name for name, keep in zip(units, kept_N, strict=True) if keep]
            records += [(unit, *key, *values) for key, run in runs.items() for values in _by_unit(recipe, run, kept_N, names)]
    return {"unit_facts": facts, "units": pd.DataFrame(records, columns=list(COLUMNS["units"]))}


def _whole(unit: str, unit_N: NDArray[np.int64], labels_N: NDArray[np.int64]) -> tuple[NDArray[np.bool_], UnitFacts]:
    """Which images are of units with one label, and how many units there are of either sort."""
    torn_U = torn_groups(unit_N, labels_N)
    kept_N, images_U = ~torn_U[unit_N], np.bincount(unit_N)
    several = int((images_U[~torn_U] > 1).sum())
    facts = UnitFacts(unit, int((~torn_U).sum()), int(kept_N.sum()), several, int(torn_U.sum()), int((~kept_N).sum()))
    return kept_N, facts


def _by_unit(
    recipe: Recipe, run: Runs, kept_N: NDArray[np.bool_], units: list[object]
) -> list[tuple[str, float, float]]:
    """Metric, score per image and score per unit, over the kept images."""
    labels_N = run.labels_N[kept_N]
    pairs = []
    for model_NK in models_of(run):
        images_NK = model_NK[kept_N].astype(np.float64)
        units_UK, labels_U = per_patient(images_NK, labels_N, units)
        pairs.append([(SCORES[m](images_NK, labels_N, None), SCORES[m](units_UK, labels_U, None)) for m in recipe.metrics])
    means = np.mean(pairs, axis=0)
    return [(metric, float(image), float(unit)) for metric, (image, unit) in zip(recipe.metrics, means, strict=True)]


def _subgroups(recipe: Recipe, specs: Specs, runs: AllRuns) -> pd.DataFrame:
    rows = specs.rows(recipe.evaluation_split)
    labels_N = specs.labels(rows)
    records = []
    for column in recipe.report.subgroups:
        groups = groups_of(column, specs.index.loc[rows, column], recipe.report.bands.get(column, ()))
        for group, inside_N in groups.items():
            for key, run in runs.items():
                patients = [patient for patient, inside in zip(run.patients_N, inside_N, strict=True) if inside]
                known = [patient for patient in patients if patient is not None]
                sizes = len(patients), len(set(known)) + len(patients) - len(known), _present(labels_N[inside_N])
                scored = len(patients) >= recipe.report.smallest_group
                for metric in recipe.metrics:
                    found = _scored(recipe, run, inside_N, patients, metric) if scored else (float("nan"),) * 3
                    records.append((column, group, *key, metric, *sizes, *found))
    return pd.DataFrame(records, columns=list(COLUMNS["subgroups"]))


def _present(labels_N: NDArray[np.int64]) -> int:
    """Classes that have images, or findings that are there in some."""
    return int((labels_N == 1).any(axis=0).sum()) if labels_N.ndim == 2 else len(np.unique(labels_N))


def _scored(
    recipe: Recipe, run: Runs, inside_N: NDArray[np.bool_], patients: list[str | None], metric: str
) -> tuple[float, float, float]:
    """Mean score of a group over the runs, and its interval over patients where the metric has one."""
    models_MNK, labels_N = models_of(run)[:, inside_N], run.labels_N[inside_N]
    if metric not in SLOPES:
        scores = [SCORES[metric](model_NK.astype(np.float64), labels_N, None) for model_NK in models_MNK]
        return float(np.mean(scores)), float("nan"), float("nan")
    score, slopes_N = mean_influence(models_MNK, labels_N, metric)
    return score, *patient_interval(score, slopes_N, patients, recipe.bootstrap.level)
