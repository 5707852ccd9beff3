"""The report says what the frames say: its numbers are parsed back from HTML, Markdown and CSV."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tests.finished_study import fields
from tests.index_only import write_index

from medssl.recipe import Recipe
from medssl.results import _own_facts
from medssl.stages.report import format_result_table, render, result_json
from medssl.stages.report_data import (
    BOOTSTRAP,
    COLUMNS,
    SAME_AGAINST_SAME,
    WELCH,
    ArmFacts,
    Confusion,
    DatasetFacts,
    ReportData,
    SameAgainstSame,
)
from medssl.stages.report_text import number3, p_value, signed3, some
from medssl.store import open_store
from medssl.study import Study

CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
METRICS = ("balanced_accuracy", "accuracy", "f1_macro", "f1_weighted", "auc")
MEANS = {("colour", "linear_probe"): 0.453, ("random", "linear_probe"): 0.424, ("barlow_twins", "linear_probe"): 0.490,
         ("random", "fine_tune"): 0.437, ("barlow_twins", "fine_tune"): 0.452}  # fmt: skip
REPEATS = {"linear_probe": (3, 3, 35), "fine_tune": (3, 3, 5)}


def fake_scores(seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for (arm, protocol), mean in MEANS.items():
        seeds, draws, heads = REPEATS[protocol]
        seeds = 1 if arm == "colour" else seeds
        for m, metric in enumerate(METRICS):
            of_seed, of_draw = rng.normal(0, 0.008, seeds), rng.normal(0, 0.015, draws)
            for s, d, h in itertools.product(range(seeds), range(draws), range(heads)):
                value = mean + 0.09 * m + of_seed[s] + of_draw[d] + rng.normal(0, 0.004)
                rows.append((arm, protocol, s, d, h, metric, value))
    return pd.DataFrame(
        rows, columns=["arm", "protocol", "pretraining_seed", "label_draw", "head_seed", "metric", "value"]
    )


def summary_of(scores: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (arm, protocol, metric), part in scores.groupby(["arm", "protocol", "metric"], sort=False):
        spreads = [part.groupby(k)["value"].mean().std() for k in ("head_seed", "label_draw", "pretraining_seed")]
        counts = [part[k].nunique() for k in ("pretraining_seed", "label_draw", "head_seed")]
        rows.append((arm, protocol, metric, part["value"].mean(), part["value"].std(), *spreads, len(part), *counts))
    return pd.DataFrame(rows, columns=[
        "arm", "protocol", "metric", "mean", "std", "std_head", "std_draw", "std_pretraining",
        "n", "n_pretraining", "n_draw", "n_head",
    ])  # fmt: skip


def fake_comparisons() -> pd.DataFrame:
    rows = [
        ("barlow_twins", "random", "linear_probe", "balanced_accuracy", 0.0662, 0.0413, 0.0911, 0.0002, BOOTSTRAP),
        ("barlow_twins", "random", "linear_probe", "balanced_accuracy", 0.0610, 0.0591, 0.0629, 1e-40, WELCH),
        ("barlow_twins", "colour", "linear_probe", "balanced_accuracy", 0.0371, 0.0102, 0.0633, 0.0081, BOOTSTRAP),
        ("barlow_twins", "colour", "linear_probe", "balanced_accuracy", 0.0352, 0.0337, 0.0371, 1e-25, WELCH),
        ("barlow_twins", "random", "fine_tune", "balanced_accuracy", 0.0149, -0.0221, 0.0522, 0.4372, BOOTSTRAP),
        ("barlow_twins", "random", "fine_tune", "balanced_accuracy", 0.0213, 0.0095, 0.0331, 0.0037, WELCH),
        ("random", "random", "linear_probe", "balanced_accuracy", -0.0117, -0.0134, -0.0100, 3e-19, SAME_AGAINST_SAME),
        ("random", "random", "fine_tune", "balanced_accuracy", 0.0093, -0.0012, 0.0198, 0.0721, SAME_AGAINST_SAME),
    ]
    columns = ["better", "than", "protocol", "metric", "difference", "low", "high", "p", "test"]
    frame = pd.DataFrame(rows, columns=columns)
    evidence = frame["test"] == BOOTSTRAP
    frame["p_holm"] = frame["p"].map({0.0002: 0.0006, 0.0081: 0.0162, 0.4372: 0.4372}).where(evidence)
    frame["effect_size"] = pd.Series([4.1, np.nan, 2.3, np.nan, 0.7]).reindex(frame.index)
    return frame.assign(margin=np.nan, planned=[True] * 6 + [None, None])


def fake_history(steps: int = 660) -> pd.DataFrame:
    frames = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        step = np.arange(0, steps, 10)
        fall = np.exp(-step / 120)
        frames.append(pd.DataFrame({
            "seed": seed, "step": step, "epoch": step // 55, "loss": 90 * fall + 18 + rng.normal(0, 0.6, len(step)),
            "invariance": 30 * fall + 9 + rng.normal(0, 0.3, len(step)),
            "redundancy": 60 * fall + 9 + rng.normal(0, 0.4, len(step)),
            "learning_rate": 1.5e-3 * np.sin(np.pi * np.minimum(1, (step + 5) / steps)),
            "images_per_second": 210 + rng.normal(0, 8, len(step)), "data_wait_share": rng.uniform(0, 0.03, len(step)),
            "embedding_std": 0.031 * (1 - 0.4 * fall), "effective_rank": 120 - 80 * fall + rng.normal(0, 1, len(step)),
            "gradient_norm": 3 * fall + 0.5 + rng.exponential(0.1, len(step)),
        }))  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def fake_searches() -> pd.DataFrame:
    rng = np.random.default_rng(5)
    rows = []
    for arm, protocol in MEANS:
        rates, decays = (1e-4, 1e-3, 1e-2, 1e-1), (0.0, 1e-5, 1e-4, 1e-3)
        points = [(r, d, 0.45 - 0.02 * abs(np.log10(r) + 2) + rng.normal(0, 0.004)) for r in rates for d in decays]
        if protocol == "fine_tune":
            points = [(10 ** rng.uniform(-4, -2), 10 ** rng.uniform(-6, -3), rng.uniform(0.3, 0.45)) for _ in range(12)]
        best = max(range(len(points)), key=lambda i, p=points: p[i][2])
        edge = arm == "random" and protocol == "fine_tune"
        rows += [(arm, protocol, *p, i == best, edge and i == best, False) for i, p in enumerate(points)]
    columns = ["arm", "protocol", "learning_rate", "weight_decay", "score", "best", "on_edge", "stopped"]
    return pd.DataFrame(rows, columns=columns)


def png(width: int = 520, height: int = 130, noise: bool = False) -> bytes:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([200 - 60 * ((x // 64 + y // 64) % 2), 150 + 20 * np.sin(x / 9), 140 + 20 * np.cos(y / 7)], -1)
    pixels = rng.integers(0, 256, (height, width, 3)) if noise else pixels
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def fake_data() -> ReportData:
    scores = fake_scores()
    counts = np.diag([40.0, 60, 100, 10, 90, 900, 20]) + np.random.default_rng(1).uniform(0, 12, (7, 7))
    places = np.arange(49).reshape(7, 7)
    images = {"train": 7010, "validation": 1500, "test": 1505}
    shares = np.array([327, 514, 1099, 115, 1113, 6705, 142]) / 10015
    return ReportData(
        study="ham10000-laptop",
        description="Does Barlow Twins on the unlabelled training images help a classifier of skin lesions?",
        main_protocol="linear_probe",
        arms=[
            ArmFacts("colour", "colour and intensity statistics of the image", "colour"),
            ArmFacts("random", "ResNet-18 at 64 px, random weights", "random"),
            ArmFacts("barlow_twins", "ResNet-18 at 64 px, Barlow Twins, 12 epochs of the training images"),
        ],
        datasets=[DatasetFacts(
            "skin_ham10000",
            counts={s: {c: round(n * f) for c, f in zip(CLASSES, shares, strict=True)} for s, n in images.items()},
            groups={"train": 5229, "validation": 1120, "test": 1121},
            judged_images=1504, judged_patients=1121, licence="CC BY-NC 4.0", split_seed=0,
            digest="images 0a1b2c3d4e5f6071, labels 99aabbccddeeff00",
        )],
        scores=scores, summary=summary_of(scores), comparisons=fake_comparisons(),
        same_against_same=[SameAgainstSame("random", "linear_probe", "balanced_accuracy", 9, 8 / 9)],
        searches=fake_searches(), histories={"barlow_twins": fake_history()},
        confusions={key: Confusion(CLASSES, counts + 8 * ((i + places) % 5)) for i, key in enumerate(MEANS)},
        view_sheets={"barlow_twins": png()},
        feeding=pd.DataFrame({"feeding": ["resident", "streaming"], "images_per_second": [212.4, 171.9],
                              "data_wait_share": [0.012, 0.134], "workers": [2, 2]}),
        recipe_yaml="study: ham10000-laptop\narms:\n- name: random\n- name: barlow_twins\n  epochs: 12\n",
        overrides=["arms.2.epochs=12"], versions={"medssl": "0.1.0", "torch": "2.9.1", "ray": "2.60.0"},
        hardware="2 CPU cores, no accelerator", notes=["Intervals hold for this test split."],
    )  # fmt: skip


class Reader(HTMLParser):
    """Tables (rows of cell texts), visible text, and every tag with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.tables[-1][-1][-1] += data


