"""Tables and figures in the form of a paper, filled with the study's own scores: what a recipe says of them.

A table names its rows (an arm each, with the cells that a paper prints before the numbers) and its columns (a protocol, a metric
and what is shown of it). A figure has a line for each of some arms over points that differ in arm, protocol or shifted set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

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
    """Whose scores."""
    shifted: str | None = None
    """Shifted set that they are on; null is the study's own evaluation split."""
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
    alternative: Literal["greater", "two-sided"] = "greater"
    """Of Welch's test: whether `arm` scores higher, or another score."""


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


def check_forms(recipe: Recipe) -> None:
    """Raises ValueError with the nearest name where a table or figure names what the recipe has not."""
    arms = [arm.name for arm in recipe.arms] + [arm.name for arm in recipe.outside]
    protocols, sets = [p.name for p in recipe.protocols], [each.name for each in recipe.shifted]

    def check(where: str, arm: str | None, protocol: str | None, metric: str | None, shifted: str | None) -> None:
        named = (("arm", arm, arms), ("protocol", protocol, protocols), ("metric", metric, recipe.metrics))
        for kind, name, known in (*named, ("shifted set", shifted, sets)):
            if name is not None and name not in known:
                near = nearest(name, known) if known else "the study has none"
                raise ValueError(f"{where} names {kind} '{name}': {near}")

    for table in recipe.tables:
        where = f"table '{table.title}'"
        for column in table.columns:
            check_metric(column.metric)
            check(where, None, column.protocol, column.metric, column.shifted)
        for row in (*table.rows, *([table.class_report] if table.class_report else [])):
            check(where, row.arm, table.protocol, None, None)
            check(where, row.than, None, None, None)
    for figure in recipe.figures:
        for point in figure.points:
            for line in figure.lines:
                arm = point.arm.replace("{line}", line)
                check(f"figure '{figure.title}'", arm, point.protocol or figure.protocol, figure.metric, point.shifted)
