"""Surgery: evaluation unchanged up to eps, gain 1 / sqrt(s) in training, dead filters, all on trained networks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medssl.collectives import SyncBatchNorm, convert_batch_norm
from medssl.errors import RecipeError
from medssl.networks import EncoderParams, build_encoder, feature_width
from medssl.networks.surgery import LayerSurgery, SurgeryParams, operate
from medssl.training.plan import PretrainPlan
from medssl.training.step import build_pretraining

LAYER = SurgeryParams(scaling="layer", dead_filters="none")
KINDS = {"test_resnet": nn.BatchNorm2d, "test_efficientnet": "BatchNormAct2d", "synchronised": SyncBatchNorm}


def images(count: int = 16, seed: int = 7) -> Tensor:
    small = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(small, size=(32, 32), mode="bicubic")


_TRAINED: dict[str, nn.Module] = {}


@torch.enable_grad()
def trained(kind: str = "test_resnet") -> nn.Module:
    """A network after a few steps on labels it can learn, so that gammas, betas and running statistics are real."""
    if kind not in _TRAINED:
        encoder = build_encoder(EncoderParams(name="test_resnet" if kind == "synchronised" else kind, image_px=32), 0)
        encoder = convert_batch_norm(encoder) if kind == "synchronised" else encoder
        torch.manual_seed(0)
        head = nn.Linear(feature_width(encoder), 2)
        optimiser = torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=0.05, momentum=0.9)
        encoder.train()
        for step in range(30):
            batch = images(32, seed=step)
            labels = (batch.mean((1, 2, 3)) > 0).long()
            loss = F.cross_entropy(head(encoder(batch)), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert loss.item() < 0.6
        _TRAINED[kind] = encoder.eval()
    return copy.deepcopy(_TRAINED[kind])


def part(encoder: nn.Module, layer: LayerSurgery) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return encoder.get_submodule(layer.convolution), encoder.get_submodule(layer.batch_norm)  # type: ignore[return-value]


def normalised(norm: nn.BatchNorm2d, x: Tensor, training: bool) -> Tensor:
    """The batch norm's own output, without the activation that some kinds apply."""
    mean, variance = (None, None) if training else (norm.running_mean, norm.running_var)
    return F.batch_norm(x, mean, variance, norm.weight, norm.bias, training, 0.0, norm.eps)


def slope(before: Tensor, after: Tensor, beta: Tensor) -> Tensor:
    """Per channel, the factor by which what comes on top of beta has changed."""
    b, a = ((t - beta.view(1, -1, 1, 1)).transpose(0, 1).flatten(1).double() for t in (before, after))
    return (a * b).sum(1) / (b * b).sum(1)


@torch.no_grad()
def probe(conv: nn.Conv2d) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, conv.in_channels, 9, 9, generator=generator) + 0.5


@torch.no_grad()
@pytest.mark.parametrize("scaling", ["layer", "filter"])
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_stays_up_to_eps(kind: str, scaling: str) -> None:
    before, after = trained(kind), trained(kind)
    params = SurgeryParams(scaling=scaling, dead_filters="none")
    report = operate(after, params, images())
    reached, seen = before(images()), after(images())
    deviation = float(((seen - reached).norm(dim=1) / reached.norm(dim=1)).max())
    assert report.feature_deviation == pytest.approx(deviation, rel=1e-3, abs=1e-6)
    assert deviation < 0.2
    exact_before, exact_after = trained(kind), trained(kind)
    for module in [*exact_before.modules(), *exact_after.modules()]:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = 1e-30  # small enough to vanish; torch refuses 0 in training
    exact = operate(exact_after, params, images())
    assert exact.pair_deviation < 1e-6
    torch.testing.assert_close(exact_after(images()), exact_before(images()), rtol=1e-4, atol=1e-4)
    assert sum(layer.scaled_filters for layer in report.layers) > 0
    assert type(part(after, report.layers[0])[1]) is KINDS[kind] or type(part(after, report.layers[0])[1]).__name__ == KINDS[kind]