def markdown_tables(text: str) -> list[list[list[str]]]:
    tables = [[]]
    for line in text.splitlines():
        if line.startswith("| "):
            cells = [c.strip().replace("**", "") for c in re.split(r"(?<!\\)\|", line)[1:-1]]
            tables[-1].append([re.sub(r"\\(.)", r"\1", c).replace("&lt;", "<").replace("&gt;", ">") for c in cells])
        elif tables[-1]:
            tables.append([])
    return [t[:1] + t[2:] for t in tables if t]


@pytest.fixture(scope="module")
def data() -> ReportData:
    return fake_data()


@pytest.fixture(scope="module")
def files(data: ReportData) -> dict[str, bytes]:
    return render(data)


def test_csv_holds_every_digit(data: ReportData, files: dict[str, bytes]) -> None:
    for name in ("scores", "summary", "comparisons", "searches"):
        back = pd.read_csv(io.BytesIO(files[f"{name}.csv"]))
        pd.testing.assert_frame_equal(back, getattr(data, name), check_dtype=False, check_exact=True)


def test_per_class_recall_and_precision_against_a_loop(data: ReportData, files: dict[str, bytes]) -> None:
    frame = pd.read_csv(io.BytesIO(files["per_class.csv"]))
    assert len(frame) == len(MEANS) * len(CLASSES)
    for row in frame.itertuples():
        counts = data.confusions[(row.arm, row.protocol)].counts
        k = CLASSES.index(row[3])
        assert row.images == pytest.approx(sum(counts[k][j] for j in range(7)), rel=1e-12)
        assert row.recall == pytest.approx(counts[k][k] / sum(counts[k][j] for j in range(7)), rel=1e-12)
        assert row.precision == pytest.approx(counts[k][k] / sum(counts[j][k] for j in range(7)), rel=1e-12)


