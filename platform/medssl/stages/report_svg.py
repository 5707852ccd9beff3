"""Small charts as inline SVG: scales, ticks, and a panel to draw on.

Panels are drawn about as wide as they are shown on a telephone, and flow side by side on wider screens, so that their
text keeps its size. Coordinates are rounded to a tenth, which keeps a page of thousands of points small and its bytes
the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

INK, SOFT, GRID = "#1a1a1a", "#555555", "#e2e2e2"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's colours without yellow, which is too pale on white: told apart with every common colour blindness."""
_SHAPES = (
    "M{x} {y}h0", "M{x} {y}m-{h} -{h}h{d}v{d}h-{d}z", "M{x} {y}m0 -{h}l{h} {d}h-{d}z", "M{x} {y}m-{h} 0h{d}m-{h} -{h}v{d}",
    "M{x} {y}m0 -{d}l{h} {d} -{h} {d} -{h} -{d}z", "M{x} {y}m-{h} -{h}l{d} {d}m-{d} 0l{d} -{d}",
    "M{x} {y}m-{h} -{h}h{d}l-{h} {d}z",
)  # fmt: skip
"""Dot, square, triangle, plus, tall diamond, cross, triangle upside down: SVG paths around (x, y), h half of the size d."""
DASHES = ("", "6 3", "2 2", "8 3 2 3", "1 3", "10 4", "4 2 1 2")


def colour(index: int) -> str:
    """Colour of the index-th arm or seed; they repeat after seven."""
    return COLOURS[index % len(COLOURS)]


def dash(index: int) -> str:
    """Dash pattern of the index-th seed; they repeat after seven."""
    return DASHES[index % len(DASHES)]


