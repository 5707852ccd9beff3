"""Weights out: the exported file gives the encoder's features in timm, torchvision and ONNX Runtime; the card tells the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medssl import cli
from medssl.artifacts import publish
from medssl.errors import DataError, RecipeError
from medssl.networks import EncoderParams, build_encoder, load_weights, save_weights
from medssl.recipe_file import dump, load
from medssl.stages import export as exporting
from medssl.stages.export import FORMATS, convert, export
from medssl.stages.model_card import is_non_commercial
from medssl.store import Store, open_store

PARAMS = EncoderParams(image_px=32)
IMAGES = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def trained(params: EncoderParams = PARAMS) -> nn.Module:
    """An encoder whose batch norms have seen something."""
    encoder = build_encoder(params, 1)
    shape = (8, params.channels, params.image_px, params.image_px)
    encoder.train()(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    return encoder.eval()


@torch.inference_mode()
def features(network: nn.Module) -> Tensor:
    found: Tensor = network.eval()(IMAGES)
    return found


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return trained()


def test_timm_gives_the_same_features(encoder: nn.Module, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import load_file

    path = tmp_path / "e.safetensors"
    path.write_bytes(convert(encoder, PARAMS, "timm"))
    network = timm.create_model("resnet18", num_classes=0)
    network.load_state_dict(load_file(path), strict=True)
    torch.testing.assert_close(features(network), features(encoder), atol=1e-4, rtol=0)
    network = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(path))
    torch.testing.assert_close(features(network), features(encoder), atol=1e-4, rtol=0)


def test_torchvision_gives_the_same_features(encoder: nn.Module, tmp_path: Path) -> None:
    from torchvision import models

    path = tmp_path / "e.pth"
    path.write_bytes(convert(encoder, PARAMS, "torchvision"))
    network = models.resnet18()
    network.fc = nn.Identity()
    network.load_state_dict(torch.load(path, weights_only=True))
    torch.testing.assert_close(features(network), features(encoder), atol=1e-4, rtol=0)


@pytest.mark.parametrize("batch", [1, 5])
def test_onnx_runtime_gives_the_same_features(encoder: nn.Module, batch: int, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "e.onnx"
    path.write_bytes(convert(encoder, PARAMS, "onnx"))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(["features"], {"images": IMAGES[:batch].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), features(encoder)[:batch], atol=1e-4, rtol=0)


def test_our_own_file_says_which_encoder_it_is(encoder: nn.Module, tmp_path: Path) -> None:
    from safetensors import safe_open

    path = tmp_path / "e.safetensors"
    path.write_bytes(convert(encoder, PARAMS, "safetensors"))
    with safe_open(path, "pt") as opened:
        params = EncoderParams(**json.loads(opened.metadata()["encoder"]))
    again = build_encoder(params, 0)
    load_weights(again, path.read_bytes())
    assert params == PARAMS and torch.equal(features(again), features(encoder))


def test_grey_images_and_transformers() -> None:
    grey = EncoderParams(image_px=32, channels=1, mean=(0.5,), std=(0.2,))
    assert convert(trained(grey), grey, "timm")
    with pytest.raises(RecipeError, match=r"'conv1.weight' is the first of 1 that differ; its networks take 3 channels"):
        convert(trained(grey), grey, "torchvision")
    transformer = EncoderParams(name="vit_tiny_patch16_224", image_px=64)
    assert convert(build_encoder(transformer, 0), transformer, "timm")
    with pytest.raises(RecipeError, match="torchvision has no network 'vit_tiny_patch16_224'"):
        convert(build_encoder(transformer, 0), transformer, "torchvision")


def test_a_file_with_other_features_is_not_kept(encoder: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = FORMATS["safetensors"]._replace(read=lambda data, params: lambda images: encoder(images) + 0.01)
    monkeypatch.setitem(FORMATS, "safetensors", wrong)
    with pytest.raises(DataError, match=r"off by 0\.01 from the encoder's: nothing was written"):
        convert(encoder, PARAMS, "safetensors")


def test_a_missing_package_is_named(encoder: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(RecipeError, match=r"needs the package\(s\) onnxscript: pip install 'medssl\[export\]'"):
        convert(encoder, PARAMS, "onnx")


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("CC BY-NC 4.0", True), ("cc-by-nc-sa-3.0", True), ("Non-commercial use", True), ("NonCommercial", True),
        ("for research purposes only", True), ("Only for academic use", True), ("not for commercial use", True),
        ("CC BY 4.0", False), ("CC0", False), ("Apache-2.0", False), ("", False), ("Ncube Data Licence", False),
    ],
)  # fmt: skip
def test_non_commercial_licences(licence: str, expected: bool) -> None:
    assert is_non_commercial(licence) is expected


# -- an arm of a study -----------------------------------------------------------------------------------------

SUMMARY = ("arm", "protocol", "metric", "mean", "std", "n", "n_pretraining", "n_draw", "n_head")
COMPARISONS = ("better", "than", "protocol", "metric", "difference", "low", "high", "p", "test")


@pytest.fixture
def store(tmp_path: Path, encoder: nn.Module) -> Store:
    """What a finished study leaves, as far as an export reads it."""
    store = open_store(str(tmp_path / "store"), create=True)
    recipe = load({
        "study": "s", "dataset": "datasets/d", "encoder": {"name": "resnet18", "image_px": 32},
        "images": {"decode_px": 40, "resize": "crop"},
        "arms": [
            {"name": "bt", "objective": {"name": "barlow_twins", "projector": [8, 8]}, "epochs": 2, "batch_size": 8},
            {"name": "given", "initial_weights": "timm"}, {"name": "colour", "features": "colour"},
        ],
        "protocols": [{"name": "probe", "kind": "linear_probe"}],
    })  # fmt: skip
    card = {
        "format": 1, "name": "lesions", "licence": "CC BY-NC 4.0", "images": 10, "classes": ["a", "b"],
        "splits": {"train": 6, "val": 2, "test": 2}, "digests": {"images": "ab" * 32, "labels": "cd" * 32},
    }  # fmt: skip
    result = {
        "columns": {"summary": SUMMARY, "comparisons": COMPARISONS, "scores": []}, "scores": [],
        "summary": [
            ["bt", "probe", "balanced_accuracy", 0.71, 0.02, 12, 2, 2, 3], ["given", "probe", "auc", 0.9, None, 1, 1, 1, 1],
        ],
        "comparisons": [["bt", "given", "probe", "balanced_accuracy", 0.1, 0.05, 0.15, 0.001, "nested bootstrap"]],
    }  # fmt: skip
    store.write("datasets/d/card.json", json.dumps(card).encode())
    store.write("studies/s/recipe.yaml", dump(recipe).encode())
    store.write("studies/s/result.json", json.dumps(result).encode())
    origin = {"source": "timm:resnet18.a1_in1k", "licence": "", "summary": "100 of 100 tensors loaded"}
    for name, encoders, facts in [
        ("bt", {"0": "pretrain-0", "1": "pretrain-1"}, {}),
        ("given", {"0": "initialise-0"}, {"initial_weights": origin}),
        ("colour", {}, {}),
    ]:
        index = {"study": "s", "arm": name, "encoders": encoders, "evaluations": []}
        store.write(f"studies/s/arms/{name}.json", json.dumps(index).encode())
        for artifact in encoders.values():
            publish(
                store, artifact, stage="pretrain", version=1, config={}, inputs={}, facts=facts,
                files={"encoder.safetensors": save_weights(encoder if artifact != "pretrain-0" else build_encoder(PARAMS, 5))},
            )  # fmt: skip
    return store


def test_command(store: Store, encoder: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "encoder.pth"
    arguments = ["export", "bt", "--format", "torchvision", "--out", str(out), "--store", store.uri, "--seed", "1"]
    assert cli.main([*arguments, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["path"] == str(out) and written["features"] == 512 and written["non_commercial"] == ["lesions"]
    for name, value in torch.load(out, weights_only=True).items():
        assert torch.equal(value, encoder.state_dict()[name])
    card = (tmp_path / "encoder.pth.card.md").read_text()
    for words in [
        "# bt (resnet18)", "CC BY-NC 4.0", "**Non-commercial**: the licence of lesions", "6 images of split train, of 10 in all",
        "pretrained without labels by barlow_twins", "for 2 epochs at batch 8", "cut to the centre square and resized to 40 x 40",
        "[0.485, 0.456, 0.406]", "| probe | balanced_accuracy | 0.710 ± 0.020 | 2 x 2 x 3 |",
        "| bt over given | probe | balanced_accuracy | +0.100 | +0.050 to +0.150 | 0.001 |",
        written["sha256"], "projector:", "Pretraining seed 1",
    ]:  # fmt: skip
        assert words in card
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "non-commercial: lesions" in printed and written["sha256"] in printed


def snippet(card: Path) -> str:
    return card.read_text().split("```python\n")[1].split("\n```")[0]


@pytest.mark.parametrize("format_", FORMATS)
def test_the_cards_example_runs(
    format_: str, store: Store, encoder: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if format_ == "onnx":
        pytest.importorskip("onnxruntime")
    written = export("given", format_, tmp_path / f"e{FORMATS[format_].suffixes[0]}", store_uri=store.uri)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"images": IMAGES.numpy() if format_ == "onnx" else IMAGES}
    exec(snippet(written.card), names)
    found = torch.as_tensor(names["features"]).detach()
    torch.testing.assert_close(found, features(encoder), atol=1e-4, rtol=0)
    card = written.card.read_text()
    assert "| timm:resnet18.a1_in1k | weights that the encoder started from | **not stated** |" in card
    assert "| lesions | the encoder was judged on it, not made from it | CC BY-NC 4.0 |" in card
    assert written.non_commercial == () and "| probe | auc | 0.900 | 1 x 1 x 1 |" in card


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arm": "colour"}, "arm 'colour' has no network"),
        ({"arm": "bit"}, "no arm 'bit'"),
        ({"pretraining_seed": 2}, "no pretraining seed 2; it has 0, 1"),
        ({"format_": "keras"}, "unknown format 'keras'"),
        ({"out": Path("e.onnx")}, "end it in .safetensors for format timm"),
        ({"study": "t"}, "study 't' has no arm 'bt'"),
        ({"out": Path("/proc/nowhere/e.safetensors")}, "cannot write /proc/nowhere/e.safetensors"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], words: str, store: Store, tmp_path: Path) -> None:
    arguments = {"arm": "bt", "format_": "timm", "out": tmp_path / "e.safetensors", "store_uri": store.uri} | changes
    with pytest.raises((RecipeError, DataError)) as refused:
        export(**arguments)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_study_without_report_or_data_set(store: Store, tmp_path: Path) -> None:
    store.delete("datasets/d/card.json")
    store.delete("studies/s/result.json")
    written = export("bt", "safetensors", tmp_path / "e.safetensors", store_uri=store.uri)
    card = written.card.read_text()
    assert "There is no report of the study." in card
    assert "| datasets/d | images of split train | **not stated** | its card was not found" in card
    assert "The licence of datasets/d is not stated" in card


def test_an_index_of_an_older_report_says_what_to_do(store: Store, tmp_path: Path) -> None:
    store.write("studies/s/arms/bt.json", json.dumps({"study": "s", "arm": "bt", "evaluations": []}).encode())
    with pytest.raises(RecipeError, match="run `medssl report RECIPE`, then export"):
        export("bt", "timm", tmp_path / "e.safetensors", store_uri=store.uri)
