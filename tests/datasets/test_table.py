"""Tables and folders -> rows."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medssl.datasets.folder import read_folder
from medssl.datasets.table import TableColumns, read_table
from medssl.errors import DataError


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_bytes(text.encode(encoding))
    return str(path)


def test_identifiers_stay_text_and_further_columns_keep_their_type(tmp_path: Path) -> None:
    source = write(
        tmp_path / "t.csv",
        "image,label,patient_id,split,age,ward,score,checked\n"
        "b/2.jpg,1,007,train,45,NA,1.5,true\na/1.jpg,,,validation,,,NA,false\nc/3.jpg,1,007,train,50,B,,\n",
    )
    rows = read_table(source)
    assert rows["image_id"].to_pylist() == ["1", "2", "3"]
    rows = rows.slice(0, 2)
    assert rows["patient_id"].to_pylist() == [None, "007"]
    assert rows["label"].to_pylist() == [None, "1"]
    assert rows["labels"].to_pylist() == [[], ["1"]]
    assert rows["split"].to_pylist() == ["val", "train"]
    assert rows["uri"].to_pylist() == [str(tmp_path / "a/1.jpg"), str(tmp_path / "b/2.jpg")]
    assert rows["age"].to_pylist() == [None, 45]
    assert rows["ward"].to_pylist() == [None, "NA"]
    assert rows["score"].to_pylist() == [None, 1.5]
    assert rows["checked"].to_pylist() == [False, True]


def test_columns_by_name_and_kept_roles(tmp_path: Path) -> None:
    source = write(tmp_path / "t.csv", "pic,dx,who,lesion,clinic,years,junk\nx.png,mel,p,b,Graz,30,1\n")
    columns = TableColumns(image="pic", label="dx", patient="who", bag="lesion", site="clinic", age="years")
    rows = read_table(source, columns, root="s3://bucket/pictures", drop=["junk"])
    assert rows.column_names[7:] == ["site", "age"]
    assert rows.to_pylist() == [
        {
            "uri": "s3://bucket/pictures/x.png", "image_id": "x", "patient_id": "p", "bag_id": "b", "label": "mel",
            "labels": ["mel"], "split": None, "site": "Graz", "age": 30,
        }
    ]  # fmt: skip


def test_image_ids_are_stems_where_all_differ_else_paths(tmp_path: Path) -> None:
    rows = read_table(write(tmp_path / "t.csv", "image\na/1.jpg\nb/1.jpg\n"))
    assert rows["image_id"].to_pylist() == ["a/1.jpg", "b/1.jpg"]


def test_parquet_with_categories_and_float_ids(tmp_path: Path) -> None:
    table = pa.table(
        {
            "image": ["1.jpg", "2.jpg"],
            "label": pa.array(["x", None]).dictionary_encode(),
            "patient_id": [3.0, None],
            "stage": pa.array(["I", "II"]).dictionary_encode(),
            "when": pa.array([1, 2], pa.timestamp("ms")),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    rows = read_table(str(tmp_path / "t.parquet"))
    assert rows["patient_id"].to_pylist() == ["3", None]
    assert rows["label"].to_pylist() == ["x", None]
    assert rows.schema.field("stage").type == pa.string()
    assert rows.schema.field("when").type == pa.timestamp("ms")


def test_several_labels(tmp_path: Path) -> None:
    rows = read_table(write(tmp_path / "t.csv", "image,label\n1.jpg,b| a\n2.jpg,a\n3.jpg,\n"), label_separator="|")
    assert rows["labels"].to_pylist() == [["a", "b"], ["a"], []]
    assert rows["label"].to_pylist() == [None, "a", None]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters_quotes_and_a_byte_order_mark(tmp_path: Path, delimiter: str) -> None:
    text = delimiter.join(["image", "note"]) + "\n" + delimiter.join(["1.jpg", '"two\nlines, and; more"']) + "\n"
    rows = read_table(write(tmp_path / "t.csv", text, "utf-8-sig"))
    assert rows["note"].to_pylist() == ["two\nlines, and; more"]


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("", {}, "empty"),
        ("image\n", {}, "no images"),
        ("label\nx\n", {}, "no column named image"),
        ("image,label\n1.jpg,x\n", {"columns": TableColumns(label="lable")}, "did you mean 'label'"),
        ("image,split\n1.jpg,fold1\n", {}, "'fold1'"),
        ("image\n1.jpg\n1.jpg\n", {}, "more than once"),
        ("image,label\n,x\n", {}, "no image path"),
        ("image,sha256\n1.jpg,x\n", {}, "'sha256' is taken"),
        ("image,x,x\n1.jpg,1,2\n", {}, "two columns named 'x'"),
        ("image,x\n1.jpg\n", {}, "readable table"),
        ("image\n1.jpg\n", {"drop": ["nothing"]}, "'nothing'"),
        ("image\n/abs/1.jpg\n", {"root": "s3://bucket"}, "leads out of s3://bucket"),
        ("image\n/etc/hostname\n", {}, "'/etc/hostname' leads out of .*give --root"),
        ("image\nfile:///etc/hostname\n", {}, "leads out of"),
        ("image\nfile:///pictures/%2E%2E/etc/1.jpg\n", {"root": "/pictures"}, "leads out of /pictures"),
        ("image\n/pictures2/1.jpg\n", {"root": "/pictures"}, "leads out of /pictures"),
        ("image\ns3://other/1.jpg\n", {}, "leads out of"),
        ("image\ns3://bucket2/1.jpg\n", {"root": "s3://bucket"}, "leads out of s3://bucket"),
        ("image\ns3://bucket/images/../key/1.jpg\n", {"root": "s3://bucket/images/"}, "leads out of s3://bucket/images/"),
        ("image\n../other/1.jpg\n", {}, "leads out of"),
        ("image\na/../../1.jpg\n", {}, "leads out of"),
        ("image\n../../key/1.jpg\n", {"root": "s3://bucket/images"}, "leads out of s3://bucket/images"),
    ],
)
def test_bad_tables_are_one_line(tmp_path: Path, text: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read_table(write(tmp_path / "t.csv", text), **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "root", "expected"),
    [
        ("/pictures/a/1.jpg", "/pictures/", "/pictures/a/1.jpg"),
        ("/anywhere/1.jpg", "/", "/anywhere/1.jpg"),
        ("file:///pictures/a%20b.jpg", "/pictures", "/pictures/a b.jpg"),
        ("s3://bucket/images/1.jpg", "s3://bucket/images", "s3://bucket/images/1.jpg"),
        ("a/../1.jpg", "s3://bucket", "s3://bucket/1.jpg"),
        ("..1.jpg", "s3://bucket/images/", "s3://bucket/images/..1.jpg"),
        ("link/../1.jpg", "/pictures", "/pictures/1.jpg"),
        ("1.jpg", "file:///my%20pictures", "/my pictures/1.jpg"),
    ],
)
def test_paths_below_the_root(tmp_path: Path, path: str, root: str, expected: str) -> None:
    rows = read_table(write(tmp_path / "t.csv", f"image\n{path}\n"), root=root)
    assert rows["uri"].to_pylist() == [expected]


def test_latin_1_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="UTF-8"):
        read_table(write(tmp_path / "t.csv", "image,site\n1.jpg,Münster\n", "latin-1"))


def test_missing_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no table or folder"):
        read_table(str(tmp_path / "none.csv"))


def make_files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_folder_per_class(tmp_path: Path) -> None:
    make_files(tmp_path, "mel/1.jpg", "nv/deep/2.PNG", "3.tif", "nv/notes.txt", ".hidden/4.jpg", "nv/._5.jpg")
    rows = read_folder(str(tmp_path))
    assert rows.select(["image_id", "label", "split"]).to_pylist() == [
        {"image_id": "1", "label": "mel", "split": None},
        {"image_id": "2", "label": "nv", "split": None},
        {"image_id": "3", "label": None, "split": None},
    ]
    assert all(os.path.isfile(uri) for uri in rows["uri"].to_pylist())


def test_folders_of_splits(tmp_path: Path) -> None:
    make_files(tmp_path, "train/mel/1.jpg", "val/nv/2.jpg", "test/nv/3.jpg")
    assert read_folder(str(tmp_path))["split"].to_pylist() == ["train", "val", "test"]
    assert read_folder(str(tmp_path))["label"].to_pylist() == ["mel", "nv", "nv"]


def test_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images below"):
        read_folder(str(tmp_path))
