"""inspect: what is in a dataset, from its card and index; no image is read and Ray is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from medssl.datasets.dataset import open_dataset
from medssl.datasets.duplicates import connected, groups_of_equal, near_pairs

NEAR_BITS = 2
"""Perceptual hashes of the same picture, compressed or scaled anew, differ in 0 to 4 of 64 bits; so do, from about 4
bits on, those of different pictures that look alike (on 10,015 dermoscopic images 2 bits find 64 pairs of one lesion
and 31 of two, 4 bits 110 and 333)."""
_EXAMPLES = 5
_SIZE_NAMES = 12


def inspect_dataset(uri: str, *, near_bits: int = NEAR_BITS) -> dict[str, Any]:
    """Facts of the dataset at `uri` as plain JSON values.

    Keys: `uri`; `card` (without its list of shards); `shards`; `classes` (images by split and class), `unlabelled` (by
    split); `bags` and `patients` (how many there are of each size); `sizes` (most frequent widths x heights);
    `duplicates` with `exact` (same stored bytes) and `near` (perceptual hashes within `near_bits`), each with the
    number of groups and images, how many groups lie across splits, patients or labels, and examples.

    Raises:
        DataError: there is no dataset at `uri`.
    """
    dataset = open_dataset(uri)
    index = dataset.index()
    near = connected(near_pairs(index["phash"].tolist(), near_bits), len(index))
    return {
        "uri": dataset.uri,
        "card": {key: value for key, value in dataset.card.items() if key != "shards"},
        "shards": {"files": len(dataset.card["shards"]), "bytes": sum(s["bytes"] for s in dataset.card["shards"])},
        "classes": dataset.card["counts"],
        "unlabelled": dataset.card["unlabelled"],
        "bags": _histogram(index["bag_id"]),
        "patients": _histogram(index["patient_id"]),
        "sizes": _sizes(index),
        "duplicates": {
            "exact": _describe(groups_of_equal(index["sha256"].tolist()), index),
            "near": {"bits": near_bits, **_describe(near, index)},
        },
    }


def _histogram(ids: pd.Series[Any]) -> dict[str, int]:
    """How many bags (patients) have 1, 2, 3 ... images; unknown ids are left out."""
    sizes = ids.dropna().value_counts()
    return {str(size): int(number) for size, number in sizes.value_counts().sort_index().items()}


def _sizes(index: pd.DataFrame) -> dict[str, int]:
    """The most frequent image sizes."""
    sizes = index["width"].astype(str) + " x " + index["height"].astype(str)
    return {str(size): int(number) for size, number in sizes.value_counts().head(_SIZE_NAMES).items()}


def _describe(groups: Sequence[Sequence[int]], index: pd.DataFrame) -> dict[str, Any]:
    columns = {
        name: index[name].astype(object).where(index[name].notna(), None) for name in ("split", "patient_id", "label")
    }

    def differ(group: Sequence[int], name: str) -> bool:
        return len({columns[name].iat[row] for row in group} - {None}) > 1

    across = [group for group in groups if differ(group, "split")]
    shown = [*across, *(group for group in groups if group not in across[:_EXAMPLES])][:_EXAMPLES]
    return {
        "groups": len(groups),
        "images": sum(len(group) for group in groups),
        "across_splits": len(across),
        "across_patients": sum(differ(group, "patient_id") for group in groups),
        "across_labels": sum(differ(group, "label") for group in groups),
        "examples": [[_name(index, row) for row in group[:_EXAMPLES]] for group in shown],
    }


def _name(index: pd.DataFrame, row: int) -> str:
    place = index.loc[row, ["image_id", "split", "label"]].to_dict()
    image_id, split, label = place["image_id"], place["split"], place["label"]
    return f"{image_id} ({split}, {label})" if isinstance(label, str) else f"{image_id} ({split})"


# ----------------------------------------------------------------------------------------------------------------- text


def render_text(facts: dict[str, Any]) -> str:
    """The facts for people."""
    card = facts["card"]
    lines = [
        f"{card['name']}  {facts['uri']}",
        f"{card['images']:,} images, {card['patients']:,} patients, {card['bags']:,} bags, "
        f"{facts['shards']['files']} shards of {facts['shards']['bytes'] / 1e6:,.1f} MB, medssl {card['medssl']}",
        f"licence: {card['licence'] or 'not stated'}{'; SYNTHETIC, drawn by a program' if card['synthetic'] else ''}",
        _splits_line(card),
    ]
    if card["unknown_patients"]:
        lines.append(f"images without a patient id: {card['unknown_patients']:,} (each taken for a patient of its own)")
    if card["pseudonymised"]:
        lines.append(f"pseudonymised: {', '.join(card['pseudonymised_columns'])}")
    if card["rejected"]:
        listed = f"listed in {card['rejected_list']}" if card["rejected_list"] else "their list was removed (medssl forget)"
        lines.append(f"images set aside at ingest: {card['rejected']:,}, {listed}")
    lines += ["", *_class_table(facts), ""]
    lines += _histogram_line("images per bag", facts["bags"], "no bag ids")
    lines += _histogram_line("images per patient", facts["patients"], "no patient ids")
    lines.append("sizes: " + ", ".join(f"{size}: {number:,}" for size, number in facts["sizes"].items()))
    lines += ["", *_duplicate_lines("exact duplicates", facts["duplicates"]["exact"])]
    near = facts["duplicates"]["near"]
    lines += _duplicate_lines(f"near duplicates (perceptual hash within {near['bits']} of 64 bits)", near)
    lines += [
        "",
        f"digest of the images {card['digests']['images'][:16]}, of the labels {card['digests']['labels'][:16]}",
    ]
    return "\n".join(lines)


def _splits_line(card: dict[str, Any]) -> str:
    made = "given by the user" if card["split_seed"] is None else f"made at ingest from seed {card['split_seed']}"
    if held := card.get("held_out"):
        name, value, without = held["column"], held["value"], held["without"]
        made = f"test is {name}={value}; the others, {without:,} without {name} among them, {made}"
    leak = card["leakage"]
    if leak["allowed"]:
        found = f"{leak['patients']} patients and {leak['bags']} bags in more than one split"
        return f"splits: {made}; LEAKAGE allowed: {found}"
    return f"splits: {made}; no patient and no bag in more than one"


def _class_table(facts: dict[str, Any]) -> list[str]:
    counts, unlabelled = facts["classes"], facts["unlabelled"]
    splits = list(facts["card"]["splits"])
    rows = [[name, *(counts[split][name] for split in splits)] for name in facts["card"]["classes"]]
    if any(unlabelled.values()):
        rows.append(["(no label)", *(unlabelled[split] for split in splits)])
    rows.append(["images", *(facts["card"]["splits"][split] for split in splits)])
    rows.append(["patients", *(facts["card"]["groups"][split] for split in splits)])
    width = max(len(str(row[0])) for row in rows)
    head = "".join(f"{split:>10}" for split in splits)
    body = [f"{row[0]:<{width}}" + "".join(f"{number:>10,}" for number in row[1:]) for row in rows]
    return [" " * width + head, *body]


def _histogram_line(title: str, histogram: dict[str, int], empty: str) -> list[str]:
    if not histogram:
        return [f"{title}: {empty}"]
    return [f"{title}: " + ", ".join(f"{size}: {number:,}" for size, number in histogram.items())]


def _duplicate_lines(title: str, found: dict[str, Any]) -> list[str]:
    if not found["groups"]:
        return [f"{title}: none"]
    head = (
        f"{title}: {found['groups']:,} groups of {found['images']:,} images; {found['across_splits']:,} groups lie "
        f"across splits, {found['across_patients']:,} across patients, {found['across_labels']:,} across labels"
    )
    return [head, *("  " + ", ".join(names) for names in found["examples"])]
