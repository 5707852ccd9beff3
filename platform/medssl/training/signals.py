"""What the pretraining loop tells telemetry and user: at its start, a logged step, a checkpoint and its end. Rank 0 speaks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from medssl import telemetry
from medssl.training.history import MEASURES

if TYPE_CHECKING:
    from medssl.training.loop import Progress

T = TypeVar("T")
_COLLAPSED_STD, _COLLAPSED_RANK = 0.02, 1.5
"""A random ResNet starts far above both: what falls below has collapsed."""
_SHOWN = ("learning_rate", "images_per_second", "data_wait_share", "effective_rank", "embedding_std")

logger = logging.getLogger(__name__)


def at_start() -> None:
    """The pretraining begins here, or is taken up at its last checkpoint: one that then hangs, or whose first checkpoint never
    comes, has to be seen as well, and from here on its work can be lost."""
    now = time.time()
    telemetry.gauge("running", 1)
    telemetry.gauge("progress_time_seconds", now)
    telemetry.gauge("checkpoint_time_seconds", now)


def at_log(progress: Progress) -> None:
    """A logged step."""
    now, row = time.time(), progress.measures
    telemetry.gauge("running", 1)
    telemetry.gauge("progress_time_seconds", now)
    telemetry.gauge("loss", progress.loss)
    for name in _SHOWN:
        if (value := row.get(name)) is not None:
            telemetry.gauge(name, value)
    for name, value in row.items():
        if name not in (*MEASURES, "step", "epoch", "rank", "loss") and isinstance(value, int | float):
            telemetry.gauge("loss_term", value, term=name)
    rate, batch = progress.images_per_second, progress.images / max(progress.step, 1)
    telemetry.gauge("step_seconds", batch / rate if rate else 0.0)
    telemetry.gauge("epochs", progress.total_epochs)
    telemetry.gauge("epochs_done", progress.total_epochs * progress.step / max(progress.total_steps, 1))
    telemetry.gauge("expected_end_time_seconds", now + (progress.total_images - progress.images) / rate if rate else now)


def timed_checkpoint(write: Callable[[], T]) -> T:
    """Writes a checkpoint and tells how long that took."""
    started = time.perf_counter()
    written = write()
    telemetry.gauge("checkpoint_upload_seconds", time.perf_counter() - started)
    telemetry.gauge("checkpoint_time_seconds", time.time())
    return written


def at_end(non_finite: bool) -> None:
    """The pretraining ends here, for whatever reason."""
    if non_finite:
        telemetry.count("non_finite_steps")
    telemetry.gauge("running", 0)


def warn_of_collapse(step: int, row: Mapping[str, Any]) -> bool:
    """Says so in words when all images get about one feature, or features of about one direction."""
    if row["embedding_std"] > _COLLAPSED_STD and row["effective_rank"] > _COLLAPSED_RANK:
        return False
    logger.warning(
        "the representation is collapsing at step %d: embedding standard deviation %.3g (1 is spread out, 0 is one point), "
        "effective rank %.3g. Features like these tell images apart no more: lower the learning rate, lengthen the warm-up, or "
        "strengthen what keeps features apart (a larger batch, lambda_, variance, target_momentum)",
        step, row["embedding_std"], row["effective_rank"],
    )  # fmt: skip
    return True
