"""What a task on another process needs to know of its study: plain values, opened again where it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from medssl.artifacts import digest_json
from medssl.datasets.dataset import Dataset, open_dataset
from medssl.errors import DataError
from medssl.recipe import Recipe
from medssl.rows import open_resident
from medssl.stages.specs import Specs
from medssl.store import Store, open_store

if TYPE_CHECKING:
    from medssl.training.feed import ResidentImages


@dataclass(frozen=True)
class Context:
    """A study's store, dataset and recipe by value. Small, and without secrets: credentials come from the environment."""

    store_uri: str
    dataset_uri: str
    dataset_digest: str
    """Digest of the dataset card that the study was planned with."""
    recipe: Mapping[str, Any]
    resident: Mapping[str, Any]
    """Arguments of `rows.open_resident`."""

    def open(self) -> Opened:
        """The study, opened in this process; kept for further tasks of the same study."""
        return _open(
            self.store_uri, self.dataset_uri, self.dataset_digest, _Hashable(self.recipe), _Hashable(self.resident)
        )


@dataclass(frozen=True)
class Opened:
    """An open study."""

    store: Store
    dataset: Dataset
    recipe: Recipe
    specs: Specs
    images: ResidentImages


class _Hashable(dict[str, Any]):
    """A mapping as a cache key, by content."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(digest_json(dict(self)))


@lru_cache(maxsize=2)
def _open(store_uri: str, dataset_uri: str, dataset_digest: str, recipe: _Hashable, resident: _Hashable) -> Opened:
    store, dataset = open_store(store_uri), open_dataset(dataset_uri)
    if digest_json(dataset.card["digests"]) != dataset_digest:
        raise DataError(f"dataset {dataset_uri} was ingested anew while the study ran: run the study again")
    loaded = Recipe.model_validate(dict(recipe))
    return Opened(store, dataset, loaded, Specs(loaded, dataset.index(), dataset.classes), open_resident(**resident))
