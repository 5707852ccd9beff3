"""Claims of a recipe, and how their intervals are made."""

from __future__ import annotations

from pydantic import Field, model_validator

from medssl.metrics import METRICS
from medssl.params import Params
from medssl.protocols import check_metric
from medssl.shifted import judged_as


class Comparison(Params):
    """A claim to test: `better` scores higher than `than`."""

    better: str
    """Arm that is claimed to be better."""
    than: str
    """Arm it is compared with."""
    protocol: str
    """Protocol whose scores are compared."""
    shifted: str | None = None
    """Shifted set on whose images the scores are compared; null: the study's own evaluation split."""
    metric: str = "balanced_accuracy"
    """Metric that is compared."""
    equivalence_margin: float | None = Field(None, gt=0, lt=1)
    """Largest difference of the metric that does not matter, chosen before any score is seen: the two arms are then also tested
    for differing by less (two one-sided tests on the nested bootstrap); null leaves that test out."""

    @model_validator(mode="after")
    def _consistent(self) -> Comparison:
        check_metric(self.metric)
        if self.metric not in METRICS:
            raise ValueError(f"comparison metric '{self.metric}' has no nested bootstrap: choose from {', '.join(METRICS)}")
        return self

    @property
    def judged(self) -> str:
        """Name of the compared scores' protocol in tables."""
        return judged_as(self.protocol, self.shifted)

    @property
    def claim(self) -> tuple[str, str, str, str]:
        """What is claimed, whatever the margin: better, than, protocol as judged, metric."""
        return self.better, self.than, self.judged, self.metric


class Bootstrap(Params):
    """Nested bootstrap of the comparisons."""

    replicates: int = Field(2000, ge=100)
    """Bootstrap replicates."""
    level: float = Field(0.95, gt=0.5, lt=1)
    """Level of the interval."""
    seed: int = Field(0, ge=0)
    """Seed of the resampling."""
