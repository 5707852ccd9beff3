"""Published augmentations as flat values: what a preset does not list, it does not do.

Sigmas of blurs are in pixels and were published for views of 224 px (paper 000: 256): nothing rescales them for other sizes,
a recipe that uses smaller views overrides `blur_sigma`. Paper 002 takes each method's own: simclr, byol, and swav (with
`small_crops: 0` for its runs at 96 px). Authors' code that draws the order of the jitter's four operations at random
(torchvision's ColorJitter) is followed with the fixed order brightness, contrast, saturation, hue.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NOTHING: dict[str, Any] = {
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (0.75, 1.3333),
    "horizontal_flip": 0.0,
    "vertical_flip": 0.0,
    "jitter": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
    "grey": 0.0,
    "blur": (0.0, 0.0),
    "solarise": (0.0, 0.0),
}

# Barlow Twins, section 2 and the authors' main.py: BYOL's augmentations without change.
_BARLOW_TWINS: dict[str, Any] = _NOTHING | {
    "crop_scale": (0.08, 1.0),
    "horizontal_flip": 0.5,
    "jitter": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "grey": 0.2,
    "blur": (1.0, 0.1),
    "blur_sigma": (0.1, 2.0),
    "solarise": (0.0, 0.2),
    "solarise_threshold": (0.5, 0.5),
}

# SimCLR, appendix A: colour distortion of strength 1, blur in half of the images. The authors' second code (SimCLR v2)
# draws brightness as a factor, the first as an addition; here it is a factor.
_SIMCLR: dict[str, Any] = _NOTHING | {
    "crop_scale": (0.08, 1.0),
    "horizontal_flip": 0.5,
    "jitter": 0.8,
    "brightness": 0.8,
    "contrast": 0.8,
    "saturation": 0.8,
    "hue": 0.2,
    "grey": 0.2,
    "blur": (0.5, 0.5),
    "blur_sigma": (0.1, 2.0),
}

# Paper 000, table 12 and appendix A.2: probabilities from the table, strengths "as in the literature" (Barlow Twins'),
# solarisation with kornia's defaults, whose threshold 0.1 and addition 0.1 are ranges about 0.5 and 0. (The text has the
# addition after the inversion; kornia, which it names, adds before.) The authors' code differs from the text: one crop box
# per batch with crop_scale 0.7 to 1, rotation of 45 degrees at 0.5, jitter 0.24, 0.24, 0.12, 0.06, one blur sigma per batch.
_PAPER000: dict[str, Any] = _BARLOW_TWINS | {"solarise_threshold": (0.4, 0.6), "solarise_addition": (-0.1, 0.1)}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # This project's own: the defaults of ViewParams.
    "default": {},
    "barlow_twins": _BARLOW_TWINS,
    # BYOL, table 6 (appendix B).
    "byol": _BARLOW_TWINS,
    # VICReg, the authors' augmentations.py: the same two sets as Barlow Twins'.
    "vicreg": _BARLOW_TWINS,
    "simclr": _SIMCLR,
    # SimSiam, section 3: MoCo v2's augmentations.
    "simsiam": _SIMCLR | {"crop_scale": (0.2, 1.0), "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    # SwAV, appendix A.2 and the authors' multicropdataset.py: SimCLR's colours and blur, the same for crops of both sizes.
    "swav": _SIMCLR | {"crop_scale": (0.14, 1.0), "small_crops": 6, "small_px": 96, "small_scale": (0.05, 0.14)},
    "paper000": _PAPER000,
    # Paper 000, table 12 with the cutout, for pools with DermNet's watermarked images: 50 to 100 pixels wide and 185 to 190
    # high at 256 (footnote 5).
    "paper000_cutout": _PAPER000
    | {"cutout": 0.33, "cutout_width": (50 / 256, 100 / 256), "cutout_height": (185 / 256, 190 / 256)},
    # Paper 000, appendix A.1 and table 11, fine-tuning: scale, ratio and angle from the text, probabilities from the table.
    # It says "flipped" without a direction: horizontally here. Angles are drawn to both sides, the text has 0 to 45.
    "paper000_fine_tune": _NOTHING
    | {"crop_scale": (0.7, 1.0), "crop_ratio": (0.75, 1.33), "horizontal_flip": 0.25, "rotation": 0.25, "rotation_degrees": 45.0},
    # Paper 001 states no augmentation ("two augmented views", section 2.1) beside the methods it cites: SimCLR's. For its
    # SimSiam and VICReg, "in their original configurations", take simsiam and vicreg.
    "paper001": _SIMCLR,
    # Paper 003, section 3.1: "crop, flip, jitter" after SimCLR, no strengths. Only these three are done, at SimCLR's values.
    "paper003": _NOTHING
    | {
        "crop_scale": (0.08, 1.0),
        "horizontal_flip": 0.5,
        "jitter": 0.8,
        "brightness": 0.8,
        "contrast": 0.8,
        "saturation": 0.8,
        "hue": 0.2,
    },
    # Paper 003, section 3.2, fine-tuning: crop 0.6 to 1, "flips" (both here), 30 degrees, jitter without a strength (0.2 and
    # hue 0.05 are ours: dermoscopic colour is evidence).
    "paper003_fine_tune": _NOTHING
    | {
        "crop_scale": (0.6, 1.0),
        "horizontal_flip": 0.5,
        "vertical_flip": 0.5,
        "rotation": 1.0,
        "rotation_degrees": 30.0,
        "jitter": 0.8,
        "brightness": 0.2,
        "contrast": 0.2,
        "saturation": 0.2,
        "hue": 0.05,
    },
    # Paper 004, section 4.2: the same as SimCLR's, colour strength 1.
    "paper004_dermatology": _SIMCLR,
    # Paper 004, section 4.2: crop, colour jitter of strength 0.5, rotation up to 45 degrees, horizontal flip; no blur, which
    # hides texture that is the disease. No probability is given for the rotation (1 here); turning to grey is not named.
    "paper004_chest_xray": _NOTHING
    | {
        "crop_scale": (0.08, 1.0),
        "horizontal_flip": 0.5,
        "rotation": 1.0,
        "rotation_degrees": 45.0,
        "jitter": 0.8,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "hue": 0.1,
    },
    # Paper 004, section 4.3, fine-tuning: "random color augmentation, crops with resize, blurring, rotation, and flips"
    # without values: SimCLR's, with the chest X-ray set's 45 degrees.
    "paper004_fine_tune": _SIMCLR | {"rotation": 1.0, "rotation_degrees": 45.0},
    # jobs/ham10000-laptop.yaml, chosen on its validation split: colour is evidence in skin lesions, and thumbnails of 64 px
    # bear no blur.
    "dermoscopy_small": _NOTHING
    | {
        "crop_scale": (0.2, 1.0),
        "horizontal_flip": 0.5,
        "vertical_flip": 0.5,
        "rotation": 1.0,
        "rotation_degrees": 180.0,
        "jitter": 0.8,
        "brightness": 0.1,
        "contrast": 0.1,
        "saturation": 0.05,
    },
}
"""Values of `ViewParams` by the name of a preset. Several papers' methods share one set: they then have equal values."""
