"""Matrices in a recipe: arms, protocols, comparisons and rows of tables that differ in a few values, written once.

An entry of `arms`, `protocols`, `comparisons` or a table's `rows` with a `matrix` stands for one entry at each combination of its
axes. An axis is a list of values, or a mapping of names to fields that the entry gets; `{axis}` in any text of the entry is the
value's name, and a text that is nothing but `{axis}` the value itself. `except` lists combinations that are left out.
`pretraining_mix` is the `mix` of every arm that pretrains and names none.

    - matrix:
        start: {sl: {initial_weights: timm}, ssl: {initial_weights: bt.pth}}
        data: {i: {}, iu: {mix: [{times: 1}, {dataset: datasets/other}]}}
      except: [{start: ssl, data: iu}]
      name: "{start}_{data}"
      objective: {name: barlow_twins}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from medssl.errors import nearest

_KEYS = ("arms", "protocols", "comparisons")


def written_out(fields: Any) -> Any:
    """The fields of a recipe with every matrix of arms and comparisons written out; what is no such recipe is returned as it is.

    Raises:
        ValueError: an axis without values, an unknown axis in `except`, or nothing left.
    """
    if not isinstance(fields, Mapping):
        return fields
    found = dict(fields)
    tables = found.get("tables")
    if isinstance(tables, list | tuple):
        found["tables"] = [_with_rows(table, f"tables.{number}.rows") for number, table in enumerate(tables)]
    for key in _KEYS:
        entries = found.get(key)
        if isinstance(entries, list | tuple) and any(_has_matrix(entry) for entry in entries):
            found[key] = [each for i, entry in enumerate(entries) for each in _entries(entry, f"{key}.{i}.matrix")]
    mix = found.pop("pretraining_mix", None)
    if mix is not None and isinstance(found.get("arms"), list | tuple):
        found["arms"] = [_with_mix(arm, mix) for arm in found["arms"]]
    return found


def _with_mix(arm: Any, mix: Any) -> Any:
    pretrains = isinstance(arm, Mapping) and arm.get("objective") is not None and not arm.get("mix")
    return {**arm, "mix": mix} if pretrains else arm


def for_datasets(fields: Mapping[str, Any], datasets: Any) -> dict[str, dict[str, Any]]:
    """Fields of a study on each of several datasets, by name: those of the file with the dataset's in their place, `{dataset}` in
    any text replaced by the name, and the name after the study's.

    Raises:
        ValueError: no datasets, or one without fields or with a name that no study can have.
    """
    if not isinstance(datasets, Mapping) or not datasets:
        raise ValueError(f"datasets is {datasets!r}: give the fields of each by its name, such as `breast: {{dataset: ...}}`")
    found = {}
    for name, own in datasets.items():
        if not isinstance(own, Mapping) or "dataset" not in own:
            raise ValueError(f"datasets.{name} is {own!r}: give its fields, `dataset` among them")
        merged = _filled(_merged(fields, own), "dataset", str(name), str(name))
        found[str(name)] = {**merged, "study": f"{fields.get('study')}.{name}"}
    return found


def _with_rows(table: Any, where: str) -> Any:
    """A table with the matrices of its rows written out."""
    rows = table.get("rows") if isinstance(table, Mapping) else None
    if not isinstance(rows, list | tuple) or not any(_has_matrix(row) for row in rows):
        return table
    return {**table, "rows": [each for i, row in enumerate(rows) for each in _entries(row, f"{where}.{i}.matrix")]}


def _has_matrix(entry: Any) -> bool:
    return isinstance(entry, Mapping) and ("matrix" in entry or "except" in entry)


def _entries(entry: Any, where: str) -> list[Any]:
    if not _has_matrix(entry):
        return [entry]
    axes = _axes(entry.get("matrix"), where)
    left_out = _left_out(entry.get("except") or [], axes, where)
    shared = {key: value for key, value in entry.items() if key not in ("matrix", "except")}
    written = []
    for names in product(*axes.values()):
        chosen = dict(zip(axes, names, strict=True))
        if any(all(str(value) == chosen[axis] for axis, value in each.items()) for each in left_out):
            continue
        one: Any = shared
        values = {axis: axes[axis][name] for axis, name in chosen.items()}
        for value in values.values():
            one = _merged(one, value) if isinstance(value, Mapping) else one
        for axis, name in chosen.items():
            one = _filled(one, axis, name, name if isinstance(values[axis], Mapping) else values[axis])
        written.append(one)
    if not written:
        raise ValueError(f"{where}: every combination is left out by `except`")
    return written


def _axes(matrix: Any, where: str) -> dict[str, dict[str, Any]]:
    """Values by name, by axis."""
    if not isinstance(matrix, Mapping) or not matrix:
        raise ValueError(f"{where} is {matrix!r}: give an axis or more, such as `batch_size: [16, 32]`")
    axes: dict[str, dict[str, Any]] = {}
    for axis, values in matrix.items():
        named = values if isinstance(values, Mapping) else {str(v): v for v in values} if isinstance(values, list | tuple) else {}
        if not named or len(named) < len(values):
            raise ValueError(f"{where}: axis '{axis}' is {values!r}: give a list of different values, or fields by name")
        for name, value in values.items() if isinstance(values, Mapping) else ():
            if not isinstance(value, Mapping):
                raise ValueError(f"{where}: '{name}' of axis '{axis}' is {value!r}: give the fields that it sets, {{}} for none")
        axes[str(axis)] = {str(name): value for name, value in named.items()}
    return axes


def _left_out(excepted: Any, axes: Mapping[str, Mapping[str, Any]], where: str) -> Sequence[Mapping[str, Any]]:
    if not isinstance(excepted, list | tuple) or not all(isinstance(each, Mapping) and each for each in excepted):
        raise ValueError(f"{where}: except is {excepted!r}: give a list of combinations, such as `[{{batch_size: 16}}]`")
    for each in excepted:
        for axis, value in each.items():
            if axis not in axes:
                raise ValueError(f"{where}: except names axis '{axis}': {nearest(str(axis), axes)}")
            if str(value) not in axes[axis]:
                raise ValueError(f"{where}: except names '{value}' of axis '{axis}': {nearest(str(value), axes[axis])}")
    return excepted


def _filled(value: Any, axis: str, name: str, itself: Any) -> Any:
    """A copy with `{axis}` replaced in every text."""
    mark = f"{{{axis}}}"
    if isinstance(value, str):
        return itself if value == mark else value.replace(mark, name)
    if isinstance(value, Mapping):
        return {key: _filled(each, axis, name, itself) for key, each in value.items()}
    return [_filled(each, axis, name, itself) for each in value] if isinstance(value, list | tuple) else value


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of both; where both have a mapping, of both again, and else of the other."""
    found = dict(one)
    for key, value in other.items():
        mine = found.get(key)
        found[key] = _merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return found
