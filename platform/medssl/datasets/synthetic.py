"""Procedural lesion-like images: SYNTHETIC, drawn by a program, for trying medssl out and for tests without data.

They look roughly like dermoscopy (skin tone, uneven light, hairs, one pigmented lesion) and no score on them says
anything about patients. The four classes are named after dermoscopic patterns and differ in structure: a net of
lines, scattered dots, a smooth interior, streaks that run outwards. Colour, size, light and pose are drawn from the
same ranges for all classes, so colour statistics tell little and features of structure much. A patient has one lesion
or two, a lesion has one to four images, each in another pose, zoom and light.

Arrays are (P, P) or (P, P, 3) with P the side in pixels; u, v are lesion coordinates (the lesion's mean radius is 1).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Array = NDArray[np.float32]

PATTERNS = {"reticular": 0.38, "globular": 0.28, "homogeneous": 0.2, "starburst": 0.14}
"""Classes and their shares."""
LICENCE = "CC0-1.0 (drawn by a program)"
_IMAGES_PER_LESION = (0.35, 0.3, 0.2, 0.15)
"""Shares of lesions with 1, 2, 3 and 4 images."""
_TWO_LESIONS = 0.12


def write_synthetic(folder: Path, images: int = 800, seed: int = 0, px: int = 112) -> Path:
    """Draws `images` JPEG files of `px` x `px` pixels and a table into `folder`; returns the table's path.

    The table has the columns image, label, patient_id, bag_id (the lesion), site, device, sex, age and no split. The
    same seed draws the same images.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows, shots = [], []
    for row, shot in _shots(images, seed):
        rows.append(row)
        shots.append(shot)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda job: _write(folder / str(job[0]["image"]), job[1], px), zip(rows, shots, strict=True)))
    table = folder / "table.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return table


@dataclass(frozen=True)
class _Shot:
    """One picture of one lesion: two seeds decide everything."""

    pattern: str
    lesion_seed: int
    image_seed: int


def _shots(images: int, seed: int) -> Iterator[tuple[dict[str, object], _Shot]]:
    """Table row and picture, patient by patient."""
    rng = np.random.default_rng([seed, images])
    names, shares = list(PATTERNS), list(PATTERNS.values())
    made = patient = lesion = 0
    while made < images:
        patient += 1
        person = {
            "site": str(rng.choice(["north", "south"])),
            "device": str(rng.choice(["contact", "polarised"])),
            "sex": str(rng.choice(["female", "male"])),
            "age": int(rng.integers(18, 90)),
        }
        for _ in range(1 + int(rng.random() < _TWO_LESIONS)):
            lesion += 1
            pattern = str(rng.choice(names, p=shares))
            for _ in range(1 + int(rng.choice(4, p=_IMAGES_PER_LESION))):
                if made == images:
                    return
                made += 1
                row = {
                    "image": f"images/synthetic_{made:05d}.jpg", "label": pattern,
                    "patient_id": f"patient-{patient:04d}", "bag_id": f"lesion-{lesion:04d}", **person,
                }  # fmt: skip
                yield row, _Shot(pattern, seed * 1_000_003 + lesion, seed * 1_000_003 + made)


def _write(path: Path, shot: _Shot, px: int) -> None:
    quality = 85 + shot.image_seed % 10
    Image.fromarray(draw_lesion(shot.pattern, shot.lesion_seed, shot.image_seed, px)).save(path, quality=quality)


def draw_lesion(pattern: str, lesion_seed: int, image_seed: int, px: int = 112) -> NDArray[np.uint8]:
    """One picture, (px, px, 3) uint8: the lesion of `lesion_seed`, seen as `image_seed` has it."""
    lesion = np.random.default_rng([lesion_seed, 1])
    view = np.random.default_rng([image_seed, 2])
    u, v = _pose(view, px)
    mask, depth = _shape(lesion, u, v, irregular=0.5 if pattern != "starburst" else 0.8)
    texture = _TEXTURES[pattern](lesion, u, v)
    skin = np.array([0.86, 0.66, 0.55], np.float32) * lesion.uniform(0.75, 1.08) + lesion.normal(0, 0.02, 3).astype(
        np.float32
    )
    pigment = np.array([0.45, 0.29, 0.21], np.float32) * lesion.uniform(0.7, 1.4) + lesion.normal(0, 0.03, 3).astype(
        np.float32
    )
    strength = lesion.uniform(0.5, 0.75) + lesion.uniform(0.35, 0.5) * (texture - 0.5) + 0.12 * depth
    cover = (mask * np.clip(strength, 0.05, 1))[:, :, None]
    image = skin * (1 - cover) + pigment * cover
    image *= (1 + 0.05 * _clouds(view, px, 7) + 0.03 * _clouds(view, px, 25))[:, :, None]
    image *= _light(view, px)[:, :, None] * (1 + view.normal(0, 0.035, 3).astype(np.float32))
    picture = Image.fromarray((np.clip(image, 0, 1) * 255).astype(np.uint8))
    _draw_hairs(view, picture)
    clean = np.asarray(picture).astype(np.float32)
    noisy = clean + view.normal(0, view.uniform(1.5, 4), clean.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------- pose, light


def _pose(view: np.random.Generator, side: int) -> tuple[Array, Array]:
    """Lesion coordinates of every pixel: turned, zoomed, shifted, a little sheared, mirrored or not."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) * (2 / side) - 1
    x, y = x - view.uniform(-0.18, 0.18), y - view.uniform(-0.18, 0.18)
    angle, zoom, shear = view.uniform(0, 2 * np.pi), view.uniform(1.35, 1.9), view.uniform(-0.12, 0.12)
    mirror = view.choice([-1.0, 1.0])
    u = zoom * (np.cos(angle) * x - np.sin(angle) * y) + shear * y
    v = zoom * (np.sin(angle) * x + np.cos(angle) * y)
    return (mirror * u).astype(np.float32), v.astype(np.float32)


def _light(view: np.random.Generator, side: int) -> Array:
    """A gradient across the picture, darker corners, and the exposure."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) * (2 / side) - 1
    angle = view.uniform(0, 2 * np.pi)
    gradient = 1 + view.uniform(0, 0.18) * (np.cos(angle) * x + np.sin(angle) * y)
    vignette = 1 - view.uniform(0, 0.22) * (x**2 + y**2) / 2
    light: Array = (view.uniform(0.82, 1.12) * gradient * vignette).astype(np.float32)
    return light


def _clouds(rng: np.random.Generator, side: int, cells: int) -> Array:
    """Smooth noise with standard deviation about 1 over `cells` x `cells` random values."""
    noise = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC))


