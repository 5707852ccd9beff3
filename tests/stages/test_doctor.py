"""The doctor: every check one line, and each way a store can be wrong named by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from medssl.stages import doctor
from medssl.stages.doctor import Check, run_checks
from medssl.store import Store


def by_name(checks: list[Check]) -> dict[str, Check]:
    assert len({check.name for check in checks}) == len(checks)
    for check in checks:
        assert "\n" not in check.name + check.detail + check.advice
    return {check.name: check for check in checks}


def test_this_machine() -> None:
    import torch

    checks = by_name(run_checks(start_ray=False))
    assert checks["torch"].detail == torch.__version__
    assert all(checks[name].ok for name in ("python", "ray", "torch", "torchvision", "usage statistics"))
    assert not any(name.startswith("store") for name in checks)


@pytest.mark.ray
def test_ray_starts() -> None:
    assert doctor._ray_starts().ok


def test_folder_store(tmp_path: Path) -> None:
    checks = list(doctor._store(str(tmp_path)))
    assert [check.name for check in checks] == [
        "store",
        "store: write and read back",
        "store: create if absent",
        "store: delete",
    ]
    assert all(check.ok for check in checks)
    assert list(tmp_path.iterdir()) == [], "nothing is left"


@pytest.mark.s3
def test_s3_store(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(check.ok for check in doctor._store(s3_store.uri))
    assert s3_store.list() == []
    monkeypatch.setenv("MEDSSL_STORE_DEADLINE_SECONDS", "1")
    assert "does not exist" in only(s3_store.uri.replace("s3://test-", "s3://none-"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    assert "refuses the secret key" in only(s3_store.uri)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKWRONG")
    assert "does not know the access key id" in only(s3_store.uri)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "no S3 server answers" in only(s3_store.uri)


def only(uri: str) -> str:
    """The detail of the one check that a store which cannot be opened gets."""
    (check,) = doctor._store(uri)
    assert not check.ok
    assert "canary" not in check.detail
    assert "\n" not in check.detail
    return check.detail


def test_a_store_that_overwrites_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some servers ignore If-None-Match."""

    def overwrite(self: Store, key: str, data: bytes) -> bool:
        self.write(key, data)
        return True

    monkeypatch.setattr(Store, "create", overwrite)
    checks = {check.name: check for check in doctor._store(str(tmp_path))}
    assert not checks["store: create if absent"].ok
    assert "overwrites" in checks["store: create if absent"].advice
    assert checks["store: delete"].ok


def test_usage_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    assert doctor._usage_statistics().detail == "off"
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    assert "on, because" in doctor._usage_statistics().detail
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "false")
    assert not doctor._usage_statistics().ok
