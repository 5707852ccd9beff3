"""ingest on a real local Ray: what it publishes, what it refuses, and that it never loses what was there."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medssl.datasets.dataset import open_dataset
from medssl.datasets.pseudonyms import pseudonym
from medssl.datasets.table import TableColumns
from medssl.errors import DataError, StoreError
from medssl.stages.ingest import IngestOptions, IngestResult, TooManyRejected, ingest
from medssl.store import open_store

pytestmark = pytest.mark.ray
SMALL = 8
"""Images in a shard of most tests: several shards from few images."""


def draw(path: Path, seed: int, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((48, 36), Image.Resampling.BICUBIC).save(path, **options)
    return path


def make_table(folder: Path, count: int = 30, **columns: Any) -> Path:
    """`count` images with labels a, b, two to a patient; `columns` map a name to a function of the number."""
    fields: dict[str, Any] = {
        "image": lambda n: f"images/{n:04d}.jpg", "label": lambda n: "ab"[n % 2],
        "patient_id": lambda n: f"p{n // 2:03d}",
    } | columns  # fmt: skip
    for number in range(count):
        path = folder / f"images/{number:04d}.jpg"
        if not path.exists():
            draw(path, number)
    table = folder / "table.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(fields)
        writer.writerows([[make(number) for make in fields.values()] for number in range(count)])
    return table


def run(source: Path, target: Path, **options: Any) -> IngestResult:
    return ingest(source, str(target), IngestOptions(shard_rows=options.pop("shard_rows", SMALL), **options))


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file but the lease's."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "leases" not in path.parts
    }


def test_shards_index_and_card(ray_session: Any, tmp_path: Path) -> None:
    table = make_table(tmp_path, age=lambda n: n + 20, note=lambda n: "x" if n else "")
    seen: list[tuple[int, int]] = []
    options = IngestOptions(licence="CC0", shard_rows=SMALL, name="thirty")
    result = ingest(table, str(tmp_path / "out"), options, on_progress=lambda done, total: seen.append((done, total)))
    dataset = open_dataset(str(tmp_path / "out"))
    index, card = dataset.index(), dataset.card
    assert (result.images, len(index), dataset.name, dataset.classes, card["licence"]) == (
        30,
        30,
        "thirty",
        ["a", "b"],
        "CC0",
    )
    assert index["image_id"].tolist() == sorted(index["image_id"]) and index.index.tolist() == list(range(30))
    assert [shard.rows for shard in dataset.shards] == [8, 8, 8, 6]
    assert index["age"].tolist() == list(range(20, 50)) and index["note"].isna().sum() == 1
    assert sorted(seen) == seen and seen[-1] == (30, 30)
    for shard, entry in zip(dataset.shards, card["shards"], strict=True):
        data = dataset.store.read(shard.path)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        rows = pq.read_table(io.BytesIO(data)).to_pylist()
        for offset, row in enumerate(rows):
            place = index.iloc[shard.first_row + offset]
            assert row["image_id"] == place["image_id"] and row["sha256"] == place["sha256"]
            assert hashlib.sha256(row["image"]).hexdigest() == row["sha256"]
            original = tmp_path / f"images/{row['image_id']}.jpg"
            with Image.open(original) as one, Image.open(io.BytesIO(row["image"])) as other:
                assert np.array_equal(np.asarray(one), np.asarray(other))
            assert (row["width"], row["height"]) == (48, 36)
    sides = index.groupby("patient_id")["split"].nunique()
    assert sides.max() == 1 and set(index["split"]) == {"train", "val", "test"}
    assert sum(sum(classes.values()) for classes in card["counts"].values()) == 30
    assert card["split_seed"] == 0 and card["unknown_patients"] == 0 and card["leakage"]["patients"] == 0


def test_no_metadata_reaches_the_store(ray_session: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "DOE^JANE"
    table = make_table(tmp_path, 4)
    draw(tmp_path / "images/0001.jpg", 1, exif=exif, comment=b"DOE^JANE")
    assert b"DOE^JANE" in (tmp_path / "images/0001.jpg").read_bytes()
    run(table, tmp_path / "out")
    for path in (tmp_path / "out/shards").iterdir():
        assert all(b"DOE" not in image for image in pq.read_table(path)["image"].to_pylist())


def test_the_same_input_gives_the_same_bytes(ray_session: Any, tmp_path: Path) -> None:
    """Whatever the order of the table's rows; and an unchanged shard is not written again."""
    table = make_table(tmp_path)
    run(table, tmp_path / "one")
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    run(table, tmp_path / "two")
    first, second = tree(tmp_path / "one"), tree(tmp_path / "two")
    card_1, card_2 = (json.loads((tmp_path / name / "card.json").read_text()) for name in ("one", "two"))
    assert {**card_1, "name": ""} == {**card_2, "name": ""}
    assert {k: v for k, v in first.items() if k != "card.json"} == {k: v for k, v in second.items() if k != "card.json"}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one/shards").iterdir()}
    run(table, tmp_path / "one")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "one/shards").iterdir()} == before