@torch.no_grad()
@pytest.mark.parametrize("scaling", ["layer", "filter"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_report_equals_a_measurement_of_every_pair(kind: str, scaling: str) -> None:
    before, after = trained(kind), trained(kind)
    report = operate(after, SurgeryParams(scaling=scaling, dead_filters="none"))
    assert report.layers and report.feature_deviation is None
    for layer in report.layers:
        (conv, norm), (conv2, norm2) = part(before, layer), part(after, layer)
        norms_C = conv.weight.double().flatten(1).norm(dim=1)
        s_C = (norms_C.norm().expand_as(norms_C) if scaling == "layer" else norms_C).clamp(min=1)
        assert layer.scale == pytest.approx(float(s_C.max())) and layer.scaled_filters == int((s_C > 1).sum())
        # Evaluation, channel by channel, on any input.
        x = probe(conv)
        gain_C = slope(normalised(norm, conv(x), False), normalised(norm2, conv2(x), False), norm.bias)
        alive_C = norm.weight.abs() > 1e-4
        assert layer.gain == pytest.approx(float(gain_C[layer.channel]), rel=1e-3)
        assert (gain_C[alive_C] - 1).abs().max() <= abs(1 - layer.gain) + 1e-4
        assert layer.variance == pytest.approx(float(norm.running_var[layer.channel]))
        # Evaluation of the whole layer, on outputs of the convolution that have the running moments.
        z = torch.randn(16, conv.out_channels, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        z = (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True, correction=0)
        z = z * norm.running_var.double().sqrt().view(1, -1, 1, 1) + norm.running_mean.double().view(1, -1, 1, 1)
        root = s_C.sqrt().view(1, -1, 1, 1)
        first, second = (normalised(n.double(), v, False) for n, v in ((norm, z), (norm2, z / root)))
        measured = (second - first).norm() / (first - norm.bias.view(1, -1, 1, 1)).norm()
        assert layer.deviation == pytest.approx(float(measured), rel=1e-3, abs=1e-6)
    assert report.pair_deviation == max(layer.deviation for layer in report.layers)


@torch.no_grad()
@pytest.mark.parametrize("scaling", ["layer", "filter"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_training_the_gain_is_one_by_the_root_of_s(kind: str, scaling: str) -> None:
    before, after = trained(kind), trained(kind)
    report = operate(after, SurgeryParams(scaling=scaling, dead_filters="none"))
    for layer in report.layers:
        (conv, norm), (conv2, norm2) = part(before, layer), part(after, layer)
        norms_C = conv.weight.double().flatten(1).norm(dim=1)
        s_C = (norms_C.norm().expand_as(norms_C) if scaling == "layer" else norms_C).clamp(min=1)
        x = probe(conv)
        variance_C = conv(x).double().var((0, 2, 3), correction=0)
        gain_C = slope(normalised(norm, conv(x), True), normalised(norm2, conv2(x), True), norm.bias)
        up_to_eps_C = torch.sqrt((variance_C + norm.eps) / (variance_C + s_C * norm.eps))
        alive_C = norm.weight.abs() > 1e-4
        torch.testing.assert_close(gain_C[alive_C], (up_to_eps_C / s_C.sqrt())[alive_C], rtol=2e-3, atol=1e-4)
    assert max(layer.scale for layer in report.layers) > 1.2  # so the gain is clearly not 1
    whole_before, whole_after = before.train()(images()), after.train()(images())
    assert (whole_after - whole_before).norm() > 0.01 * whole_before.norm()


@torch.no_grad()
def test_which_numbers_change_and_by_what() -> None:
    before, after = trained(), trained()
    for layer in operate(after, LAYER).layers:
        (conv, norm), (conv2, norm2) = part(before, layer), part(after, layer)
        s = float(conv.weight.double().norm())
        s = max(s, 1.0)
        for was, now, power in [
            (conv.weight, conv2.weight, 0.5),
            (norm.running_mean, norm2.running_mean, 0.5),
            (norm.running_var, norm2.running_var, 2.0),
            (norm.weight, norm2.weight, 0.5),
            (norm.bias, norm2.bias, 0.0),
        ]:
            torch.testing.assert_close(now, was / s**power, rtol=1e-5, atol=1e-8)
    again = operate(after, LAYER)  # sqrt(s) is what is left of a norm s
    assert all(
        layer.scale == pytest.approx(max(1.0, math.sqrt(float(part(before, layer)[0].weight.norm())))) for layer in again.layers
    )


def pair(norm_of_layer: float, variance: float, filters: int = 4) -> nn.Sequential:
    network = nn.Sequential(nn.Conv2d(3, filters, 3), nn.BatchNorm2d(filters)).eval()
    with torch.no_grad():
        network[0].weight.mul_(norm_of_layer / network[0].weight.norm())
        network[1].running_var.fill_(variance)
        network[1].running_mean.normal_()
        network[1].weight.uniform_(0.5, 2.0)
    return network


def test_eps_at_a_large_norm_and_a_small_variance() -> None:
    network = pair(32, 0.02)
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        before = network(x)
        (layer,) = operate(network, LAYER).layers
        after = network(x)
    assert layer.scale == pytest.approx(32) and layer.gain == pytest.approx(0.81, abs=0.005)
    assert slope(before, after, network[1].bias.detach()).tolist() == pytest.approx([layer.gain] * 4, rel=1e-4)
    assert layer.deviation == pytest.approx(1 - layer.gain, rel=1e-4)


def test_a_small_layer_is_not_scaled_and_biases_of_convolutions_are() -> None:
    small = pair(0.9, 1.0)
    before = copy.deepcopy(small.state_dict())
    (layer,) = operate(small, LAYER).layers
    assert (layer.scale, layer.scaled_filters, layer.gain) == (1, 0, 1)
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())
    large = pair(4.0, 1.0)
    bias = large[0].bias.detach().clone()
    operate(large, LAYER)
    torch.testing.assert_close(large[0].bias.detach(), bias / 2)


def killed(channels: tuple[int, ...] = (1, 5, 6)) -> tuple[nn.Module, nn.Conv2d, nn.BatchNorm2d]:
    encoder = trained()
    name = operate(trained(), SurgeryParams(scaling="none", dead_filters="none")).layers[2]
    conv, norm = part(encoder, name)
    with torch.no_grad():
        conv.weight[list(channels)] *= 0.05 / conv.weight[list(channels)].flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        conv.weight[0] *= 0.11 / conv.weight[0].norm()  # just alive
    return encoder, conv, norm


def test_dead_filters_become_copies_with_their_batch_norm_entries() -> None:
    encoder, conv, norm = killed()
    before = copy.deepcopy(encoder.state_dict())
    weight = conv.weight.detach().clone()
    report = operate(encoder, SurgeryParams(scaling="none", seed=3))
    (layer,) = [layer for layer in report.layers if layer.replaced]
    assert layer.replaced == (1, 5, 6) and len(layer.donors) == 3 and not set(layer.donors) & {1, 5, 6}
    for channel, donor in zip(layer.replaced, layer.donors, strict=True):
        assert torch.equal(conv.weight[channel], weight[donor])
        for entry in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert entry[channel] == entry[donor]
    others = [c for c in range(conv.out_channels) if c not in layer.replaced]
    assert torch.equal(conv.weight[others], weight[others])
    changed = {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[0] for name in changed} == {layer.convolution, layer.batch_norm}
    assert not any(layer.replaced for layer in operate(encoder, SurgeryParams(scaling="none")).layers)


def test_dead_filters_are_judged_before_the_scaling() -> None:
    encoder, conv, _ = killed()
    (layer,) = [layer for layer in operate(encoder, SurgeryParams()).layers if layer.replaced]
    assert layer.replaced == (1, 5, 6)
    smallest = float(conv.weight[0].detach().norm())  # alive before, though far below the threshold now
    assert smallest == pytest.approx(0.11 / math.sqrt(layer.scale), rel=1e-4)


def test_dead_filters_drawn_anew() -> None:
    encoder, conv, norm = killed()
    report = operate(encoder, SurgeryParams(scaling="none", dead_filters="reinitialise"))
    (layer,) = [layer for layer in report.layers if layer.replaced]
    assert layer.replaced == (1, 5, 6) and layer.donors == ()
    drawn = conv.weight[[1, 5, 6]].detach()
    expected = math.sqrt(2 / (conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]))  # He's, by fan-out, as timm
    assert float(drawn.std()) == pytest.approx(expected, rel=0.3)
    for entry, new in ((norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0), (norm.running_var, 1)):
        assert entry[[1, 5, 6]].tolist() == [new] * 3
    assert "3 dead filters in 1 layers drawn anew" in report.describe()


@pytest.mark.parametrize("dead", ["copy", "reinitialise"])
def test_the_seed_decides(dead: str) -> None:
    states = []
    for seed in (1, 1, 2):
        encoder, _, _ = killed()
        torch.manual_seed(len(states))  # torch's own generator has no part in it
        operate(encoder, SurgeryParams(dead_filters=dead, seed=seed))
        states.append(encoder.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_a_layer_without_a_living_filter_is_kept_and_told() -> None:
    network = pair(0.1, 1.0)
    before = network[0].weight.detach().clone()
    report = operate(network, SurgeryParams())
    assert report.layers[0].still_dead == 4 and torch.equal(network[0].weight, before)
    assert "4 dead filters kept" in report.describe()


def test_a_grouped_convolution_copies_within_its_group() -> None:
    network = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8))
    for seed in range(5):
        with torch.no_grad():
            network[0].weight.normal_()
            network[0].weight[[0, 7]] = 0
        (layer,) = operate(network, SurgeryParams(seed=seed)).layers
        assert layer.donors[0] in (1, 2, 3) and layer.donors[1] in (4, 5, 6)


class Odd(nn.Module):
    """Convolutions in every situation that surgery must leave alone, and two that it must not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.bare = nn.Conv2d(8, 8, 1)
        self.two_ways, self.two_ways_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.twice, self.twice_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.summed, self.summed_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.plain, self.plain_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, affine=False)
        self.unused = nn.Conv2d(8, 8, 1)
        self.late_norm = nn.BatchNorm2d(8)  # declared before its convolution
        self.late = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first_norm(self.first(x)), inplace=True)
        x = self.bare(x).relu()
        y = self.two_ways(x)
        x = self.two_ways_norm(y) + y
        x = self.twice_norm(self.twice(self.twice(x)))
        z = self.summed(x)
        z += x
        x = self.plain_norm(self.plain(self.summed_norm(z)))
        return self.late_norm(self.late(x)).mean((2, 3))


def test_pairs_are_seen_not_guessed() -> None:
    network = Odd().train()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(5)
    before = copy.deepcopy(network)
    report = operate(network, LAYER, torch.randn(4, 3, 16, 16))
    assert [(layer.convolution, layer.batch_norm) for layer in report.layers] == [("first", "first_norm"), ("late", "late_norm")]
    assert dict(report.left_alone) == {
        "bare": "no batch norm follows it",
        "two_ways": "its output goes elsewhere as well",
        "twice": "it is used 2 times",
        "summed": "its output goes elsewhere as well",
        "plain": "its batch norm plain_norm has no gamma",
        "unused": "its weights are computed, or unused",
    }
    assert network.training and network.first_norm.training and int(network.first_norm.num_batches_tracked) == 0
    for name, _ in report.left_alone:
        assert torch.equal(network.get_submodule(name).weight, before.get_submodule(name).weight)
    assert "6 convolution(s) left alone, the first bare: no batch norm follows it" in report.describe()


@pytest.mark.parametrize(("name", "pairs", "alone"), [("resnet18", 20, 0), ("resnet50", 53, 0), ("resnet50d", 55, 0)])
def test_all_convolutions_of_a_resnet_have_their_batch_norm(name: str, pairs: int, alone: int) -> None:
    report = operate(build_encoder(EncoderParams(name=name), 0), SurgeryParams(scaling="none", dead_filters="none"))
    assert (len(report.layers), len(report.left_alone)) == (pairs, alone)
    for layer in report.layers:
        head, tail = layer.convolution.rpartition(".")[::2]
        expected = f"{head}.1" if tail == "0" and "downsample" in head else layer.convolution.replace("conv", "bn")
        assert layer.batch_norm == expected or "downsample" in head or head == "conv1"


def test_grey_encoders_need_no_images() -> None:
    grey = build_encoder(EncoderParams(name="test_resnet", channels=1, mean=(0.5,), std=(0.2,)), 0)
    assert operate(grey, SurgeryParams()).layers[0].scale > 1


def one_size(channels: int, image_px: int) -> nn.Module:
    """A user's own encoder that takes images of one size and no others."""
    layers = [nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * image_px**2, 8)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_encoder_of_one_size_needs_no_images(channels: int) -> None:
    """As in a streamed pretraining, which has no images at hand."""
    encoder = {"name": f"{__name__}:one_size", "image_px": 24, "channels": channels, "mean": [0.5] * channels}
    fields = {
        "encoder": {**encoder, "std": [0.2] * channels}, "objective": {"name": "simclr", "projector": (8, 8)}, "optimiser": {},
        "schedule": {}, "views": {}, "epochs": 1, "batch_size": 4, "seed": 0, "surgery": {},
    }  # fmt: skip
    module = build_pretraining(PretrainPlan.model_validate(fields))
    assert module.surgery is not None and "of 1 layers" in module.surgery and "in the features" not in module.surgery


@pytest.mark.parametrize("name", ["resnet18", "test_efficientnet", "densenet121"])
def test_the_size_of_the_traced_images_changes_nothing(name: str) -> None:
    found = []
    for px in (32, 64, 160):
        encoder = build_encoder(EncoderParams(name=name), 0)
        report = operate(encoder, SurgeryParams(dead_threshold=0.5), image_shape=(3, px, px))
        found.append((report, encoder.state_dict()))
    for report, weights in found[1:]:
        assert report == found[0][0] and all(torch.equal(value, found[0][1][key]) for key, value in weights.items())


def test_refusals_in_one_line() -> None:
    for name in ("vit_tiny_patch16_224", "convnext_atto"):
        with pytest.raises(RecipeError, match=r"needs convolutions followed by batch norm, .* has none; choose") as caught:
            operate(build_encoder(EncoderParams(name=name, image_px=64), 0), SurgeryParams())
        assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match=r"refuses images of 1 x 32 x 32 \(.*\); give images of its size"):
        operate(trained(), SurgeryParams(), torch.randn(1, 1, 32, 32))


def test_the_log_names_the_largest_deviation() -> None:
    report = operate(trained(), SurgeryParams(dead_filters="none"), images())
    pair_layer = max(report.layers, key=lambda layer: layer.deviation)
    channel_layer = max(report.layers, key=lambda layer: abs(1 - layer.gain))
    line = report.describe()
    assert line.startswith("surgery: ") and "\n" not in line
    assert f"{pair_layer.deviation:.2%} in a layer ({pair_layer.convolution}, s {pair_layer.scale:.3g})" in line
    assert f"{abs(1 - channel_layer.gain):.2%} in a channel ({channel_layer.convolution} channel {channel_layer.channel}" in line
    assert f"{report.feature_deviation:.2%} in the features" in line
    assert "no scaling" in operate(trained(), SurgeryParams(scaling="none")).describe()
