"""A dataset in the store: card, index and shards.

<uri>/card.json               what there is; written last, replaced at once
<uri>/index-<digest>.parquet  all columns but the images, sorted by image id
<uri>/shards/<digest>.parquet the images, encoded, with the same columns
<uri>/rejected-<digest>.csv   images that were set aside, with the reason
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medssl.datasets.card import CARD, FORMAT
from medssl.errors import DataError, MissingKey
from medssl.store import Store, open_store, split_uri

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Shard:
    """A shard and where its rows are in the index: rows `first_row` to `first_row + rows - 1`."""

    path: str
    rows: int
    first_row: int


class Dataset:
    """An open dataset. `row` everywhere in medssl is a row number of `index()`."""

    def __init__(self, uri: str, card: dict[str, Any], store: Store) -> None:
        self.uri = uri
        self.card = card
        self.store = store
        self._index: pd.DataFrame | None = None

    @property
    def name(self) -> str:
        """Name in the card."""
        return str(self.card["name"])

    @property
    def classes(self) -> list[str]:
        """Class names, sorted; a class index is a position here."""
        return list(self.card["classes"])

    @property
    def images_digest(self) -> str:
        """Digest of image contents, patients, bags and splits."""
        return str(self.card["digests"]["images"])

    @property
    def labels_digest(self) -> str:
        """Digest of the labels."""
        return str(self.card["digests"]["labels"])

    @property
    def shards(self) -> list[Shard]:
        """The shards in index order."""
        shards, first = [], 0
        for entry in self.card["shards"]:
            shards.append(Shard(entry["path"], entry["rows"], first))
            first += entry["rows"]
        return shards

    def __len__(self) -> int:
        """Number of images."""
        return int(self.card["images"])

    def index(self) -> pd.DataFrame:
        """All columns but the images, one row per image, sorted by image_id; the RangeIndex is the row number.

        Missing patient_id, bag_id and label are NaN (`isna()`). Treat the frame as read-only: it is shared.
        """
        if self._index is None:
            import pyarrow.parquet as pq

            entry = self.card["index"]
            data = self.store.read(entry["path"])
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise DataError(f"the index of dataset {self.uri} is not the one its card names: ingest it again")
            self._index = pq.read_table(io.BytesIO(data)).to_pandas()
        return self._index


def dataset_uri(name: str, store: Store) -> str:
    """A dataset's URI: as a recipe gives it, or below the study's store."""
    return name if "://" in name or Path(name).is_absolute() else store.uri_of(name)


def open_dataset(uri: str) -> Dataset:
    """The dataset at `uri` (`s3://...`, `file://...` or a path); DataError when there is none."""
    scheme, place = split_uri(uri)
    if scheme == "file" and not Path(place).is_dir():
        raise DataError(f"there is no dataset at {uri}: no such folder")
    store = open_store(uri)
    card = read_card(store)
    if card is None:
        raise DataError(f"there is no dataset at {uri}: it has no {CARD}")
    return Dataset(store.uri, card, store)


def read_card(store: Store) -> dict[str, Any] | None:
    """The card of the dataset at `store`, None when there is none; DataError when it cannot be understood."""
    try:
        card = json.loads(store.read(CARD))
    except MissingKey:
        return None
    except ValueError:
        raise DataError(
            f"{store.uri_of(CARD)} is not JSON: it was not written by medssl; ingest again or remove it"
        ) from None
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        found = card.get("format") if isinstance(card, dict) else None
        raise DataError(
            f"{store.uri_of(CARD)} has card format {found}, this medssl reads {FORMAT}: ingest the images again"
        )
    return card
