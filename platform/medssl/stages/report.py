"""The report stage: everything a study found, as one self-contained HTML file, Markdown, and CSV tables.

`render` is a pure function of its data: no clock, no chance, no network, so the same results give the
same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from medssl.stages import report_comparisons as comparisons
from medssl.stages import report_embedding as pictures
from medssl.stages import report_figures as figures
from medssl.stages import report_findings as findings
from medssl.stages import report_grids as grids
from medssl.stages import report_judged as judged
from medssl.stages import report_tables as tables
from medssl.stages import report_words as words
from medssl.stages.report_believed import believed
from medssl.stages.report_data import DatasetFacts, ReportData, metric_order, protocol_order
from medssl.stages.report_forms import forms
from medssl.stages.report_labels import label_curves
from medssl.stages.report_page import (
    Block,
    Code,
    Column,
    Figure,
    Fold,
    Page,
    Section,
    Table,
    Text,
    to_html,
    to_markdown,
)
from medssl.stages.report_published import published
from medssl.stages.report_shifted import shifted_sets
from medssl.stages.report_text import metric_title
from medssl.stages.report_tuning import tuning_curves

__all__ = ["VERSION", "ReportData", "format_result_table", "render", "render_together", "result_json"]

VERSION = 2
"""Raised when the same data give another report."""

format_result_table = tables.format_result_table
result_json = tables.result_json


def render(data: ReportData) -> dict[str, bytes]:
    """`report.html`, `report.md`, and as `.csv` every frame of the data (`COLUMNS`) and `per_class`.

    The HTML holds its style and pictures, runs no script and asks for nothing outside itself. Tables show three
    decimals, CSV files all digits.
    """
    page = compose(data)
    return {"report.html": to_html(page).encode(), "report.md": to_markdown(page).encode(), **tables.csv_files(data)}


def compose(data: ReportData) -> Page:
    """The report as a page of blocks."""
    makers: Sequence[tuple[str, str, Callable[[ReportData], list[Block | None]]]] = (
        ("result", "Result", _result),
        ("scores", "Scores", _scores),
        ("forms", "In the paper's form", forms),
        ("comparisons", "Comparisons", _comparisons),
        ("seeds", "Scores over seeds", _seeds),
        ("classes", "Finding by finding" if data.findings else "Class by class", _classes),
        ("believed", "Can the probabilities be believed?", believed),
        ("units", "Per patient and per bag", judged.units),
        ("labels", "With fewer labels", label_curves),
        ("shifted", "Shifted sets", shifted_sets),
        ("subgroups", "Subgroups", judged.subgroups),
        ("embedding", "What the features look like", lambda d: [pictures.embedding_maps(d)]),
        ("mistakes", "The most confident mistakes", lambda d: [pictures.confident_mistakes(d)]),
        ("published", "What the paper prints", published),
        ("training", "Training", _training),
        ("search", "Search", _search),
        ("views", "Augmented views", lambda d: [grids.view_sheets(d)]),
        ("data", "Data", _data),
        ("run", "How it was run", _run),
    )
    sections = []
    for anchor, title, maker in makers:
        blocks = [block for block in maker(data) if block is not None]
        if blocks:
            sections.append(Section(anchor, title, blocks))
    footer = " · ".join(f"{name} {version}" for name, version in data.versions.items())
    return Page(f"Study {data.study}", data.description, sections, footer)


def render_together(data: ReportData, studies: Mapping[str, str]) -> dict[str, bytes]:
    """The page of a recipe with several datasets: its tables and figures, and where the report of each one's study is.

    Args:
        data: scores of each study in `by_dataset`, with the tables and figures that name them.
        studies: name of the study by dataset; its report lies beside this one.
    """
    rows = [[name, study, f"{data.by_dataset[name]['arm'].nunique()}"] for name, study in studies.items()]
    links = {(row, 1): f"../{study}/report.html" for row, study in enumerate(studies.values())}
    columns = [Column("dataset"), Column("report"), Column("arms", "", True)]
    reports = Table("A study on each dataset, with a report of its own.", columns, rows, links=links)
    said = Text("A research result; not for decisions about patients. Intervals and tests are in the reports of the studies.")
    parts: list[tuple[str, str, list[Block | None]]] = [
        ("forms", "In the paper's form", forms(data)),
        ("studies", "The studies", [reports, said]),
        ("run", "How it was run", _run(data)),
    ]
    sections = [Section(anchor, title, [b for b in blocks if b is not None]) for anchor, title, blocks in parts]
    page = Page(f"Study {data.study}", data.description, [section for section in sections if section.blocks])
    return {"report.html": to_html(page).encode(), "report.md": to_markdown(page).encode()}


def _result(data: ReportData) -> list[Block | None]:
    return [*words.verdicts(data), *words.cautions(data), *words.basis(data)]


def _scores(data: ReportData) -> list[Block | None]:
    blocks: list[Block | None] = [tables.result_table(data, protocol) for protocol in protocol_order(data)]
    arms = [[arm.name, arm.description] for arm in data.arms if arm.description]
    about = Table("The arms.", [Column("arm"), Column("what it is")], arms) if arms else None
    return [*blocks, tables.spread_table(data, data.main_metric), about]


def _comparisons(data: ReportData) -> list[Block | None]:
    if data.comparisons.empty:
        return []
    main = [data.main_metric] if (data.comparisons["metric"] == data.main_metric).any() else metric_order(data)
    every = comparisons.all_tests_table(data)
    return [
        words.about_plan(data),
        figures.differences(data, data.main_metric),
        comparisons.comparison_table(data, main),
        words.about_welch(data),
        Fold("Every test, with the A/A rows one by one", [every]) if every else None,
    ]


def _seeds(data: ReportData) -> list[Block | None]:
    main = figures.distributions(data, data.main_metric)
    others: list[tuple[str, Figure]] = []
    for metric in figures.other_metrics(data):
        figure = figures.distributions(data, metric)
        if figure is not None:
            others.append((metric, figure))
    folds = [Fold(f"The same for {metric_title(metric)}", [figure]) for metric, figure in others]
    return [main, *folds]


def _classes(data: ReportData) -> list[Block | None]:
    if data.findings:
        areas: list[Block | None] = [findings.auc_table(data, protocol) for protocol in protocol_order(data)]
        return [*areas, *judged.class_tables(data), *findings.call_tables(data)]
    recalls: list[Block | None] = [tables.recall_table(data, protocol) for protocol in protocol_order(data)]
    return [*recalls, *judged.class_tables(data), grids.confusion_matrices(data)]


def _training(data: ReportData) -> list[Block | None]:
    return [figures.training_curves(data), figures.range_tests(data), *tuning_curves(data), tables.feeding_table(data)]


def _search(data: ReportData) -> list[Block | None]:
    return [tables.chosen_table(data), grids.search_grids(data)]


def _data(data: ReportData) -> list[Block | None]:
    return [block for facts in data.datasets for block in _of_dataset(facts)]


def _of_dataset(facts: DatasetFacts) -> list[Block | None]:
    return [tables.counts_table(facts), findings.known_table(facts), tables.bags_table(facts), tables.card_table(facts)]


def _run(data: ReportData) -> list[Block | None]:
    rows = [["hardware", data.hardware]] if data.hardware else []
    rows += [[name, version] for name, version in data.versions.items()]
    ran = Table("What it ran on.", [Column("part"), Column("value")], rows) if rows else None
    changed = Text("Changed for this run: " + "; ".join(data.overrides) + ".") if data.overrides else None
    recipe = Code("The recipe as it was run:", data.recipe_yaml) if data.recipe_yaml else None
    return [*words.notes(data), ran, changed, recipe]
