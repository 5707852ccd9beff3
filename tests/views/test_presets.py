"""Presets: each paper's values, overriding them, and that names leave no trace in dumps and hashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from medssl.artifacts import digest_json
from medssl.errors import RecipeError
from medssl.recipe_file import dump, load
from medssl.views import PRESETS, ViewParams

JOBS = Path(__file__).resolve().parents[2] / "jobs"
COLOUR_04 = {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grey": 0.2}
COLOUR_08 = {"jitter": 0.8, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "grey": 0.2}
IMAGENET = {"crop_scale": (0.08, 1.0), "horizontal_flip": 0.5, "vertical_flip": 0.0, "rotation": 0.0, "cutout": 0.0}
NO_COLOUR = {"jitter": 0.0, "grey": 0.0, "blur": (0.0, 0.0), "solarise": (0.0, 0.0)}
UNEVEN = {"blur": (1.0, 0.1), "blur_sigma": (0.1, 2.0), "solarise": (0.0, 0.2)}
EVEN = {"blur": (0.5, 0.5), "blur_sigma": (0.1, 2.0), "solarise": (0.0, 0.0)}
KORNIA = {"solarise_threshold": (0.4, 0.6), "solarise_addition": (-0.1, 0.1)}
PIL = {"solarise_threshold": (0.5, 0.5), "solarise_addition": (0.0, 0.0)}
STATED: dict[str, dict[str, Any]] = {
    "barlow_twins": IMAGENET | COLOUR_04 | UNEVEN | PIL,
    "byol": IMAGENET | COLOUR_04 | UNEVEN | PIL,
    "vicreg": IMAGENET | COLOUR_04 | UNEVEN | PIL,
    "simclr": IMAGENET | COLOUR_08 | EVEN,
    "simsiam": IMAGENET | COLOUR_08 | EVEN
    | {"crop_scale": (0.2, 1.0), "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "swav": IMAGENET | COLOUR_08 | EVEN
    | {"crop_scale": (0.14, 1.0), "small_crops": 6, "small_px": 96, "small_scale": (0.05, 0.14)},
    "paper000": IMAGENET | COLOUR_04 | UNEVEN | KORNIA,
    "paper000_cutout": IMAGENET | COLOUR_04 | UNEVEN | KORNIA
    | {"cutout": 0.33, "cutout_width": (50 / 256, 100 / 256), "cutout_height": (185 / 256, 190 / 256)},
    "paper000_fine_tune": NO_COLOUR
    | {"crop_scale": (0.7, 1.0), "crop_ratio": (0.75, 1.33), "horizontal_flip": 0.25, "rotation": 0.25, "rotation_degrees": 45},
    "paper001": IMAGENET | COLOUR_08 | EVEN,
    "paper003": IMAGENET | COLOUR_08 | {"grey": 0.0, "blur": (0.0, 0.0), "solarise": (0.0, 0.0)},
    "paper003_fine_tune": {"crop_scale": (0.6, 1.0), "rotation_degrees": 30, "horizontal_flip": 0.5, "vertical_flip": 0.5},
    "paper004_dermatology": IMAGENET | COLOUR_08 | EVEN,
    "paper004_chest_xray": {
        "crop_scale": (0.08, 1.0), "horizontal_flip": 0.5, "vertical_flip": 0.0, "rotation": 1.0, "rotation_degrees": 45,
        "brightness": 0.4, "contrast": 0.4, "grey": 0.0, "blur": (0.0, 0.0), "solarise": (0.0, 0.0),
    },
    "paper004_fine_tune": IMAGENET | COLOUR_08 | EVEN | {"rotation": 1.0, "rotation_degrees": 45},
    "dermoscopy_small": {"crop_scale": (0.2, 1.0), "rotation_degrees": 180, "hue": 0.0, "blur": (0.0, 0.0)},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(STATED))
def test_preset_does_what_its_paper_states(name: str) -> None:
    params = ViewParams(preset=name)
    found = {field: getattr(params, field) for field in STATED[name]}
    assert found == STATED[name]


def test_every_preset_is_tested_and_only_the_documented_ones_are_equal() -> None:
    assert set(STATED) | {"default"} == set(PRESETS)
    groups: dict[str, set[str]] = {}
    for name in PRESETS:
        groups.setdefault(digest_json(ViewParams(preset=name).canonical()), set()).add(name)
    together = [names for names in groups.values() if len(names) > 1]
    assert sorted(map(sorted, together)) == [["barlow_twins", "byol", "vicreg"], ["paper001", "paper004_dermatology", "simclr"]]


def test_a_preset_holds_every_value_that_a_newer_default_could_change() -> None:
    """What changes views in effect must be in the preset: defaults of ViewParams are the project's own and may move."""
    for name, values in PRESETS.items():
        params = ViewParams(preset=name)
        needed = {"crop_scale", "crop_ratio", "horizontal_flip", "vertical_flip", "jitter", "grey", "blur", "solarise"}
        needed |= {"brightness", "contrast", "saturation", "hue"} if params.jitter else set()
        needed |= {"blur_sigma"} if any(params.blur) else set()
        needed |= {"solarise_threshold"} if any(params.solarise) else set()
        assert name == "default" or needed <= set(values), name


