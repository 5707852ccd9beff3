"""One suite for every kind of store: a folder, an S3 server in memory, and a real one with authentication."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from medssl.errors import MissingKey, StoreError
from medssl.store import TEMPORARY, Entry, Store, open_store


@pytest.fixture(scope="session")
def _moto() -> Iterator[str]:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["file", "moto", pytest.param("ceph", marks=pytest.mark.s3)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store(kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if kind == "file":
        return open_store(str(tmp_path / "store with space"), create=True)
    if kind == "moto":
        monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("_moto"))
    else:
        request.getfixturevalue("s3_server")
    return open_store(f"s3://test-{uuid.uuid4().hex[:12]}/some/prefix", create=True)


def test_write_read_overwrite(store: Store) -> None:
    for data in (b"one", b"", bytes(range(256)) * 5000):
        store.write("folder/name", data)
        assert store.read("folder/name") == data
    assert store.exists("folder/name")
    assert not store.exists("folder")
    assert not store.exists("folder/name/below")


def test_missing_key(store: Store) -> None:
    for key in ("nothing", "a/b/nothing"):
        assert not store.exists(key)
        with pytest.raises(MissingKey, match="nothing"):
            store.read(key)
    store.delete("nothing")
    store.delete_prefix("nothing")
    assert store.list() == []


@pytest.mark.parametrize("key", ["", "/a", "a//b", "../a", "a/../b", "a/", "./a", f"a/{TEMPORARY}x"])
def test_bad_keys_are_refused(store: Store, key: str) -> None:
    with pytest.raises(StoreError, match="not valid"):
        store.write(key, b"")
    with pytest.raises(StoreError, match="not valid"):
        store.read(key)


@pytest.mark.parametrize("key", ["ä ö/ü%20+&=?#.txt", "a'b\"c", "~x/(1)"])
def test_odd_keys(store: Store, key: str) -> None:
    store.write(key, b"x")
    assert store.read(key) == b"x"
    assert store.list() == [Entry(key, 1)]
    store.delete(key)
    assert store.list() == []


def test_create_tells_one(store: Store) -> None:
    assert store.create("once", b"1")
    assert not store.create("once", b"2")
    assert not store.create("once", b"1"), "the same bytes from another writer do not count as ours"
    assert store.read("once") == b"1"
    store.delete("once")
    assert store.create("once", b"3")


def test_create_race_of_threads(store: Store, kind: str) -> None:
    if kind == "moto":
        pytest.skip("moto looks first and writes then: not atomic")
    with ThreadPoolExecutor(8) as pool:
        for turn in range(10):
            start = threading.Barrier(8)

            def create(number: int, turn: int = turn, start: threading.Barrier = start) -> bool:
                start.wait()
                return store.create(f"race-{turn}", str(number).encode())

            won = list(pool.map(create, range(8)))
            assert won.count(True) == 1
            assert store.read(f"race-{turn}") == str(won.index(True)).encode()


def _create_many(store: Store, number: int) -> list[bool]:
    return [store.create(f"race-{turn}", str(number).encode()) for turn in range(20)]


def test_create_race_of_processes(store: Store, kind: str) -> None:
    if kind == "moto":
        pytest.skip("moto looks first and writes then: not atomic")
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("forkserver")) as pool:
        results = list(pool.map(_create_many, [store] * 4, range(4)))
    for turn in range(20):
        won = [result[turn] for result in results]
        assert won.count(True) == 1
        assert store.read(f"race-{turn}") == str(won.index(True)).encode()


def test_readers_never_see_half_a_write(store: Store) -> None:
    bodies = [bytes([value]) * 300_000 for value in (1, 2)]
    store.write("swap", bodies[0])
    stop = threading.Event()

    def write() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            store.write("swap", bodies[turn % 2])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {store.read("swap") for _ in range(60)}
        names = {entry.key for entry in store.list()}
    finally:
        stop.set()
        writer.join()
    assert seen <= set(bodies)
    assert names == {"swap"}


def test_list(store: Store) -> None:
    for key in ("b", "a/2", "a/1/x", "ab/3", "c/d/e/f"):
        store.write(key, key.encode())
    everything = [Entry(key, len(key)) for key in ("a/1/x", "a/2", "ab/3", "b", "c/d/e/f")]
    assert store.list() == everything
    assert store.list("a/") == everything[:2]
    assert store.list("a") == everything[:3]
    assert store.list("c/d") == store.list("c/d/e/") == everything[4:]
    assert store.list("b") == everything[3:4]
    assert store.list("nothing") == []


def test_list_of_more_than_one_page(store: Store) -> None:
    keys = [f"many/{number:04d}" for number in range(1100)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.write(key, b"x"), keys))
    assert [entry.key for entry in store.list("many/")] == keys
    store.delete_prefix("many")
    assert store.list() == []


def test_delete_prefix_is_a_folder(store: Store) -> None:
    for key in ("step-1/a", "step-1/b/c", "step-10/a"):
        store.write(key, b"")
    store.delete_prefix("step-1")
    assert [entry.key for entry in store.list()] == ["step-10/a"]
    store.delete_prefix("")
    assert store.list() == []


def test_sub(store: Store) -> None:
    inner = store.sub("a/b")
    inner.write("c", b"1")
    inner.sub("d").write("e", b"2")
    store.write("a/bx", b"3")
    assert [entry.key for entry in inner.list()] == ["c", "d/e"]
    assert store.read("a/b/d/e") == b"2"
    assert inner.uri == store.uri_of("a/b")
    assert open_store(inner.uri) == inner
    assert open_store(inner.uri).read("c") == b"1"
    inner.delete_prefix("")
    assert [entry.key for entry in store.list()] == ["a/bx"]


@pytest.mark.parametrize("size", [0, 5, 16 * 2**20, 33 * 2**20 + 7])
def test_upload_and_download(store: Store, tmp_path: Path, size: int) -> None:
    source, target = tmp_path / "source", tmp_path / "new" / "folder" / "target"
    source.write_bytes(os.urandom(1000) * (size // 1000) + b"z" * (size % 1000))
    store.upload(source, "files/large")
    assert store.list() == [Entry("files/large", size)]
    store.download("files/large", target)
    assert target.read_bytes() == source.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_download_and_upload_of_nothing(store: Store, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("old")
    with pytest.raises(MissingKey):
        store.download("nothing", target)
    assert target.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} <= {"target", "store with space"}
    with pytest.raises(StoreError, match="no such file"):
        store.upload(tmp_path / "nothing", "key")
    assert store.list() == []


def test_pickle_holds_no_secret(store: Store) -> None:
    store.write("key", b"data")
    pickled = pickle.dumps(store)
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in pickled
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in repr(store)
    again = pickle.loads(pickled)
    assert again == store
    assert again.read("key") == b"data"


def _read_in_child(store: Store, results: Any) -> None:
    results.put(store.read("key"))


def test_works_after_fork(store: Store) -> None:
    store.write("key", b"data")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_read_in_child, args=(store, results))
    child.start()
    assert results.get(timeout=30) == b"data"
    child.join(30)
    assert child.exitcode == 0


# --- what is not a store ---


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s4://bucket", "did you mean 's3'"),
        ("fil:///tmp", "did you mean 'file'"),
        ("s3:/bucket/x", "write s3://bucket/folder"),
        ("s3://", "names no bucket"),
        ("s3://ab/x", "'ab' is not valid: 3 to 63"),
        ("s3://Bad_Name/x", "is not valid"),
        ("file://folder", "three slashes"),
        ("", "empty"),
    ],
)
def test_wrong_uris(uri: str, words: str) -> None:
    with pytest.raises(StoreError, match=words) as caught:
        open_store(uri)
    assert "\n" not in str(caught.value)


def test_credentials_in_the_uri_are_refused_and_not_repeated() -> None:
    with pytest.raises(StoreError, match="holds credentials") as caught:
        open_store("s3://key:canary@bucket/x")
    assert "canary" not in str(caught.value)


def test_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        open_store(str(tmp_path / "nothing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        open_store((tmp_path / "file").as_uri())
    assert open_store(tmp_path.as_uri()) == open_store(str(tmp_path)) == open_store(f"file:{tmp_path}")


def test_folder_errors_are_one_line(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("a", b"")
    with pytest.raises(StoreError, match="in the way"):
        store.write("a/b", b"")
    store.write("c/d", b"")
    with pytest.raises(StoreError, match="in the way"):
        store.write("c", b"")
    with pytest.raises(MissingKey):
        store.read("c")


def test_left_over_temporary_files_are_not_listed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("a/b", b"x")
    (tmp_path / "a" / f"{TEMPORARY}left-by-a-kill").write_bytes(b"half")
    assert store.list() == [Entry("a/b", 1)]


@pytest.mark.s3
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"AWS_ACCESS_KEY_ID": "AKWRONG"}, "does not know the access key id: check AWS_ACCESS_KEY_ID"),
        ({"AWS_SECRET_ACCESS_KEY": "canary"}, "refuses the secret key: check AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no AWS credentials found"),
        ({"AWS_ENDPOINT_URL": "http://user:canary@127.0.0.1:9"}, "no S3 server answers at http://127.0.0.1:9 "),
        ({"AWS_ENDPOINT_URL": "127.0.0.1:9"}, "is not a URL"),
        ({"AWS_PROFILE": "nobody"}, "'nobody' is not in the AWS configuration"),
    ],
)
def test_s3_refusals_are_one_line(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    monkeypatch.setenv("MEDSSL_STORE_DEADLINE_SECONDS", "1")
    for name, value in variables.items():
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name)
    started = time.monotonic()
    for use in (lambda: open_store(s3_store.uri), lambda: s3_store.read("x"), lambda: s3_store.write("x", b"")):
        with pytest.raises(StoreError) as caught:
            use()
        assert words in str(caught.value) or "access denied" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "canary" not in str(caught.value)
        assert caught.value.__cause__ is None
    assert time.monotonic() - started < 10
    with pytest.raises(StoreError) as caught:
        open_store(s3_store.uri)
    assert words in str(caught.value)


@pytest.mark.s3
def test_wrong_bucket(s3_server: Any) -> None:
    with pytest.raises(StoreError, match="bucket 'not-there' does not exist at http"):
        open_store("s3://not-there/x")
    assert open_store("s3://not-there/x", create=True).list() == []
    assert open_store("s3://not-there/x", create=True).list() == [], "making it again is no error"


def test_a_server_that_is_not_s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    server = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("MEDSSL_STORE_DEADLINE_SECONDS", "1")
    try:
        with pytest.raises(StoreError, match="is not an S3 server"):
            open_store("s3://bucket/x")
    finally:
        server.shutdown()
        server.server_close()


def test_deadline_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSSL_STORE_DEADLINE_SECONDS", "soon")
    with pytest.raises(StoreError, match="'soon' is not a number of seconds"):
        open_store("s3://bucket/x")
