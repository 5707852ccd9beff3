"""A user's own encoder: called, measured, trained and exported like the others; what is wrong with one is a line."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medssl.checks import own_encoders
from medssl.errors import RecipeError
from medssl.networks import EncoderParams, build_encoder, estimate_batch_norm, feature_width, load_weights, save_weights
from medssl.networks.own import check_own
from medssl.recipe_file import load
from medssl.stages.export import convert
from medssl.stages.initial import stage_weights, weights_digests
from medssl.stages.specs import Spec, Specs
from medssl.store import open_store

SOURCE = """
import torch
from torch import nn


class Small(nn.Module):
    def __init__(self, channels=3, width=5):
        super().__init__()
        self.num_features = 99  # whatever it means here
        self.body = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(4, width)

    def forward(self, x):
        return self.fc(self.body(x))


def plain():
    return Small()

def sized(channels, *, image_px):
    return Small(channels, width=image_px // 4)

def any_keywords(**given):
    assert set(given) == {"channels", "image_px"}
    return Small()

def loaded():
    torch.manual_seed(3)
    return Small()

def needs(depth): return Small()
def nothing(): return "a network"
def broken(): raise OSError("no weights at\\n/nowhere")
def maps(): return nn.Conv2d(3, 4, 3)
def several():
    class Several(Small):
        def forward(self, x): return [x]
    return Several()
def infinite():
    class Infinite(Small):
        def forward(self, x): return super().forward(x) / 0
    return Infinite()
def grey(): return Small(channels=1)
def tied():
    network = Small()
    network.again = network.fc.weight
    network.body[0].extra = network.fc.weight
    return network
calls = []
def counted():
    calls.append(1)
    torch.manual_seed(len(calls))
    return Small()

constant = 3
"""

_numbers = itertools.count()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes the source as a module of a new name, importable."""
    monkeypatch.syspath_prepend(tmp_path)

    def module(source: str = SOURCE) -> str:
        name = f"own_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return module


def params(name: str, **changes: Any) -> EncoderParams:
    return EncoderParams(name=name, image_px=32, **changes)


def test_a_function_is_called_with_what_it_takes_and_measured(write: Callable[..., str]) -> None:
    module = write()
    one = {"channels": 1, "mean": (0.5,), "std": (0.2,)}
    cases = [("plain", 5, {}), ("any_keywords", 5, {}), ("sized", 8, {}), ("sized", 8, one), ("Small", 5, one)]
    for function, width, more in cases:
        encoder = build_encoder(params(f"{module}:{function}", **more), 0)
        assert encoder.training and feature_width(encoder) == width
        assert encoder(torch.randn(2, more.get("channels", 3), 32, 32)).shape == (2, width)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, again, other = (build_encoder(params(f"{module}:plain"), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert save_weights(first) == save_weights(again) != save_weights(other)
    assert set(first.state_dict()) == {f"body.0.{k}" for k in ("weight", "bias")} | {"fc.weight", "fc.bias"} | {
        f"body.1.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }  # fmt: skip
    assert float(first.body[1].running_mean.abs().sum()) == 0  # being measured left no trace
    with torch.device("meta"):
        assert feature_width(build_encoder(params(f"{module}:plain"), 0)) == 5
    check_own(params(f"{module}:plain"), random=True)
    check_own(params(f"{module}:loaded"), random=False)


def test_what_is_wrong_is_one_line(write: Callable[..., str]) -> None:
    module, failing = write(), write("raise ValueError('on import')")
    lacking = write("import no_such_dependency")
    for name, words in [
        ("no_such_module.sub:f", "Python finds no module 'no_such_module': install it, or put its folder into PYTHONPATH"),
        (f"{module}.sub:f", f"Python finds no module '{module}.sub'"),
        (f"{failing}:f", f"importing {failing} failed with ValueError: on import"),
        (f"{lacking}:f", f"importing {lacking} failed with ModuleNotFoundError: No module named 'no_such_dependency'"),
        (f"{module}:plane", f"{module} has no function 'plane': did you mean 'plain'?"),
        (f"{module}:constant", f"{module} has no function 'constant'"),
        ("hf-hub:someone/net", "write an encoder of your own as package.module:function"),
        (f"{module}:needs", "the function needs 'depth': it is given channels and image_px alone"),
        (f"{module}:nothing", "the function returned str: it must return a torch.nn.Module"),
        (f"{module}:broken", "broken() failed with OSError: no weights at /nowhere"),
        (f"{module}:maps", "images of shape (2, 3, 32, 32) give (2, 4, 30, 30): features must be (B, E), here (2, E)"),
        (f"{module}:several", "it gives list for images: features must be a tensor (B, E)"),
        (f"{module}:infinite", "its features of images between 0 and 1 are not finite"),
        (f"{module}:grey", "images of shape (2, 3, 32, 32) fail with RuntimeError: "),
        (f"{module}:tied", "its weights cannot be kept as safetensors: RuntimeError: "),
        (f"{module}:counted", "two calls with one seed gave different weights"),
        (f"{module}:loaded", "it gives the same weights for every seed, which are no random ones: set initial_weights: function"),
    ]:
        with pytest.raises(RecipeError) as refused:
            check_own(params(name), random=True)
        assert words in str(refused.value) and str(refused.value).startswith(f"encoder '{name}': ")
        assert "\n" not in str(refused.value)


def recipe(function: str, **arm: Any) -> Any:
    return load({
        "study": "s", "dataset": "datasets/d", "encoder": {"name": function, "image_px": 32},
        "arms": [{"name": "own", **arm}], "repeats": {"labels": 10},
        "protocols": [{"name": "p", "kind": "linear_probe"}, {"name": "t", "kind": "fine_tune"}],
    })  # fmt: skip


def test_its_source_is_part_of_every_name(write: Callable[..., str]) -> None:
    import numpy as np
    import pandas as pd

    from medssl.artifacts import Marker

    module = write()
    index = pd.DataFrame({
        "image_id": [f"{n}" for n in range(60)], "sha256": "0", "label": ["a", "b"] * 30, "patient_id": None, "bag_id": None,
        "split": np.repeat(["train", "val", "test"], 20),
    })  # fmt: skip
    pretrained = {"objective": {"name": "simclr"}, "epochs": 1, "batch_size": 8}
    found = {}
    for arm in ({}, pretrained):
        chosen = recipe(f"{module}:plain", **arm)
        sources = own_encoders(chosen)
        assert sources == {f"{module}:plain": hashlib.sha256(SOURCE.encode()).hexdigest()}
        for which, digests in (("given", sources), ("other", {f"{module}:plain": "0"}), ("none", {})):
            specs = Specs(chosen, index, ["a", "b"], sources=digests)
            encoder = specs.encoder(chosen.arms[0], 0)
            assert encoder is not None
            marker = Marker("m", "pretrain", 1, {}, {}, {"encoder.safetensors": "1"})  # the same weights
            embed = specs.embed(chosen.arms[0], 0, chosen.protocols[0], marker)
            [tuned] = [c for c in specs.cells() if c.protocol.name == "t" and (c.pretraining_seed, c.label_draw) == (0, 0)]
            point = {"learning_rate": 0.1, "weight_decay": 0.0}
            for spec in (encoder, embed, specs.evaluate(tuned, 0, point, marker)):
                found[encoder.stage, which, spec.stage] = spec.name
    for stages in (("initialise", "embed", "evaluate"), ("pretrain", "embed", "evaluate")):
        for stage in stages:
            assert len({found[stages[0], which, stage] for which in ("given", "other", "none")}) == 3
    assert own_encoders(recipe("resnet18")) == {}


def test_loaded_weights_are_one_encoder_and_kept(write: Callable[..., str], tmp_path: Path) -> None:
    import pandas as pd

    module, store = write(), open_store(str(tmp_path / "store"), create=True)
    chosen = recipe(f"{module}:loaded", initial_weights="function")
    assert not chosen.arms[0].is_random and own_encoders(chosen)
    assert Specs(chosen, pd.DataFrame(), []).pretraining_seeds(chosen.arms[0]) == range(1)
    weights = save_weights(build_encoder(chosen.encoder, 0))
    digests = weights_digests(chosen, store)
    assert digests == {"own": hashlib.sha256(weights).hexdigest()}
    spec = Spec("initialise", {}, {"initial_weights": digests["own"]}, "initialise own seed 0")
    given = stage_weights(chosen, store, [(chosen.arms[0], 0, spec)])[spec.name]
    assert given.facts["source"] == f"{module}:loaded" and given.facts["sha256"] == digests["own"]
    with pytest.raises(RecipeError, match=re.escape("encoder resnet18 is no function of yours (package.module:function)")):
        weights_digests(recipe("resnet18", initial_weights="function"), store)


def test_it_is_exported_where_a_format_can_hold_it(write: Callable[..., str]) -> None:
    chosen = params(f"{write()}:plain")
    encoder = build_encoder(chosen, 1)
    estimate_batch_norm(encoder, [torch.randn(8, 3, 32, 32)])
    again = build_encoder(chosen, 2).eval()
    load_weights(again, convert(encoder, chosen, "safetensors"))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), encoder(images))
    for format_ in ("timm", "torchvision"):
        with pytest.raises(RecipeError, match=f"^{format_} has no network 'own_.*': export it as safetensors or onnx$"):
            convert(encoder, chosen, format_)
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert convert(encoder, chosen, "onnx")  # read back and compared
