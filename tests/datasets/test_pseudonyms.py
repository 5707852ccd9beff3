"""Keyed hashes: reproducible with the key, absent without, and nothing left that undoes them."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import pyarrow as pa
import pytest

from medssl.datasets.pseudonyms import pseudonymise, read_key
from medssl.datasets.rowset import build_rows
from medssl.errors import DataError

KEY = b"0123456789abcdef"


def expected(identifier: str) -> str:
    return hmac.digest(KEY, identifier.encode(), hashlib.sha256).hex()[:32]


def rows(further: dict[str, list[str | None]] | None = None, paths: tuple[str, ...] = ("1.jpg", "2.jpg")) -> pa.Table:
    return build_rows(
        list(paths), list(paths), patient_ids=["DOE-1", None], bag_ids=["case-7", None], labels=[[], []],
        further=pa.table({k: pa.array(v, pa.string()) for k, v in further.items()}) if further else None,
    )  # fmt: skip


def test_patients_and_bags_become_hmacs() -> None:
    out, replaced = pseudonymise(rows(), KEY)
    assert replaced == ["patient_id", "bag_id"]
    assert out["patient_id"].to_pylist() == [expected("DOE-1"), None]
    assert out["bag_id"].to_pylist() == [expected("case-7"), None]
    assert out["image_id"].to_pylist() == ["1", "2"]


def test_image_ids_that_hold_a_patient_id_are_replaced_all() -> None:
    out, replaced = pseudonymise(rows(paths=("doe-1_a.jpg", "2.jpg")), KEY)
    assert "image_id" in replaced
    assert sorted(out["image_id"].to_pylist()) == sorted([expected("2"), expected("doe-1_a")])


def test_a_copy_of_the_id_is_replaced_and_an_id_within_text_refused() -> None:
    out, replaced = pseudonymise(rows({"folder": ["DOE-1", None]}), KEY)
    assert "folder" in replaced and out["folder"].to_pylist()[0] == expected("DOE-1")
    with pytest.raises(DataError, match="'note' contains patient or bag ids in 1 rows"):
        pseudonymise(rows({"note": ["seen: doe-1, again", "fine"]}), KEY)


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDSSL_PSEUDONYM_KEY", raising=False)
    with pytest.raises(DataError, match="MEDSSL_PSEUDONYM_KEY is empty"):
        read_key()
    monkeypatch.setenv("MEDSSL_PSEUDONYM_KEY", "short")
    with pytest.raises(DataError, match="holds 5 bytes"):
        read_key()
    (tmp_path / "key").write_bytes(KEY + b"\n")
    assert read_key(tmp_path / "key") == KEY
    with pytest.raises(DataError, match="cannot read the key file"):
        read_key(tmp_path / "none")