def test_result_tables_of_html_and_markdown_hold_the_summary(data: ReportData, files: dict[str, bytes]) -> None:
    html = Reader(files["report.html"].decode()).tables
    markdown = markdown_tables(files["report.md"].decode())
    assert len(html) == len(markdown)
    for tables in (html, markdown):
        for protocol, table in zip(("linear_probe", "fine_tune"), tables, strict=False):
            assert [row[0] for row in table[1:]] == [a for a, p in MEANS if p == protocol]
            for row in table[1:]:
                for metric, text in zip(METRICS, row[1:], strict=False):
                    s = data.summary
                    wanted = s[(s["arm"] == row[0]) & (s["protocol"] == protocol) & (s["metric"] == metric)].iloc[0]
                    mean, std = (float(v) for v in text.split(" ± "))
                    assert mean == pytest.approx(wanted["mean"], abs=0.0005000001)
                    assert std == pytest.approx(wanted["std"], abs=0.0005000001)
                draws = 3 if row[0] == "colour" else 9
                heads = REPEATS[protocol][2]
                assert row[-1] == f"{draws * heads} ({draws // 3} × 3 × {heads})"


def test_comparisons_stand_in_html_with_the_same_test_on_equal_arms_beside(files: dict[str, bytes]) -> None:
    table = next(t for t in Reader(files["report.html"].decode()).tables if "of A/A line" in " ".join(t[0]))
    rows = {(row[0], row[1]): row[2:] for row in table[1:]}
    assert rows[("barlow_twins over random", "linear probe")] == [
        "+0.066", "+0.041 to +0.091", "< 0.001 (< 0.001)", "+4.100", "< 0.001", "< 0.001",
    ]  # fmt: skip
    assert rows[("barlow_twins over random", "fine tune")] == [
        "+0.015", "−0.022 to +0.052", "0.437 (0.437)", "+0.700", "0.004", "0.072",
    ]  # fmt: skip
    assert rows[("barlow_twins over colour", "linear probe")][1:3] == ["+0.010 to +0.063", "0.008 (0.016)"]
    assert "p corrected for the 3 tests" in files["report.md"].decode()


