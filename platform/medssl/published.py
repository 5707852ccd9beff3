"""A paper's printed scores and p values in a recipe, shown beside Welch's tests of them and the study's own scores."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from medssl.params import Params
from medssl.statistics import PublishedTest, RecomputedTest, recompute_published

_BOUND = re.compile(r"^<\s*([0-9.]+(?:e[-+]?[0-9]+)?)$", re.IGNORECASE)


class PublishedTestParams(Params):
    """One printed p value."""

    first: str
    """Row whose mean is claimed to be greater, or to differ."""
    second: str
    """The other row."""
    alternative: Literal["greater", "two-sided"] = "greater"
    """greater: the null hypothesis is first <= second; two-sided: first = second."""
    p: Annotated[float, Field(gt=0, le=1)] | str
    """As printed: a value, or a bound such as "< 1e-10"."""

    @model_validator(mode="after")
    def _consistent(self) -> PublishedTestParams:
        if isinstance(self.p, str) and (not (found := _BOUND.match(self.p)) or not 0 < float(found[1]) <= 1):
            raise ValueError(f"p of {self.first} and {self.second} is '{self.p}': write a value as 0.05 or a bound as '< 1e-10'")
        return self

    @property
    def printed(self) -> PublishedTest:
        """As numbers."""
        if isinstance(self.p, float):
            return PublishedTest(self.first, self.second, self.alternative, self.p)
        found = _BOUND.match(self.p)
        assert found is not None
        return PublishedTest(self.first, self.second, self.alternative, float(found[1]), is_bound=True)


class PublishedParams(Params):
    """A table of a paper: means by row, standard deviations where it prints them, and tests of them."""

    source: str
    """Where it is printed: `paper 000, tables 4 and 13`."""
    metric: str
    """Metric of the scores, by its name in a study."""
    runs: int | None = Field(None, ge=1)
    """Runs that each mean is over; null where the paper doesn't say."""
    rows: dict[str, tuple[float, Annotated[float, Field(ge=0)]] | float] = Field(min_length=1)
    """Mean and standard deviation by the row's name, or the mean alone."""
    arms: dict[str, str] = Field(default_factory=dict)
    """The study's arm that stands for a row."""
    protocol: str | dict[str, str] | None = None
    """The study's protocol that the scores of these arms are taken from, or by row where they differ; needed with `arms`."""
    tests: tuple[PublishedTestParams, ...] = ()
    """Printed p values."""

    @model_validator(mode="after")
    def _consistent(self) -> PublishedParams:
        tested = [name for test in self.tests for name in (test.first, test.second)]
        judged = self.protocol if isinstance(self.protocol, dict) else {}
        missing = next((name for name in (*tested, *self.arms, *judged) if name not in self.rows), None)
        if missing is not None:
            raise ValueError(f"{self.source}: no row is named '{missing}': choose from {', '.join(self.rows)}")
        if self.arms and self.protocol is None:
            raise ValueError(f"{self.source}: arms stand for rows, so protocol has to say whose scores are shown")
        unsaid = next((name for name in self.arms if self.protocol_of(name) is None), None)
        if unsaid is not None:
            raise ValueError(f"{self.source}: protocol has to say whose scores row '{unsaid}' shows")
        if self.tests and (self.runs or 1) < 2:
            raise ValueError(f"{self.source}: tests are of means over several runs: give runs")
        single = next((name for name in tested if self.scores[name][1] is None), None)
        if single is not None:
            raise ValueError(f"{self.source}: row '{single}' has no standard deviation, so there is no test of it")
        return self

    def protocol_of(self, row: str) -> str | None:
        """The protocol that a row's scores are shown of."""
        return self.protocol.get(row) if isinstance(self.protocol, dict) else self.protocol

    @property
    def scores(self) -> dict[str, tuple[float, float | None]]:
        """Mean and standard deviation by row; None where none is printed."""
        return {name: (row, None) if isinstance(row, float) else row for name, row in self.rows.items()}

    @property
    def recomputed(self) -> list[RecomputedTest]:
        """Welch's tests of the printed means."""
        means = {name: (mean, std, self.runs) for name, (mean, std) in self.scores.items() if std is not None and self.runs}
        return recompute_published(means, [test.printed for test in self.tests])
