"""Multi-crop: shapes, scales, what the draws depend on, and a second image of the same bag."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from medssl.errors import RecipeError
from medssl.networks import EncoderParams
from medssl.views import MultiViews, RandomView, TwoViews, ViewParams, view_sheet

PLAIN = EncoderParams(image_px=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
NOTHING = ViewParams(crop_ratio=(1, 1), horizontal_flip=0, vertical_flip=0, jitter=0, grey=0, blur=(0, 0), solarise=(0, 0))
SWAV = ViewParams(preset="swav", small_px=16, cutout=0.5)


def noise(count: int = 6, px: int = 40, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, px, px, channels), dtype=torch.uint8, generator=generator)


def changed(**fields: object) -> ViewParams:
    return ViewParams.model_validate({**NOTHING.model_dump(), **fields})


@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(channels: int) -> None:
    encoder = EncoderParams(image_px=32, channels=channels, mean=(0.5,) * channels, std=(0.2,) * channels)
    views = MultiViews(SWAV, encoder)(noise(channels=channels), seed=1, step=2)
    assert [tuple(view.shape) for view in views] == [(6, channels, 32, 32)] * 2 + [(6, channels, 16, 16)] * 6
    assert all(view.dtype == torch.float32 for view in views)


@pytest.mark.parametrize("params", [ViewParams(), ViewParams(preset="paper000_cutout")])
def test_without_small_crops_it_is_two_views_bit_for_bit(params: ViewParams) -> None:
    images = noise()
    two = TwoViews(params, PLAIN)(images[2:], seed=1, step=2, first=2, total=6)
    multi = MultiViews(params, PLAIN)(images[2:], seed=1, step=2, first=2, total=6)
    assert len(multi) == 2 and all(torch.equal(a, b) for a, b in zip(two, multi, strict=True))
    one = RandomView(params, PLAIN, 1)(images[2:], seed=1, step=2, first=2, total=6)
    assert torch.equal(one, two[1])


def test_large_views_do_not_change_with_small_crops_nor_small_ones_with_their_number() -> None:
    images = noise()
    none, two, six = (MultiViews(changed(small_crops=n, small_px=16), PLAIN)(images, seed=1, step=2) for n in (0, 2, 6))
    assert all(torch.equal(a, b) for a, b in zip(none, two[:2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(two, six[:4], strict=True))
    small = six[2:]
    assert not any(torch.equal(small[i], small[j]) for i in range(6) for j in range(i))


def test_crops_keep_the_shares_of_the_image_that_were_asked_for() -> None:
    line = torch.arange(256, dtype=torch.uint8)
    ramp = torch.stack([line[None, :].expand(256, -1), line[:, None].expand(-1, 256), torch.zeros(256, 256).byte()], -1)
    params = ViewParams(preset="swav", jitter=0, grey=0, blur=(0, 0), small_crops=4, small_px=32)
    encoder = EncoderParams(image_px=64, mean=(0.0,) * 3, std=(1.0,) * 3)
    views = MultiViews(params, encoder)(ramp[None].expand(150, -1, -1, -1), seed=0, step=0)
    for view, low, high in [*((v, 0.14, 1.0) for v in views[:2]), *((v, 0.05, 0.14) for v in views[2:])]:
        px = view.shape[-1]
        # Differences of neighbours away from the borders (where the sampling is mirrored), times the side.
        width = (view[:, 0, px // 2, -3] - view[:, 0, px // 2, 2]).abs() * px / (px - 5) * 255 / 256
        height = (view[:, 1, -3, px // 2] - view[:, 1, 2, px // 2]).abs() * px / (px - 5) * 255 / 256
        share = width * height
        assert float(share.min()) > low * 0.97 and float(share.max()) < high * 1.03
        assert float(share.min()) < low + 0.1 * (high - low) and float(share.max()) > low + 0.85 * (high - low)
        ratio = width / height
        assert float(ratio.min()) > 0.75 * 0.97 and float(ratio.max()) < 1.3333 * 1.03


@pytest.mark.parametrize("world", [2, 3])
def test_draws_do_not_depend_on_the_number_of_workers(world: int) -> None:
    images, second = noise(12), noise(12, seed=1)
    multi = MultiViews(SWAV, PLAIN)
    whole = multi(images, second_BHWC=second, seed=1, step=2)
    share = 12 // world
    parts = [
        multi(images[part], second_BHWC=second[part], seed=1, step=2, first=part.start, total=12)
        for part in (slice(rank * share, (rank + 1) * share) for rank in range(world))
    ]
    for number, view in enumerate(whole):
        torch.testing.assert_close(torch.cat([part[number] for part in parts]), view, rtol=0, atol=1e-6)


def test_views_repeat_by_seed_and_step_and_each_image_has_its_own() -> None:
    images, multi = noise(1).expand(4, -1, -1, -1), MultiViews(SWAV, PLAIN)
    found, again, other = (multi(images, seed=1, step=step) for step in (2, 2, 3))
    for view, same, different in zip(found, again, other, strict=True):
        assert torch.equal(view, same) and not torch.equal(view, different)
        assert len({float(image.sum()) for image in view}) == 4


def test_second_image_makes_the_second_view_and_every_other_small_crop() -> None:
    black, white = torch.zeros(3, 40, 40, 3, dtype=torch.uint8), torch.full((3, 40, 40, 3), 255, dtype=torch.uint8)
    multi = MultiViews(changed(small_crops=4, small_px=16), PLAIN)
    for number, view in enumerate(multi(black, second_BHWC=white, seed=0, step=0)):
        torch.testing.assert_close(view, torch.full_like(view, number % 2), rtol=0, atol=1e-6)
    # Only the source differs: the draws are those of one image.
    images, second = noise(), noise(seed=1)
    mixed = multi(images, second_BHWC=second, seed=0, step=0)
    plain, of_second = (multi(source, seed=0, step=0) for source in (images, second))
    for number, view in enumerate(mixed):
        assert torch.equal(view, (of_second if number % 2 else plain)[number])


def test_small_crops_are_augmented_as_the_large_view_of_their_turn() -> None:
    images = torch.zeros(5, 40, 40, 3, dtype=torch.uint8)
    params = changed(small_crops=3, small_px=16, solarise=(0, 1), solarise_threshold=(0, 0))  # black turns white
    views = MultiViews(params, PLAIN)(images, seed=0, step=0)
    assert [float(view.mean()) for view in views] == [0, 1, 0, 1, 0]


def test_what_does_not_fit_is_refused() -> None:
    multi = MultiViews(SWAV, PLAIN)
    with pytest.raises(ValueError, match=r"second images are \(5, 40, 40, 3\) on cpu.*must match"):
        multi(noise(), second_BHWC=noise(5), seed=0, step=0)
    with pytest.raises(ValueError, match="outside a global batch of 6"):
        multi(noise(), seed=0, step=0, first=1, total=6)
    with pytest.raises(RecipeError, match=r"small_px 96 is above encoder\.image_px 32.*small_crops to 0"):
        MultiViews(ViewParams(preset="swav"), PLAIN)
    for kind in (TwoViews, RandomView):
        with pytest.raises(RecipeError, match=r"small_crops is 6.*set small_crops to 0"):
            kind(SWAV, PLAIN)


def test_sheet_shows_small_crops_padded_with_white() -> None:
    params = changed(small_crops=2, small_px=16)
    data = view_sheet(torch.zeros(3, 40, 40, 3, dtype=torch.uint8), params, PLAIN, draws=2)
    sheet = torch.from_numpy(np.array(Image.open(io.BytesIO(data))))
    small = sheet[:34, 3 * 34 : 4 * 34]
    assert bool((small[:16, :16] == 0).all()) and bool((small[16:] == 255).all()) and bool((small[:, 16:] == 255).all())
    assert sheet.shape == (3 * 34, 9 * 34, 3) and bool((sheet[:32, 34 : 34 + 32] == 0).all())
