"""Datasets that have an index and a card but no images: enough for everything that is planned before an image is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from medssl.datasets.card import CARD, Provenance, build_card
from medssl.datasets.layouts.chexpert import FINDINGS as CHEXPERT
from medssl.datasets.layouts.dermnet import GROUPS
from medssl.datasets.layouts.eurosat import KINDS
from medssl.datasets.layouts.isic2019 import PAPER_000
from medssl.datasets.layouts.kather2016 import TISSUES
from medssl.datasets.layouts.nih14 import FINDINGS as NIH
from medssl.datasets.leakage import Leakage
from medssl.datasets.rowset import build_rows
from medssl.datasets.shards import Measured, ShardResult
from medssl.stages.ingest import _index, _parquet_bytes
from medssl.store import Store

SKIN = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
PUBLIC: dict[str, tuple[Sequence[str], int]] = {
    "padufes20": (("ack", "bcc", "mel", "nev", "scc", "sek"), 2_298), "dermnet": (GROUPS, 19_559),
    "oral-paper000": (("normal", "oscc"), 5_192), "breakhis400": (("benign", "malignant"), 1_820),
    "kather2016": (tuple(TISSUES.values()), 5_000), "kermany": (("normal", "pneumonia"), 5_856),
    "patchcamelyon": (("normal", "tumor"), 327_680), "covid-cxr": (("covid19", "other"), 866),
    "brain-mri": (("glioma", "meningioma", "notumor", "pituitary"), 7_023), "busi": (("benign", "malignant", "normal"), 780),
    "eurosat": (KINDS, 27_000), "isic2018": (SKIN, 11_720), "isic2019": (tuple(sorted(PAPER_000["train"])), 25_331),
    "ham10000": (SKIN, 10_015), "isic2017": (("bkl", "mel", "nv"), 2_750), "cxr": (("covid19", "other"), 370),
}  # fmt: skip
"""Classes and images of the public datasets that the recipes in jobs/ name."""
FINDINGS: dict[str, tuple[Sequence[str], int]] = {"chexpert": (CHEXPERT, 223_648), "nih14": (NIH, 112_120)}
"""The same of those with findings."""
FURTHER: dict[str, Sequence[str]] = {"cxr": ("covid19", "bacterial")}
"""Findings of those that have classes too."""
MOST = 4_000
"""Images of a dataset with more, by default: what a batch, a draw or the neighbours ask for is there all the same."""


def write_index(
    store: Store, labels: Sequence[str | None], splits: Sequence[str], further: Mapping[str, Any] | None = None
) -> None:
    """Index and card; every two images are of one lesion."""
    count = len(labels)
    names = [f"{n:07d}.png" for n in range(count)]
    rows = build_rows(
        names, names, labels=[[] if label is None else [label] for label in labels], splits=list(splits),
        patient_ids=[f"p{n // 2}" for n in range(count)], bag_ids=[f"b{n // 2}" for n in range(count)],
        further=pa.table(dict(further)) if further else None,
    )  # fmt: skip
    digests = [hashlib.sha256(f"{store.uri}{name}".encode()).hexdigest() for name in names]
    measured = [Measured(n.removesuffix(".png"), 8, 8, d, "0" * 16) for n, d in zip(names, digests, strict=True)]
    index = _index(rows, [ShardResult(None, measured)])
    data = _parquet_bytes(index)
    provenance = Provenance(store.uri.rsplit("/", 1)[-1], "", True, None, None, Leakage({}, {}), False)
    card = build_card(index, [], "index.parquet", hashlib.sha256(data).hexdigest(), provenance)
    store.write("index.parquet", data)
    store.write(CARD, json.dumps(card).encode())


def write_public(store: Store, name: str, most: int = MOST) -> None:
    """One of `PUBLIC` or `FINDINGS`, or `isic2019-paper000`, of its size or about `most` images, 6 : 1 : 3 in splits."""
    if name == "isic2019-paper000":
        counts = {"train": PAPER_000["train"], "val": dict.fromkeys(PAPER_000["train"], 160), "test": PAPER_000["test"]}
        labels, splits = [], []
        for split, of in counts.items():
            scale = min(1.0, most / sum(of.values()))
            for label, images in of.items():
                number = 2 * max(1, round(scale * images / 2))
                labels += [label] * number
                splits += [split] * number
        write_index(store, labels, splits)
        return
    classes, images = PUBLIC.get(name) or FINDINGS[name]
    total = min(images, most)
    pairs = np.arange(total) // 2
    order = ("train",) * 6 + ("val",) + ("test",) * 3
    chosen = [order[pair // len(classes) % 10] for pair in pairs]
    if name in FINDINGS:
        generator = np.random.default_rng(0)
        columns = {finding: generator.integers(0, 2, total) for finding in classes}
        write_index(store, [None] * total, chosen, columns)
    else:
        further = {finding: (pairs + n) % 2 for n, finding in enumerate(FURTHER.get(name, ()))}
        write_index(store, [classes[pair % len(classes)] for pair in pairs], chosen, further)
