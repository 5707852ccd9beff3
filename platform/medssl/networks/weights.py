"""Encoder weights from files as people have them: torchvision's and timm's, the published files of self-supervised methods,
checkpoints of DDP and Lightning, our own.

A file's tensors are flattened to dotted names (`{"teacher": {"backbone.conv1.weight": ...}}` gives
`teacher.backbone.conv1.weight`), so that containers (state_dict, model, classy_state_dict.base_model.model.trunk ...) and
prefixes (module., backbone., encoder_q. ...) are one thing: the beginning of a name. The beginning under which the most
tensors have the encoder's names and shapes is the encoder; the rest (heads, projectors, second networks) is dropped.

Where a file has several whole encoders the preferred one is, in this order:

1. under a part named `teacher`, `ema` or `online`: DINO's evaluations use the teacher, BYOL's the online network;
2. under any other name: MoCo's `encoder_q` and `base_encoder`, the `backbone` beside a `momentum_backbone`;
3. under `student`, `target`, `momentum`, `k` or `key`.

Networks that were cut off as `nn.Sequential(*list(resnet.children())[:-1])` number their parts (`0.weight`,
`4.0.conv1.weight`): the numbers are positions of the encoder's own parts, and are read as such.
"""

from __future__ import annotations

import argparse
import io
import pickle
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medssl.errors import DataError, RecipeError, nearest
from medssl.networks.encoder import EncoderParams, build_encoder, save_weights

LEAST_SHARE = 0.9
"""Smallest share of the encoder's tensors that a file must have."""

_PREFERRED = {"teacher", "ema", "online"}
_AVOIDED = {"student", "target", "momentum", "k", "key"}
_COUNTER = "num_batches_tracked"  # of a batch norm; older files lack it, and only a cumulative average reads it
_DEEPEST = 12  # containers within containers


# -- files -----------------------------------------------------------------------------------------------------


def read_weights(data: bytes) -> dict[str, Tensor]:
    """All tensors of a safetensors file or a torch checkpoint, by dotted name, on the CPU.

    Objects other than tensors, mappings and plain values are not opened, since opening them could run code.

    Raises:
        DataError: the file is no such file, is cut off, or holds Python objects.
    """
    if data[8:9] == b"{" and data[5:8] == bytes(3):  # the length of its header in 8 bytes, then the header in JSON
        return _read_safetensors(data)
    _refuse_other_files(data)
    found: dict[str, Tensor] = {}
    _flatten(_load_checkpoint(data), "", found, _DEEPEST)
    if not found:
        raise DataError("the checkpoint holds no named tensors: give a file with a state dict")
    return found


def _refuse_other_files(data: bytes) -> None:
    if not data:
        raise DataError("the file is empty: download it again")
    if data[:512].lstrip()[:1] == b"<":
        raise DataError("the file is a web page (HTML), not weights: download the file that the page leads to")
    if data.startswith(b"version https://git-lfs"):
        raise DataError("the file is a Git LFS pointer, not weights: fetch the file itself with `git lfs pull`")
    if not data.startswith((b"PK\x03\x04", b"\x80")):  # of a zip archive, or of a pickle as torch wrote it before 1.6
        raise DataError("the file is neither a safetensors file nor a torch checkpoint: export the weights as one of them")