def test_default_preset_is_the_default() -> None:
    assert ViewParams(preset="default") == ViewParams() == ViewParams(preset=None)


def test_values_override_the_preset() -> None:
    params = ViewParams(preset="swav", small_crops=0, blur=(0.0, 0.0))
    assert (params.small_crops, params.blur) == (0, (0.0, 0.0))
    swav = ViewParams(preset="simclr", crop_scale=(0.14, 1.0), blur=(0.0, 0.0))
    assert params == swav
    with pytest.raises(ValidationError, match="crop_scale must be two rising values"):
        ViewParams(preset="swav", crop_scale=(0.5, 0.3))


def test_names_leave_no_trace_in_the_hash() -> None:
    for name in PRESETS:
        params = ViewParams(preset=name)
        assert params.preset is None and "preset" not in params.canonical()
        written = ViewParams.model_validate(params.canonical())
        assert written == params and written.canonical() == params.canonical(), name


def test_hashes_of_recipes_without_the_newer_fields_stay() -> None:
    """Digests taken before presets, cutout and small crops existed."""
    assert digest_json(ViewParams().canonical()) == "b7adba52c8049810e76e55e01bf5ad349512c7a6ed6050a405267b2d824df584"
    laptop = load(JOBS / "ham10000-laptop.yaml").arms[0].views
    assert digest_json(laptop.canonical()) == "0b42ebc672fbe21c1179dc72c03fb0475b727646283dbf3ad8e8570a58936cba"
    changed = ViewParams(cutout=0.1, small_px=64).canonical()
    assert {field for field in changed if field not in ViewParams().canonical()} == {"cutout", "small_px"}


def test_laptop_recipe_is_its_preset() -> None:
    assert load(JOBS / "ham10000-laptop.yaml").arms[0].views == ViewParams(preset="dermoscopy_small")


def recipe(views: dict[str, Any]) -> dict[str, Any]:
    objective = {"name": "barlow_twins", "projector": [8, 8]}
    return {
        "study": "s",
        "dataset": "datasets/d",
        "arms": [{"name": "bt", "objective": objective, "epochs": 1, "batch_size": 8, "views": views}, {"name": "random"}],
        "protocols": [{"name": "probe", "kind": "linear_probe"}],
    }


def test_in_a_recipe() -> None:
    named = load(recipe({"preset": "paper004_chest_xray", "rotation_degrees": 20}))
    assert named.arms[0].views == ViewParams(preset="paper004_chest_xray", rotation_degrees=20)
    assert "preset" not in dump(named)
    written = load(recipe(named.arms[0].views.canonical()))
    assert written == named
    assert written.plan(written.arms[0], 0).canonical() == named.plan(named.arms[0], 0).canonical()
    other = load(recipe({"preset": "simclr"}), ["arms.bt.views.preset=byol", "arms.bt.views.grey=0"])
    assert other.arms[0].views == ViewParams(preset="byol", grey=0)
    with pytest.raises(RecipeError, match=r"arms\.0\.views: unknown preset 'simcrl': did you mean 'simclr'\?$"):
        load(recipe({"preset": "simcrl"}))
    with pytest.raises(RecipeError, match=r"unknown preset '3': choices: barlow_twins, byol, "):
        load(recipe({"preset": 3}))
