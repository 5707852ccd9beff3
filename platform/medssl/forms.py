"""Tables and figures in the form of a paper, filled with the study's own scores: what a recipe says of them.

A table names its rows (an arm each, with the cells that a paper prints before the numbers) and its columns (a protocol, a metric
and what is shown of it). A figure has a line for each of some arms over points that differ in arm, protocol or shifted set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medssl.errors import nearest
from medssl.params import Params
from medssl.protocols import check_metric

if TYPE_CHECKING:
    from medssl.recipe import Recipe

OF_TWO = ("difference", "welch_p")
"""What a column shows of a row's two arms."""


class FormColumn(Params):
    """A column of numbers."""

    title: str
    """Its head."""
    unit: str = ""
    """Below the head."""
    protocol: str
    """Whose scores, where the row names no other."""
    shifted: str | None = None
    """Shifted set that they are on; null is the study's own evaluation split."""
    dataset: str | None = None
    """Which of the recipe's `datasets` they are of; in tables of `together` only."""
    metric: str
    """Which score."""
    value: Literal["mean", "std", "mean_std", "n", "difference", "welch_p"] = "mean_std"
    """Of all runs of the row's arm: mean, standard deviation, both, their number; of the row's two arms: the difference of their
    means (`arm` minus `than`), or p of Welch's test over all runs (the papers' test)."""
    percent: bool = False
    """Times 100."""
    decimals: int = Field(3, ge=0, le=6)
    """Decimals of means, standard deviations and differences."""


class FormRow(Params):
    """A row; without an arm it is a heading."""

    cells: tuple[str, ...] = Field(min_length=1)
    """What stands before the numbers."""
    arm: str | None = None
    """Whose scores it shows."""
    than: str | None = None
    """Second arm, of columns that compare two."""
    protocol: str | None = None
    """Whose scores the row shows, in place of its columns' protocols: where rows differ in protocol and not in arm."""
    alternative: Literal["greater", "two-sided"] = "greater"
    """Of Welch's test: whether `arm` scores higher, or another score."""

    @model_serializer(mode="wrap")
    def _without_idle_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A row under its columns' protocols leaves reports the names that they had before rows had one."""
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name != "protocol" or value is not None}


class TableForm(Params):
    """A table as a paper prints it."""

    title: str
    """Its caption, with paper and number."""
    heads: tuple[str, ...] = ()
    """Heads of the cells that stand before the numbers."""
    columns: tuple[FormColumn, ...] = ()
    """Columns of numbers."""
    rows: tuple[FormRow, ...] = ()
    """Rows; an entry with `matrix` stands for several (medssl.matrix)."""
    class_report: FormRow | None = None
    """In place of columns and rows: precision, recall, F1 and number of images of each class of this row's arm."""
    protocol: str | None = None
    """Protocol of a class report."""

    @model_validator(mode="after")
    def _consistent(self) -> TableForm:
        if self.class_report is not None:
            if self.columns or self.rows or self.heads or self.protocol is None or self.class_report.arm is None:
                raise ValueError(f"table '{self.title}': a class report has an arm and a protocol, and no heads, columns or rows")
            if self.class_report.protocol is not None:
                raise ValueError(f"table '{self.title}': the protocol of a class report stands beside it, not in it")
            return self
        if not self.columns or not self.rows or self.protocol is not None:
            raise ValueError(f"table '{self.title}': give columns and rows (protocol stands in the columns)")
        for row in self.rows:
            if len(row.cells) > len(self.heads) or (row.arm is not None and len(row.cells) != len(self.heads)):
                raise ValueError(f"table '{self.title}': row {list(row.cells)} needs a cell for each of {len(self.heads)} heads")
            if row.arm is not None and row.than is None and any(column.value in OF_TWO for column in self.columns):
                raise ValueError(f"table '{self.title}': row {list(row.cells)} is compared with nothing: give it `than`")
        return self


class FormPoint(Params):
    """A place on a figure's x axis."""

    label: str
    """What stands there."""
    arm: str = "{line}"
    """Name of the arm, `{line}` for the line's name."""
    protocol: str | None = None
    """Another protocol than the figure's."""
    shifted: str | None = None
    """Shifted set that the scores are on."""


