"""What a report is made of: plain frames and facts, filled from the store by the caller, so that rendering is pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medssl.calibration import Reliability
from medssl.forms import FigureForm, TableForm
from medssl.statistics import RecomputedTest
from medssl.training.finder import RangeTest

BOOTSTRAP = "nested bootstrap"
WELCH = "Welch over head seeds"
SAME_AGAINST_SAME = "random against random"
EQUIVALENCE = "equivalence, nested bootstrap"
NOT_REPORTED = "planned, not reported"
"""Names in the column `test` of the comparisons: the evidence, the papers' test, that test where nothing differs, the evidence
that two arms differ by less than a margin, and a claim of the first run that the recipe has no more (a row without numbers)."""

NO_LABEL = "(no label)"
"""Where images are counted by class, what stands for none."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "scores": ("arm", "protocol", "pretraining_seed", "label_draw", "head_seed", "metric", "value"),
    "summary": (
        "arm", "protocol", "metric", "mean", "std", "std_head", "std_draw", "std_pretraining",
        "n", "n_pretraining", "n_draw", "n_head",
    ),
    "comparisons": (
        "better", "than", "protocol", "metric", "difference", "low", "high", "p", "test",
        "p_holm", "effect_size", "margin", "planned",
    ),
    "searches": ("arm", "protocol", "learning_rate", "weight_decay", "score", "best", "on_edge", "stopped"),
    "class_scores": (
        "arm", "protocol", "class", "images", "precision", "recall", "f1", "auc", "average_precision", "sensitivity",
    ),
    "calibration": (
        "arm", "protocol", "confidence", "accuracy", "ece", "brier", "ece_corrected", "brier_corrected",
        "temperature", "ece_scaled", "brier_scaled",
    ),
    "priors": ("arm", "protocol", "metric", "measured", "as_it_is", "corrected"),
    "units": ("unit", "arm", "protocol", "metric", "per_image", "per_unit"),
    "finding_calls": ("arm", "protocol", "finding", "hits", "misses", "false_alarms", "rejections"),
    "shifted": ("set", "arm", "protocol", "metric", "home", "away"),
    "subgroups": (
        "column", "group", "arm", "protocol", "metric", "images", "patients", "classes", "score", "low", "high",
    ),
}  # fmt: skip
"""Columns of the frames. A frame may have more; a missing column reads as empty.

Of the comparisons: `p_holm` is p corrected for the number of tests on the nested bootstrap, `effect_size` Hedges' g over all
runs, `margin` that of an equivalence test (whose interval is at twice its level), `planned` whether it was in the list of the
first run (None where nobody knows, or where it is no claim).
"""


def empty(frame: str) -> pd.DataFrame:
    """An empty frame with the columns of `COLUMNS[frame]`."""
    return pd.DataFrame(columns=list(COLUMNS[frame]))


