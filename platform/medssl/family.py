"""Recipes that stand for a study on each of several datasets: run, plan or report them all, and show them on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medssl.artifacts import STUDIES
from medssl.events import OnEvent
from medssl.recipe_file import Family, load_all
from medssl.results import StudyResult
from medssl.stages.report import ReportData, render_together
from medssl.stages.report_facts import versions
from medssl.store import Store, open_for_writing
from medssl.study import PlanLine, Study, plan, report, run

Given = Family | str | Path | Mapping[str, Any]
"""A recipe, read already or not."""


def run_all(
    recipe: Given,
    store: Store | str,
    *,
    overrides: Sequence[str] = (),
    on_event: OnEvent | None = None,
    address: str | None = None,
) -> dict[str, StudyResult]:
    """Runs what a recipe stands for, one study after the other (see `study.run`); results by dataset's name, or by the study's.
    `overrides` of a recipe that is read already are named in its reports and not applied again.

    Of several the page of all together is at `studies/NAME/report.html` in the store.
    """
    family, opened = _loaded(recipe, overrides), _opened(store)
    if family.together is not None:
        for each in family.recipes.values():
            Study(each, opened)  # what the last one lacks is said before hours of the first
    results = {
        name: run(each, opened, on_event=on_event, address=address, told=overrides) for name, each in family.recipes.items()
    }
    _show_together(family, results, opened)
    return results


def report_all(
    recipe: Given, store: Store | str, *, overrides: Sequence[str] = (), on_event: OnEvent | None = None
) -> dict[str, StudyResult]:
    """Makes the reports of finished studies again (see `study.report`)."""
    family, opened = _loaded(recipe, overrides), _opened(store)
    results = {name: report(each, opened, on_event=on_event, told=overrides) for name, each in family.recipes.items()}
    _show_together(family, results, opened)
    return results


def plan_all(recipe: Given, store: Store | str, *, overrides: Sequence[str] = ()) -> dict[str, list[PlanLine]]:
    """The stages of each study (see `study.plan`); what an earlier one makes for a later one too is `shared` there."""
    family, opened = _loaded(recipe, overrides), _opened(store)
    plans, made = dict[str, list[PlanLine]](), set[str]()
    for each in family.recipes.values():
        lines = plan(each, opened)
        plans[each.study] = [
            replace(line, state="shared", images=0) if line.state == "to do" and line.artifact in made else line for line in lines
        ]
        made |= {line.artifact for line in lines if line.artifact}
    return plans


def page_uri(family: Family, store: Store | str) -> str | None:
    """Where the page of several datasets is; None for a single study."""
    return None if family.together is None else _opened(store).sub(f"{STUDIES}/{family.name}").uri_of("report.html")


def _loaded(recipe: Given, overrides: Sequence[str]) -> Family:
    return recipe if isinstance(recipe, Family) else load_all(recipe, overrides)


def _opened(store: Store | str) -> Store:
    return open_for_writing(store) if isinstance(store, str) else store


def _show_together(family: Family, results: Mapping[str, StudyResult], store: Store) -> None:
    if family.together is None:
        return
    place = store.sub(f"{STUDIES}/{family.name}")
    data = ReportData(
        family.name,
        description=family.description,
        tables=family.together.tables,
        figures=family.together.figures,
        by_dataset={name: result.scores for name, result in results.items()},
        versions=versions(),
    )
    for name, content in render_together(data, {name: result.study for name, result in results.items()}).items():
        place.write(name, content)
