"""The claims of a study: which were fixed before it was first run, and how small a difference its design can show.

The first run of a study writes the list of its comparisons, with their margins, to `studies/<name>/planned.json`, before
anything is evaluated; nothing writes it again. A report marks every comparison that is not in it and lists those that are
in it and not in the recipe any more. Another list needs a study of another name, and the file then says how many of its
evaluations were there already.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from medssl.artifacts import STUDIES, digest_json
from medssl.comparison import Comparison
from medssl.errors import MissingKey, StoreError
from medssl.recipe import Recipe
from medssl.stages.report_text import metric_title, plural
from medssl.statistics import Scatter, smallest_detectable_difference, smallest_equivalence_margin
from medssl.store import Store

if TYPE_CHECKING:
    from medssl.study import Study

PLANNED = "planned.json"
POWER = 0.8
"""Chance with which a difference that a design can detect is found."""


# -- which were fixed beforehand -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """The comparisons of a study as they were when it was first run."""

    comparisons: tuple[Comparison, ...]
    recipe: str
    """Digest of the recipe that fixed them, without `compute`."""
    evaluated_before: int
    """Evaluations of that recipe that were in the store already: made by another study, or by a version that kept no list."""

    def has(self, comparison: Comparison) -> bool:
        """Whether this was claimed from the start, with whatever margin."""
        return comparison.claim in {c.claim for c in self.comparisons}

    def has_margin(self, comparison: Comparison) -> bool:
        """Whether equivalence within this very margin was to be tested from the start."""
        return comparison in self.comparisons

    def dropped(self, reported: Sequence[Comparison]) -> list[Comparison]:
        """Planned comparisons that are not reported, and those whose margin is not."""
        claims, margins = {c.claim for c in reported}, {(c.claim, c.equivalence_margin) for c in reported}
        return [
            c for c in self.comparisons
            if c.claim not in claims or (c.equivalence_margin is not None and (c.claim, c.equivalence_margin) not in margins)
        ]  # fmt: skip

    def to_json(self) -> bytes:
        """As stored."""
        comparisons = [c.canonical() for c in self.comparisons]
        whole = {"comparisons": comparisons, "recipe": self.recipe, "evaluated_before": self.evaluated_before}
        return json.dumps(whole, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Planned:
        """What `to_json` wrote; ValueError for anything else."""
        saved = json.loads(data)
        try:
            comparisons = tuple(Comparison.model_validate(c) for c in saved["comparisons"])
            return cls(comparisons, str(saved["recipe"]), int(saved["evaluated_before"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{error} in a list of planned comparisons") from error


def fix_claims(store: Store, recipe: Recipe, evaluated: Callable[[], int]) -> Planned:
    """The comparisons that were fixed when the study was first run in this store; fixes those of `recipe` if none were.

    Args:
        evaluated: how many evaluations of the study are finished; asked only when the list is written.

    Raises:
        StoreError: the list in the store is not one that medssl wrote.
    """
    place = store.sub(f"{STUDIES}/{recipe.study}")
    try:
        data = place.read(PLANNED)
    except MissingKey:
        config = recipe.canonical()
        config.pop("compute")
        planned = Planned(recipe.comparisons, digest_json(config), evaluated())
        if place.create(PLANNED, planned.to_json()):
            return planned
        data = place.read(PLANNED)  # another run of the study was first
    try:
        return Planned.from_json(data)
    except ValueError as error:
        where = place.uri_of(PLANNED)
        raise StoreError(f"{where} is not as medssl wrote it ({error}): put it back, or run the study by another name") from None


def evaluated(study: Study) -> int:
    """Evaluations of a study that are finished."""
    specs = [spec for cell in study.specs.cells() for spec in (study.evaluations(cell) or {}).values()]
    return sum(study.is_finished(spec) for spec in specs)


# -- what the design can show ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detectable:
    """What a study's design can show of one comparison, before anything is run."""

    better: str
    than: str
    protocol: str
    metric: str
    difference: float
    """Smallest true difference that the nested bootstrap finds with this power, uncorrected for the number of tests."""
    margin: float | None
    """Smallest margin within which two equal arms are shown to be equivalent; None where the recipe has no margin."""
    wanted_margin: float | None
    """The recipe's margin."""
    power: float
    level: float
    pretraining_seeds: tuple[int, int]
    """Of the two arms."""
    label_draws: int
    head_seeds: int
    patients: int
    """Among the judged images, each unknown one counted as one."""
    notes: tuple[str, ...]
    """What the comparison will say nothing about."""

    def to_text(self) -> str:
        """One line."""
        first, second = self.pretraining_seeds
        seeds = plural(first, "seed") if first == second else f"{first} and {second} seeds"
        repeats = [seeds, plural(self.label_draws, "draw"), plural(self.head_seeds, "head"), plural(self.patients, "patient")]
        what = f"detect a difference of {self.difference:.3f}" if self.difference < 1 else "hardly detect any difference"
        line = (
            f"{self.better} over {self.than}, {self.protocol}: can {what} in {metric_title(self.metric)} "
            f"({self.power:.0%} power) with {', '.join(repeats)}"
        )
        if self.margin is not None and self.wanted_margin is not None:
            line += f"; equivalence within {self.margin:.3f} if they are equal (the recipe asks for {self.wanted_margin:g})"
        return "; ".join([line, *self.notes])


