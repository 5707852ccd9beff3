"""The model card that goes with an exported encoder: data and their licences, method, preprocessing, scores, digest, recipe.

Plain facts in, Markdown out: no clock and no chance, so one encoder has one card.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from medssl import __version__
from medssl.arms import Arm, MixPart
from medssl.datasets.dataset import dataset_uri, open_dataset
from medssl.errors import MedsslError
from medssl.networks.encoder import EncoderParams
from medssl.networks.weights import timm_arguments
from medssl.recipe import Recipe
from medssl.stages.report_data import BOOTSTRAP
from medssl.store import Store

_NON_COMMERCIAL = re.compile(
    r"\bnc\b|non[\s_-]?commercial|not for commercial|(research|academic|educational)[\w\s,/-]*\bonly\b"
    r"|\bonly\b[\w\s,/-]*\b(research|academic|educational)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class DataFacts:
    """Something that the encoder was made from: a data set, or weights it started from."""

    name: str
    role: str
    licence: str
    """As its card says it; '' where it says nothing."""
    note: str = ""
    inherited: bool = True
    """Whether the encoder was made from it; False for images that it was only judged on."""

    @property
    def non_commercial(self) -> bool:
        """Whether the encoder inherits a licence whose words forbid commercial use."""
        return self.inherited and is_non_commercial(self.licence)


@dataclass(frozen=True, eq=False)
class CardFacts:
    """Everything a card says."""

    recipe: Recipe
    recipe_yaml: str
    arm: str
    pretraining_seed: int
    params: EncoderParams
    features: int
    """E, the width of the features."""
    format: str
    file: str
    """Name of the exported file, without folder."""
    sha256: str
    data: Sequence[DataFacts]
    result: Mapping[str, Any] | None
    """The report's `result.json`; None without a report."""


def is_non_commercial(licence: str) -> bool:
    """Whether a licence's words forbid commercial use: NC, non-commercial, research only."""
    return _NON_COMMERCIAL.search(licence) is not None


def data_facts(store: Store, recipe: Recipe, arm: Arm, given: Mapping[str, Any] | None) -> list[DataFacts]:
    """The data sets of the pretraining, the study's own where it was only judged on, and the weights that it started from.

    Random weights without pretraining have their batch-norm statistics from the images, given ones (`given`: the marker's
    facts of them) have nothing from them.
    """
    if arm.objective is None and given is not None:
        found = [_dataset_facts(store, recipe.dataset, None)]
    else:
        found = [_dataset_facts(store, part.dataset or recipe.dataset, part) for part in recipe.mix(arm)]
        if all(part.dataset is not None for part in recipe.mix(arm)):
            found.append(_dataset_facts(store, recipe.dataset, None))
    ancestor = recipe.parent(arm)
    while ancestor is not None:
        parts = recipe.mix(ancestor) if ancestor.objective is not None or ancestor.is_random else ()
        shown = [_dataset_facts(store, part.dataset or recipe.dataset, part) for part in parts]
        found += [replace(each, role=f"{each.role}: for {ancestor.name}, which it started from") for each in shown]
        first, ancestor = ancestor, recipe.parent(ancestor)
        if ancestor is None and first.initial_weights == "random":
            return found
    if given is not None:
        found.append(DataFacts(str(given["source"]), "weights that the encoder started from", given["licence"], given["summary"]))
    return found


def _dataset_facts(store: Store, name: str, part: MixPart | None) -> DataFacts:
    """One data set; `part` is what of it the encoder was made from."""
    role = "the encoder was judged on it, not made from it"
    if part is not None:
        role = f"images of split {part.described}"
    try:
        dataset = open_dataset(dataset_uri(name, store))
    except MedsslError:
        return DataFacts(name, role, "", "its card was not found when this card was written", part is not None)
    card = dataset.card
    if part is not None:
        counts = card["splits"] if part.classes is None else _of_classes(card, part.classes)
        used = sum(counts.get(split, 0) for split in part.splits)
        often = f", each {part.times} times an epoch" if part.times > 1 else ""
        role = f"{used:,} {role}, of {len(dataset):,} in all{often}"
    note = "drawn by a program" if card.get("synthetic") else f"images {dataset.images_digest[:16]}"
    return DataFacts(dataset.name, role, card.get("licence") or "", note, part is not None)


