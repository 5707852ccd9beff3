"""Label curves: one protocol at several numbers of labelled images, written once in a recipe.

A protocol whose `labels` is a list stands for a protocol at each of its values, and a comparison that names it for a
comparison at each: `linear_probe` with `labels: [0.1, 0.5]` becomes `linear_probe_10pct` and `linear_probe_50pct`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def expanded(fields: Any) -> Any:
    """The fields of a recipe with every label curve written out; what is no such recipe is returned as it is.

    Raises:
        ValueError: an empty list, or a value given twice.
    """
    if not isinstance(fields, Mapping) or not isinstance(fields.get("protocols"), list | tuple):
        return fields
    protocols: list[Any] = []
    names: dict[str, list[str]] = {}
    for protocol in fields["protocols"]:
        values = protocol.get("labels") if isinstance(protocol, Mapping) else None
        if not isinstance(values, list | tuple):
            protocols.append(protocol)
            continue
        name = str(protocol.get("name"))
        if not values:
            raise ValueError(f"protocol '{name}': labels is an empty list: give the numbers or shares of labelled images")
        points = [f"{name}_{_suffix(value)}" for value in values]
        twice = next((value for value, point in zip(values, points, strict=True) if points.count(point) > 1), None)
        if twice is not None:
            raise ValueError(f"protocol '{name}': labels has {twice!r} twice (shares are told apart to a tenth of a percent)")
        names[name] = points
        protocols += [
            {**protocol, "name": point, "labels": value, "curve": name} for value, point in zip(values, points, strict=True)
        ]
    claims = fields.get("comparisons")
    if not names or not isinstance(claims, list | tuple):
        return {**fields, "protocols": protocols}
    comparisons = [
        each if point is None else {**each, "protocol": point}
        for each in claims
        for point in (names.get(str(each.get("protocol")), [None]) if isinstance(each, Mapping) else [None])
    ]
    return {**fields, "protocols": protocols, "comparisons": comparisons}


def _suffix(value: Any) -> str:
    """0.1 -> 10pct, 0.125 -> 12.5pct, 500 -> 500, all -> all."""
    return f"{round(100 * value, 1):g}pct" if isinstance(value, float) else str(value)
