"""A page as plain blocks, and its two renderings: one self-contained HTML file, and Markdown with the same tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Literal

import jinja2
from markupsafe import Markup


@dataclass(frozen=True)
class Text:
    """A paragraph. `title` stands before it in bold."""

    text: str
    title: str = ""
    tone: Literal["plain", "good", "unclear", "warning", "leak"] = "plain"
    block: Literal["text"] = "text"


@dataclass(frozen=True)
class Column:
    """Head of a column; `unit` stands below the title."""

    title: str
    unit: str = ""
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """A table of text that is already formatted. `bold` holds (row, column) of emphasised cells, `links` where cells lead."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    bold: frozenset[tuple[int, int]] = frozenset()
    links: Mapping[tuple[int, int], str] = field(default_factory=dict)
    block: Literal["table"] = "table"


@dataclass(frozen=True)
class Key:
    """One entry of a figure's legend."""

    label: str
    swatch: Markup


@dataclass(frozen=True)
class Figure:
    """Panels (SVG or image elements) that flow side by side, with one caption and legend."""

    caption: str
    panels: Sequence[Markup]
    keys: Sequence[Key] = ()
    wide: bool = False
    block: Literal["figure"] = "figure"


@dataclass(frozen=True)
class Code:
    """Text shown as it is."""

    caption: str
    text: str
    block: Literal["code"] = "code"


@dataclass(frozen=True)
class Fold:
    """Blocks that open on a click (no script)."""

    title: str
    blocks: Sequence[Block]
    block: Literal["fold"] = "fold"


Block = Text | Table | Figure | Code | Fold


@dataclass(frozen=True)
class Section:
    """A headed part of the page; `anchor` is its id."""

    anchor: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """The whole report."""

    title: str
    description: str
    sections: Sequence[Section]
    footer: str = field(default="")


@cache
def _template() -> jinja2.Template:
    source = resources.files("medssl.stages").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def to_html(page: Page) -> str:
    """One HTML document: style and pictures inside, no script, nothing fetched. All text is escaped."""
    return _template().render(page=page)


def to_markdown(page: Page) -> str:
    """The text and tables of the page as Markdown (GitHub's tables); figures are named by their caption."""
    parts = [f"# {_plain(page.title)}", _plain(page.description)]
    for section in page.sections:
        parts += [f"## {_plain(section.title)}", *_blocks(section.blocks)]
    parts.append(_plain(page.footer))
    return "\n\n".join(part for part in parts if part) + "\n"


def _blocks(blocks: Sequence[Block]) -> list[str]:
    parts: list[str] = []
    for block in blocks:
        match block:
            case Text():
                title = f"**{_plain(block.title)}** " if block.title else ""
                parts.append(f"> {title}{_plain(block.text)}" if block.tone != "plain" else title + _plain(block.text))
            case Table():
                parts += [_plain(block.caption), _table(block)]
            case Figure():
                parts.append(f"*Figure in report.html: {_plain(block.caption)}*")
            case Code():
                fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", block.text)), default=0))
                parts += [_plain(block.caption), f"{fence}\n{block.text.rstrip()}\n{fence}"]
            case Fold():
                parts += [f"### {_plain(block.title)}", *_blocks(block.blocks)]
    return parts


def _table(table: Table) -> str:
    heads = [_plain(f"{c.title} ({c.unit})" if c.unit else c.title) for c in table.columns]
    lines = [heads, ["---:" if c.numeric else "---" for c in table.columns]]
    for r, row in enumerate(table.rows):
        cells = [f"[{_plain(cell)}]({to})" if (to := table.links.get((r, c))) else _plain(cell) for c, cell in enumerate(row)]
        lines.append([f"**{cell}**" if (r, c) in table.bold else cell for c, cell in enumerate(cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: on one line, with its active characters escaped."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|])", r"\\\1", text)
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # inside a word an underscore is only an underscore
    return re.sub(r"^([#+-]|\d+[.)])(?=\s)", r"\\\1", text)