def test_every_test_is_listed_once(data: ReportData, files: dict[str, bytes]) -> None:
    table = next(t for t in Reader(files["report.html"].decode()).tables if "test" in t[0])
    wanted = sorted(
        (f"{r.better} over {r.than}", r.protocol.replace("_", " "), r.test, *map(p_value, (r.p, r.p_holm)), signed3(r.difference))
        for r in data.comparisons.itertuples()
    )
    assert sorted((r[0], r[1], r[3], r[6], r[7], r[4]) for r in table[1:]) == wanted


def test_scores_of_the_validation_split_are_called_so(data: ReportData) -> None:
    facts = data.datasets[0]
    named = {"validation": "val"}
    counts = {named.get(split, split): number for split, number in facts.counts.items()}
    groups = {named.get(split, split): number for split, number in facts.groups.items()}
    closed = dataclasses.replace(
        data, split="val", notes=[], datasets=[dataclasses.replace(
            facts, counts=counts, groups=groups, judged_images=sum(counts["val"].values()), judged_patients=groups["val"]
        )],
    )  # fmt: skip
    text = render(closed)["report.md"].decode()
    assert f"{sum(counts['val'].values()):,} validation images of {groups['val']:,} patients" in text
    assert "were chosen on these images too, so the scores are a little too good" in text
    assert "Comparisons on the validation split" in text and "linear probe, validation split" in text
    assert "test split" not in text and "test image" not in text
    assert "chosen on other images" in render(data)["report.md"].decode()


def test_unlabelled_images_of_the_judged_split_are_neither_judged_nor_a_class(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), create=True)
    known = ["a", "a", "b", "b"] * 6
    judged = [*["a"] * 10, *["b"] * 20, *[None] * 70]
    write_index(store.sub("datasets/squares"), [*known, *known, *judged], ["train"] * 24 + ["val"] * 24 + ["test"] * 100)
    facts = _own_facts(Study(Recipe.model_validate(fields()), store))
    assert facts.counts["test"] == {"a": 10, "b": 20, "(no label)": 70}
    scores = fake_scores()
    text = render(ReportData("s", scores=scores, summary=summary_of(scores), datasets=[facts]))["report.md"].decode()
    assert "Measured on 30 test images of 15 patients" in text  # two images each
    assert "Guessing among 2 classes gives 0.500." in text
    assert "30 test images of 30 look nearly like images of other splits" in text  # these hashes are all the same


def test_plain_words_follow_the_interval(data: ReportData, files: dict[str, bytes]) -> None:
    for text in (Reader(files["report.html"].decode()).text, files["report.md"].decode()):
        assert "barlow_twins is better than random (linear probe)." in text
        assert "Not enough evidence: barlow_twins against random (fine tune)." in text
        assert "1,504 test images of 1,121 patients" in text
        assert "p < 0.01 in 8 of 9 pairs" in unescape(text)
    worse = data.comparisons.assign(difference=-0.05, low=-0.07, high=-0.03)
    text = render(dataclasses.replace(data, comparisons=worse))["report.md"].decode()
    assert "barlow_twins is worse than random" in text
    assert "is better than" not in text
    unknown = data.comparisons.assign(low=np.nan, high=np.nan)
    text = render(dataclasses.replace(data, comparisons=unknown))["report.md"].decode()
    assert "No interval could be computed, so nothing is claimed" in text
    assert "is better than" not in text


