"""What a recipe says of its report."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from medssl.params import Params


class ReportParams(Params):
    """What the report says of the predictions beside the scores; nothing here changes an evaluation."""

    specificity: float = Field(0.95, gt=0, lt=1)
    """Specificity at which the sensitivity for each class is given."""
    decision_class: str | None = None
    """Class against the rest whose decision curve is drawn: the net benefit of acting on its probability; null none."""
    deployment_prior: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Frequency of each class where the classifier is to be used: scores as they would be there stand beside the measured ones.
    Shares or counts, one for every class; null none."""
    subgroups: tuple[str, ...] = ()
    """Further columns of the dataset (site, device, sex, age ...): every metric by their values."""
    bands: dict[str, Annotated[tuple[float, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Limits at which a column of `subgroups` that holds numbers is cut, ascending: {age: [40, 60]}."""
    smallest_group: int = Field(20, ge=2)
    """Groups of fewer images are counted, not scored."""
    embedding_map: bool = True
    """t-SNE of the judged images' features, of each arm that a probe judges."""
    images: bool = False
    """Whether images of the dataset stand in the report: the errors that were made most confidently, and the sheets of augmented
    views, which show a few training images whole."""

    @model_validator(mode="after")
    def _consistent(self) -> ReportParams:
        twice = next((name for name in self.subgroups if self.subgroups.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"subgroups names column '{twice}' twice")
        for name, limits in self.bands.items():
            if name not in self.subgroups:
                raise ValueError(f"bands cuts column '{name}', which subgroups does not name: add it there")
            if list(limits) != sorted(set(limits)):
                raise ValueError(f"bands of '{name}' are {list(limits)}: limits ascend, each once")
        if self.deployment_prior is not None and sum(share > 0 for share in self.deployment_prior.values()) < 2:
            raise ValueError("deployment_prior has fewer than two classes above 0: there is nothing to tell apart")
        return self
