"""A user's own encoder: found, called, checked on images; every failure is one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from medssl.errors import RecipeError
from medssl.networks.encoder import EncoderParams, build_encoder, feature_width, load_weights, save_weights
from medssl.networks.own import source_digest

CODE = """
import torch
from torch import nn

def small(channels, image_px):
    return nn.Sequential(nn.Conv2d(channels, 6, 3), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 11))

def plain():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

def number():
    return 3

def maps(channels):
    return nn.Conv2d(channels, 6, 3)

def odd():
    return nn.Linear(5, 5)

def infinite():
    class Infinite(nn.Module):
        def forward(self, x):
            return x.flatten(1) / 0
    return Infinite()

def broken(channels):
    raise OSError("no weights at /nowhere\\nsecond line")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    name = "own_network_of_" + "".join(c if c.isalnum() else "_" for c in request.node.name)
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


def params(name: str) -> EncoderParams:
    return EncoderParams(name=name, image_px=24, channels=3)


def test_an_own_network_is_an_encoder(module: str) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (build_encoder(params(f"{module}:small"), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert feature_width(first) == 11 and first.training and first(torch.rand(4, 3, 24, 24)).shape == (4, 11)
    assert torch.equal(first[0].weight, again[0].weight) and not torch.equal(first[0].weight, other[0].weight)
    load_weights(other, save_weights(again))
    images = torch.rand(2, 3, 24, 24)
    assert torch.equal(other.eval()(images), again.eval()(images))
    assert feature_width(build_encoder(params(f"{module}:plain"), 0)) == 3


def test_other_code_is_another_network(module: str, tmp_path: Path) -> None:
    before = source_digest(f"{module}:small")
    path = tmp_path / f"{module}.py"
    path.write_text(path.read_text().replace("nn.Conv2d(channels, 6, 3)", "nn.Conv2d(channels, 6, 5)"))
    assert source_digest(f"{module}:small") != before


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("smal", "has no function 'smal': did you mean 'small'?"),
        ("number", "returned int: it has to return a torch.nn.Module"),
        ("maps", "to (2, 6, 22, 22): it has to give features of shape (2, width)"),
        ("odd", "failed on images of shape (2, 3, 24, 24): RuntimeError: mat1 and mat2"),
        ("infinite", "not finite"),
        ("broken", "the function failed: OSError: no weights at /nowhere"),
    ],
)
def test_what_is_no_encoder_is_refused_in_a_line(module: str, function: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build_encoder(params(f"{module}:{function}"), 0)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_module_that_is_not_there_or_fails(module: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no module 'nowhere\.at_all' to import"):
        build_encoder(params("nowhere.at_all:net"), 0)
    (tmp_path / f"{module}.py").write_text("import no_such_package")
    with pytest.raises(RecipeError, match="fails when imported: ModuleNotFoundError: No module named 'no_such_package'"):
        build_encoder(params(f"{module}:small"), 0)
