"""Views: each augmentation against a second way to the same image, reproducibility, the evaluation view."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch.nn import functional as F

from medssl.networks import EncoderParams
from medssl.views import (
    Draws,
    RandomView,
    TwoViews,
    ViewParams,
    augment,
    draw,
    draw_cutout,
    eval_view,
    generator_for,
    normalise,
    to_unit,
    view_sheet,
)

PLAIN = EncoderParams(image_px=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
NOTHING = ViewParams(
    crop_scale=(1, 1), crop_ratio=(1, 1), horizontal_flip=0, vertical_flip=0, jitter=0, grey=0, blur=(0, 0), solarise=(0, 0)
)


def pictures(count: int = 6, px: int = 32, channels: int = 3) -> torch.Tensor:
    """Smooth random uint8 images (count, px, px, channels)."""
    small = torch.rand(count, channels, 6, 6, generator=torch.Generator().manual_seed(count + px))
    smooth = F.interpolate(small, size=(px, px), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().byte().permute(0, 2, 3, 1).contiguous()


def changed(**fields: object) -> ViewParams:
    return ViewParams.model_validate({**NOTHING.model_dump(), **fields})


def made(params: ViewParams, images: torch.Tensor, view: int = 0, encoder: EncoderParams = PLAIN) -> torch.Tensor:
    return RandomView(params, encoder, view)(images, seed=3, step=5)


def draws_of(params: ViewParams, images: torch.Tensor, view: int = 0) -> Draws:
    return draw(params, view, len(images), *images.shape[1:3], generator_for("views", 3, 5, view))


def test_nothing_changes_nothing() -> None:
    images = pictures()
    torch.testing.assert_close(made(NOTHING, images), to_unit(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("field", "axis"), [("horizontal_flip", 3), ("vertical_flip", 2)])
def test_flips(field: str, axis: int) -> None:
    images = pictures()
    torch.testing.assert_close(made(changed(**{field: 1}), images), to_unit(images).flip(axis), rtol=0, atol=1e-5)


def test_quarter_turns() -> None:
    images = pictures(24)
    found, seen = made(changed(quarter_turns=True), images), set()
    for image, view in zip(to_unit(images), found, strict=True):
        errors = [float((torch.rot90(image, k, (1, 2)) - view).abs().max()) for k in range(4)]
        seen.add(int(np.argmin(errors)))
        assert min(errors) < 1e-4
    assert seen == {0, 1, 2, 3}


def test_rotation_is_about_the_centre_by_the_angle_drawn() -> None:
    params = changed(rotation=1, rotation_degrees=45)
    images = torch.zeros(8, 65, 65, 3, dtype=torch.uint8)
    images[:, 20:23, 31:34] = 255  # a dot 11 pixels above the centre
    encoder = EncoderParams(image_px=65, mean=(0.0,) * 3, std=(1.0,) * 3)
    views = RandomView(params, encoder)(images, seed=3, step=5)
    draws = draws_of(params, images)
    assert float(draws.angle.abs().max()) <= math.pi / 4 and len(draws.angle.unique()) == 8
    line = torch.arange(65.0) - 32
    for view, angle in zip(views[:, 0], draws.angle, strict=True):
        mass = view.sum()
        row, column = (view.sum(1) * line).sum() / mass, (view.sum(0) * line).sum() / mass
        assert float(torch.hypot(row, column)) == pytest.approx(11, abs=0.15)
        assert abs(math.atan2(float(column), -float(row))) == pytest.approx(abs(float(angle)), abs=0.02)


def test_crop_equals_cutting_and_resizing() -> None:
    params = changed(crop_scale=(0.2, 0.6), crop_ratio=(0.75, 1.3333))
    images = pictures(16, px=60)
    views, draws = made(params, images), draws_of(params, images)
    share = draws.width * draws.height
    assert float(share.min()) >= 0.2 and float(share.max()) <= 0.6
    ratio = draws.width / draws.height
    assert float(ratio.min()) >= 0.75 and float(ratio.max()) <= 1.3334
    assert float((draws.centre_x - draws.width / 2).min()) >= 0 and float((draws.centre_x + draws.width / 2).max()) <= 1
    for image, view, x, y, w, h in zip(images, views, draws.centre_x, draws.centre_y, draws.width, draws.height, strict=True):
        box = tuple(float(v) * 60 for v in (x - w / 2, y - h / 2, x + w / 2, y + h / 2))
        # BILINEAR transforms sample points, as grid_sample does.
        cut = Image.fromarray(image.numpy()).transform((32, 32), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
        expected = torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 255
        assert float((view - expected)[:, 1:-1, 1:-1].abs().max()) < 0.01


def test_shrinking_much_does_not_alias() -> None:
    board = torch.zeros(4, 256, 256, 3, dtype=torch.uint8)
    board[:, ::2, ::2] = 255
    board[:, 1::2, 1::2] = 255  # a chequerboard of single pixels: grey to an eye that averages
    views = made(NOTHING, board)
    assert float((views - 0.5).abs().max()) < 0.01


def test_crop_that_never_fits_keeps_to_the_ratio() -> None:
    draws = draws_of(changed(crop_scale=(1, 1), crop_ratio=(2, 2)), pictures())
    torch.testing.assert_close(draws.width, torch.ones(6))
    torch.testing.assert_close(draws.height, torch.full((6,), 0.5))


def test_colour_jitter_follows_its_definitions() -> None:
    params = changed(jitter=1, brightness=0.4, contrast=0.4, saturation=0.2, hue=0)
    images = pictures()
    draws, x = draws_of(params, images), to_unit(images).double()
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(1, 3, 1, 1)
    b, c, s = (v.double().view(-1, 1, 1, 1) for v in (draws.brightness, draws.contrast, draws.saturation))
    assert 0.6 <= float(b.min()) < float(b.max()) <= 1.4
    x = (x * b).clamp(0, 1)
    x = (x * c + (1 - c) * (x * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)).clamp(0, 1)
    x = (x * s + (1 - s) * (x * weights).sum(1, keepdim=True)).clamp(0, 1)
    torch.testing.assert_close(made(params, images).double(), x, rtol=0, atol=1e-5)


def test_hue_keeps_grey_and_luma_and_turns_colour() -> None:
    params = changed(jitter=1, brightness=0, contrast=0, saturation=0, hue=0.1)
    images = (pictures().float() * 0.2 + 100).byte()  # near grey, so that nothing is clamped
    images[0] = images[0, :, :, :1]
    found, before = made(params, images), to_unit(images)
    torch.testing.assert_close(found[0], before[0], rtol=0, atol=2e-4)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    torch.testing.assert_close((found * weights).sum(1), (before * weights).sum(1), rtol=0, atol=1e-3)
    assert float((found[1:] - before[1:]).abs().mean()) > 0.002
    angles = draws_of(params, images).hue
    assert float(angles.abs().max()) <= 0.2 * math.pi and len(angles.unique()) == len(images)


def test_grey() -> None:
    images = pictures()
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    expected = (to_unit(images) * weights).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(made(changed(grey=1), images), expected, rtol=0, atol=1e-5)


def test_blur_equals_a_gaussian_of_the_sigma_drawn() -> None:
    from scipy.ndimage import gaussian_filter

    params = changed(blur=(1, 0.5), blur_sigma=(0.5, 2))
    images = pictures(16)
    for view in range(2):
        found, draws = made(params, images, view), draws_of(params, images, view)
        assert len(draws.blur_sigma.unique()) > 1 and float(draws.blur_sigma.min()) >= 0.5
        assert bool(draws.blur.all()) == (view == 0)
        for image, out, flag, sigma in zip(to_unit(images), found, draws.blur, draws.blur_sigma, strict=True):
            blurred = gaussian_filter(image.numpy(), (0, float(sigma), float(sigma)), radius=(0, 6, 6), mode="mirror")
            expected = torch.from_numpy(blurred) if flag else image
            assert float((out - expected).abs().max()) < 1e-4


def test_solarise() -> None:
    images = pictures()
    params = changed(solarise=(0, 1), solarise_threshold=(0.4, 0.6), solarise_addition=(-0.1, 0.1))
    draws, x = draws_of(params, images, 1), to_unit(images)
    x = (x + draws.solarise_addition.view(-1, 1, 1, 1)).clamp(0, 1)
    expected = torch.where(x < draws.solarise_threshold.view(-1, 1, 1, 1), x, 1 - x)
    torch.testing.assert_close(made(params, images, 1), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(made(params, images, 0), to_unit(images), rtol=0, atol=1e-5)


def test_every_parameter_is_drawn_per_image_with_its_probability() -> None:
    count = 4000
    params = ViewParams(rotation=0.5, rotation_degrees=30, solarise_addition=(-0.1, 0.1), solarise_threshold=(0.4, 0.6))
    draws = draw(params, 1, count, 96, 96, generator_for("views", 0, 0, 1))
    for name, values in draws._asdict().items():
        assert values.shape == (count,)
        assert len(values.unique()) >= (2 if name in ("grey", "blur", "solarise") else 1000), name
    shares = {
        "horizontal_flip": float((draws.width < 0).float().mean()),
        "vertical_flip": float((draws.height < 0).float().mean()),
        "rotation": float((draws.angle != 0).float().mean()),
        "jitter": float((draws.brightness != 1).float().mean()),
        "grey": float(draws.grey.mean()),
    }
    for name, share in shares.items():
        assert share == pytest.approx(getattr(params, name), abs=0.03), name
    assert float(draws.blur.mean()) == pytest.approx(0.1, abs=0.03)
    assert float(draws.solarise.mean()) == pytest.approx(0.2, abs=0.03)


def test_views_differ_from_each_other_and_repeat_by_seed_and_step() -> None:
    images, two = pictures(), TwoViews(ViewParams(), PLAIN)
    first, second = two(images, seed=1, step=2)
    again = two(images, seed=1, step=2)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert not torch.equal(first, second)
    for seed, step in ((2, 2), (1, 3)):
        assert not torch.equal(two(images, seed=seed, step=step)[0], first)
    same = images[:1].expand(4, -1, -1, -1)
    assert len({float(view.sum()) for view in two(same, seed=1, step=2)[0]}) == 4


def test_global_random_state_is_neither_used_nor_moved() -> None:
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    TwoViews(ViewParams(), PLAIN)(pictures(), seed=1, step=2)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("world", [2, 3])
def test_views_do_not_depend_on_the_number_of_workers(world: int) -> None:
    images, two = pictures(12, px=40), TwoViews(ViewParams(rotation=0.5, rotation_degrees=20), PLAIN)
    whole = two(images, seed=1, step=2)
    share = 12 // world
    parts = [two(images[r * share : (r + 1) * share], seed=1, step=2, first=r * share, total=12) for r in range(world)]
    for view in range(2):
        torch.testing.assert_close(torch.cat([part[view] for part in parts]), whole[view], rtol=0, atol=1e-6)


def test_one_channel() -> None:
    encoder = EncoderParams(image_px=32, channels=1, mean=(0.5,), std=(0.2,))
    views = TwoViews(ViewParams(), encoder)(pictures(channels=1), seed=0, step=0)
    assert [view.shape for view in views] == [(6, 1, 32, 32)] * 2
    assert eval_view(pictures(channels=1), encoder).shape == (6, 1, 32, 32)
    with pytest.raises(ValueError, match="3 channel"):
        TwoViews(ViewParams(), encoder)(pictures(), seed=0, step=0)


def test_eval_view_is_the_whole_image_resized_and_normalised() -> None:
    encoder = EncoderParams(image_px=32)
    images = pictures(3, px=96)
    found = eval_view(images, encoder)
    for image, view in zip(images, found, strict=True):
        resized = Image.fromarray(image.numpy()).resize((32, 32), Image.Resampling.BILINEAR)  # antialiased
        expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 255
        torch.testing.assert_close(view[None], normalise(expected, encoder), rtol=0, atol=0.02)
    same = pictures(3, px=32)
    torch.testing.assert_close(eval_view(same, encoder), normalise(to_unit(same), encoder))


def test_augment_normalises() -> None:
    encoder = EncoderParams(image_px=32)
    images = pictures()
    found = augment(to_unit(images), draws_of(NOTHING, images), NOTHING, encoder)
    torch.testing.assert_close(found, normalise(to_unit(images), encoder), rtol=0, atol=1e-4)


def test_draws_of_today_stay() -> None:
    """Numbers taken before cutout and small crops existed: finished artifacts were made with these draws."""
    draws = draw(ViewParams(), 1, 3, 40, 60, generator_for("views", 7, 11, 1))
    expected = {
        "centre_x": [0.542468, 0.388339, 0.482394],
        "centre_y": [0.504156, 0.469448, 0.45831],
        "width": [-0.858321, -0.508117, -0.676109],
        "height": [-0.985374, 0.933495, 0.91118],
        "angle": [0, 0, 0],
        "brightness": [1, 0.810359, 0.837411],
        "contrast": [1, 1.281384, 1.196483],
        "saturation": [1, 0.960009, 0.874835],
        "hue": [0, -0.334936, 0.531538],
        "grey": [0, 0, 0],
        "blur": [0, 0, 0],
        "blur_sigma": [1.741399, 1.261899, 0.656434],
        "solarise": [1, 0, 0],
        "solarise_threshold": [0.5, 0.5, 0.5],
        "solarise_addition": [0, 0, 0],
    }
    assert list(draws._asdict()) == list(expected)
    for name, values in draws._asdict().items():
        assert values.tolist() == pytest.approx(expected[name], abs=2e-6), name
    first, second = TwoViews(ViewParams(), EncoderParams(image_px=32))(pictures(), seed=7, step=11)
    assert first.mean((1, 2, 3)).tolist() == pytest.approx([0.14722, -0.22781, 0.08575, 0.57023, 0.28335, -0.6297], abs=1e-4)
    assert second.std((1, 2, 3)).tolist() == pytest.approx([0.67548, 0.71135, 1.31653, 0.70693, 1.05092, 1.20493], abs=1e-4)


def test_cutout_is_a_centred_rectangle_of_the_sizes_asked_for() -> None:
    encoder = EncoderParams(image_px=256, channels=1, mean=(0.0,), std=(1.0,))
    white = torch.full((100, 32, 32, 1), 255, dtype=torch.uint8)
    black = RandomView(changed(cutout=1), encoder)(white, seed=3, step=5)[:, 0] == 0
    columns, rows = black.any(1), black.any(2)
    widths, heights = columns.sum(1), rows.sum(1)
    assert torch.equal(black.sum((1, 2)), widths * heights)  # solid
    assert 50 <= int(widths.min()) <= 55 and 95 <= int(widths.max()) <= 100  # paper 000 at 256 px
    assert int(heights.min()) == 185 and int(heights.max()) == 190
    assert float(widths.float().mean()) == pytest.approx(75, abs=5) and len(widths.unique()) > 20
    for flags, sizes in ((columns, widths), (rows, heights)):
        assert torch.equal(flags.int().argmax(1), (256 - sizes) // 2)  # centred
    small = RandomView(changed(cutout=1), encoder.model_copy(update={"image_px": 64}))(white, seed=3, step=5)[:, 0] == 0
    torch.testing.assert_close(small.any(1).sum(1) / 64, widths / 256, rtol=0, atol=0.009)  # shares of any view


def test_cutout_has_its_probability_and_leaves_all_else_as_it_is() -> None:
    images = pictures(60)
    for view in range(2):
        plain, cut = (RandomView(ViewParams(cutout=p), PLAIN, view)(images, seed=3, step=5) for p in (0, 0.33))
        hidden = draw_cutout(ViewParams(cutout=0.33), 60, generator_for("cutout", 3, 5, view)).hidden.bool()
        assert torch.equal((plain != cut).flatten(1).any(1), hidden)
    flags = draw_cutout(ViewParams(cutout=0.33), 4000, generator_for("cutout", 3, 5, 0)).hidden
    assert float(flags.mean()) == pytest.approx(0.33, abs=0.03)


def test_cutout_comes_before_colours_and_is_black_before_normalisation() -> None:
    images = pictures()
    centre = made(changed(cutout=1, solarise=(1, 1), solarise_threshold=(0, 0)), images)[:, :, 15:17, 15:17]
    assert bool((centre == 1).all())  # black, then inverted
    encoder = EncoderParams(image_px=32)
    found = RandomView(changed(cutout=1), encoder)(images, seed=3, step=5)[:, :, 16, 16]
    torch.testing.assert_close(found, (-torch.tensor(encoder.mean) / torch.tensor(encoder.std)).expand(6, -1))


def test_view_sheet() -> None:
    sheet = Image.open(io.BytesIO(view_sheet(pictures(4), ViewParams(), EncoderParams(image_px=32), draws=2)))
    assert sheet.format == "PNG"
    assert sheet.size == (5 * 34, 4 * 34)
    evaluated = np.asarray(sheet)[:32, :32].astype(int)
    assert np.abs(evaluated - pictures(4)[0].numpy().astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"crop_scale": (0.5, 0.3)}, "crop_scale"), ({"blur": (1.2, 0)}, "blur"), ({"blur_sigma": (0, 1)}, "blur_sigma")],
)
def test_impossible_parameters_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ViewParams.model_validate(fields)