def test_welch_alone_claims_nothing(data: ReportData) -> None:
    alone = data.comparisons[data.comparisons["test"] == WELCH]
    text = render(dataclasses.replace(data, comparisons=alone, same_against_same=()))["report.md"].decode()
    assert "No claim." in text
    assert "is better than" not in text
    assert "No A/A line" in text


def test_each_search_is_read_by_its_own_metric(data: ReportData) -> None:
    one = render(dataclasses.replace(data, search_metrics={"linear_probe": "auc", "fine_tune": "auc"}))["report.md"].decode()
    assert "Search over learning rate and weight decay: AUC on the validation split" in one
    two = render(dataclasses.replace(data, search_metrics={"linear_probe": "auc", "fine_tune": "accuracy"}))["report.md"].decode()
    assert "weight decay: AUC (linear probe), accuracy (fine tune) on the validation split" in two
    chosen = [line for line in two.splitlines() if re.match(r"\| \w+ \| (linear probe|fine tune) \|", line) and "| no |" in line]
    assert chosen and all(("| AUC |" in line) == ("linear probe" in line) for line in chosen)


def test_a_caution_about_many_arms_names_some_and_counts_the_rest() -> None:
    assert some(["a", "b"], ", ") == "a, b"
    assert some(list("abcdefg"), "; ") == "a; b; c; d; e; f; g"
    assert some(list("abcdefgh"), ", ") == "a, b, c, d, e, f, and 2 more"


def test_warnings_come_from_the_data(data: ReportData) -> None:
    text = render(data)["report.md"].decode()
    assert "on the edge of its space for random (fine tune)" in text
    assert "does not beat" not in text
    bad = data.histories["barlow_twins"].assign(effective_rank=1.2)
    below = data.summary.copy()
    below.loc[(below["arm"] == "barlow_twins") & (below["protocol"] == "linear_probe"), "mean"] = 0.4
    few = below.assign(n_pretraining=1)
    facts = dataclasses.replace(data.datasets[0], leakage_allowed=True, leakage_patients=12, synthetic=True)
    changed = dataclasses.replace(
        data, histories={"barlow_twins": bad}, summary=few, datasets=[facts], warnings=["The store was slow."]
    )
    text = render(changed)["report.md"].decode()
    assert "scored better than random (linear probe), from a single pretraining." in text
    assert "is better than" not in text
    for part in ("the embedding collapsed", "does not beat colour", "barlow_twins has 1 pretraining seed",
                 "12 patients with images in two splits", "are synthetic", "The store was slow."):  # fmt: skip
        assert part in text, part
    assert "colour has 1 pretraining seed" not in text
    unknown = dataclasses.replace(data, datasets=[dataclasses.replace(data.datasets[0], unknown_patients=3)])
    assert "none of whom is known to be among" in render(unknown)["report.md"].decode()
    assert "none of whom is among the training images" not in text


def test_nothing_but_a_name_gives_a_page() -> None:
    files = render(ReportData(study="empty"))
    assert "The study holds no scores." in files["report.md"].decode()
    assert set(files) == {"report.html", "report.md", "per_class.csv", *(f"{name}.csv" for name in COLUMNS)}
    assert files["scores.csv"] == b"arm,protocol,pretraining_seed,label_draw,head_seed,metric,value\n"
    assert format_result_table(ReportData("x").summary, ReportData("x").comparisons) == "no results yet"
    assert result_json("empty", *(getattr(ReportData("x"), n) for n in ("scores", "summary", "comparisons"))) == {
        "study": "empty", "arms": [], "comparisons": [],
    }  # fmt: skip


