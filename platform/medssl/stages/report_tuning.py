"""The report's curves of the fine-tunings, epoch by epoch (paper 003's figures 1 and 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from medssl.stages import report_svg as svg
from medssl.stages.report_data import ReportData, arm_order, protocol_order
from medssl.stages.report_figures import curve_panel
from medssl.stages.report_page import Block, Figure, Key
from medssl.stages.report_text import metric_title, title_of

TRAINING_LOSS, VALIDATION_LOSS = "training loss", "validation loss"


def tuning_frame(histories: Sequence[Sequence[Mapping[str, Any]]], watched: str) -> pd.DataFrame:
    """Epoch, losses and the watched validation score where it is no loss, means over the runs that got to the epoch.

    Args:
        histories: of each run, as `FineTuned.history`; a run that stopped early is shorter.
        watched: name of the validation score that was watched.
    """
    lines = pd.DataFrame([dict(line) for history in histories for line in history])
    if lines.empty:
        return lines
    names = {"loss": TRAINING_LOSS, "validation_loss": VALIDATION_LOSS}
    if watched != "loss":
        names["validation"] = f"validation {metric_title(watched)}"
    kept = [column for column in names if column in lines]
    return lines.groupby("epoch")[kept].mean().rename(columns=names).reset_index()


def tuning_curves(data: ReportData) -> list[Block | None]:
    """A figure for each protocol that fine-tunes: one panel a quantity, one colour an arm."""
    return [_figure(data, protocol) for protocol in protocol_order(data)]


def _figure(data: ReportData, protocol: str) -> Figure | None:
    found = {arm: data.tunings[arm, protocol] for arm in arm_order(data) if (arm, protocol) in data.tunings}
    found = {arm: frame for arm, frame in found.items() if not frame.empty}
    columns = list(dict.fromkeys(str(c) for frame in found.values() for c in frame.columns if c != "epoch"))
    panels = [panel for column in columns if (panel := curve_panel(found, [], column, column, "epoch"))]
    if not panels:
        return None
    keys = [Key(arm, svg.swatch(svg.colour(i), line=True)) for i, arm in enumerate(found)]
    caption = (
        f"{title_of(protocol)}: fine-tuning, epoch by epoch (the head's own first), mean over the runs that got so far. The "
        "training loss is of augmented images, weighted and smoothed as the recipe says, the validation loss is neither: "
        "their heights do not compare, their courses do."
    )
    return Figure(caption, panels, keys)
