"""What a pretraining's workers read before they train. No Ray."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tests import finished_study

from medssl.datasets.dataset import open_dataset
from medssl.datasets.read import Decoding
from medssl.mixes import Source
from medssl.rows import open_resident
from medssl.stages.pretrain import Job, _sample
from medssl.store import open_store


def test_the_sample_is_of_the_first_part_that_shows_images(tmp_path: Path) -> None:
    """A part of a mix may be left out as a whole, where its images are held back elsewhere."""
    store, decoding = open_store(str(tmp_path / "store"), create=True), Decoding(32, "squash")
    finished_study.write_dataset(tmp_path, store)
    dataset = open_dataset(store.uri)
    resident: dict[str, Any] = {
        "dataset_uri": dataset.uri, "digest": decoding.digest(dataset), "decoding": asdict(decoding), "cache_dir": str(tmp_path),
    }  # fmt: skip

    def sample(*shown: list[int], resident: dict[str, Any] | None = resident) -> Any:
        sources = [Source(dataset.uri, len(dataset), rows, ["train"], resident=resident) for rows in shown]
        return _sample(Job(store.uri, "a", {}, sources, asdict(decoding), {}, None))

    images = open_resident(**resident).images
    assert np.array_equal(sample([3, 5], [7]).numpy(), images[[3, 5]])
    assert np.array_equal(sample([], [7, 9]).numpy(), images[[7, 9]])
    assert len(sample(list(range(80)))) == 32
    assert sample([]) is None and sample([3], resident=None) is None
