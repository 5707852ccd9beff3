"""Surgery on a pretrained encoder before a second pretraining: weight scaling and replacement of dead filters.

Paper 002: Ciga, Xu, Martel, "Resource and data efficient self supervised learning" (2021), Weight scaling, Dead filters.
Encoders trained by contrast have convolutions of large norm, on which a further pretraining starts slowly, and some
filters of hardly any norm, which give no response and get no gradient.

Scaling. s is the Frobenius norm of a convolution's weights (`layer`) or of each filter's (`filter`). Where s > 1

    weights (and bias) / sqrt(s)    running mean / sqrt(s)    running variance / s^2    gamma / sqrt(s)    beta unchanged

In evaluation the batch norm's output stays: (1 / sqrt(s)) / sqrt(variance / s^2) / sqrt(s) = 1 / sqrt(variance). In
training, where the batch's own variance (now / s) takes the place of the running one, the gain of the layer becomes
1 / sqrt(s): that smaller scale is what the second pretraining starts from. The running variance is therefore too small by
a factor s for the scaled convolution, until training has averaged it away.

Both hold up to eps, which is not scaled: the evaluation gain of a channel is sqrt((v + eps) / (v + s^2 eps)) with v its
running variance before, 0.81 for s = 32 and v = 0.02, and the gain in training sqrt((v + eps) / (v + s eps)) / sqrt(s)
with v the batch's. The report names the largest deviation.

Dead filters, those of norm below 0.1, are judged and replaced before the scaling, so that the weights are those the paper
judged, and new filters share their layer's scale. A copy takes its donor's batch-norm entries along.

Which batch norm belongs to a convolution is seen by running the encoder, not read from names. A convolution is left alone,
and reported, when its output goes anywhere but into one batch norm: scaling would change the output there.

Shapes: B images, I input channels, H, W height and width, C filters (output channels) of a convolution, E feature width.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from medssl.errors import RecipeError
from medssl.params import Params

_CHUNK = 32
_TRACE_PX = 64
_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)


class SurgeryParams(Params):
    """What is done to an encoder's weights between two pretrainings; the defaults are paper 002's."""

    scaling: Literal["none", "layer", "filter"] = "layer"
    """Weight scaling by the norm of each layer, or of each filter, where that is above 1."""
    dead_filters: Literal["none", "copy", "reinitialise"] = "copy"
    """Dead filters become copies of random living ones of their layer, or are drawn anew."""
    dead_threshold: float = Field(0.1, gt=0)
    """Norm below which a filter is dead."""
    seed: int = Field(0, ge=0)
    """Which living filters are copied, and what new ones are drawn."""


@dataclass(frozen=True)
class LayerSurgery:
    """What was done to one convolution and its batch norm."""

    convolution: str
    batch_norm: str
    scale: float
    """s, with scaling by filter the largest; 1 where nothing was scaled."""
    scaled_filters: int
    replaced: tuple[int, ...]
    """Dead filters that were replaced, by channel."""
    donors: tuple[int, ...]
    """Where the replacements were copied from; empty when they were drawn."""
    still_dead: int
    """Dead filters of a layer without a living one to copy."""
    gain: float
    """Gain of the scaling in evaluation, of the channel where it is furthest from 1."""
    channel: int
    """That channel."""
    variance: float
    """Its running variance before the scaling."""
    deviation: float
    """|output' - output| / |output - beta| of the pair in evaluation over all channels, on inputs whose moments are the
    running ones; a channel of hardly any variance has a gain far from 1 but no part in the output."""


@dataclass(frozen=True)
class SurgeryReport:
    """What :func:`operate` did, in the order of execution."""

    layers: tuple[LayerSurgery, ...]
    """All convolutions with a batch norm of their own."""
    left_alone: tuple[tuple[str, str], ...]
    """Other convolutions, each with the reason."""
    feature_deviation: float | None
    """Largest |features' - features| / |features| of an image through the scaling, in evaluation; None without images."""

    @property
    def pair_deviation(self) -> float:
        """The largest deviation of a convolution with its batch norm."""
        return max((layer.deviation for layer in self.layers), default=0.0)

    def describe(self) -> str:
        """One line for the log."""
        parts = [self._scaled(), *self._filters()]
        if self.left_alone:
            name, reason = self.left_alone[0]
            parts.append(f"{len(self.left_alone)} convolution(s) left alone, the first {name}: {reason}")
        return f"surgery: {'; '.join(parts)}"

    def _scaled(self) -> str:
        scaled = [layer for layer in self.layers if layer.scaled_filters]
        if not scaled:
            return f"no scaling of {len(self.layers)} layers"
        pair = max(scaled, key=lambda layer: layer.deviation)
        channel = max(scaled, key=lambda layer: abs(1 - layer.gain))
        text = (
            f"{len(scaled)} of {len(self.layers)} layers scaled, s up to {max(layer.scale for layer in scaled):.3g}; "
            f"largest deviation of the evaluation output {pair.deviation:.2%} in a layer ({pair.convolution}, "
            f"s {pair.scale:.3g}), {abs(1 - channel.gain):.2%} in a channel ({channel.convolution} channel {channel.channel}, "
            f"running variance {channel.variance:.2g})"
        )
        return text if self.feature_deviation is None else f"{text}, {self.feature_deviation:.2%} in the features"

    def _filters(self) -> Iterator[str]:
        for copied in (True, False):
            layers = [layer for layer in self.layers if layer.replaced and bool(layer.donors) == copied]
            if layers:
                count = sum(len(layer.replaced) for layer in layers)
                yield f"{count} dead filters in {len(layers)} layers {'copied from living ones' if copied else 'drawn anew'}"
        dead = sum(layer.still_dead for layer in self.layers)
        if dead:
            yield f"{dead} dead filters kept, as their layers have no living one"


