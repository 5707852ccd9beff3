"""Feeds: the same global batches for every number of workers, resumable within an epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medssl.collectives import Process
from medssl.errors import DataError, RecipeError
from medssl.training.feed import ResidentFeed, ResidentImages

ROWS = np.arange(3, 40)


@pytest.fixture
def images(tmp_path: Path) -> ResidentImages:
    array = np.random.default_rng(0).integers(0, 256, (45, 4, 5, 3), dtype=np.uint8)
    return ResidentImages.write(tmp_path / "digest", array, [f"image-{k:02d}" for k in range(45)])


def feed(images: ResidentImages, rank: int = 0, world: int = 1, seed: int = 1) -> ResidentFeed:
    return ResidentFeed(images, ROWS, 12, seed, Process(rank, world, torch.device("cpu")))


def test_resident_images_round_trip(images: ResidentImages) -> None:
    again = ResidentImages.open(images.path)
    assert again.digest == "digest" and len(again) == 45 and again.image_ids[44] == "image-44"
    assert isinstance(again.images, np.memmap) and np.array_equal(again.images, images.images)
    assert again.tensor().data_ptr() == again.images.ctypes.data  # no copy
    kept = ResidentImages.write(images.path, np.zeros((1, 2, 2, 3)), ["other"])
    assert len(kept) == 45


def test_what_is_no_resident_folder(tmp_path: Path, images: ResidentImages) -> None:
    with pytest.raises(DataError, match="holds no resident images"):
        ResidentImages.open(tmp_path / "missing")
    np.save(images.path / "images.npy", np.zeros((3, 4, 5, 3), np.uint8))
    with pytest.raises(DataError, match=r"is damaged.*45 ids"):
        ResidentImages.open(images.path)


def test_an_epoch_is_a_permutation_without_the_incomplete_batch(images: ResidentImages) -> None:
    one = feed(images)
    assert one.steps_per_epoch == 3
    batches = list(one.batches(0))
    rows = torch.cat([batch.rows_B for batch in batches])
    assert len(rows) == 36 == len(rows.unique()) and set(rows.tolist()) < set(ROWS.tolist())
    for pixels, numbers, *_ in batches:
        assert pixels.dtype == torch.uint8 and pixels.shape == (12, 4, 5, 3)
        assert np.array_equal(pixels.numpy(), images.images[numbers.numpy()])


def test_order_follows_seed_and_epoch(images: ResidentImages) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat([batch.rows_B for batch in feed(images, seed=seed).batches(epoch)]).tolist()

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_global_batch(images: ResidentImages, world: int) -> None:
    whole = list(feed(images).batches(1))
    parts = [list(feed(images, rank, world).batches(1)) for rank in range(world)]
    for step, (pixels, rows, *_) in enumerate(whole):
        assert torch.equal(torch.cat([part[step][1] for part in parts]), rows)
        assert torch.equal(torch.cat([part[step][0] for part in parts]), pixels)


def test_starting_within_an_epoch(images: ResidentImages) -> None:
    whole, rest = list(feed(images).batches(2)), list(feed(images).batches(2, start_step=2))
    assert len(rest) == 1 and torch.equal(rest[0][1], whole[2][1])
    assert list(feed(images).batches(2, start_step=3)) == []


@pytest.mark.parametrize(
    ("batch_size", "world", "words"),
    [(12, 5, "batch_size 12 cannot be shared evenly by 5 workers"), (38, 1, "larger than the 37 images"), (3, 3, "one image")],
)
def test_impossible_batches(images: ResidentImages, batch_size: int, world: int, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        ResidentFeed(images, ROWS, batch_size, 0, Process(0, world, torch.device("cpu")))