def detectable(study: Study) -> tuple[Detectable, ...]:
    """What the design can show of each comparison, assuming the default `Scatter`; nothing where there is one patient."""
    own = study.specs.index.loc[study.specs.rows(study.recipe.evaluation_split), "patient_id"]
    judged: dict[str | None, pd.Series] = {None: own}
    judged |= {name: each.index.loc[each.rows, "patient_id"] for name, each in study.specs.shifted.items()}
    patients = {name: int(ids.nunique() + ids.isna().sum()) for name, ids in judged.items()}
    return tuple(_detectable(study, c, patients[c.shifted]) for c in study.recipe.comparisons if patients[c.shifted] > 1)


def _detectable(study: Study, comparison: Comparison, patients: int) -> Detectable:
    recipe = study.recipe
    arms, protocol = {a.name: a for a in recipe.arms}, next(p for p in recipe.protocols if p.name == comparison.protocol)
    both = [arms.get(name) for name in (comparison.better, comparison.than)]
    first, second = (
        len(study.specs.pretraining_seeds(arm, protocol)) if arm else len(study.outside[name].probabilities_MNK)
        for name, arm in zip((comparison.better, comparison.than), both, strict=True)
    )
    draws = recipe.draws_of(protocol)
    level = round(1 - recipe.bootstrap.level, 12)
    design: dict[str, Any] = {
        "pretraining_seeds": (first, second), "label_draws": draws, "head_seeds": (protocol.head_seeds,) * 2,
        "patients": patients, "power": POWER, "level": level,
    }  # fmt: skip
    seeds = zip(both, (first, second), strict=True)
    single = [arm.name for arm, n in seeds if arm and n == 1 and (arm.objective or arm.is_random)]
    notes = [f"nothing about other pretraining seeds of {name}, which has one" for name in single]
    notes += ["nothing about other draws of the labels: there is one"] if draws == 1 else []
    asked = comparison.equivalence_margin
    return Detectable(
        *comparison.claim,
        difference=smallest_detectable_difference(**design),
        margin=None if asked is None else smallest_equivalence_margin(**design),
        wanted_margin=asked, power=POWER, level=level, pretraining_seeds=(first, second), label_draws=draws,
        head_seeds=protocol.head_seeds, patients=patients, notes=tuple(notes),
    )  # fmt: skip


def assumptions(comparisons: Sequence[Detectable]) -> str:
    """What the detectable differences rest on, in a line."""
    found = Scatter()
    text = (
        "This assumes the standard deviations of balanced accuracy that a linear probe had on HAM10000: "
        f"{found.pretraining_seed:.3f} over pretraining seeds, {found.label_draw:.3f} over label draws, {found.head_seed:.3f} "
        f"over heads, and a standard error of {found.patient:.2f}/√n over n patients. Other data, metrics and protocols scatter "
        "otherwise."
    )
    tests = len(comparisons) + sum(c.wanted_margin is not None for c in comparisons)
    alone = f" Each number is of one test by itself; the report corrects {tests} together (Holm), which takes more."
    return text + (alone if tests > 1 else "")