@torch.no_grad()
def operate(
    encoder: nn.Module,
    params: SurgeryParams,
    images_BIHW: Tensor | None = None,
    *,
    image_shape: tuple[int, int, int] | None = None,
) -> SurgeryReport:
    """Changes the encoder's weights in place as `params` say; which batch norm follows what is found by running it.

    Args:
        encoder: maps (B, I, H, W) to (B, E); its training mode is kept.
        params: what to do. The result follows from them and the encoder's weights alone.
        images_BIHW: normalised images of the encoder's size, on which the report measures how far scaling moves the
            features. Without them noise shows the order of layers, and features are not compared.
        image_shape: (I, H, W) of that noise, for an encoder that takes images of one size; None is 64 x 64 px.

    Raises:
        RecipeError: no convolution has a batch norm to itself (a transformer), or the encoder refused the images.
    """
    with _evaluating(encoder):
        images_BIHW = None if images_BIHW is None else images_BIHW.to(next(encoder.parameters()).device)
        pairs, left_alone = _pairs(encoder, _noise(encoder, image_shape) if images_BIHW is None else images_BIHW[:1])
        generator = torch.Generator().manual_seed(params.seed)
        replaced = [_replace_dead(pair, params, generator) for pair in pairs]
        before_BE = None if images_BIHW is None else _features(encoder, images_BIHW)
        layers = [_scale(pair, params.scaling, *filters) for pair, filters in zip(pairs, replaced, strict=True)]
        deviation = None
        if images_BIHW is not None and before_BE is not None:
            moved_B = (_features(encoder, images_BIHW) - before_BE).norm(dim=1)
            deviation = float((moved_B / before_BE.norm(dim=1).clamp(min=1e-12)).max())
    return SurgeryReport(tuple(layers), left_alone, deviation)


