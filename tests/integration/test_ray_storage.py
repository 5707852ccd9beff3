"""Ray Data and Tune on the store's filesystem, and no secret in anything they leave there."""

from __future__ import annotations

from typing import Any

import pytest
from ceph import ACCESS_KEY, SECRET_KEY

from medssl.filesystem import retrying_filesystem
from medssl.store import Store

pytestmark = [pytest.mark.s3, pytest.mark.ray]


def assert_no_secret(store: Store) -> None:
    entries = store.list()
    assert entries
    for entry in entries:
        body = store.read(entry.key)
        assert SECRET_KEY.encode() not in body, entry.key
        assert ACCESS_KEY.encode() not in body, entry.key


@pytest.mark.acceptance
def test_ray_data_writes_and_reads_through_faults(ray_session: Any, s3_store: Store, fault_proxy: Any) -> None:
    filesystem, root = retrying_filesystem(s3_store.uri)
    through_proxy = {"runtime_env": {"env_vars": {"AWS_ENDPOINT_URL": fault_proxy.endpoint}}}
    fault_proxy.rates = {"503": 0.05, "reset": 0.05, "lost": 0.05, "cut": 0.05}
    ray_session.data.range(2000, override_num_blocks=4).write_parquet(
        f"{root}/data", filesystem=filesystem, ray_remote_args=through_proxy
    )
    assert len(s3_store.list("data/")) == 4
    found = ray_session.data.read_parquet(f"{root}/data", filesystem=filesystem, ray_remote_args=through_proxy)
    assert sorted(row["id"] for row in found.take_all()) == list(range(2000))
    assert sum(fault_proxy.injected.values()) > 0, "else this test shows nothing"
    assert_no_secret(s3_store)


@pytest.mark.acceptance
def test_tune_stores_its_state(ray_session: Any, s3_store: Store, tmp_path: Any) -> None:
    from ray import tune

    def trial(config: dict[str, float]) -> None:
        folder = tmp_path / f"checkpoint-{config['x']}"
        folder.mkdir(exist_ok=True)
        (folder / "weights").write_bytes(b"w" * 1000)
        tune.report({"score": config["x"] ** 2}, checkpoint=tune.Checkpoint.from_directory(str(folder)))

    filesystem, root = retrying_filesystem(s3_store.uri)
    tuner = tune.Tuner(
        trial,
        param_space={"x": tune.grid_search([1.0, 2.0])},
        run_config=tune.RunConfig(name="search", storage_path=root, storage_filesystem=filesystem, verbose=0),
    )
    results = tuner.fit()
    assert results.num_errors == 0
    assert sorted(result.metrics["score"] for result in results) == [1.0, 4.0]
    names = [entry.key for entry in s3_store.list("search/")]
    assert any(name.endswith("tuner.pkl") for name in names)
    assert sum(name.endswith("/weights") for name in names) == 2
    assert_no_secret(s3_store)