@pytest.mark.parametrize("left", ["histories", "searches", "confusions", "comparisons", "scores", "view_sheets"])
def test_any_part_may_be_missing(data: ReportData, left: str) -> None:
    blank = getattr(ReportData("x"), left)
    text = Reader(render(dataclasses.replace(data, **{left: blank}))["report.html"].decode()).text
    assert "nan" not in re.findall(r"[a-z]+", text.lower())
    assert "None" not in text


def test_one_seed_and_missing_numbers() -> None:
    scores = fake_scores()
    one = scores[(scores["pretraining_seed"] == 0) & (scores["label_draw"] == 0) & (scores["head_seed"] == 0)]
    one = one.assign(value=one["value"].where(one["metric"] != "auc"))
    history = fake_history(20).assign(loss=np.nan)
    data = ReportData("one", scores=one, summary=summary_of(one), histories={"random": history})
    files = render(data)
    table = Reader(files["report.html"].decode()).tables[0]
    assert table[1][1] == number3(one["value"].iloc[0])
    assert table[1][5] == "–"
    assert "nan" not in files["report.html"].decode().replace("NaN", "nan").lower().split("<style>")[0]
    assert not re.search(r'(?<![a-z])nan(?![a-z])', files["report.html"].decode().lower())
    saved = result_json("one", one, data.summary, data.comparisons)
    assert saved["arms"][0]["std"] is None
    assert saved["arms"][0]["n"] == 1
    assert json.loads(json.dumps(saved, allow_nan=False)) == saved


def test_user_text_is_escaped() -> None:
    nasty = '<script>alert(1)</script>"&\'|`*_x_'
    scores = fake_scores().replace({"arm": {"random": nasty}, "protocol": {"fine_tune": nasty}})
    comparisons = fake_comparisons().replace({"than": {"random": nasty}})
    data = fake_data()
    data = dataclasses.replace(
        data, study=nasty, description=nasty, arms=[ArmFacts(nasty, nasty)], scores=scores, summary=summary_of(scores),
        comparisons=comparisons, searches=fake_searches().replace({"arm": {"random": nasty}}),
        histories={nasty: fake_history(40)}, confusions={(nasty, nasty): Confusion([nasty, "b"], np.eye(2))},
        view_sheets={nasty: png()}, recipe_yaml=f"a: {nasty}\n```\n</pre><script>", overrides=[nasty],
        versions={nasty: nasty}, hardware=nasty, notes=[nasty], warnings=[nasty],
        feeding=pd.DataFrame({nasty: [nasty]}),
        datasets=[DatasetFacts(nasty, nasty, {"test": {nasty: 3}}, {"test": 2}, licence=nasty, judged_images=3)],
    )  # fmt: skip
    files = render(data)
    html = files["report.html"].decode()
    reader = Reader(html)
    assert "script" not in {tag for tag, _ in reader.tags}
    assert not [a for _, attributes in reader.tags for a in attributes if a.startswith("on")]
    assert nasty in reader.text
    markdown = re.sub(r"(?s)\n(`{3,})\n.*?\n\1\n", "", files["report.md"].decode())
    assert "<" not in markdown
    assert len({len(row) for row in markdown_tables(markdown)[0]}) == 1
    assert result_json(nasty, scores, data.summary, comparisons)["study"] == nasty


def test_page_asks_for_nothing_outside_itself(files: dict[str, bytes]) -> None:
    html = files["report.html"].decode()
    assert "http" not in html.replace("http-equiv", "")
    assert "url(" not in html
    assert "@import" not in html
    for tag, attributes in Reader(html).tags:
        assert tag not in ("script", "iframe", "object", "embed", "base"), tag
        for name in ("src", "href", "srcset", "data", "action", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value[:60])


def test_links_of_the_contents_lead_somewhere(files: dict[str, bytes]) -> None:
    tags = Reader(files["report.html"].decode()).tags
    ids = [a["id"] for _, a in tags if "id" in a]
    targets = [a["href"][1:] for tag, a in tags if tag == "a"]
    assert len(ids) == len(set(ids))
    assert targets == ids


def test_same_data_same_bytes(files: dict[str, bytes]) -> None:
    assert render(fake_data()) == files


