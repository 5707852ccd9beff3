"""A study recipe from a YAML file or a mapping, with overrides; every failure is one line for the user.

The line has the field, the value and the nearest valid name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from medssl.errors import RecipeError, nearest
from medssl.forms import Together, check_together
from medssl.matrix import for_datasets, written_out
from medssl.params import Params
from medssl.protocols import KINDS
from medssl.recipe import Recipe

_USER = re.compile(r"://[^/@\s]+@")
"""User and password in a URI: never repeated on a terminal or in a log."""


@dataclass(frozen=True)
class Family:
    """What one file stands for: a study, or with `datasets` one on each of them and a page of all together."""

    name: str
    recipes: Mapping[str, Recipe]
    """By dataset's name; a single study under its own name."""
    together: Together | None = None
    """None for a single study."""
    description: str = ""
    """Of all together: `{dataset}` stands for all of them."""


def load(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A validated recipe from a YAML file or a mapping, with `path.to.field=value` overrides applied in order.

    Raises:
        RecipeError: the file cannot be read, is no YAML mapping, or a field, value or override is not valid, or it stands for
            studies on several datasets.
    """
    family = load_all(source, overrides)
    if family.together is not None:
        names = ", ".join(family.recipes)
        raise RecipeError(f"study '{family.name}' is one on each of its datasets ({names}): run, plan or load them all")
    return next(iter(family.recipes.values()))


def load_all(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Family:
    """The validated recipes of a YAML file or a mapping: one, or with `datasets` one for each.

    `datasets` maps names to fields that take the place of the file's, `dataset` among them; the study on one is named
    `study.name`, and `{dataset}` in any text is the name. `together` has tables and figures of all of them.

    Raises:
        RecipeError: as for :func:`load`.
    """
    origin = "recipe" if isinstance(source, Mapping) else str(source)
    raw = dict(source) if isinstance(source, Mapping) else _read(Path(source))
    for override in overrides:
        raw = _override(raw, override)
    datasets, together = raw.pop("datasets", None), raw.pop("together", None)
    if datasets is None:
        if together is not None:
            raise RecipeError(f"{origin}: together shows several datasets, and there is no field datasets: name them there")
        recipe = _validated(raw, origin)
        return Family(recipe.study, {recipe.study: recipe})
    try:
        written = for_datasets(raw, datasets)
        page = {} if together is None else written_out(together)
        shown = Together.model_validate(page)
    except ValidationError as error:
        raise RecipeError(f"{origin}: together.{_explain(error)}") from None
    except ValueError as error:
        raise RecipeError(f"{origin}: {error}") from None
    recipes = {name: _validated(fields, f"{origin}: dataset {name}") for name, fields in written.items()}
    try:
        check_together(shown, recipes)
    except ValueError as error:
        raise RecipeError(f"{origin}: {error}") from None
    description = str(raw.get("description") or "").replace("{dataset}", ", ".join(recipes))
    return Family(str(raw["study"]), recipes, shown, description)


def _validated(raw: Mapping[str, Any], origin: str) -> Recipe:
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{origin}: {_explain(error)}") from None


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, all values written out."""
    return yaml.safe_dump(recipe.canonical(), sort_keys=False, allow_unicode=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}: give the path of a study's YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from None
    try:
        raw = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise RecipeError(f"{path}{where} is not valid YAML: {getattr(error, 'problem', None) or 'cannot be parsed'}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} holds {type(raw).__name__}, not the fields of a study")
    return raw


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number (YAML 1.1 wants 1.0e-3) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # `<<: *anchor` takes fields over, which the mapping's own then replace: no key given twice
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=deep) for key in own]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.MarkedYAMLError(problem=f"field '{key}' is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    path, sign, text = override.partition("=")
    if not sign or not path.strip():
        raise RecipeError(f"--set {override}: write it as path.to.field=value, for example arms.0.epochs=5")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: the value is not valid YAML ({getattr(error, 'problem', error)})") from None
    return dict(_set(raw, path.strip().split("."), value, path))


def _set(node: Any, keys: list[str], value: Any, path: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, list):
        names = [str(item["name"]) for item in node if isinstance(item, Mapping) and "name" in item]
        if key in names:
            index = names.index(key)
        elif key.isdigit() and int(key) < len(node):
            index = int(key)
        else:
            raise RecipeError(
                f"--set {path}: no item '{key}'; choices: 0 to {len(node) - 1}" + (f" or {', '.join(names)}" if names else "")
            )
        return [*node[:index], _set(node[index], rest, value, path), *node[index + 1 :]]
    if isinstance(node, Mapping) or node is None:
        return {**(node or {}), key: _set((node or {}).get(key), rest, value, path)}
    raise RecipeError(f"--set {path}: '{key}' is below the single value {node!r}")


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"] if part not in KINDS]
    where = ".".join(location) or "recipe"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    given = first.get("input")
    if first["type"] == "extra_forbidden":
        return f"unknown field '{where}': {nearest(location[-1], _fields_at(first['loc'][:-1]))}{more}"
    if first["type"] == "missing":
        return f"field '{where}' is missing{more}"
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(given, Mapping | Params) else f", not {given!r}"
    return f"{where}: {message}{_USER.sub('://***@', shown)}{more}"


def _fields_at(location: Sequence[int | str]) -> list[str]:
    """Names of the fields of the parameter group at a pydantic error location."""
    models: list[type[Params]] = [Recipe]
    for part in location:
        if isinstance(part, int):
            continue
        chosen = [m for m in models if "kind" in m.model_fields and part == m.model_fields["kind"].default]
        if chosen:
            models = chosen
            continue
        annotations = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        models = [m for annotation in annotations for m in _models_in(annotation)] or models
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[Params]]:
    if isinstance(annotation, type) and issubclass(annotation, Params):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]