def complete(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """The frame with every column of `COLUMNS[name]` (missing ones empty), those first, a fresh index."""
    columns = list(COLUMNS[name])
    return frame.reindex(columns=[*columns, *(c for c in frame.columns if c not in columns)]).reset_index(drop=True)


@dataclass(frozen=True)
class ArmFacts:
    """An arm as the report names it. The order of the arms in `ReportData.arms` is their order in tables."""

    name: str
    description: str = ""
    """One phrase, such as `ResNet-18, Barlow Twins, 12 epochs`."""
    kind: Literal["pretrained", "random", "colour", "outside"] = "pretrained"
    """`outside` is predictions from a file, of models whose making nobody knows here.

    `colour` has no encoder: it needs no pretraining seeds, and is the floor for the others."""


@dataclass(frozen=True)
class DatasetFacts:
    """What the dataset card says, as far as a reader needs it."""

    name: str
    role: str = "pretraining and evaluation"
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Images by split and class (`counts["test"]["nv"]`); unlabelled images under the class name NO_LABEL."""
    groups: Mapping[str, int] = field(default_factory=dict)
    """Patients by split (each unknown patient counts as one)."""
    evaluated: bool = True
    """Whether scores were measured on it."""
    judged_images: int = 0
    """Labelled images of the judged split, on which the scores were measured: those without a label are in `counts` alone."""
    judged_patients: int = 0
    """Patients of these images, counted as `groups` are."""
    licence: str = ""
    synthetic: bool = False
    """Drawn by a program: its scores say nothing about patients."""
    leakage_allowed: bool = False
    leakage_patients: int = 0
    """Patients with images on both sides of a split."""
    copies: int = 0
    """Judged images that other splits have too, byte for byte."""
    look_alikes: int = 0
    """Judged images that look nearly like one of another split, copies among them."""
    unknown_patients: int = 0
    """Images without a patient id."""
    rejected: int = 0
    """Images set aside at ingest as unreadable, truncated or missing."""
    pseudonymised: bool = False
    split_seed: int | None = None
    """Seed of the splits that ingest made; None where the user gave them."""
    digest: str = ""
    """Content digest of images and labels, as in the card."""
    bags: Mapping[int, int] = field(default_factory=dict)
    """Number of bags by number of images, of the images for pretraining; empty where no arm pretrains on bags."""
    findings: Mapping[str, Mapping[str, tuple[int, int, int]]] = field(default_factory=dict)
    """Images with a finding, without it, and of which it is not known, by split and finding; empty where images have classes."""


@dataclass(frozen=True, eq=False)
class Confusion:
    """Confusion counts of one arm and protocol on the evaluation split, averaged over all repeats."""

    classes: Sequence[str]
    counts: NDArray[np.floating]
    """(K, K) mean number of images; rows are the true class, columns the predicted one."""


@dataclass(frozen=True)
class SameAgainstSame:
    """How often the test over head seeds finds a difference between two encoders of one arm, where there is none."""

    arm: str
    protocol: str
    metric: str
    pairs: int
    """Pairs of pretraining seeds, within each label draw."""
    share_significant: float
    """Share of them with p below `threshold`."""
    threshold: float = 0.01


@dataclass(frozen=True)
class UnitFacts:
    """How the judged images lie in patients or in bags (lesions, cases)."""

    unit: str
    """patient or bag."""
    units: int
    """Scored ones; an image whose unit is not known is one of its own."""
    images: int
    """Images of the scored ones."""
    several: int
    """Scored ones with more than one image."""
    torn: int
    """Left out because their images have different labels."""
    torn_images: int


@dataclass(frozen=True, eq=False)
class DecisionCurves:
    """Net benefit of acting on the probability of one class, mean over the runs; class frequencies that class weights or
    over-sampling took out of the training are put back first."""

    class_name: str
    share: float
    """Of the judged images that are of the class."""
    thresholds_T: NDArray[np.floating]
    all_T: NDArray[np.floating]
    """Of acting on every image."""
    models: Mapping[tuple[str, str], NDArray[np.floating]]
    """(T,) by (arm, protocol)."""


@dataclass(frozen=True, eq=False)
class EmbeddingMap:
    """Judged images where t-SNE puts their features."""

    points_N2: NDArray[np.floating]
    labels_N: NDArray[np.integer]
    classes: Sequence[str]


@dataclass(frozen=True)
class Mistake:
    """An image that an arm names wrongly and confidently."""

    image_id: str
    label: str
    predicted: str
    confidence: float
    """Mean probability of `predicted` over the runs."""
    png: bytes


@dataclass(frozen=True)
class PublishedFacts:
    """A paper's table and Welch's tests of it."""

    source: str
    metric: str
    runs: int | None
    """Runs of a mean; None where they are not printed."""
    rows: Mapping[str, tuple[float, float | None]]
    """Printed mean and standard deviation; None where none is printed."""
    arms: Mapping[str, str]
    """Arm of the study by row, where one stands for it."""
    protocols: Mapping[str, str]
    """Whose scores these arms show, by row."""
    tests: Sequence[RecomputedTest]


@dataclass(frozen=True)
class FirstList:
    """How the list of comparisons was fixed, when the study was first run."""

    recipe: str
    """Digest of the recipe that fixed it."""
    evaluated_before: int
    """Evaluations of that recipe that had been made by then: with any, the list may have been chosen with scores in view."""


@dataclass(frozen=True, eq=False)
class ReportData:
    """Everything a report shows. Frames have the columns of `COLUMNS`; all but `study` may be empty."""

    study: str
    description: str = ""
    split: str = "test"
    """Split that the scores were measured on: test or val."""
    findings: bool = False
    """Whether images have several findings in place of one class; what is said of classes is said of findings then."""
    main_metric: str = "balanced_accuracy"
    """The metric that the plain-language result and the figures use."""
    main_protocol: str | None = None
    """The protocol named first; None takes the first of the scores."""
    interval_level: float = 0.95
    """Coverage of `low` to `high` in the comparisons."""
    arms: Sequence[ArmFacts] = ()
    """Arms in order; arms of the frames that are not named here follow in order of appearance."""
    datasets: Sequence[DatasetFacts] = ()

    scores: pd.DataFrame = field(default_factory=lambda: empty("scores"))
    summary: pd.DataFrame = field(default_factory=lambda: empty("summary"))
    comparisons: pd.DataFrame = field(default_factory=lambda: empty("comparisons"))
    """`test` is one of the names above, or any other, which is listed as it is."""
    first_list: FirstList | None = None
    """None where nobody knows which comparisons were planned."""
    same_against_same: Sequence[SameAgainstSame] = ()
    """The A/A line over all pairs of seeds, where it was counted (the comparisons hold single pairs)."""
    searches: pd.DataFrame = field(default_factory=lambda: empty("searches"))
    search_metrics: Mapping[str, str] = field(default_factory=dict)
    """What `score` in the searches of a protocol is, measured on validation; balanced accuracy where it is not said."""

    histories: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """Pretraining curves by arm. Columns: seed, step, epoch, then those of CURVES in report_figures and any others."""
    monitors: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """What was measured now and then in a pretraining, by arm of `histories`. Columns: seed, epoch (epochs done), then those of
    MONITOR_CURVES in report_figures and any others."""
    tunings: Mapping[tuple[str, str], pd.DataFrame] = field(default_factory=dict)
    """Fine-tunings by (arm, protocol), means over the runs. Columns: epoch, and what `report_tuning` draws."""
    range_tests: Mapping[tuple[str, int], RangeTest] = field(default_factory=dict)
    """Range tests of the learning-rate finder by (arm, pretraining seed)."""
    confusions: Mapping[tuple[str, str], Confusion] = field(default_factory=dict)
    """By (arm, protocol)."""
    class_scores: pd.DataFrame = field(default_factory=lambda: empty("class_scores"))
    """Scores of each class against the rest, mean over the runs; precision over those that predict the class at all."""
    finding_calls: pd.DataFrame = field(default_factory=lambda: empty("finding_calls"))
    """Of findings: images in which each is there and named, there and not, not there and named, neither; mean over the runs."""
    specificity: float = 0.95
    """That `sensitivity` in the class scores is at."""
    calibration: pd.DataFrame = field(default_factory=lambda: empty("calibration"))
    """Mean over the runs: confidence, accuracy, expected calibration error and Brier score; the last two also with the class
    frequencies of the labelled images put back, NaN where neither class weights nor over-sampling took them out, and after
    temperature scaling, NaN where evaluations have no temperature."""
    reliabilities: Mapping[tuple[str, str], tuple[Reliability, Reliability | None]] = field(default_factory=dict)
    """All runs' predictions together by (arm, protocol): as they are, and with the class frequencies put back."""
    deployment_prior: Mapping[str, float] = field(default_factory=dict)
    """Share of each class where the classifier is to be used."""
    priors: pd.DataFrame = field(default_factory=lambda: empty("priors"))
    """Scores as measured, and with images weighed to the deployment prior: probabilities as they are, and corrected for it."""
    decisions: DecisionCurves | None = None
    units: pd.DataFrame = field(default_factory=lambda: empty("units"))
    """Scores per image and per patient or bag, over the same images."""
    unit_facts: Sequence[UnitFacts] = ()
    published: Sequence[PublishedFacts] = ()
    """What papers print."""
    tables: Sequence[TableForm] = ()
    """Tables in a paper's form."""
    figures: Sequence[FigureForm] = ()
    """Figures in a paper's form."""
    by_dataset: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """Of a recipe with several datasets: the scores of each one's study, for tables and figures that name datasets."""
    label_curves: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Labelled images in one draw by protocol, ascending, by label curve."""
    shifted: pd.DataFrame = field(default_factory=lambda: empty("shifted"))
    """Mean scores at home and on each shifted set, both over the shared classes."""
    shifted_notes: Sequence[str] = ()
    """What was judged of each shifted set."""
    subgroups: pd.DataFrame = field(default_factory=lambda: empty("subgroups"))
    """Scores by group of a column, with intervals over patients; NaN for groups of fewer images than `smallest_group`."""
    smallest_group: int = 1
    embeddings: Mapping[str, EmbeddingMap] = field(default_factory=dict)
    """By arm."""
    mistakes: Mapping[str, Sequence[Mistake]] = field(default_factory=dict)
    """By arm, under the main protocol, the most confident first; empty unless the recipe allows images in reports."""
    view_sheets: Mapping[str, bytes] = field(default_factory=dict)
    """A PNG of augmented views by arm."""
    feeding: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Rates of the feeding modes; every column is shown as it is named."""

    recipe_yaml: str = ""
    """The recipe as it was run, overrides applied."""
    overrides: Sequence[str] = ()
    """`--set` values of this run, such as `arms.0.epochs=5`."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Such as {"medssl": "0.1.0", "torch": "2.9.1", "ray": "2.60.0"}."""
    hardware: str = ""
    leaks: Sequence[str] = ()
    """Where images or patients that are judged were trained on, and that was allowed. Shown in red."""
    warnings: Sequence[str] = ()
    """What a reader must know before believing the numbers (collapse, a stopped run, leakage). Shown first."""
    notes: Sequence[str] = ()
    """What a reader may want to know."""

    @property
    def judged(self) -> str:
        """The split in words: test or validation."""
        return {"val": "validation"}.get(self.split, self.split)


def arm_order(data: ReportData) -> list[str]:
    """Names of all arms: those of `data.arms` first, then the others in order of appearance."""
    names = [arm.name for arm in data.arms]
    for frame in (data.summary, data.scores):
        if "arm" in frame:
            names += [str(name) for name in frame["arm"].unique()]
    names += list(data.histories)
    return list(dict.fromkeys(names))


def protocol_order(data: ReportData) -> list[str]:
    """Names of all protocols, the main one first."""
    names = [] if data.main_protocol is None else [data.main_protocol]
    for frame in (data.summary, data.scores):
        if "protocol" in frame:
            names += [str(name) for name in frame["protocol"].unique()]
    return list(dict.fromkeys(names))


def metric_order(data: ReportData) -> list[str]:
    """Names of all metrics, the main one first."""
    names = [data.main_metric]
    for frame in (data.summary, data.scores):
        if "metric" in frame:
            names += [str(name) for name in frame["metric"].unique()]
    return list(dict.fromkeys(names))


def arm_kind(data: ReportData, name: str) -> str:
    """Kind of an arm; one that `data.arms` does not name is its own name if that is a kind, else `pretrained`."""
    kinds = {arm.name: arm.kind for arm in data.arms}
    return kinds.get(name, name if name in ("random", "colour") else "pretrained")
