"""The measurement measures: rates agree with the seconds they come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medssl.collectives import Process
from medssl.training.bench import measure_feed, measure_step
from medssl.training.feed import ResidentFeed, ResidentImages
from medssl.training.plan import PretrainPlan


def test_measurements(tmp_path: Path) -> None:
    process = Process(0, 1, torch.device("cpu"))
    images = ResidentImages.write(tmp_path / "images", np.zeros((20, 40, 40, 3)), [str(k) for k in range(20)])
    feed = ResidentFeed(images, range(20), 8, 0, process)
    groups: dict[str, object] = {"optimiser": {}, "schedule": {}, "views": {}}
    encoder, objective = {"name": "test_resnet", "image_px": 32}, {"name": "barlow_twins", "projector": (16, 16)}
    fields = {**groups, "encoder": encoder, "objective": objective, "epochs": 1, "batch_size": 8, "seed": 0}
    speed = measure_step(PretrainPlan.model_validate(fields), feed, process, steps=3, warmup=1)
    assert speed.images_per_second == pytest.approx(3 * 8 / speed.seconds)
    assert speed.steps == 3
    assert speed.views_per_second > 0
    assert measure_feed(feed, batches=5) > 0