@contextlib.contextmanager
def _evaluating(encoder: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _features(encoder: nn.Module, images_BIHW: Tensor) -> Tensor:
    return torch.cat([encoder(chunk).flatten(1).double() for chunk in torch.split(images_BIHW, _CHUNK)])


# ------------------------------------------------------------------------------------------------------------- pairing


@dataclass(frozen=True)
class _Pair:
    name: str
    convolution: nn.modules.conv._ConvNd
    norm_name: str
    norm: nn.modules.batchnorm._BatchNorm


class _Trace(TorchFunctionMode):
    """Records where the outputs of convolutions go while the encoder runs.

    Modules are known by the tensors they hand to torch's functions, tensors by identity. That sees functions called
    outside modules (a sum, a concatenation), and batch norms of any class.
    """

    def __init__(self, convolutions: dict[int, str], norms: dict[int, str]) -> None:
        super().__init__()
        self.convolutions, self.norms = convolutions, norms
        self.calls: Counter[str] = Counter()
        self.takers: dict[str, list[str | None]] = {}  # by convolution: the batch norm, or None for anything else
        self._made: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept: a freed one's identity is given out again

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(True for _ in _tensors(result)):
            return result  # asked for a shape or a dtype
        given = [id(tensor) for tensor in _tensors((args, kwargs or {}))]
        norm = next((self.norms[i] for i in given if i in self.norms), None) if func is F.batch_norm else None
        if norm is not None:
            self.calls[norm] += 1
        for i in given:
            if i in self._made:
                self.takers[self._made[i][0]].append(norm)
        name = next((self.convolutions[i] for i in given if i in self.convolutions), None) if func in _CONVOLUTIONS else None
        if name is not None:
            self.calls[name] += 1
            self.takers.setdefault(name, [])
            self._made[id(result)] = name, result
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _pairs(encoder: nn.Module, image_BIHW: Tensor) -> tuple[list[_Pair], tuple[tuple[str, str], ...]]:
    """Convolutions with a batch norm of their own in the order of execution, and the others with the reason."""
    modules = dict(encoder.named_modules())
    convolutions = {n: m for n, m in modules.items() if isinstance(m, nn.modules.conv._ConvNd) and not m.transposed}
    norms = {n: m for n, m in modules.items() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_var is not None}
    pairs, left_alone = [], []
    if convolutions and norms:
        trace = _Trace({id(m.weight): n for n, m in convolutions.items()}, {id(m.running_var): n for n, m in norms.items()})
        try:
            with trace:
                encoder(image_BIHW)
        except Exception as error:  # whatever a network says to images it does not like
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            shape = " x ".join(map(str, image_BIHW.shape[1:]))
            raise RecipeError(f"surgery: the encoder refuses images of {shape} ({reason}); give images of its size") from error
        for name in [*trace.takers, *(n for n in convolutions if n not in trace.takers)]:
            reason, norm_name = _verdict(name, trace, modules)
            if reason:
                left_alone.append((name, reason))
            else:
                pairs.append(_Pair(name, convolutions[name], norm_name, norms[norm_name]))
    if not pairs:
        raise RecipeError(
            f"surgery needs convolutions followed by batch norm, and the encoder ({type(encoder).__name__}) has none; "
            "choose a ResNet or another convolutional encoder with batch norm, or leave surgery out"
        )
    return pairs, tuple(left_alone)


def _verdict(name: str, trace: _Trace, modules: dict[str, nn.Module]) -> tuple[str, str]:
    """Why a convolution is left alone (or nothing), and the batch norm that follows it."""
    calls, takers = trace.calls[name], trace.takers.get(name, [])
    if calls != 1:
        return ("its weights are computed, or unused" if calls == 0 else f"it is used {calls} times"), ""
    norm = takers[0] if len(takers) == 1 else None
    if norm is None:
        return ("its output goes elsewhere as well" if any(takers) else "no batch norm follows it"), ""
    if trace.calls[norm] != 1:
        return f"its batch norm {norm} is used {trace.calls[norm]} times", ""
    return ("" if modules[norm].weight is not None else f"its batch norm {norm} has no gamma"), norm


def _noise(encoder: nn.Module, image_shape: tuple[int, int, int] | None) -> Tensor:
    first = next((m for m in encoder.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    channels, like = (3, next(encoder.parameters())) if first is None else (first.in_channels, first.weight)
    shape = image_shape or (channels, _TRACE_PX, _TRACE_PX)
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(like)


# ----------------------------------------------------------------------------------------------------------- operations


def _filter_norms(convolution: nn.modules.conv._ConvNd) -> Tensor:
    norms_C: Tensor = convolution.weight.double().flatten(1).norm(dim=1)
    return norms_C


def _entries(pair: _Pair) -> list[tuple[Tensor, float]]:
    """Everything a channel has beside its filter, with the value of a new network."""
    norm = pair.norm
    entries = [(norm.weight, 1.0), (norm.bias, 0.0), (norm.running_mean, 0.0), (norm.running_var, 1.0)]
    return [(tensor, new) for tensor, new in [*entries, (pair.convolution.bias, 0.0)] if tensor is not None]


def _replace_dead(pair: _Pair, params: SurgeryParams, generator: torch.Generator) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Replaces dead filters; which, their donors, and how many had none."""
    weight = pair.convolution.weight
    norms_C = _filter_norms(pair.convolution).cpu()
    dead, living = ((norms_C < params.dead_threshold) == flag for flag in (True, False))
    channels: list[int] = dead.nonzero()[:, 0].tolist()
    if not channels or params.dead_filters == "none":
        return (), (), 0
    if params.dead_filters == "reinitialise":
        fresh = nn.init.kaiming_normal_(torch.empty(weight.shape), mode="fan_out", nonlinearity="relu", generator=generator)
        weight[dead] = fresh[dead].to(weight)
        for entry, new in _entries(pair):
            entry[dead] = new
        return tuple(channels), (), 0
    if not living.any():
        return (), (), len(channels)
    donors = [_donor(channel, living, pair.convolution.groups, generator) for channel in channels]
    for tensor in (weight, *(entry for entry, _ in _entries(pair))):
        tensor[channels] = tensor[donors]
    return tuple(channels), tuple(donors), 0


def _donor(channel: int, living_C: Tensor, groups: int, generator: torch.Generator) -> int:
    """A random living filter; of the same group where it has one, as another group's sees other inputs."""
    size = len(living_C) // groups
    first = channel // size * size
    own = living_C[first : first + size].nonzero()[:, 0] + first
    candidates = own if len(own) else living_C.nonzero()[:, 0]
    return int(candidates[torch.randint(len(candidates), (1,), generator=generator)])


def _scale(pair: _Pair, scaling: str, replaced: tuple[int, ...], donors: tuple[int, ...], still_dead: int) -> LayerSurgery:
    norm, convolution = pair.norm, pair.convolution
    assert norm.running_mean is not None and norm.running_var is not None
    s_C = _filter_norms(convolution)
    if scaling == "layer":
        s_C = s_C.norm().expand_as(s_C)
    s_C = s_C.clamp(min=1) if scaling != "none" else torch.ones_like(s_C)
    variance_C = norm.running_var.double()
    gain_C = torch.sqrt((variance_C + norm.eps) / (variance_C + s_C.square() * norm.eps))
    share_C = norm.weight.double().square() * variance_C / (variance_C + norm.eps)  # of |output - beta|^2
    deviation = torch.sqrt(((1 - gain_C).square() * share_C).sum() / share_C.sum().clamp(min=1e-30))
    channel = int((1 - gain_C).abs().argmax())
    root_C = s_C.sqrt()
    convolution.weight.div_(root_C.view(-1, *[1] * (convolution.weight.ndim - 1)))
    for tensor in (convolution.bias, norm.running_mean, norm.weight):
        if tensor is not None:
            tensor.div_(root_C)
    norm.running_var.div_(s_C.square())
    return LayerSurgery(
        convolution=pair.name,
        batch_norm=pair.norm_name,
        scale=float(s_C.max()),
        scaled_filters=int((s_C > 1).sum()),
        replaced=replaced,
        donors=donors,
        still_dead=still_dead,
        gain=float(gain_C[channel]),
        channel=channel,
        variance=float(variance_C[channel]),
        deviation=float(deviation),
    )
