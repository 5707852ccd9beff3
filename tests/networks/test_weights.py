"""Weights in: the layouts people have load to the same features, everything else is refused in one line."""

from __future__ import annotations

import argparse
import io
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from medssl.errors import DataError, RecipeError
from medssl.networks import EncoderParams, build_encoder, load_weights, save_weights
from medssl.networks.weights import encoder_weights, find_timm, fit_weights, load_timm, match_weights, read_weights

SMALL = EncoderParams(image_px=32)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Tensors = dict[str, Tensor]
CHILDREN = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")


@pytest.fixture(scope="module")
def given() -> Tensors:
    """A ResNet-18's weights with statistics that a training has moved, under torchvision's names, without classifier."""
    return trained(1)


@pytest.fixture(scope="module")
def other() -> Tensors:
    """The second network of a checkpoint, which must not be taken."""
    return trained(2)


def trained(seed: int) -> Tensors:
    encoder = build_encoder(SMALL, seed)
    encoder.train()(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))
    return {name: value.detach().clone() for name, value in encoder.state_dict().items()}


def below(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


def numbered(tensors: Tensors) -> Tensors:
    """Names as in nn.Sequential(*list(resnet.children())[:-1])."""
    parts = {name: name.partition(".") for name in tensors}
    return {f"{CHILDREN.index(part)}.{rest}": tensors[name] for name, (part, _, rest) in parts.items()}


def without_counters(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}


def head(prefix: str) -> Tensors:
    return {f"{prefix}.0.weight": torch.zeros(16, 512), f"{prefix}.1.running_mean": torch.zeros(16)}


def optimiser() -> dict[str, Any]:
    return {"state": {0: {"mu": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def classifier() -> Tensors:
    return {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}


LAYOUTS: dict[str, Callable[[Tensors, Tensors], Any]] = {
    "torchvision": lambda g, o: OrderedDict(g | classifier()),
    "timm": lambda g, o: g | classifier(),
    "timm training": lambda g, o: {
        "epoch": 3, "arch": "resnet18", "state_dict": o | classifier(), "state_dict_ema": g | classifier(),
        "args": argparse.Namespace(lr=0.1), "optimizer": optimiser(),
    },
    "barlow twins": lambda g, o: g,
    "barlow twins, full": lambda g, o: {
        "epoch": 1, "optimizer": optimiser(),
        "model": below("module.backbone.", g) | head("module.projector") | {"module.bn.running_mean": torch.zeros(16)},
    },
    "vicreg, full": lambda g, o: {"epoch": 1, "model": below("module.backbone.", g) | head("module.projector")},
    "swav": lambda g, o: below("module.", g) | head("module.projection_head") | {"module.prototypes.weight": torch.zeros(30, 16)},
    "byol, truncated": lambda g, o: {
        "online_network_state_dict": below("encoder.", numbered(g)) | head("projetion.net"),
        "target_network_state_dict": below("encoder.", numbered(o)) | head("projetion.net"),
    },
    "byol, ddp": lambda g, o: {
        "model": below("module.target_network.encoder.", o) | below("module.online_network.encoder.", g),
    },
    "lightly": lambda g, o: {
        "pytorch-lightning_version": "2.1", "hyper_parameters": {"lr": 0.1}, "callbacks": {},
        "state_dict": below("backbone_momentum.", numbered(o)) | below("backbone.", numbered(g)) | head("projection_head.layers"),
    },
    "solo-learn": lambda g, o: {
        "state_dict": below("momentum_backbone.", o) | below("backbone.", g) | {"classifier.weight": torch.zeros(10, 512)}
    },
    "simclr": lambda g, o: {"arch": "resnet18", "state_dict": below("backbone.", g) | head("backbone.fc")},
    "simclr, vissl": lambda g, o: {
        "classy_state_dict": {"base_model": {"model": {"trunk": below("_feature_blocks.", g), "heads": head("0.clf")}}}
    },
    "moco": lambda g, o: {
        "state_dict": below("module.encoder_k.", o) | below("module.encoder_q.", g) | head("module.encoder_q.fc")
        | {"module.queue": torch.zeros(16, 64)},
    },
    "dino": lambda g, o: g,
    "dino, full": lambda g, o: {
        "student": below("module.backbone.", o) | head("module.head.mlp"), "teacher": below("backbone.", g) | head("head.mlp"),
        "args": argparse.Namespace(arch="resnet18"), "epoch": 3,
    },
    "ddp, compiled": lambda g, o: below("module._orig_mod.", g),
    "a fine-tuning of ours": lambda g, o: below("encoder.", g) | {"head.weight": torch.zeros(3, 512)},
    "without counters": lambda g, o: without_counters(g),
}  # fmt: skip


def checkpoint(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def features(data: bytes) -> tuple[Tensor, Any]:
    encoder = build_encoder(SMALL, 9)
    report = fit_weights(encoder, read_weights(data))
    with torch.inference_mode():
        return encoder.eval()(IMAGES), report


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_features_of_its_network(layout: str, given: Tensors, other: Tensors) -> None:
    expected = build_encoder(SMALL, 3)
    expected.load_state_dict(given)
    found, report = features(checkpoint(LAYOUTS[layout](given, other)))
    with torch.inference_mode():
        assert torch.equal(found, expected.eval()(IMAGES))
    assert len(report.loaded) == report.total == 100 and not report.missing and not report.mismatched
    assert "100 of 100 tensors loaded" in report.describe() and "\n" not in report.describe()


def test_safetensors_and_torchs_old_format(given: Tensors) -> None:
    expected = features(checkpoint(given))[0]
    assert torch.equal(features(save(given | classifier()))[0], expected)
    old = io.BytesIO()
    torch.save(given, old, _use_new_zipfile_serialization=False)
    assert torch.equal(features(old.getvalue())[0], expected)


def test_half_precision_is_widened(given: Tensors) -> None:
    half = {name: value.half() if value.is_floating_point() else value for name, value in given.items()}
    encoder = build_encoder(SMALL, 9)
    fit_weights(encoder, read_weights(save(half)))
    assert {v.dtype for v in encoder.state_dict().values()} == {torch.float32, torch.int64}


def test_our_own_file_stays_as_it_is() -> None:
    encoder = build_encoder(SMALL, 4)
    encoder.train()(torch.randn(4, 3, 32, 32))
    data, report = encoder_weights(SMALL, read_weights(save_weights(encoder)), 0)
    assert data == save_weights(encoder) and report.prefix == "" and not report.dropped
    load_weights(build_encoder(SMALL, 0), data)


def test_what_is_reported(given: Tensors, other: Tensors) -> None:
    tensors = read_weights(checkpoint(LAYOUTS["moco"](given, other)))
    del tensors["state_dict.module.encoder_q.bn1.bias"]
    report = match_weights(build_encoder(SMALL, 0), tensors)
    assert report.prefix == "state_dict.module.encoder_q."
    assert report.missing == ("bn1.bias",) and not report.foreign
    assert report.describe() == (
        "99 of 100 tensors loaded from 'state_dict.module.encoder_q.*'; "
        "dropped 103 (encoder_k 100, fc 2, queue 1); missing 1 (bn1.bias)"
    )
    assert report.facts() == {
        "prefix": report.prefix, "loaded": 99, "of": 100, "dropped": {"encoder_k": 100, "fc": 2, "queue": 1},
        "missing": ["bn1.bias"],
    }  # fmt: skip


def test_what_a_file_lacks_comes_from_the_seed(given: Tensors) -> None:
    tensors = {name: value for name, value in given.items() if name != "conv1.weight"}
    random = build_encoder(SMALL, 6)
    data, report = encoder_weights(SMALL, tensors, 6)
    loaded = build_encoder(SMALL, 0)
    load_weights(loaded, data)
    assert report.missing == ("conv1.weight",)
    assert torch.equal(loaded.state_dict()["conv1.weight"], random.state_dict()["conv1.weight"])


def of(name: str, **changes: Any) -> Tensors:
    return dict(build_encoder(EncoderParams(name=name, image_px=32, **changes), 0).state_dict())


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (lambda: of("resnet34"), ["100 of the encoder's 100", "'layer1.2.conv1.weight'", "lacks", "larger network"]),
        (lambda: below("module.", of("resnet50")), ["layer1.0.conv1.weight", "(64, 64, 1, 1)", "(64, 64, 3, 3)", "architecture"]),
        (lambda: of("vit_tiny_patch16_224"), ["none of the encoder's 100 tensors", "'cls_token' (1, 1, 192)", "another network"]),
        (
            lambda: of("resnet18", channels=1, mean=(0.5,), std=(0.2,)),
            ["(64, 1, 7, 7)", "(64, 3, 7, 7)", "for images of 1 channel(s), the encoder takes 3", "set encoder.channels to 1"],
        ),
        (
            lambda: {name: value for name, value in of("resnet18").items() if not name.startswith("layer4")},
            ["only 75 of the encoder's 100 tensors fit", "90%", "'layer4.0.conv1.weight'"],
        ),
    ],
    ids=["too deep", "other blocks", "other network", "channels", "too little"],
)
def test_weights_of_another_network_are_refused(tensors: Callable[[], Tensors], words: list[str]) -> None:
    encoder = build_encoder(SMALL, 0)
    before = save_weights(encoder)
    with pytest.raises(DataError) as refused:
        fit_weights(encoder, tensors())
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert save_weights(encoder) == before


class Trap:
    """Pickles to a call that would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("torch_file", [True, False])
def test_code_in_a_pickle_does_not_run(torch_file: bool, tmp_path: Path, given: Tensors) -> None:
    import pickle

    content = {"state_dict": given, "callback": Trap(tmp_path / "sprung")}
    with pytest.raises(DataError, match=r"could run code.*save its state dict alone") as refused:
        read_weights(checkpoint(content) if torch_file else pickle.dumps(content, protocol=2))
    assert "\n" not in str(refused.value) and not (tmp_path / "sprung").exists()


def test_files_that_are_no_weights(given: Tensors) -> None:
    for data, words in [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer"),
        (save(given)[:-100], "cut off or damaged"),
        (checkpoint(given)[:-5000], "no whole torch checkpoint"),
        (b"PK\x03\x04 but nothing else", "no whole torch checkpoint"),
        (b"some text", "neither a safetensors file nor a torch checkpoint"),
        (checkpoint([1, 2]), "no named tensors"),
        (checkpoint({"state": 3}), "no named tensors"),
    ]:
        with pytest.raises(DataError, match=words) as refused:
            read_weights(data)
        assert "\n" not in str(refused.value)


def test_timm_names() -> None:
    found = find_timm("timm", SMALL)
    assert found.name.startswith("resnet18.") and found.channels == 3 and found.place
    assert find_timm("timm:resnet50.tv_in1k", SMALL).name == "resnet50.tv_in1k"
    with pytest.raises(RecipeError, match=r"no pretrained weights 'resnet18.nowhere'; choices: .*resnet18\.a1_in1k"):
        find_timm("timm:resnet18.nowhere", SMALL)
    with pytest.raises(RecipeError, match=r"'resnet81' is no timm model"):
        find_timm("timm:resnet81", SMALL)


@pytest.mark.parametrize("channels", [3, 1])
def test_timms_weights_come_through_timm(
    channels: int, given: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    (tmp_path / "w.safetensors").write_bytes(save(given | classifier()))
    create = timm.create_model

    def local(name: str, **arguments: Any) -> Any:
        return create(name, pretrained_cfg_overlay={"file": str(tmp_path / "w.safetensors")}, **arguments)

    monkeypatch.setattr(timm, "create_model", local)
    params = EncoderParams(image_px=32, channels=channels, mean=(0.5,) * channels, std=(0.2,) * channels)
    tensors = load_timm(find_timm("timm", params), params)
    monkeypatch.undo()
    report = fit_weights(build_encoder(params, 0), tensors)
    assert len(report.loaded) == 100
    wanted = given["conv1.weight"] if channels == 3 else given["conv1.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(tensors["conv1.weight"], wanted)


def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("cannot reach the hub\nand a long tale")

    monkeypatch.setattr(timm, "create_model", unreachable)
    told = r"cannot be had from .* \(ConnectionError: cannot reach the hub\).*give the file"
    with pytest.raises(DataError, match=told) as refused:
        load_timm(find_timm("timm", SMALL), SMALL)
    assert "\n" not in str(refused.value)
