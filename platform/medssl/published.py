"""A paper's printed scores and p values in a recipe, shown beside Welch's tests of them and the study's own scores."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from medssl.params import Params
from medssl.statistics import PublishedTest

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
    """A table of a paper: means and standard deviations by row, and tests of them."""

    source: str
    """Where it is printed: `paper 000, tables 4 and 13`."""
    metric: str
    """Metric of the scores, by its name in a study."""
    runs: int = Field(ge=2)
    """Runs that each mean is over."""
    rows: dict[str, tuple[float, Annotated[float, Field(ge=0)]]] = Field(min_length=1)
    """Mean and standard deviation by the row's name."""
    arms: dict[str, str] = Field(default_factory=dict)
    """The study's arm that stands for a row."""
    protocol: str | None = None
    """The study's protocol that the scores of these arms are taken from; needed with `arms`."""
    tests: tuple[PublishedTestParams, ...] = ()
    """Printed p values."""

    @model_validator(mode="after")
    def _consistent(self) -> PublishedParams:
        named = [name for test in self.tests for name in (test.first, test.second)]
        missing = next((name for name in (*named, *self.arms) if name not in self.rows), None)
        if missing is not None:
            raise ValueError(f"{self.source}: no row is named '{missing}': choose from {', '.join(self.rows)}")
        if self.arms and self.protocol is None:
            raise ValueError(f"{self.source}: arms stand for rows, so protocol has to say whose scores are shown")
        return self