def _draw_hairs(view: np.random.Generator, picture: Image.Image) -> None:
    draw, side = ImageDraw.Draw(picture), picture.width
    for _ in range(int(view.choice([0, 0, 0, 2, 4, 8]))):
        start, angle, bend = view.uniform(0, side, 2), view.uniform(0, 2 * np.pi), view.normal(0, 0.6)
        steps = np.linspace(0, 1, 12)
        reach = view.uniform(0.4, 1.2) * side
        xs = start[0] + reach * steps * np.cos(angle + bend * steps)
        ys = start[1] + reach * steps * np.sin(angle + bend * steps)
        tone = int(view.uniform(25, 80))
        draw.line(list(zip(xs, ys, strict=True)), fill=(tone, int(tone * 0.8), int(tone * 0.7)))


# ------------------------------------------------------------------------------------------ shape and patterns


def _shape(lesion: np.random.Generator, u: Array, v: Array, irregular: float) -> tuple[Array, Array]:
    """Mask (1 inside, soft border) and depth (1 in the middle, 0 at the border) of a blob with a wavy outline."""
    angle, radius = np.arctan2(v, u), np.hypot(u * lesion.uniform(0.85, 1.2), v)
    outline = np.full_like(radius, lesion.uniform(0.85, 1.1))
    for wave in range(2, 8):
        outline += irregular * lesion.normal(0, 0.16 / wave) * np.cos(wave * angle + lesion.uniform(0, 2 * np.pi))
    mask = 1 / (1 + np.exp(-(outline - radius) / lesion.uniform(0.03, 0.09)))
    return mask.astype(np.float32), np.clip(1 - radius / outline, 0, 1).astype(np.float32)


def _warp(lesion: np.random.Generator, u: Array, v: Array, amount: float) -> tuple[Array, Array]:
    """Coordinates bent by slow waves, so that nothing drawn in them is quite regular."""
    a, b, c, d = lesion.uniform(0, 2 * np.pi, 4)
    f, g = lesion.uniform(1.5, 3.5, 2)
    return u + amount * np.sin(f * v + a) * np.cos(g * u + b), v + amount * np.sin(g * u + c) * np.cos(f * v + d)


def _reticular(lesion: np.random.Generator, u: Array, v: Array) -> Array:
    """A net: dark lines round light holes."""
    u, v = _warp(lesion, u, v, 0.12)
    cells = lesion.uniform(8, 12)
    lines = np.maximum(np.abs(np.cos(cells * u)), np.abs(np.cos(cells * v)))
    net: Array = np.clip((lines - 0.55) / 0.45, 0, 1) * 1.25
    return net


def _globular(lesion: np.random.Generator, u: Array, v: Array) -> Array:
    """Dots of differing size, one in most cells of a jittered grid."""
    cells = lesion.uniform(3.2, 4.6)
    table = lesion.uniform(0, 1, (4, 32, 32)).astype(np.float32)
    column, row = np.floor(u * cells), np.floor(v * cells)
    i, j = column.astype(int) % 32, row.astype(int) % 32
    du = u * cells - column - (0.35 + 0.3 * table[0, i, j])
    dv = v * cells - row - (0.35 + 0.3 * table[1, i, j])
    size = np.where(table[3, i, j] < 0.85, 0.17 + 0.16 * table[2, i, j], 0)
    dots: Array = np.clip((size - np.hypot(du, dv)) / 0.08 + 0.5, 0, 1)
    return 0.22 + 0.9 * dots


def _homogeneous(lesion: np.random.Generator, u: Array, v: Array) -> Array:
    """Slow changes of tone only."""
    u, v = _warp(lesion, u, v, 0.3)
    tone: Array = 0.5 + 0.3 * np.sin(lesion.uniform(1, 2) * u + lesion.uniform(0, 6)) * np.cos(lesion.uniform(1, 2) * v)
    return tone


def _starburst(lesion: np.random.Generator, u: Array, v: Array) -> Array:
    """Streaks that run outwards and grow stronger towards the border."""
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    streaks = int(lesion.integers(11, 19))
    bend = lesion.normal(0, 0.4)
    wave = np.cos(
        streaks * angle + bend * 3 * radius + lesion.uniform(0, 6) + 0.8 * np.sin(3 * angle + lesion.uniform(0, 6))
    )
    return (0.5 + 0.55 * wave * np.clip(radius * 1.4 - 0.2, 0, 1)).astype(np.float32)


_TEXTURES = {
    "reticular": _reticular,
    "globular": _globular,
    "homogeneous": _homogeneous,
    "starburst": _starburst,
}
