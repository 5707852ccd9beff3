"""Patient ids -> keyed hashes (HMAC-SHA256). Who has the key can repeat the mapping; nobody else can reverse or guess
it.

The pseudonym is the first 32 hex digits (128 bits) of HMAC-SHA256(key, id in UTF-8), the same for a patient id and
for a bag id of the same text, and the same in every dataset ingested with the key. The key is never stored.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from medssl.errors import DataError

KEY_VARIABLE = "MEDSSL_PSEUDONYM_KEY"
SHORTEST_KEY_BYTES = 16
_SHORTEST_CONTAINED_ID = 4
"""Shorter patient ids ("1", "07") are found by chance in nearly every file name."""


def read_key(file: str | Path | None = None) -> bytes:
    """The key from `file`, else from the environment's MEDSSL_PSEUDONYM_KEY; surrounding white space does not belong
    to it.

    Raises:
        DataError: there is no key, or it has fewer than 16 bytes.
    """
    if file is not None:
        try:
            key = Path(file).expanduser().read_bytes().strip()
        except OSError as error:
            raise DataError(f"cannot read the key file {file}: {error.strerror}") from None
        source = f"key file {file}"
    else:
        key = os.environ.get(KEY_VARIABLE, "").strip().encode()
        source = f"environment variable {KEY_VARIABLE}"
    if not key:
        raise DataError(f"no key to pseudonymise with: {source} is empty; make one with `openssl rand -hex 32`")
    if len(key) < SHORTEST_KEY_BYTES:
        raise DataError(
            f"{source} holds {len(key)} bytes: give {SHORTEST_KEY_BYTES} or more, as from `openssl rand -hex 32`"
        )
    return key


def pseudonym(key: bytes, identifier: str) -> str:
    """Keyed hash of one id."""
    return hmac.new(key, identifier.encode(), hashlib.sha256).hexdigest()[:32]


def pseudonymise(rows: pa.Table, key: bytes) -> tuple[pa.Table, list[str]]:
    """`rows` with identifiers replaced, and the names of the columns that were.

    Replaced are: patient ids; bag ids, always (a lesion or case number identifies as well as a patient's); all
    image ids when any of them contains its patient's or bag's id; a further text column where every value is its row's
    patient or bag id.

    Raises:
        DataError: another further column contains a patient's or bag's id within longer text, which hashing cannot
            mend.
    """
    identifiers = [
        [name for name in pair if name is not None]
        for pair in zip(rows["patient_id"].to_pylist(), rows["bag_id"].to_pylist(), strict=True)
    ]
    replaced = [name for name in ("patient_id", "bag_id") if rows[name].null_count < len(rows)]
    for name in rows.column_names:
        if name in ("uri", "patient_id", "bag_id", "label", "labels", "split"):
            continue
        if not pa.types.is_string(rows.schema.field(name).type):
            continue
        values = rows[name].to_pylist()
        same = [value is None or value in known for value, known in zip(values, identifiers, strict=True)]
        if name == "image_id":
            if any(_contains(value, known) for value, known in zip(values, identifiers, strict=True)):
                replaced.append(name)
        elif all(same) and any(value is not None for value in values):
            replaced.append(name)
        else:
            found = [value for value, known in zip(values, identifiers, strict=True) if _contains(value, known)]
            if found:
                raise DataError(
                    f"column {name!r} contains patient or bag ids in {len(found)} rows, which would undo the "
                    "pseudonyms: drop the column"
                )
    for name in replaced:
        hashed = [None if value is None else pseudonym(key, value) for value in rows[name].to_pylist()]
        rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array(hashed, pa.string()))
    return rows, replaced


def _contains(value: str | None, known: Sequence[str]) -> bool:
    if value is None:
        return False
    return any(
        value == name or (len(name) >= _SHORTEST_CONTAINED_ID and name.lower() in value.lower()) for name in known
    )