def _read_safetensors(data: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        found: dict[str, Tensor] = load(data)
    except SafetensorError as error:
        raise DataError(f"the safetensors file is cut off or damaged, download it again: {_line(error)}") from None
    return found


def _load_checkpoint(data: bytes) -> Any:
    try:
        # Training scripts keep their command line in the checkpoint: a Namespace holds values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({named.group(1)})" if named else ""
        raise DataError(
            f"the file holds Python objects{what}, which could run code and are not opened: "
            "where you trust it, load it with torch and save its state dict alone"
        ) from None
    except Exception as error:
        raise DataError(f"the file is no whole torch checkpoint, download it again: {_line(error)}") from None


def _flatten(node: Any, prefix: str, found: dict[str, Tensor], depth: int) -> None:
    """Tensors below named keys; an optimiser's state is below numbers and so left out."""
    if not isinstance(node, Mapping) or depth == 0:
        return
    for key, value in node.items():
        if not isinstance(key, str):
            continue
        if isinstance(value, Tensor):
            found[prefix + key] = value.detach()
        else:
            _flatten(value, f"{prefix}{key}.", found, depth - 1)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# -- matching --------------------------------------------------------------------------------------------------


class Mismatch(NamedTuple):
    """A tensor that the file and the encoder have by the same name in different shapes."""

    name: str
    in_file: tuple[int, ...]
    in_encoder: tuple[int, ...]

    def __str__(self) -> str:
        return f"'{self.name}' is {self.in_file} in the file and {self.in_encoder} in the encoder"


@dataclass(frozen=True)
class LoadReport:
    """What of a file is the encoder. Counters of batch norms are left out of all lists."""

    prefix: str
    """Beginning of the encoder's names in the file, '' or ending in '.'."""
    sources: Mapping[str, str]
    """Name in the file of each tensor that fits, by the encoder's name."""
    dropped: tuple[str, ...]
    """Names in the file that are no part of the encoder."""
    missing: tuple[str, ...]
    """Names in the encoder that the file lacks: they keep the random values of the encoder's seed."""
    mismatched: tuple[Mismatch, ...]
    foreign: tuple[str, ...]
    """Those of `dropped` that lie in a part which the encoder has as well, such as a layer too many."""
    counters: Mapping[str, str]
    """As `sources`, for the counters of batch norms that the file has."""

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names in the encoder of the tensors that fit."""
        return tuple(self.sources)

    @property
    def total(self) -> int:
        """Tensors of the encoder."""
        return len(self.sources) + len(self.missing) + len(self.mismatched)

    def describe(self) -> str:
        """What was loaded, dropped and missing, in a line."""
        where = f" from '{self.prefix}*'" if self.prefix else ""
        groups = Counter(self._group(name) for name in self.dropped)
        dropped = ", ".join(f"{name} {count}" for name, count in groups.items())
        missing = f"missing {len(self.missing)} ({', '.join(self.missing)})" if self.missing else "none missing"
        return (
            f"{len(self.sources)} of {self.total} tensors loaded{where}; "
            f"{f'dropped {len(self.dropped)} ({dropped})' if dropped else 'none dropped'}; {missing}"
        )

    def facts(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "prefix": self.prefix,
            "loaded": len(self.sources),
            "of": self.total,
            "dropped": dict(Counter(self._group(name) for name in self.dropped)),
            "missing": list(self.missing),
        }

    def _group(self, name: str) -> str:
        """The part of a dropped name where it leaves the prefix: `encoder_k`, `fc`."""
        parts, common = name.split("."), self.prefix.split(".")[:-1]
        position = next((n for n, (a, b) in enumerate(zip(parts, common, strict=False)) if a != b), len(common))
        return parts[min(position, len(parts) - 1)]


def match_weights(encoder: nn.Module, tensors: Mapping[str, Tensor]) -> LoadReport:
    """Finds the encoder among a file's tensors; changes nothing and refuses nothing, see :func:`fit_weights`."""
    shapes = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    forms = ({name: name for name in shapes}, _numbered(encoder, shapes))
    prefix, names = _best(tensors, shapes, forms)
    sources: dict[str, str] = {}
    counters: dict[str, str] = {}
    mismatched = []
    for rest, name in names.items():
        given = tensors.get(prefix + rest)
        if given is None:
            continue
        if tuple(given.shape) == shapes[name]:
            (counters if _is_counter(name) else sources)[name] = prefix + rest
        elif not _is_counter(name):
            mismatched.append(Mismatch(name, tuple(given.shape), shapes[name]))
    there = {prefix + rest for rest in names}
    parts = {rest.split(".")[0] for rest in names}
    dropped = tuple(name for name in tensors if name not in there and not _is_counter(name))
    return LoadReport(
        prefix=prefix,
        sources=sources,
        dropped=dropped,
        missing=tuple(name for rest, name in names.items() if prefix + rest not in tensors and not _is_counter(name)),
        mismatched=tuple(mismatched),
        foreign=tuple(n for n in dropped if n.startswith(prefix) and n[len(prefix) :].split(".")[0] in parts),
        counters=counters,
    )


def _numbered(encoder: nn.Module, shapes: Mapping[str, Any]) -> dict[str, str]:
    """The encoder's names by the names that its parts have in a plain nn.Sequential of them."""
    position = {name: str(number) for number, (name, _) in enumerate(encoder.named_children())}
    parts = {name: name.partition(".") for name in shapes}
    return {position.get(part, part) + dot + rest: name for name, (part, dot, rest) in parts.items()}


def _best(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], forms: tuple[Mapping[str, str], ...]
) -> tuple[str, Mapping[str, str]]:
    """The prefix and the form of names of the preferred whole encoder, else those under which most tensors fit."""
    fits: Counter[tuple[str, int]] = Counter()
    named: Counter[tuple[str, int]] = Counter()
    for given, tensor in tensors.items():
        for prefix, rest in _cuts(given):
            for form, names in enumerate(forms):
                name = names.get(rest)
                if name is not None and not _is_counter(name):
                    named[prefix, form] += 1
                    fits[prefix, form] += tuple(tensor.shape) == shapes[name]
    if not named:
        return "", forms[0]
    enough = LEAST_SHARE * sum(not _is_counter(name) for name in shapes)

    def order(key: tuple[str, int]) -> tuple[Any, ...]:
        prefix, form = key
        whole = fits[key] >= enough
        return not whole, _rank(prefix) if whole else 0, -fits[key], -named[key], form, len(prefix), prefix

    prefix, form = min(named, key=order)
    return prefix, forms[form]


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """('', 'a.b.c'), ('a.', 'b.c'), ('a.b.', 'c')."""
    yield "", name
    for match in re.finditer(r"\.", name):
        yield name[: match.end()], name[match.end() :]


def _rank(prefix: str) -> int:
    words = set(re.split(r"[._]", prefix))
    return 0 if words & _PREFERRED else 2 if words & _AVOIDED else 1


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] == _COUNTER


