"""The synthetic set: the same from the same seed, structure in it, little in the colours."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medssl.datasets.synthetic import PATTERNS, draw_lesion, write_synthetic


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("synthetic"), images=160, seed=3, px=96)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_and_files(drawn: Path) -> None:
    rows = table(drawn)
    assert len(rows) == 160 and len({row["image"] for row in rows}) == 160
    assert {row["label"] for row in rows} == set(PATTERNS)
    for row in rows:
        with Image.open(drawn.parent / row["image"]) as image:
            assert image.size == (96, 96) and image.mode == "RGB"
    images_of: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        images_of.setdefault(row["bag_id"], []).append(row)
    assert {len(bag) for bag in images_of.values()} == {1, 2, 3, 4}
    assert all(len({(row["patient_id"], row["label"]) for row in bag}) == 1 for bag in images_of.values())


def test_the_same_seed_draws_the_same(drawn: Path, tmp_path: Path) -> None:
    again = write_synthetic(tmp_path, images=160, seed=3, px=96)
    assert again.read_bytes() == drawn.read_bytes()
    name = table(drawn)[7]["image"]
    assert (tmp_path / name).read_bytes() == (drawn.parent / name).read_bytes()
    assert write_synthetic(tmp_path / "other", images=20, seed=4, px=32).read_bytes() != drawn.read_bytes()


def test_pictures_of_one_lesion_differ_and_keep_its_texture() -> None:
    first, second = (draw_lesion("globular", 5, seed).astype(float) for seed in (1, 2))
    assert np.abs(first - second).mean() > 5


def test_structure_tells_the_classes_and_colour_hardly() -> None:
    """Nearest class mean, leave one out: mean colour against the spectrum of the grey image."""
    names = list(PATTERNS)
    colours, spectra, labels = [], [], []
    y, x = np.mgrid[0:96, 0:96] - 48
    ring = np.hypot(x, y).astype(int) // 2
    for k, name in enumerate(names):
        for lesion in range(25):
            image = draw_lesion(name, 1000 * k + lesion, 7000 * k + lesion, 96).astype(float)
            grey = image.mean(2)
            power = np.abs(np.fft.fftshift(np.fft.fft2(grey - grey.mean())))
            spectra.append(np.log([power[ring == r].mean() for r in range(1, 24)]))
            colours.append(image.mean((0, 1)))
            labels.append(k)

    def accuracy(features: list[np.ndarray]) -> float:
        values, truth = np.stack(features), np.array(labels)
        values = (values - values.mean(0)) / values.std(0)
        right = 0
        for row in range(len(values)):
            rest = np.arange(len(values)) != row
            means = np.stack([values[rest & (truth == k)].mean(0) for k in range(4)])
            right += int(np.argmin(((means - values[row]) ** 2).sum(1)) == truth[row])
        return right / len(values)

    assert accuracy(spectra) > 0.42  # chance is 0.25; the seeds are fixed
    assert accuracy(colours) < 0.35
