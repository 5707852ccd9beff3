"""One undisturbed run, which the tests that disturb one compare with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny

from medssl.store import Store, open_store


@dataclass(frozen=True)
class Undisturbed:
    """A study of an encoder beside random weights, and the store it ran in. Its dataset gives the same names wherever it lies."""

    table: Path
    dataset: str
    fields: dict[str, Any]
    recipe: Path
    store: Store


@pytest.fixture(scope="session")
def undisturbed(ray_session: Any, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Run once for the session: twenty steps of two workers, a checkpoint every other."""
    folder = tmp_path_factory.mktemp("undisturbed")
    dataset = str(folder / "lesions")
    table = tiny.ingest(folder / "drawn", dataset)
    fields = tiny.pretraining_only(dataset=dataset)
    fields["arms"] = [{"name": "random"}, fields["arms"][0] | {"epochs": 10}]
    recipe = tiny.write(folder / "study.yaml", fields)
    tiny.medssl("run", str(recipe), "--store", str(folder / "store"))
    return Undisturbed(table, dataset, fields, recipe, open_store(str(folder / "store")))
