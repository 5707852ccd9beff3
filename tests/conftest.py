"""Fixtures for all tests: the real data, one local Ray, a real S3 server, and a proxy that injects faults.

The AWS variables of every test point to this session's own S3 server (which starts when the first test asks for it),
so no test ever meets a developer's real account, and Ray's workers have them from the start.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS / "integration"), str(TESTS.parent / "cluster")]

from ceph import PACKAGES, Ceph, missing_programs  # noqa: E402
from fault_proxy import FaultProxy  # noqa: E402

if TYPE_CHECKING:
    from medssl.store import Store

# Ray's workers find the encoder of one_rank.py, as a user's are found.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS / "integration"), os.environ.get("PYTHONPATH")]))
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # as in every Ray that a run starts for itself
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Files that use Ray go to one worker, so that there is one Ray; every other file is handed out by itself."""
    config.option.loadscopereorder = False

    class OneRay(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "ray" if _uses_ray(config.rootpath / path) else path

    return OneRay(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What uses Ray takes longest and comes first."""
    items.sort(key=lambda item: not _uses_ray(item.path))


@cache
def _uses_ray(path: Path) -> bool:
    return any(word in path.read_text() for word in ("ray_session", "import tiny", "undisturbed: Any"))  # the last two run some


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real images: $MEDSSL_SHARED/data, or `shared/data` beside the repository."""
    root = Path(os.environ.get("MEDSSL_SHARED", TESTS.parent.parent / "shared"))
    if not (root / "data").is_dir():
        pytest.skip(f"no test data at {root}/data: set MEDSSL_SHARED to the folder that has them")
    return root / "data"


@pytest.fixture(scope="session")
def _ceph(tmp_path_factory: pytest.TempPathFactory) -> Ceph:
    return Ceph(tmp_path_factory.mktemp("ceph"))


@pytest.fixture(scope="session", autouse=True)
def _aws_environment(_ceph: Ceph) -> Iterator[None]:
    """The variables of the session's S3 server, whether it ever starts or not; nothing of the developer's own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name, value in _ceph.environment.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def s3_server(_ceph: Ceph) -> Iterator[Ceph]:
    """A running Ceph RADOS gateway with authentication; its variables are in the environment already."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install -y --no-install-recommends {PACKAGES}")
    try:
        _ceph.start()
        yield _ceph
    finally:
        _ceph.stop()


@pytest.fixture
def s3_store(s3_server: Ceph) -> Store:
    """A store in a fresh bucket of the S3 server."""
    from medssl.store import open_store

    return open_store(f"s3://test-{uuid.uuid4().hex[:12]}/store", create=True)


@pytest.fixture(scope="session")
def _proxy(s3_server: Ceph) -> Iterator[FaultProxy]:
    proxy = FaultProxy(s3_server.port)
    proxy.start()
    yield proxy
    proxy.stop()


@pytest.fixture
def fault_proxy(_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The S3 server behind a proxy without faults yet; AWS_ENDPOINT_URL of this process leads through it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", _proxy.endpoint)
    _proxy.clear()
    yield _proxy
    _proxy.clear()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Any]:
    """The session's only Ray: local, 6 logical CPUs. Yields the module `ray`."""
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=6, include_dashboard=False, object_store_memory=512 * 2**20, log_to_driver=False)
    yield ray
    ray.shutdown()