def test_order_of_rows_does_not_matter_to_the_pictures(data: ReportData, files: dict[str, bytes]) -> None:
    mixed = data.scores.sample(frac=1, random_state=3)
    again = render(dataclasses.replace(data, scores=mixed))["report.html"]
    assert re.findall(rb"<svg.*?</svg>", again) == re.findall(rb"<svg.*?</svg>", files["report.html"])


def test_every_score_is_a_dot_and_the_file_stays_small(data: ReportData, files: dict[str, bytes]) -> None:
    html = files["report.html"].decode()
    strips = html.split('id="seeds"')[1].split("<details>")[0]
    main = data.scores[data.scores["metric"] == "balanced_accuracy"]
    legend = 4  # three seeds, and none for colour
    assert strips.count("h0") == len(main) + legend
    assert len(files["report.html"]) < 1_000_000


def test_a_large_study_stays_a_small_file(data: ReportData) -> None:
    many = pd.concat([data.scores.assign(label_draw=d) for d in range(30)], ignore_index=True)
    wide = {key: Confusion([f"class {k}" for k in range(100)], np.ones((100, 100))) for key in MEANS}
    html = render(dataclasses.replace(data, scores=many, confusions=wide))["report.html"]
    assert len(html) < 1_500_000
    assert b"scores of a lane are drawn" in html
    assert b"class 99" in html


def test_large_sheets_are_made_smaller_and_broken_ones_left_out(data: ReportData) -> None:
    sheets = {"random": png(1600, 1600, noise=True), "barlow_twins": b"not a picture"}
    html = render(dataclasses.replace(data, view_sheets=sheets))["report.html"]
    assert len(html) < 3_000_000
    assert html.count(b"<img") == 1
    assert b"data:image/jpeg;base64" in html


def test_terminal_table_is_aligned_and_holds_the_numbers(data: ReportData) -> None:
    text = format_result_table(data.summary, data.comparisons)
    blocks = text.split("\n\n")
    assert [b.splitlines()[0].split("  ")[0] for b in blocks] == ["linear probe", "fine tune", "comparison"]
    for block in blocks[:2]:
        rows = [line for line in block.splitlines() if "±" in line]
        assert len({tuple(m.start() for m in re.finditer("±", row)) for row in rows}) == 1
    s = data.summary
    best = s[(s["arm"] == "barlow_twins") & (s["protocol"] == "linear_probe") & (s["metric"] == "accuracy")].iloc[0]
    line = next(row for row in blocks[0].splitlines() if row.startswith("barlow_twins"))
    assert f"{best['mean']:.3f} ± {best['std']:.3f}" in line
    assert "+0.041 to +0.091" in blocks[2]
    assert "auc" not in format_result_table(s, data.comparisons, metric="auc").split("\n\n")[-1]


def test_json_has_the_shape_that_is_promised(data: ReportData) -> None:
    mixed = data.scores.sample(frac=1, random_state=1)
    saved = result_json("s", mixed, data.summary, data.comparisons)
    assert set(saved) == {"study", "arms", "comparisons"}
    assert len(saved["arms"]) == len(data.summary)
    for arm in saved["arms"]:
        assert list(arm) == ["arm", "protocol", "metric", "mean", "std", "n", "values"]
        assert len(arm["values"]) == arm["n"]
        assert np.mean(arm["values"]) == pytest.approx(arm["mean"], rel=1e-12)
        assert np.std(arm["values"], ddof=1) == pytest.approx(arm["std"], rel=1e-9)
    first = data.scores[(data.scores["arm"] == "colour") & (data.scores["metric"] == "balanced_accuracy")]
    assert saved["arms"][0]["values"] == first["value"].tolist()
    assert [list(c) for c in saved["comparisons"]] == [list(data.comparisons.columns)] * len(data.comparisons)
    assert [c["p"] for c in saved["comparisons"]] == data.comparisons["p"].tolist()
    assert [c["planned"] for c in saved["comparisons"]] == [True] * 6 + [None] * 2
    assert [c["p_holm"] for c in saved["comparisons"]] == [0.0006, None, 0.0162, None, 0.4372, None, None, None]