def test_one_mended_label_changes_the_label_digest_only(ray_session: Any, tmp_path: Path) -> None:
    given = {"split": lambda n: ("train", "val", "test")[n // 2 % 3]}
    old = run(make_table(tmp_path, **given), tmp_path / "out").card
    mended = make_table(tmp_path, **given, label=lambda n: "b" if n == 4 else "ab"[n % 2])
    new = run(mended, tmp_path / "out").card
    assert old["digests"]["images"] == new["digests"]["images"] and old["digests"]["labels"] != new["digests"]["labels"]
    paths = [{shard["path"] for shard in card["shards"]} for card in (old, new)]
    assert len(paths[0] & paths[1]) == 3
    assert {f"shards/{path.name}" for path in (tmp_path / "out/shards").iterdir()} == paths[1]
    assert len(list((tmp_path / "out").glob("index-*"))) == 1


def test_unusable_images_are_set_aside_with_the_reason(ray_session: Any, tmp_path: Path) -> None:
    table = make_table(tmp_path)
    whole = (tmp_path / "images/0003.jpg").read_bytes()
    (tmp_path / "images/0003.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "images/0010.jpg").unlink()
    (tmp_path / "images/0020.jpg").write_bytes(b"<html>not found</html>")
    with pytest.raises(TooManyRejected, match=r"limit of 5\.0%") as caught:
        run(table, tmp_path / "out")
    assert len(caught.value.rejected) >= 2 and not list((tmp_path / "out").glob("*.json"))
    assert not list((tmp_path / "out").glob("shards/*"))
    result = run(table, tmp_path / "out", reject_limit=0.1)
    reasons = {each.image_id: each.reason for each in result.rejected}
    assert set(reasons) == {"0003", "0010", "0020"} and result.images == 27
    assert "truncated" in reasons["0003"] and "missing" in reasons["0010"] and "HTML" in reasons["0020"]
    assert result.to_text().splitlines()[-1].startswith("27 images ingested, 3 set aside")
    listed = list(csv.DictReader((tmp_path / "out" / result.card["rejected_list"]).open()))
    assert [row["image_id"] for row in listed] == ["0003", "0010", "0020"] and listed[0]["uri"].endswith("0003.jpg")
    assert len(open_dataset(str(tmp_path / "out")).index()) == 27
    json.dumps(result.to_json())


def test_a_refused_ingest_leaves_no_shard_of_a_task_that_was_still_at_work(ray_session: Any, tmp_path: Path) -> None:
    """The first and the last of six shards have a pipe: the test says when the one is refused and the other ends."""
    table = make_table(tmp_path)
    for number in range(1, 4):
        (tmp_path / f"images/{number:04d}.jpg").write_bytes(b"gone")
    bad, slow = (tmp_path / f"images/{number:04d}.jpg" for number in (0, 25))
    whole = slow.read_bytes()
    for path in (bad, slow):
        path.unlink()
        os.mkfifo(path)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, table, tmp_path / "out", shard_rows=5)
        with slow.open("wb") as pipe:  # opens once the task reads
            bad.write_bytes(b"gone")
            wait([running], timeout=5)
            was_over = running.done()
            if not was_over:
                pipe.write(whole)
        with pytest.raises(TooManyRejected):
            running.result()
    assert not was_over and not tree(tmp_path / "out")


@pytest.mark.s3
def test_a_store_that_fails_in_a_task_is_one_line(ray_session: Any, s3_server: Any, tmp_path: Path) -> None:
    """The images lie in a bucket that is not there, which only the tasks find out."""
    table = make_table(tmp_path, image=lambda n: f"s3://no-such-bucket-anywhere/{n:04d}.jpg")
    with pytest.raises(StoreError, match="no-such-bucket-anywhere") as caught:
        run(table, tmp_path / "out", root="s3://no-such-bucket-anywhere")
    assert "\n" not in str(caught.value) and not tree(tmp_path / "out")


def test_bad_input_loses_nothing_that_was_there(ray_session: Any, tmp_path: Path) -> None:
    table = make_table(tmp_path)
    run(table, tmp_path / "out")
    before = tree(tmp_path / "out")
    for number in range(10):
        (tmp_path / f"images/{number:04d}.jpg").write_bytes(b"gone")
    for bad in (
        lambda: run(table, tmp_path / "out"),
        lambda: run(table, tmp_path / "out", columns=TableColumns(label="x")),
    ):
        with pytest.raises(DataError):
            bad()
        assert tree(tmp_path / "out") == before


def test_a_patient_on_two_sides_is_refused_or_recorded(ray_session: Any, tmp_path: Path) -> None:
    table = make_table(tmp_path, 12, split=lambda n: "train" if n < 5 else "test")
    with pytest.raises(
        DataError, match=r"1 patient with images in more than one split \(p002: test, train\).*--allow-leakage"
    ):
        run(table, tmp_path / "out")
    result = run(table, tmp_path / "out", allow_leakage=True)
    assert result.card["leakage"] == {"allowed": True, "patients": 1, "bags": 0}
    assert "p002" in result.to_text()


def test_pseudonyms_in_every_file_and_no_key_or_name_in_any(ray_session: Any, tmp_path: Path) -> None:
    key = b"a canary of a key 0123456789"
    table = make_table(tmp_path, 12, patient_id=lambda n: f"DOE-{n // 2}", bag_id=lambda n: f"case-{n // 2}")
    draw(tmp_path / "images/0003.jpg", 3).write_bytes(b"no image")
    result = run(table, tmp_path / "out", pseudonym_key=key, reject_limit=0.5)
    index = open_dataset(str(tmp_path / "out")).index()
    assert index["patient_id"].tolist() == [pseudonym(key, f"DOE-{n // 2}") for n in range(12) if n != 3]
    assert index["bag_id"].notna().all() and result.card["pseudonymised"] is True
    plain = run(table, tmp_path / "plain", reject_limit=0.5)
    assert plain.card["splits"] == result.card["splits"]
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            content = path.read_bytes() if path.suffix != ".parquet" else repr(pq.read_table(path).to_pydict()).encode()
            assert key not in content and b"DOE-" not in content and b"case-" not in content


def test_unlabelled_rows_and_unknown_patients(ray_session: Any, tmp_path: Path) -> None:
    table = make_table(
        tmp_path, 20, label=lambda n: "" if n < 6 else "ab"[n % 2], patient_id=lambda n: "" if n >= 10 else f"p{n // 2}"
    )
    card = run(table, tmp_path / "out").card
    index = open_dataset(str(tmp_path / "out")).index()
    assert card["unknown_patients"] == 10 and index["label"].isna().sum() == 6 and card["classes"] == ["a", "b"]
    assert sum(card["unlabelled"].values()) == 6 and (index["split"][:6] == "train").all()
    assert index["bag_id"].isna().all()


def test_folder_per_class_without_labels_column(ray_session: Any, tmp_path: Path) -> None:
    for number in range(9):
        draw(tmp_path / "in" / "xyz"[number % 3] / f"{number}.png", number)
    card = run(tmp_path / "in", tmp_path / "out").card
    assert card["classes"] == ["x", "y", "z"] and card["name"] == "out"
    with pytest.raises(DataError, match="folder per class"):
        run(tmp_path / "in", tmp_path / "out", root="elsewhere")


def test_ingest_from_and_to_s3(ray_session: Any, s3_store: Any, tmp_path: Path) -> None:
    make_table(tmp_path, 12)
    for path in (tmp_path / "images").iterdir():
        s3_store.write(f"in/images/{path.name}", path.read_bytes())
    s3_store.write("in/table.csv", (tmp_path / "table.csv").read_bytes())
    options = IngestOptions(shard_rows=SMALL, name="x")
    remote = ingest(f"{s3_store.uri}/in/table.csv", f"{s3_store.uri}/out", options)
    local = ingest(tmp_path / "table.csv", str(tmp_path / "out"), options)
    assert remote.card == local.card
    assert len(open_dataset(f"{s3_store.uri}/out").index()) == 12


def as_child(script: str, *arguments: Any) -> list[str]:
    """Command of another driver on the session's Ray; `PYTHONPATH` is inherited through `child_environment`."""
    return [sys.executable, "-c", script, *(str(argument) for argument in arguments)]


def child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


_SLOW_INGEST = """
import sys, time, ray
import medssl.stages.ingest as stage
from medssl.datasets import shards
address, table, target, flag = sys.argv[1:]
published, write = shards.publish_shard, stage._write_shards
def slow(path, rows, store):
    entry = published(path, rows, store)
    open(flag, "w").close()
    time.sleep(600)
    return entry
def write_slowly(batch, **options):
    shards.publish_shard = slow
    yield from write(batch, **options)
stage._write_shards = write_slowly
ray.init(address=address, log_to_driver=False)
stage.ingest(table, target, stage.IngestOptions(shard_rows=8))
"""


def test_killed_in_mid_ingest_the_old_dataset_is_whole(ray_session: Any, tmp_path: Path) -> None:
    """The driver is killed after the first new shard is in the store; then the same ingest goes through."""
    run(make_table(tmp_path), tmp_path / "out")
    before = tree(tmp_path / "out")
    for number in range(30):
        draw(tmp_path / f"images/{number:04d}.jpg", 500 + number)
    flag = tmp_path / "flag"
    address = ray_session.get_runtime_context().gcs_address
    command = as_child(_SLOW_INGEST, address, tmp_path / "table.csv", tmp_path / "out", flag)
    child = subprocess.Popen(command, env=child_environment())
    deadline = time.monotonic() + 600
    while not flag.exists():
        assert child.poll() is None and time.monotonic() < deadline, "the child never wrote a shard"
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    during = tree(tmp_path / "out")
    assert {path: during[path] for path in before} == before and len(during) > len(before)
    assert len(open_dataset(str(tmp_path / "out")).index()) == 30
    run(tmp_path / "table.csv", tmp_path / "out")
    after = tree(tmp_path / "out")
    assert len([path for path in after if path.startswith("shards/")]) == 4 and not set(before) & set(after) - {
        "card.json"
    }


def test_real_radiographs(ray_session: Any, shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "cxr_covid" / "manifest.csv"
    result = ingest(source, str(tmp_path / "out"), IngestOptions(drop=("source",)))
    card = result.card
    assert (result.images, card["patients"], card["unknown_patients"], result.rejected) == (370, 203, 0, ())
    assert card["counts"] == {
        "train": {"covid19": 125, "other": 46},
        "val": {"covid19": 21, "other": 8},
        "test": {"covid19": 60, "other": 25},
    }  # fmt: skip
    assert card["unlabelled"] == {"train": 84, "val": 0, "test": 1}


def test_real_dermoscopy_in_bags(ray_session: Any, shared_data: Path, tmp_path: Path) -> None:
    whole = (shared_data / "skin_ham10000" / "manifest.csv").read_text().splitlines()
    (tmp_path / "some.csv").write_text("\n".join(whole[:401]) + "\n")
    options = IngestOptions(
        columns=TableColumns(bag="patient_id"), root=str(shared_data / "skin_ham10000"), drop=("source",)
    )
    result = ingest(tmp_path / "some.csv", str(tmp_path / "out"), options)
    index = open_dataset(str(tmp_path / "out")).index()
    assert result.images == 400 and (index["bag_id"] == index["patient_id"]).all()
    assert open_store(str(tmp_path / "out")).exists(result.card["index"]["path"])


_MEASURE = """
import resource, sys, ray
from medssl.stages.ingest import IngestOptions, ingest
ray.init(address=sys.argv[1], log_to_driver=False)
for table in sys.argv[2:]:
    ingest(table, table + ".out", IngestOptions(shard_rows=32))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.acceptance
def test_the_driver_holds_no_images(ray_session: Any, tmp_path: Path) -> None:
    """Four times the images (35 MB more of them) leave the driver's peak memory where it was."""
    rng = np.random.default_rng(0)
    tables = []
    for count in (60, 240):
        (tmp_path / str(count) / "images").mkdir(parents=True)
        for number in range(count):
            noise = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / str(count) / f"images/{number:04d}.jpg", "PNG", compress_level=0)
        tables.append(make_table(tmp_path / str(count), count))
    command = as_child(_MEASURE, ray_session.get_runtime_context().gcs_address, *tables)
    out = subprocess.run(command, env=child_environment(), check=True, capture_output=True, text=True).stdout
    first, second = (float(line) for line in out.split())
    assert second - first < 15