# -- loading ---------------------------------------------------------------------------------------------------


def fit_weights(encoder: nn.Module, tensors: Mapping[str, Tensor]) -> LoadReport:
    """Sets the encoder's parameters and buffers from a file's tensors, converted to the encoder's precision.

    Raises:
        DataError: nothing fits, a shape differs, the file has layers that the encoder lacks, or less than
            `LEAST_SHARE` of the encoder's tensors are there; the encoder is left as it was.
    """
    report = match_weights(encoder, tensors)
    _refuse_misfit(report, tensors)
    own = encoder.state_dict()
    for name, source in {**report.sources, **report.counters}.items():
        own[name] = tensors[source].to(own[name].dtype)
    encoder.load_state_dict(own)
    return report


def _refuse_misfit(report: LoadReport, tensors: Mapping[str, Tensor]) -> None:
    if not report.sources and not report.mismatched:
        held = ", ".join(f"'{name}' {tuple(value.shape)}" for name, value in list(tensors.items())[:3])
        raise DataError(f"none of the encoder's {report.total} tensors is in the file, which holds {held} ...: another network?")
    fitting = f"{len(report.sources)} of the encoder's {report.total} tensors fit"
    if len(report.mismatched) == 1 and not report.foreign:
        (one,) = report.mismatched
        if len(one.in_file) == 4 and one.in_file[2:] == one.in_encoder[2:] and one.in_file[0] == one.in_encoder[0]:
            raise DataError(
                f"{one}: the weights are for images of {one.in_file[1]} channel(s), the encoder takes {one.in_encoder[1]}, and "
                f"weights are not converted between channels; set encoder.channels to {one.in_file[1]}"
            )
    if report.mismatched:
        raise DataError(f"{fitting}; {report.mismatched[0]}: another architecture or image size?")
    if report.foreign:
        raise DataError(f"{fitting}, but the file goes on with '{report.foreign[0]}', which the encoder lacks: a larger network?")
    if len(report.sources) < LEAST_SHARE * report.total:
        raise DataError(f"only {fitting}, {LEAST_SHARE:.0%} are needed; the first missing one is '{report.missing[0]}'")


def encoder_weights(params: EncoderParams, tensors: Mapping[str, Tensor], seed: int) -> tuple[bytes, LoadReport]:
    """A file's tensors as the safetensors file that `load_weights` takes, and what became of them.

    Tensors that the file lacks are those of the random encoder of `seed`.

    Raises:
        DataError: as :func:`fit_weights`.
    """
    encoder = build_encoder(params, seed)
    report = fit_weights(encoder, tensors)
    return save_weights(encoder), report


# -- timm's own ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimmWeights:
    """Pretrained weights that timm knows of."""

    name: str
    """Network and tag, `resnet18.a1_in1k`."""
    place: str
    """Where timm takes them from."""
    channels: int
    """Input channels they were trained with."""
    licence: str
    """As timm states it; '' where it does not."""


def find_timm(given: str, encoder: EncoderParams) -> TimmWeights:
    """What `timm` (the encoder's own weights) or `timm:NAME` stands for; downloads nothing.

    Raises:
        RecipeError: timm has no such network or weights.
    """
    import timm

    name = given.partition(":")[2] or encoder.name
    if not timm.is_model(name):
        raise RecipeError(f"'{name}' is no timm model; {nearest(name, timm.list_models(['resnet??', 'resnet???']))}")
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:
        config = None
    if config is None or not config.has_weights:
        known = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        advice = f"choices: {', '.join(known)}" if known else "there are none for this network: take another, or a file"
        raise RecipeError(f"timm has no pretrained weights '{name}'; {advice}")
    full = f"{config.architecture}.{config.tag}" if config.tag else str(config.architecture)
    place = str(config.hf_hub_id or config.url or config.file)
    return TimmWeights(full, place, int(config.input_size[0]), str(config.license or ""))


def load_timm(found: TimmWeights, encoder: EncoderParams) -> dict[str, Tensor]:
    """timm's pretrained weights, fitted by timm to the encoder's channels and image size; from its cache or the network.

    Raises:
        DataError: they can be had from neither.
    """
    import timm

    try:
        network = timm.create_model(found.name, pretrained=True, num_classes=0, **timm_arguments(found.name, encoder))
    except Exception as error:  # the hub's client, its HTTP library and the disk each raise their own
        raise DataError(
            f"timm's weights {found.name} cannot be had from {found.place} or a cache ({type(error).__name__}: {_line(error)}); "
            "without network, download them elsewhere and give the file"
        ) from None
    return {name: value.detach() for name, value in network.state_dict().items()}


def timm_arguments(name: str, encoder: EncoderParams) -> dict[str, Any]:
    """What `timm.create_model` takes beside a name and `num_classes=0`: channels unless 3, and the size where it is fixed."""
    import timm

    config = timm.get_pretrained_cfg(name)
    sized = {"img_size": encoder.image_px} if config is not None and config.fixed_input_size else {}
    return ({"in_chans": encoder.channels} if encoder.channels != 3 else {}) | sized