def number(value: float) -> str:
    """A coordinate, rounded to a tenth."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def short(value: float) -> str:
    """A tick or cell label: three significant digits, exponents without padding."""
    if value < 0:
        return f"−{short(-value)}"
    if value != 0 and (value < 1e-3 or value >= 1e5):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values from `low` to `high`, about as many as asked."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in the range, with 2 and 5 between them when there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few = math.log10(high / low) < 2.2
    values = [m * 10.0**d for d in decades for m in ((1, 2, 5) if few else (1,))]
    return [v for v in values if low * 0.999 <= v <= high * 1.001]


@dataclass(frozen=True)
class Scale:
    """Maps values low..high to coordinates start..end, on a linear or logarithmic axis."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Coordinate of a value."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, 1e-300))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Tick values."""
        return log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high, about)


@dataclass
class Panel:
    """One SVG drawing of `width` x `height` units; `label` is what a screen reader says."""

    width: float
    height: float
    label: str
    parts: list[str] = field(default_factory=list)

    def line(
        self, ends: tuple[float, float, float, float], stroke: str = INK, width: float = 1, pattern: str = ""
    ) -> None:
        """A straight line (x1, y1, x2, y2)."""
        x1, y1, x2, y2 = ends
        dashes = f' stroke-dasharray="{pattern}"' if pattern else ""
        self.parts.append(
            f'<path d="M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}" fill="none" stroke="{stroke}"'
            f' stroke-width="{number(width)}"{dashes}/>'
        )

    def curve(self, pieces: Sequence[Sequence[tuple[float, float]]], stroke: str, pattern: str = "") -> None:
        """A line through points, in pieces where values are missing; a piece of one point is a dot."""
        path = "".join(
            "M" + "L".join(f"{number(x)} {number(y)}" for x, y in (piece if len(piece) > 1 else [piece[0]] * 2))
            for piece in pieces
            if piece
        )
        if path:
            dashes = f' stroke-dasharray="{pattern}"' if pattern else ""
            self.parts.append(
                f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="1.6" stroke-linejoin="round"'
                f' stroke-linecap="round"{dashes}/>'
            )

    def dots(self, points: Sequence[tuple[float, float]], fill: str, size: float = 4.4, opacity: float = 0.55) -> None:
        """Many dots as one path of round caps: a tenth of the bytes of as many circles."""
        if points:
            path = "".join(f"M{number(x)} {number(y)}h0" for x, y in points)
            self.parts.append(
                f'<path d="{path}" fill="none" stroke="{fill}" stroke-width="{number(size)}" stroke-linecap="round"'
                f' stroke-opacity="{opacity:g}"/>'
            )

    def marks(self, points: Sequence[tuple[float, float]], index: int, size: float = 5) -> None:
        """Marks of the index-th class as one path: colour and shape, which are together another for each of 49 classes."""
        if not points:
            return
        shape = (index + index // len(COLOURS)) % len(_SHAPES)
        h = number(size / 2)
        path = "".join(_SHAPES[shape].format(x=number(x), y=number(y), h=h, d=number(size)) for x, y in points)
        if "z" in path:
            look = f'fill="{colour(index)}" fill-opacity="0.75"'
        else:
            width = size if "h0" in path else size / 3
            look = f'fill="none" stroke="{colour(index)}" stroke-width="{number(width)}" stroke-linecap="round"'
        self.parts.append(f'<path d="{path}" {look}/>')

    def rect(
        self, box: tuple[float, float, float, float], fill: str, stroke: str = "none", *, line: float = 1,
        title: str = "",
    ) -> None:  # fmt: skip
        """A rectangle (x, y, width, height); `title` shows when the pointer rests on it."""
        x, y, width, height = box
        shape = (
            f'<rect x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}" fill="{fill}"'
            f' stroke="{stroke}" stroke-width="{number(line)}"'
        )
        self.parts.append(f"{shape}><title>{escape(title)}</title></rect>" if title else f"{shape}/>")

    def text(
        self, x: float, y: float, text: str, *, size: float = 12, anchor: str = "start", fill: str = INK,
        bold: bool = False, turn: float = 0, halo: bool = False,
    ) -> None:  # fmt: skip
        """Text at its baseline; `turn` rotates it in degrees around its anchor, `halo` keeps lines behind it away."""
        extra = ' font-weight="600"' if bold else ""
        extra += ' stroke="#ffffff" stroke-width="4" paint-order="stroke"' if halo else ""
        extra += f' transform="rotate({number(turn)} {number(x)} {number(y)})"' if turn else ""
        self.parts.append(
            f'<text x="{number(x)}" y="{number(y)}" font-size="{number(size)}" text-anchor="{anchor}"'
            f' fill="{fill}"{extra}>{escape(text)}</text>'
        )

    def x_axis(self, scale: Scale, top: float, bottom: float, title: str, about: int = 5) -> None:
        """Grid lines and labels at the ticks, and the axis title below."""
        for tick in scale.ticks(about):
            x = scale(tick)
            self.line((x, top, x, bottom), GRID)
            self.text(x, bottom + 15, short(tick), size=11, anchor="middle", fill=SOFT)
        self.text((scale.start + scale.end) / 2, bottom + 32, title, size=11.5, anchor="middle", fill=SOFT)

    def y_axis(self, scale: Scale, left: float, right: float, about: int = 4) -> None:
        """Grid lines and labels at the ticks."""
        for tick in scale.ticks(about):
            y = scale(tick)
            self.line((left, y, right, y), GRID)
            self.text(left - 6, y + 4, short(tick), size=11, anchor="end", fill=SOFT)

    def svg(self) -> Markup:
        """The drawing as an SVG element."""
        return Markup(
            f'<svg viewBox="0 0 {number(self.width)} {number(self.height)}" role="img"'
            f' aria-label="{escape(self.label)}">{"".join(self.parts)}</svg>'
        )


def swatch(fill: str, pattern: str = "", line: bool = False) -> Markup:
    """A legend's sample: a dot, or a line with its dash pattern."""
    panel = Panel(26 if line else 12, 12, "")
    if line:
        panel.line((1, 6, 25, 6), fill, 2.2, pattern)
    else:
        panel.dots([(6, 6)], fill, 10, 1)
    body = "".join(panel.parts)
    return Markup(
        f'<svg width="{number(panel.width)}" height="12" viewBox="0 0 {number(panel.width)} 12"'
        f' aria-hidden="true">{body}</svg>'
    )


def mark_swatch(index: int) -> Markup:
    """A legend's sample of the index-th class's marks."""
    panel = Panel(14, 14, "")
    panel.marks([(7, 7)], index, 7)
    return Markup(f'<svg width="14" height="14" viewBox="0 0 14 14" aria-hidden="true">{"".join(panel.parts)}</svg>')


def clipped(text: str, length: int) -> str:
    """Text cut to at most `length` characters, with an ellipsis where something is missing."""
    return text if len(text) <= length else text[: length - 1] + "…"


def shade(share: float) -> tuple[str, str]:
    """Fill and text colour for a share in 0..1: white to dark blue, readable in grey and in print."""
    share = min(1.0, max(0.0, share)) if math.isfinite(share) else 0.0
    low, high = (255, 255, 255), (0, 68, 115)
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}", "#ffffff" if share > 0.68 else INK