def _of_classes(card: Mapping[str, Any], classes: Sequence[str]) -> dict[str, int]:
    """Images of some classes by split."""
    return {split: sum(counts.get(name, 0) for name in classes) for split, counts in card["counts"].items()}


def render_card(facts: CardFacts) -> str:
    """The card as Markdown."""
    arm = next(a for a in facts.recipe.arms if a.name == facts.arm)
    params = facts.params
    parts = [
        f"# {facts.arm} ({params.name})",
        f"An image encoder of the study `{facts.recipe.study}`: {params.channels} x {params.image_px} x {params.image_px} pixels "
        f"to {facts.features} features. Pretraining seed {facts.pretraining_seed}. {facts.recipe.description}".strip(),
        "It is for research: it was judged on the data below alone, and is no medical device.",
        f"- file: `{facts.file}` (format {facts.format})\n- sha256: `{facts.sha256}`\n- written by medssl {__version__}",
        "## Data and licences\n\n" + _data(facts.data),
        f"## Method\n\n{_method(arm, facts)}",
        f"## Preprocessing\n\n{_preprocessing(facts)}",
        f"## Use\n\n```python\n{_usage(facts)}\n```",
        f"## Scores\n\n{_scores(facts)}",
        f"## Recipe\n\n```yaml\n{facts.recipe_yaml.strip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _data(data: Sequence[DataFacts]) -> str:
    rows = [[d.name, d.role, d.licence or "**not stated**", d.note] for d in data]
    table = _table(["data", "what", "licence", ""], rows)
    words = ["The encoder inherits the licences of what it was made from."]
    words += [f"**Non-commercial**: the licence of {d.name} forbids commercial use." for d in data if d.non_commercial]
    unknown = [d.name for d in data if d.inherited and not d.licence]
    words += [f"The licence of {name} is not stated: find it out before passing the encoder on." for name in unknown]
    return "\n\n".join([table, *words])


def _method(arm: Arm, facts: CardFacts) -> str:
    given = "random weights" if arm.initial_weights == "random" else f"the weights `{arm.initial_weights}`"
    if arm.objective is None:
        after = ", batch-norm statistics estimated on the images" if arm.is_random else ""
        return f"{facts.params.name} with {given}{after}; no pretraining."
    labels = "on labels" if arm.objective.takes_labels else "without labels"
    objective = ", ".join(f"{key} {value}" for key, value in arm.objective.canonical().items() if key != "name")
    return (
        f"{facts.params.name}, from {given}, pretrained {labels} by {arm.objective.name} ({objective}) for "
        f"{arm.duration} at batch {arm.batch_size} with {arm.optimiser.name}."
    )


def _preprocessing(facts: CardFacts) -> str:
    params, images = facts.params, facts.recipe.images
    square = {
        "squash": "squashed to",
        "crop": "cut to the centre square and resized to",
        "pad": "padded with black and resized to",
    }
    colour = {1: "grey", 3: "RGB"}.get(params.channels, f"{params.channels} channels")
    steps = [
        f"decoded to {colour}, 8 bits (16 bits by `{images.depth}`), turned as the EXIF orientation says",
        f"{square[images.resize]} {images.decode_px} x {images.decode_px} pixels (bilinear, antialiased)",
        f"resized to {params.image_px} x {params.image_px} pixels (bilinear, antialiased)",
        f"divided by 255, less the mean {list(params.mean)}, divided by the standard deviation {list(params.std)}, by channel",
    ]
    if images.decode_px == params.image_px:
        del steps[2]
    numbered = "\n".join(f"{n}. {step}" for n, step in enumerate(steps, 1))
    shape = f"(batch, {params.channels}, {params.image_px}, {params.image_px})"
    output = f"(batch, {facts.features})"
    return f"{numbered}\n\nInput {shape} float32, any batch; output {output} float32. The file holds no preprocessing."


def _usage(facts: CardFacts) -> str:
    name, file = facts.params.name, facts.file
    if facts.format == "onnx":
        return (
            f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{file}")\n'
            '(features,) = session.run(["features"], {"images": images})'
        )
    if facts.format == "torchvision":
        return (
            "import torch, torchvision\n\n"
            f'encoder = torchvision.models.get_model("{name}", weights=None)\n'
            "setattr(encoder, [part for part, _ in encoder.named_children()][-1], torch.nn.Identity())  # no classifier\n"
            f'encoder.load_state_dict(torch.load("{file}", weights_only=True))\nfeatures = encoder.eval()(images)'
        )
    if facts.format == "timm":
        more = "".join(f", {key}={value}" for key, value in timm_arguments(facts.params.name, facts.params).items())
        return (
            "import timm\nfrom safetensors.torch import load_file\n\n"
            f'encoder = timm.create_model("{name}", num_classes=0{more})\n'
            f'encoder.load_state_dict(load_file("{file}"))\nfeatures = encoder.eval()(images)'
        )
    return (
        "import json\nfrom pathlib import Path\n\nfrom safetensors import safe_open\n\n"
        "from medssl.networks import EncoderParams, build_encoder, load_weights\n\n"
        f'with safe_open("{file}", "pt") as weights:\n    params = EncoderParams(**json.loads(weights.metadata()["encoder"]))\n'
        f'encoder = build_encoder(params, seed=0)\nload_weights(encoder, Path("{file}").read_bytes())\n'
        "features = encoder.eval()(images)"
    )


def _scores(facts: CardFacts) -> str:
    if facts.result is None:
        return "There is no report of the study."
    frames = {key: pd.DataFrame(facts.result[key], columns=facts.result["columns"][key]) for key in ("summary", "comparisons")}
    summary, comparisons = frames["summary"], frames["comparisons"]
    rows = [
        [r["protocol"], r["metric"], _score(r),
         f"{r['n_pretraining']} x {r['n_draw']} x {r['n_head']}"]
        for r in summary[summary["arm"] == facts.arm].to_dict("records")
    ]  # fmt: skip
    parts = [
        f"On the study's {facts.recipe.evaluation_split} split, mean ± standard deviation over all runs of the arm (pretraining "
        "seeds x label draws x head seeds), of which this file is one pretraining seed.",
        _table(["protocol", "metric", "score", "runs"], rows) if rows else "The arm was not scored.",
    ]
    about = (comparisons["better"] == facts.arm) | (comparisons["than"] == facts.arm)
    ours = comparisons[(comparisons["test"] == BOOTSTRAP) & about]
    if len(ours):
        level = f"{100 * facts.recipe.bootstrap.level:g}% interval"
        rows = [
            [f"{r['better']} over {r['than']}", r["protocol"], r["metric"], f"{r['difference']:+.3f}",
             f"{r['low']:+.3f} to {r['high']:+.3f}", f"{r['p']:.2g}"]
            for r in ours.to_dict("records")
        ]  # fmt: skip
        parts.append(f"Differences with their {level} (nested bootstrap over seeds, draws and patients):")
        parts.append(_table(["comparison", "protocol", "metric", "difference", level, "p"], rows))
    return "\n\n".join(parts)


def _score(row: Mapping[Hashable, Any]) -> str:
    spread = row["std"]  # none of a single run
    return f"{row['mean']:.3f}" + ("" if spread is None or pd.isna(spread) else f" ± {spread:.3f}")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in line) + " |" for line in lines)
