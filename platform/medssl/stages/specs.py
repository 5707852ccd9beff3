"""What each artifact of a study is: its stage, configuration, inputs, and so its name.

A name can be computed once the inputs are finished, because it covers their content digests. Nothing here touches images
or Ray; `study.plan` and `study.run` read the same specifications.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medssl.arms import Arm
from medssl.artifacts import Marker, artifact_name, digest_json
from medssl.datasets.draws import finding_draw, label_draw
from medssl.datasets.findings import finding_labels
from medssl.metrics import UNKNOWN
from medssl.mixes import seen_elsewhere
from medssl.protocols import Probe, Protocol
from medssl.recipe import Recipe
from medssl.shifted import ShiftedSet, shifted_set
from medssl.stages.shown import ShownPart, candidates, shown_otherwise, with_classes
from medssl.training.plan import PretrainPlan

# Raised when a stage's numbers change for the same configuration.
VERSIONS = {"pretrain": 2, "initialise": 2, "embed": 2, "search": 2, "evaluate": 2, "transfer": 1, "report": 5}

TRAIN, VALIDATION, TEST = "train", "val", "test"


@dataclass(frozen=True)
class Spec:
    """One artifact to be."""

    stage: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    label: str
    """For people: `pretrain barlow_twins seed 1`."""
    images: int = 0
    """Images that producing it reads, each pass counted."""

    @property
    def version(self) -> int:
        """Version of the stage's numbers."""
        return VERSIONS[self.stage]

    @cached_property
    def name(self) -> str:
        """The artifact's name."""
        return artifact_name(self.stage, self.version, self.config, self.inputs)


@dataclass(frozen=True)
class Cell:
    """One arm under one protocol with one encoder and one label draw: the head seeds in it differ in chance only."""

    arm: Arm
    protocol: Protocol
    pretraining_seed: int
    label_draw: int

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.protocol.name} of {self.arm.name}, pretraining seed {self.pretraining_seed}, draw {self.label_draw}"


