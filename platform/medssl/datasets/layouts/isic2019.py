"""ISIC 2019: 25,331 dermoscopic images of eight classes with lesion ids; and the split of paper 000 from it.

`ISIC_2019_Training_Input/`, `ISIC_2019_Training_GroundTruth.csv` (image, one column per class, UNK), and
`ISIC_2019_Training_Metadata.csv` (image, age_approx, anatom_site_general, lesion_id, sex). The challenge's test images have no
lesion ids and classes that the training images lack: they are not read.

Paper 000 (table 1) fine-tunes on 2,554 images and tests on 19,423, class by class as in `PAPER_000`, and adds 1,280 others to
its pretraining. It doesn't say which; `isic2019-paper000` draws them by a seed, never a lesion in two splits: train, test, and
the 1,280 as val, which leaves out the other images.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from medssl.datasets.layouts.challenge import one_hot_labels
from medssl.datasets.layouts.tree import Layout, Record, Tree, number

CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
PAPER_000 = {
    "train": {"ak": 306, "bcc": 500, "bkl": 467, "df": 55, "mel": 500, "nv": 500, "scc": 171, "vasc": 55},
    "test": {"ak": 498, "bcc": 2549, "bkl": 1663, "df": 173, "mel": 3339, "nv": 10601, "scc": 414, "vasc": 186},
}
"""Images of each class (paper 000, table 1)."""
PAPER_000_VAL = 1280
"""Further images (paper 000, table 2), of no given classes: drawn here in the proportions of what is left."""
_TRIES = 200


def _read(tree: Tree) -> list[Record]:
    truth = "ISIC_2019_Training_GroundTruth.csv"
    frame = tree.table(tree.find(truth), ("image", *CLASSES))
    metadata = "ISIC_2019_Training_Metadata.csv"
    known = tree.table(tree.find(metadata), ("image", "age_approx", "anatom_site_general", "lesion_id", "sex"))
    facts = known.set_index("image").to_dict("index")
    absent = next((name for name in frame["image"] if name not in facts), None)
    if absent is not None:
        tree.refuse(f"{metadata} has no row of {absent}")
    images = [path for path in tree.images if "ISIC_2019_Test_Input/" not in path]
    paths = tree.matched(list(frame["image"]), truth, images)
    records = []
    for path, name, label in zip(paths, frame["image"], one_hot_labels(tree, frame, CLASSES, truth), strict=True):
        fact = facts[name]
        further = {"age": number(fact["age_approx"]), "sex": fact["sex"], "site_of_body": fact["anatom_site_general"]}
        lesion = fact["lesion_id"]
        records.append(Record(path, (label,), patient=lesion, bag=lesion, further=further))
    return records


def _read_paper_000(tree: Tree) -> list[Record]:
    records = _read(tree)
    splits = draw_counts(records, PAPER_000, PAPER_000_VAL, tree.seed)
    if isinstance(splits, str):
        tree.refuse(splits)
    return [replace(record, split=split) for record, split in zip(records, splits, strict=True) if split is not None]


def draw_counts(
    records: Sequence[Record], counts: Mapping[str, Mapping[str, int]], rest: int, seed: int
) -> list[str | None] | str:
    """A split per record: in each split of `counts` so many images of each class, `rest` others in val in the proportions of what
    is left of each class, None for what is in none; lesions are never cut, and those with images of two classes are left out. A
    text where the counts cannot be met.
    """
    lesions: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, record in enumerate(records):
        lesions[record.labels[0]][record.bag or f"\0{record.path}"].append(place)
    torn = {name for name, n in Counter(name for of_class in lesions.values() for name in of_class).items() if n > 1}
    for of_class in lesions.values():
        for name in torn & of_class.keys():
            del of_class[name]
    wanted = {label: {split: counts[split].get(label, 0) for split in counts} for label in lesions}
    unmet = sorted({label for split in counts.values() for label in split} - set(lesions))
    if unmet:
        return f"there are no images of class {unmet[0]}"
    left = {label: sum(map(len, of.values())) - sum(wanted[label].values()) for label, of in lesions.items()}
    short = next((label for label, number in left.items() if number < 0), None)
    if short is not None:
        return f"class {short} has {-left[short]:,} images fewer than the paper's split asks for"
    for label, share in _shares(left, rest).items():
        wanted[label]["val"] = share
    splits: list[str | None] = [None] * len(records)
    for label, of_class in lesions.items():
        chosen = next((c for number in range(_TRIES) if (c := _fill(of_class, wanted[label], f"{seed}/{number}"))), None)
        if chosen is None:
            return f"the counts of class {label} cannot be met without cutting a lesion"
        for name, split in chosen.items():
            for place in of_class[name]:
                splits[place] = split
    return splits


def _shares(left: Mapping[str, int], total: int) -> dict[str, int]:
    """`total` in the proportions of `left`, by largest remainders."""
    total = min(total, sum(left.values()))
    exact = {label: total * number / max(1, sum(left.values())) for label, number in left.items()}
    shares = {label: int(value) for label, value in exact.items()}
    for label in sorted(exact, key=lambda label: (shares[label] - exact[label], label))[: total - sum(shares.values())]:
        shares[label] += 1
    return shares


def _fill(lesions: Mapping[str, Sequence[int]], wanted: Mapping[str, int], salt: str) -> dict[str, str] | None:
    """A split by lesion, with exactly the wanted images in each; None where this order of lesions doesn't come out even."""
    order = sorted(lesions, key=lambda name: hashlib.sha256(f"{salt}\0{name}".encode()).digest())
    missing, chosen = dict(wanted), dict[str, str]()
    # Drawn lesion by lesion; single images, which always fit, are kept for the end.
    for name in [n for n in order if len(lesions[n]) > 1] + [n for n in order if len(lesions[n]) == 1]:
        size = len(lesions[name])
        split = next((s for s in _by_need(missing, salt, name) if missing[s] >= size), None)
        if split is not None:
            chosen[name] = split
            missing[split] -= size
    return None if any(missing.values()) else chosen


def _by_need(missing: Mapping[str, int], salt: str, name: str) -> list[str]:
    """Splits in an order drawn with the chances of what each still lacks."""
    number = int.from_bytes(hashlib.sha256(f"{salt}/split\0{name}".encode()).digest()[:8], "big") / 2**64
    position = number * sum(missing.values())
    for split, lacking in missing.items():
        if position < lacking:
            return [split, *(other for other in missing if other != split)]
        position -= lacking
    return list(missing)


_EXPECTED = "ISIC_2019_Training_Input/, ISIC_2019_Training_GroundTruth.csv and ISIC_2019_Training_Metadata.csv"
LAYOUT = Layout("ISIC 2019", _EXPECTED, _read)
PAPER_000_LAYOUT = Layout("ISIC 2019 (split of paper 000)", _EXPECTED, _read_paper_000)