class FigureForm(Params):
    """A figure as a paper draws it: scores of some arms over points."""

    title: str
    """Its caption, with paper and number."""
    x_title: str
    """Title of the x axis."""
    points: tuple[FormPoint, ...] = Field(min_length=2)
    """Places on it."""
    lines: dict[str, str] = Field(min_length=1)
    """Titles of the lines by the name that a point's `arm` has for `{line}`."""
    protocol: str
    """Whose scores."""
    metric: str
    """Which score."""
    percent: bool = False
    """Times 100."""
    panels: dict[str, str] = Field(default_factory=dict)
    """Titles of the panels by dataset, one each; in figures of `together` only."""


class Together(Params):
    """What a recipe with `datasets` shows of all of its studies on one page."""

    tables: tuple[TableForm, ...] = ()
    """Tables whose columns name their dataset."""
    figures: tuple[FigureForm, ...] = ()
    """Figures with a panel for each dataset."""


def check_together(together: Together, recipes: Mapping[str, Recipe]) -> None:
    """Raises ValueError where a table or figure names a dataset, or of its study something, that is not there."""
    for table in together.tables:
        if table.class_report is not None:
            raise ValueError(f"together: table '{table.title}' is a class report, of one study: put it under tables")
        for column in table.columns:
            _check_dataset(f"together: table '{table.title}'", column.dataset, recipes)
            only = table.model_copy(update={"columns": (column,)})
            _Checker(recipes[str(column.dataset)]).table(only)
    for figure in together.figures:
        where = f"together: figure '{figure.title}'"
        if not figure.panels:
            raise ValueError(f"{where} has no panels: name the datasets, as `panels: {{{next(iter(recipes))}: Title}}`")
        for name in figure.panels:
            _check_dataset(where, name, recipes)
            _Checker(recipes[name]).figure(figure)


def _check_dataset(where: str, name: str | None, recipes: Mapping[str, Recipe]) -> None:
    if name is None:
        raise ValueError(f"{where}: a column names no dataset; choices: {', '.join(recipes)}")
    if name not in recipes:
        raise ValueError(f"{where} names dataset '{name}': {nearest(name, recipes)}")


def check_forms(recipe: Recipe) -> None:
    """Raises ValueError with the nearest name where a table or figure names what the recipe has not."""
    checker = _Checker(recipe)
    for table in recipe.tables:
        checker.table(table)
        if any(column.dataset is not None for column in table.columns):
            raise ValueError(f"table '{table.title}' names datasets: put it under together")
    for figure in recipe.figures:
        checker.figure(figure)
        if figure.panels:
            raise ValueError(f"figure '{figure.title}' has panels, which are datasets: put it under together")


class _Checker:
    """Looks names up in a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self._known = {
            "arm": [arm.name for arm in recipe.arms] + [arm.name for arm in recipe.outside],
            "protocol": [protocol.name for protocol in recipe.protocols],
            "metric": list(recipe.metrics),
            "shifted set": [each.name for each in recipe.shifted],
        }

    def _check(self, where: str, kind: str, name: str | None) -> None:
        known = self._known[kind]
        if name is not None and name not in known:
            raise ValueError(f"{where} names {kind} '{name}': {nearest(name, known) if known else 'the study has none'}")

    def table(self, table: TableForm) -> None:
        """Arms of the rows; protocol, metric and shifted set of the columns."""
        where = f"table '{table.title}'"
        self._check(where, "protocol", table.protocol)
        for column in table.columns:
            check_metric(column.metric)
            for kind, name in (("protocol", column.protocol), ("metric", column.metric), ("shifted set", column.shifted)):
                self._check(where, kind, name)
        for row in (*table.rows, *([table.class_report] if table.class_report else [])):
            self._check(where, "arm", row.arm)
            self._check(where, "arm", row.than)
            self._check(where, "protocol", row.protocol)

    def figure(self, figure: FigureForm) -> None:
        """Arm, protocol and shifted set of each point of each line."""
        where = f"figure '{figure.title}'"
        self._check(where, "metric", figure.metric)
        for point in figure.points:
            self._check(where, "protocol", point.protocol or figure.protocol)
            self._check(where, "shifted set", point.shifted)
            for line in figure.lines:
                self._check(where, "arm", point.arm.replace("{line}", line))
