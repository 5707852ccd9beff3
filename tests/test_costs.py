"""What a plan takes on given hardware: counted operations against a count of one's own, hours against arithmetic, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests import finished_study
from torch import nn

from medssl import cli
from medssl.arms import Arm
from medssl.costs import ACHIEVED, PEAK_TFLOPS, cost, forward_flops, hardware, measured_flops, passes
from medssl.errors import RecipeError
from medssl.networks.encoder import EncoderParams, build_encoder
from medssl.recipe_file import load
from medssl.study import PlanLine


def counted(encoder: EncoderParams) -> float:
    """Two operations for each multiplication of each convolution and linear layer, from their shapes."""
    network, total = build_encoder(encoder, 0).eval(), 0.0

    def count(layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += 2 * output.numel() * layer.kernel_size[0] * layer.kernel_size[1] * layer.in_channels / layer.groups
        elif isinstance(layer, nn.Linear):
            total += 2 * output.numel() * layer.in_features

    for layer in network.modules():
        layer.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, encoder.channels, encoder.image_px, encoder.image_px))
    return total


@pytest.mark.parametrize(("name", "px"), [("resnet18", 64), ("resnet18", 224), ("test_resnet", 32), ("resnet50_2x", 32)])
def test_operations_of_a_forward_pass(name: str, px: int) -> None:
    encoder = EncoderParams(name=name, image_px=px)
    assert forward_flops(encoder) == pytest.approx(counted(encoder), rel=1e-9)


def test_resnet_18_is_what_papers_print() -> None:
    assert forward_flops(EncoderParams(name="resnet18", image_px=224)) == pytest.approx(2 * 1.82e9, rel=0.01)


def test_what_an_image_costs() -> None:
    encoder = EncoderParams(image_px=224)

    def arm(objective: str | None = None, **fields: Any) -> Arm:
        given = {} if objective is None else {"objective": {"name": objective}, "epochs": 1}
        return Arm.model_validate({"name": "a", **given, **fields})

    assert passes("pretrain", arm("simclr"), encoder) == 6 and passes("pretrain", arm("byol"), encoder) == 8
    assert passes("pretrain", arm("swav", views={"preset": "swav"}), encoder) == pytest.approx(3 * (2 + 6 * (96 / 224) ** 2))
    assert passes("initialise", arm(), encoder) == 1 and passes("initialise", arm(initial_weights="timm"), encoder) == 0
    assert [passes(stage, arm(), encoder) for stage in ("embed", "search", "evaluate", "transfer")] == [1, 3, 3, 1]
    assert passes("embed", arm(features="colour"), encoder) == 0


def test_hours_and_money() -> None:
    recipe = load(finished_study.fields())
    on = hardware("2xA100")
    assert (on.devices, on.flops) == (2, ACHIEVED * PEAK_TFLOPS["a100"] * 1e12)
    lines = [
        PlanLine("embed", "x", "to do", 1000, arm="random"), PlanLine("embed", "x", "to do", 500, arm="colour"),
        PlanLine("evaluate", "x", "waits", 200, arm="random"), PlanLine("report", "report", "waits", 0),
    ]  # fmt: skip
    one = forward_flops(recipe.encoder) / (2 * on.flops) / 3600
    found = cost(recipe, lines, on, price=3)
    assert found.hours == pytest.approx({"embed": 1000 * one, "evaluate": 600 * one})
    said = found.to_text()
    assert found.total == pytest.approx(1600 * one) and "on 2 x a100" in said and "at 3 for a device" in said
    assert "assumed: 20% of 312 trillion" in said


@pytest.mark.parametrize("text", ["a10", "0xa100", "x", "2xhere", "8 x h100", ""])
def test_hardware_that_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"--hardware is .*choices|--hardware is .*did you mean") as refused:
        hardware(text)
    assert "\n" not in str(refused.value)


def test_this_machine_is_measured() -> None:
    assert 1e8 < measured_flops(steps=1) < 1e16


def test_plan_prints_and_counts_what_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = finished_study.make(tmp_path).store
    twins = {"name": "bt", "objective": {"name": "barlow_twins", "projector": [8, 8]}, "epochs": 2, "batch_size": 4}
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(finished_study.fields(arms=[twins])))
    arguments = ["plan", str(path), "--store", store.uri]
    assert cli.main([*arguments, "--hardware", "h100", "--price", "2.5"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("about ") and "1 x h100" in last and "at 2.5 for a device" in last
    assert cli.main([*arguments, "--hardware", "h100", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert lines[-1]["stage"] == "cost" and lines[-1]["total_hours"] == pytest.approx(sum(lines[-1]["hours"].values()))
    tuned = [line for line in lines[:-1] if line["label"].startswith("tune of bt")]
    assert tuned and all(line["state"] == "waits" and line["images"] > 0 for line in tuned)
    for wrong in (["--hardware", "abacus"], ["--price", "3"], ["--hardware", "h100", "--price", "-1"]):
        assert cli.main([*arguments, *wrong]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
