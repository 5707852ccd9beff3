"""Pictures of the judged images in a report: maps of their features, and the most confident mistakes."""

from __future__ import annotations

import base64

import numpy as np
from markupsafe import Markup

from medssl.stages import report_svg as svg
from medssl.stages.report_data import EmbeddingMap, Mistake, ReportData, arm_order
from medssl.stages.report_page import Figure, Key
from medssl.stages.report_text import plural, title_of

_NAMED = 14
"""Classes with marks of their own; those with fewer images share grey dots."""
_REST = "#9a9a9a"


def embedding_maps(data: ReportData) -> Figure | None:
    """A panel an arm: where t-SNE puts the judged images' features, marked by class."""
    arms = [arm for arm in arm_order(data) if arm in data.embeddings] + sorted(set(data.embeddings) - set(arm_order(data)))
    if not arms:
        return None
    first = data.embeddings[arms[0]]
    number_K = np.bincount(first.labels_N, minlength=len(first.classes))
    frequent = [int(k) for k in np.argsort(-number_K, kind="stable")[:_NAMED] if number_K[k]]
    named = sorted(frequent)
    keys = [Key(str(first.classes[k]), svg.mark_swatch(i)) for i, k in enumerate(named)]
    rest = int((number_K > 0).sum()) - len(named)
    keys += [Key(f"{rest} rarer classes", svg.swatch(_REST))] if rest else []
    panels = [_map_panel(arm, data.embeddings[arm], named) for arm in arms]
    caption = (
        f"Features of {plural(len(first.labels_N), f'{data.judged} image')}, the same for every arm, by its first encoder. t-SNE "
        "keeps near ones near: where marks of one class lie together, its images look alike to the encoder. Distances between "
        "groups, their sizes and the axes mean nothing, and a map is no evidence: the scores are."
    )
    return Figure(caption, panels, keys)


def _map_panel(arm: str, found: EmbeddingMap, named: list[int]) -> Markup:
    width, top, margin = 360.0, 24.0, 8.0
    points_N2 = np.asarray(found.points_N2, dtype=float)
    low_2, high_2 = points_N2.min(axis=0), points_N2.max(axis=0)
    span = float((high_2 - low_2).max()) or 1.0
    height = top + width
    places_N2 = (points_N2 - (low_2 + high_2) / 2) / span * (width - 2 * margin) + np.array([width / 2, top + width / 2])
    panel = svg.Panel(width, height, f"t-SNE map of the features of {arm}")
    panel.text(4, 14, svg.clipped(arm, 44), size=12, bold=True)
    panel.rect((0.5, top, width - 1, width - 1), "none", svg.GRID)
    rest = ~np.isin(found.labels_N, named)
    panel.dots([(float(x), float(y)) for x, y in places_N2[rest]], _REST, 3, 1)
    for i, k in sorted(enumerate(named), key=lambda pair: -int((found.labels_N == pair[1]).sum())):  # rare ones on top
        panel.marks([(float(x), float(y)) for x, y in places_N2[found.labels_N == k]], i)
    return panel.svg()


def confident_mistakes(data: ReportData) -> Figure | None:
    """Thumbnails of the images that each arm names wrongly and confidently; nothing where the recipe shows no images."""
    order = arm_order(data)
    arms = [arm for arm in [*order, *sorted(set(data.mistakes) - set(order))] if data.mistakes.get(arm)]
    if not arms:
        return None
    panels = []
    for arm in arms:
        tiles = Markup("").join(_tile(each) for each in data.mistakes[arm])
        panels.append(Markup('<p class="caption">{}</p><div class="thumbs">{}</div>').format(arm, tiles))
    caption = (
        f"The {data.judged} images that each arm names wrongly with the highest probability (mean over all runs, in brackets), "
        f"under {title_of(data.main_protocol or 'the main protocol')}: the label first, then what the arm says. Some labels may "
        "be wrong."
    )
    return Figure(caption, panels, wide=True)


def _tile(each: Mistake) -> Markup:
    source = f"data:image/png;base64,{base64.b64encode(each.png).decode()}"
    said = f"{each.label}, named {each.predicted} ({each.confidence:.0%}), image {each.image_id}"
    tile = Markup('<div><img width="96" height="96" alt="{}" src="{}"><p class="caption">{}</p></div>')
    return tile.format(said, source, said)