@dataclass
class Specs:
    """Specifications of one study over one dataset state."""

    recipe: Recipe
    index: pd.DataFrame
    classes: list[str]
    """Of the dataset; where the recipe names findings, these take their place."""
    weights_digests: Mapping[str, str] = field(default_factory=dict)
    """Digest of the weights that arms start from, by the arm's name."""
    others: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """Indexes of the further datasets of mixes and shifted sets, by their names in the recipe."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Digest of the source file of users' own encoders, by the encoder's name."""

    def __post_init__(self) -> None:
        if self.recipe.findings is not None:
            self.classes = list(self.recipe.findings.names)

    def pretraining_seeds(self, arm: Arm, protocol: Protocol | None = None) -> range:
        """Seeds of an arm, or those of them that a protocol judges."""
        seeds = self.recipe.seeds_of(arm)
        return range(min(seeds, (protocol and protocol.pretraining_seeds) or seeds))

    def cells(self) -> list[Cell]:
        """All cells, arms of one protocol side by side."""
        return [
            Cell(arm, protocol, seed, draw)
            for protocol in self.recipe.protocols
            for arm in self.recipe.arms
            if self.recipe.judges(protocol, arm)
            for seed in self.pretraining_seeds(arm, protocol)
            for draw in range(self.recipe.draws_of(protocol))
        ]

    def encoder(self, arm: Arm, seed: int) -> Spec | None:
        """The encoder of one pretraining seed; None for colour features."""
        if arm.features == "colour":
            return None
        if (arm, seed) not in self._encoders:  # asked for by each of an arm's cells, and by every arm that starts from it
            self._encoders[arm, seed] = self._encoder(arm, seed)
        return self._encoders[arm, seed]

    def _encoder(self, arm: Arm, seed: int) -> Spec:
        parts = self.mix(arm)
        digests = [(part.times, self._image_digest(part.index.loc[part.rows])) for part in parts]
        config: dict[str, Any] = {"images": self._decoding()}
        inputs = {"images": digest_json(digests) if arm.mix else digests[0][1]}
        images = sum(part.times * len(part.rows) for part in parts)
        parent = self.recipe.parent(arm)
        if parent is not None:  # its name covers all that decides it, and is known before it is made
            start = self.encoder(parent, self.parent_seed(parent, seed))
            assert start is not None
            inputs["initial_weights"] = start.name
        elif arm.initial_weights != "random":
            inputs["initial_weights"] = self.weights_digests[arm.name]
        if arm.objective is None:
            config |= {"encoder": self._architecture(arm), "seed": seed}
            return Spec("initialise", config, inputs, f"initialise {arm.name} seed {seed}", images)
        plan = self.plan(arm, seed)
        if plan.objective.takes_labels:
            inputs["labels"] = digest_json([part.index.loc[part.rows, "label"].tolist() for part in parts])
        config |= {"plan": plan.canonical() | {"encoder": self._architecture(arm)}, "feeding": self.recipe.images.feeding}
        if arm.pairs == "bag":
            keys = [part.index.loc[part.rows, ["image_id", "bag_id", "patient_id"]].astype(object) for part in parts]
            lists = [part.where(part.notna(), None).to_numpy().tolist() for part in keys]
            inputs["bags"] = digest_json(lists if arm.mix else lists[0])
        inputs |= shown_otherwise(parts, streamed=config["feeding"] == "streaming", bags=arm.pairs == "bag")
        return Spec("pretrain", config, inputs, f"pretrain {arm.name} seed {seed}", plan.total_images(images))

    def parent_seed(self, parent: Arm, seed: int) -> int:
        """Pretraining seed of the encoder that another arm's seed starts from: the same, or the only one."""
        return seed if seed in self.pretraining_seeds(parent) else 0

    def plan(self, arm: Arm, seed: int) -> PretrainPlan:
        """The pretraining of one seed."""
        return with_classes(self.recipe.plan(arm, seed), self.mix(arm))

    def mix(self, arm: Arm) -> list[ShownPart]:
        """What the arm's pretraining is shown, part by part; to a method that takes labels, images that have one.

        Images of another dataset that are, byte for byte, validation or test images of the study, or images of a shifted set
        that it is judged on, are left out.
        """
        parts = []
        for part in self.recipe.mix(arm):
            index = self.index if part.dataset is None else self.others[part.dataset]
            rows = candidates(index, part, arm.objective)
            judged = seen_elsewhere(index, rows, self._judged_images) if part.dataset is not None else rows[:0]
            parts.append(ShownPart(part.dataset, index, np.setdiff1d(rows, judged), part.splits, part.times, judged))
        return parts

    @cached_property
    def shifted(self) -> dict[str, ShiftedSet]:
        """The shifted sets by name; RecipeError where one has no classes of the study."""
        return {
            each.name: shifted_set(
                each, each.dataset, self.others[each.dataset], self.index, self.classes, self.recipe.findings
            )
            for each in self.recipe.shifted
        }

    @cached_property
    def _judged_images(self) -> set[str]:
        judged = set(self.index.loc[self.index["split"].isin((VALIDATION, TEST)), "sha256"])
        return judged.union(*(set(each.index.loc[each.rows, "sha256"]) for each in self.shifted.values()))

    def embed(self, arm: Arm, seed: int, protocol: Probe, encoder: Marker | None) -> Spec:
        """Features of all labelled splits; with a bank of augmented passes where the protocol's heads draw from one."""
        config: dict[str, Any] = {"features": arm.features, "images": self._decoding()}
        rows = self.index[self.index["split"].isin((TRAIN, VALIDATION, TEST))]
        inputs = {"images": self._image_digest(rows)}
        if encoder is not None:
            config["encoder"] = self._architecture(arm)
            inputs["encoder"] = encoder.digest
        bank = protocol.probe.bank_passes
        if bank and protocol.kind != "knn":
            drawn = self.drawn_rows()
            config["encoder"] = self._architecture(arm)  # the size and colours of augmented views
            config["bank"] = {
                "passes": bank,
                "seed": seed,
                "rows": digest_json(drawn.tolist()),
                "views": protocol.probe.bank_views.canonical(),
            }
        return Spec("embed", config, inputs, f"embed {arm.name} seed {seed}", self.embed_images(protocol))

    def embed_images(self, protocol: Probe) -> int:
        """Images that the features of one encoder take: the labelled splits, and the bank's passes of the drawn ones."""
        labelled = int(self.index["split"].isin((TRAIN, VALIDATION, TEST)).sum())
        bank = 0 if protocol.kind == "knn" else protocol.probe.bank_passes
        return labelled + (bank * len(self.drawn_rows()) if bank else 0)

    def search_images(self, protocol: Protocol) -> int:
        """Images that one search reads: none for a probe, whose features are there."""
        seen = _images(protocol, len(self.draw(0, protocol)), len(self.rows(VALIDATION)))
        return seen * protocol.search.points * protocol.search.head_seeds

    def evaluation_images(self, cell: Cell) -> int:
        """Images that one head seed reads: none for a probe."""
        split = self.recipe.evaluation_split
        judged = len(self.rows(split)) + (len(self.rows(VALIDATION)) if split != VALIDATION else 0)  # for the temperature
        return _images(cell.protocol, len(self.draw(cell.label_draw, cell.protocol)), judged)

    def search(self, arm: Arm, protocol: Protocol, features: Marker) -> Spec:
        """Search on the first encoder and the first draw; `features` is the embed artifact or the encoder's."""
        config = {
            "search": protocol.search.canonical(),
            "training": _training(protocol),
            "classes": self.classes,
            **self._task,
            **self._network(arm, protocol),
        }
        rows = self.rows(VALIDATION)
        inputs = {
            "features": features.digest,
            "draw": self._label_digest(self.draw(0, protocol)),
            "validation": self._label_digest(rows),
        }
        inputs |= self._pixels(protocol, np.concatenate([self.draw(0, protocol), rows]))
        return Spec("search", config, inputs, f"search {protocol.name} of {arm.name}", self.search_images(protocol))

    def evaluate(self, cell: Cell, head_seed: int, point: Mapping[str, float], features: Marker) -> Spec:
        """One head seed of a cell, trained with the point (learning_rate, weight_decay) that the search chose."""
        config = {
            "training": _training(cell.protocol),
            "point": dict(point),
            "seed": head_seed,
            "classes": self.classes,
            **self._task,
            **self._network(cell.arm, cell.protocol),
        }
        drawn, test = self.draw(cell.label_draw, cell.protocol), self.rows(self.recipe.evaluation_split)
        inputs = {
            "features": features.digest,
            "draw": self._label_digest(drawn),
            "test": self._label_digest(test, patients=True),
        }
        seen = [drawn, test]
        watched = cell.protocol.kind == "fine_tune" and cell.protocol.training.needs_validation
        scaled = self.recipe.evaluation_split != VALIDATION  # a temperature is fitted on the validation images
        if watched or scaled:
            seen.append(self.rows(VALIDATION))
            inputs["validation"] = self._label_digest(seen[-1], patients=scaled)
        inputs |= self._pixels(cell.protocol, np.concatenate(seen))
        return Spec("evaluate", config, inputs, f"{cell.label}, head seed {head_seed}", self.evaluation_images(cell))

    def shifted_features(self, arm: Arm, seed: int, shifted: ShiftedSet, encoder: Marker | None) -> Spec:
        """Features of the judged images of a shifted set."""
        config: dict[str, Any] = {"features": arm.features, "images": self._decoding()}
        inputs = {"images": self._image_digest(shifted.index.loc[shifted.rows])}
        if encoder is not None:
            config["encoder"] = self._architecture(arm)
            inputs["encoder"] = encoder.digest
        return Spec("embed", config, inputs, f"embed {arm.name} seed {seed} on {shifted.params.name}", len(shifted.rows))

    def transfer(self, evaluation: Spec, shifted: ShiftedSet, marker: Marker) -> Spec:
        """One head seed of a cell on a shifted set; `marker` is of its evaluation."""
        name = shifted.params.name
        if name not in self._shifted_digests:  # once for thousands of evaluations
            self._shifted_digests[name] = {
                "images": self._image_digest(shifted.index.loc[shifted.rows]),
                "labels": digest_json([shifted.labels_N.tolist(), shifted.patients_N]),
            }
        inputs = {"evaluation": marker.digest, **self._shifted_digests[name]}
        images = len(shifted.rows) if evaluation.images else 0
        return Spec("transfer", {"classes": shifted.shared}, inputs, f"{evaluation.label} on {shifted.params.name}", images)

    def rows(self, split: str) -> NDArray[np.int64]:
        """Row numbers of the labelled images of a split: those with a class, or of which a finding is known."""
        if self._findings is not None:
            inside = (self.index["split"] == split).to_numpy() & (self._findings != UNKNOWN).any(axis=1)
            return np.flatnonzero(inside).astype(np.int64)
        return self.index.index[(self.index["split"] == split) & self.index["label"].notna()].to_numpy(dtype=np.int64)

    def draw(self, number: int, protocol: Protocol | None = None) -> NDArray[np.int64]:
        """Row numbers of one label draw: as many as the protocol takes, or without one as `repeats.labels` says."""
        return self._draw(number, self.recipe.repeats.labels if protocol is None else self.recipe.labels_of(protocol))

    def drawn_rows(self) -> NDArray[np.int64]:
        """Row numbers in any draw of any protocol with a bank, sorted: views depend on the place, so others must not move it."""
        banked = [p for p in self.recipe.protocols if p.kind != "fine_tune" and p.probe.bank_passes]
        taken = {(number, self.recipe.labels_of(p)) for p in banked for number in range(self.recipe.draws_of(p))}
        return np.unique(np.concatenate([self._draw(number, labels) for number, labels in taken]))

    def _draw(self, number: int, labels: int | float | None) -> NDArray[np.int64]:
        if (number, labels) not in self._draws:
            if self._findings is not None:
                known = (self.index["split"] == TRAIN).to_numpy() & (self._findings != UNKNOWN).any(axis=1)
                self._draws[number, labels] = finding_draw(self.index, known, labels=labels, draw=number)
            else:
                self._draws[number, labels] = label_draw(self.index, labels=labels, draw=number, split=TRAIN)
        return self._draws[number, labels]

    def labels(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Class indices (N,) of labelled rows, or labels (N, F) of their findings."""
        if self._findings is not None:
            return self._findings[rows]
        position = {name: number for number, name in enumerate(self.classes)}
        return np.array([position[str(name)] for name in self.index["label"].to_numpy()[rows]], dtype=np.int64)

    @property
    def findings(self) -> bool:
        """Whether images have findings in place of a class."""
        return self.recipe.findings is not None

    @cached_property
    def _findings(self) -> NDArray[np.int64] | None:
        params = self.recipe.findings
        return None if params is None else finding_labels(self.index, params, train=TRAIN)

    @property
    def _task(self) -> dict[str, str]:
        """Tells findings from classes of the same names; nothing for classes, whose artifacts keep their names."""
        return {"task": "findings"} if self.findings else {}

    @cached_property
    def _encoders(self) -> dict[tuple[Arm, int], Spec]:
        return {}

    @cached_property
    def _digests(self) -> dict[tuple[bytes, bool], str]:
        return {}

    @cached_property
    def _shifted_digests(self) -> dict[str, dict[str, str]]:
        return {}

    @cached_property
    def _draws(self) -> dict[tuple[int, int | float | None], NDArray[np.int64]]:
        return {}

    def _architecture(self, arm: Arm) -> dict[str, Any]:
        """The encoder's parameters; of a user's own network also the digest of its source."""
        params = self.recipe.encoder_of(arm)
        return params.canonical() | ({"source": self.sources[params.name]} if params.name in self.sources else {})

    def _decoding(self) -> dict[str, Any]:
        return asdict(self.recipe.decoding)

    def _network(self, arm: Arm, protocol: Protocol) -> dict[str, Any]:
        """What a fine-tuning needs to know of network and decoding; a probe has it in its features' digest."""
        if protocol.kind != "fine_tune":
            return {}
        return {"encoder": self._architecture(arm), "images": self._decoding()}

    def _pixels(self, protocol: Protocol, rows: NDArray[np.int64]) -> dict[str, str]:
        if protocol.kind != "fine_tune":
            return {}
        return {"images": self._image_digest(self.index.loc[np.unique(rows)])}

    def _image_digest(self, rows: pd.DataFrame) -> str:
        """Digest of which images these are, whatever their labels."""
        return digest_json(list(zip(rows["image_id"].tolist(), rows["sha256"].tolist(), strict=True)))

    def _label_digest(self, rows: NDArray[np.int64], *, patients: bool = False) -> str:
        """Digest of which images these are, what they are labelled, and whose they are (predictions name the patient)."""
        key = (rows.tobytes(), patients)
        if key not in self._digests:
            self._digests[key] = self._digest_labels(rows, patients)
        return self._digests[key]

    def _digest_labels(self, rows: NDArray[np.int64], patients: bool) -> str:
        own = [] if self.findings else ["label"]
        columns = ["image_id", *own, *(["patient_id"] if patients else [])]
        chosen = self.index.loc[rows, columns].astype(object)
        table = chosen.where(chosen.notna(), None).to_numpy().tolist()
        return digest_json([table, self.labels(rows).tolist()] if self.findings else table)


def _training(protocol: Protocol) -> dict[str, Any]:
    part = protocol.training if protocol.kind == "fine_tune" else protocol.probe
    return {"kind": protocol.kind, **part.canonical()}


def _images(protocol: Protocol, drawn: int, judged: int) -> int:
    """Images that one head seed reads: none for a probe, whose features are there."""
    if protocol.kind != "fine_tune":
        return 0
    per_epoch, steps = protocol.training.steps_for(drawn)
    shown = protocol.training.head_only_epochs * drawn + round(steps * drawn / per_epoch)
    return shown + max(1, protocol.training.test_passes) * judged
