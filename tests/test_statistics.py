"""The nested bootstrap against closed forms, a naive second implementation and simulated studies with a known truth."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from scipy import stats

from medssl import statistics
from medssl.metrics import METRICS
from medssl.statistics import nested


def random_arm(shape: tuple[int, int, int], labels: np.ndarray, classes: int, skill: float, seed: int) -> np.ndarray:
    """Probabilities (P, D, S, N, K) that favour the label by `skill`."""
    logits = np.random.default_rng(seed).normal(size=(*shape, len(labels), classes)).astype(np.float32)
    logits[..., np.arange(len(labels)), labels] += skill
    return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)


def arm_of_hits(hits: np.ndarray) -> np.ndarray:
    """Two-class probabilities (..., N, 2) whose accuracy under labels of 0 is the mean of `hits`."""
    return np.stack([hits, 1 - hits], axis=-1).astype(np.float32)


def resamples(units: int) -> list[tuple[tuple[int, ...], float]]:
    """All ways to draw n - 1 of n with replacement, with their probability."""
    drawn = max(units - 1, 1)
    return [(way, 1 / units**drawn) for way in itertools.product(range(units), repeat=drawn)]


def test_standard_error_equals_the_sum_over_all_resamples() -> None:
    """Every resample of a tiny study, scored image by image: the second implementation and the exact answer at once."""
    rng = np.random.default_rng(3)
    labels, patients = np.array([0, 1, 0, 1, 1, 0]), np.array(["a", "a", "b", "b", "c", "c"])
    arms = [random_arm((2, 2, 2), labels, 2, 0.7, seed) for seed in (1, 2)]
    metric = METRICS["accuracy"]
    squares = mean = 0.0
    scores: dict[tuple[int, ...], float] = {}
    for picked, patient_share in resamples(3):
        weights = np.array([sum(np.unique(patients)[p] == name for p in picked) for name in patients], float)
        for arm, p, d, s in itertools.product(range(2), range(2), range(2), range(2)):
            scores[arm, p, d, s] = metric(arms[arm][p, d, s], labels, weights)
        for (d,), draw_share in resamples(2):
            for (p0,), (p1,) in itertools.product((w for w, _ in resamples(2)), repeat=2):
                for s0, s1 in itertools.product(range(2), repeat=2):
                    share = patient_share * draw_share / 16
                    gap = scores[0, p0, d, s0] - scores[1, p1, d, s1]
                    mean += share * gap
                    squares += share * gap**2
    exact = math.sqrt(squares - mean**2)
    result = statistics.nested_bootstrap(*arms, labels, patients, metric="accuracy", replicates=40_000, seed=int(rng.integers(9)))
    assert result.standard_error == pytest.approx(exact, rel=0.02)
    assert result.difference == pytest.approx(
        np.mean([metric(a, labels) for a in arms[0].reshape(-1, 6, 2)])
        - np.mean([metric(a, labels) for a in arms[1].reshape(-1, 6, 2)])
    )


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_fast_scores_equal_the_metrics_module(metric: str) -> None:
    """Each model under each resample, against the plain function with image weights."""
    rng = np.random.default_rng(0)
    labels = rng.choice(4, size=150, p=[0.7, 0.15, 0.1, 0.05])
    arm = random_arm((2, 2, 3), labels, 4, 1.0, 5)
    groups = rng.integers(0, 90, size=150)
    weights, patients = nested._resample_patients(groups, 40, rng)
    assert patients == len(np.unique(groups))
    fast = nested._scores(arm, labels, weights, metric)
    for p, d, s, r in itertools.product(range(2), range(2), range(3), range(0, 41, 8)):
        naive = METRICS[metric](arm[p, d, s], labels, weights[:, r].astype(float))
        # AUC's resamples are to first order (DeLong); the sample itself is exact.
        tolerance = 0.02 if metric == "auc" and r > 0 else 1e-6
        assert fast[p, d, s, r] == pytest.approx(naive, abs=tolerance)
    np.testing.assert_allclose(statistics.run_scores(arm, labels, metric), fast[..., 0], atol=1e-12)


def test_auc_error_agrees_with_exact_resampling() -> None:
    rng = np.random.default_rng(1)
    labels = rng.choice(3, size=300, p=[0.8, 0.15, 0.05])
    arm = random_arm((1, 1, 1), labels, 3, 1.0, 7)
    weights, _ = nested._resample_patients(np.arange(300), 600, rng)
    fast = nested._scores(arm, labels, weights, "auc")[0, 0, 0, 1:]
    exact = [METRICS["auc"](arm[0, 0, 0], labels, w.astype(float)) for w in weights.T[1:]]
    assert np.std(fast) == pytest.approx(np.std(exact), rel=0.05)
    assert np.corrcoef(fast, exact)[0, 1] > 0.98


def test_patients_alone_give_the_paired_closed_form() -> None:
    """One model on each side, one image per patient: the error is that of the mean of paired differences."""
    rng = np.random.default_rng(2)
    hits = rng.integers(0, 2, size=(2, 400)).astype(float)
    arms = [arm_of_hits(h[None, None, None]) for h in hits]
    result = statistics.nested_bootstrap(*arms, np.zeros(400, int), np.arange(400), metric="accuracy", replicates=20_000)
    gaps = hits[0] - hits[1]
    assert result.difference == pytest.approx(gaps.mean())
    assert result.standard_error == pytest.approx(gaps.std(ddof=1) / 20, rel=0.02)
    assert result.degrees_of_freedom == pytest.approx(399)
    expected = stats.ttest_rel(hits[0], hits[1])
    assert result.p == pytest.approx(expected.pvalue, rel=0.1)
    assert (result.low, result.high) == pytest.approx(tuple(expected.confidence_interval()), abs=0.02 * gaps.std())
    assert len(result.notes) == 5


def test_images_of_one_patient_move_together() -> None:
    rng = np.random.default_rng(4)
    patients = np.repeat(np.arange(60), 10)
    hits = np.repeat(rng.integers(0, 2, size=60), 10).astype(float)
    arms = [arm_of_hits(h[None, None, None]) for h in (hits, np.ones(600))]
    grouped = statistics.nested_bootstrap(*arms, np.zeros(600, int), patients, metric="accuracy")
    unknown = statistics.nested_bootstrap(*arms, np.zeros(600, int), [None] * 600, metric="accuracy")
    assert grouped.standard_error == pytest.approx(hits.std() / math.sqrt(60), rel=0.1)
    assert unknown.standard_error == pytest.approx(hits.std() / math.sqrt(600), rel=0.1)


def test_paired_bootstrap_equals_scipys() -> None:
    """Balanced accuracy of two models on the same patients; scipy draws n of n, which is (n - 1) / n of the variance."""
    rng = np.random.default_rng(12)
    labels = rng.choice(3, size=240, p=[0.6, 0.3, 0.1])
    first, second = (random_arm((1, 1, 1), labels, 3, skill, seed)[0, 0, 0] for skill, seed in ((1.5, 1), (1.0, 2)))
    ours = statistics.paired_bootstrap(first, second, labels, np.arange(240), replicates=8000)
    hits = np.stack([first.argmax(axis=1) == labels, second.argmax(axis=1) == labels])

    def difference(picked: np.ndarray, axis: int = -1) -> np.ndarray:
        gaps = (hits[0] * 1.0 - hits[1])[picked]
        of_class = [labels[picked] == k for k in range(3)]
        return np.mean([(gaps * mine).sum(axis=axis) / mine.sum(axis=axis) for mine in of_class], axis=0)

    theirs = stats.bootstrap((np.arange(240),), difference, n_resamples=8000, method="percentile", random_state=0)
    assert ours.standard_error == pytest.approx(theirs.standard_error * math.sqrt(240 / 239), rel=0.03)
    assert (ours.percentile_low, ours.percentile_high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.008)
    metric = METRICS["balanced_accuracy"]
    assert ours.difference == pytest.approx(metric(first, labels) - metric(second, labels), abs=1e-6)
    assert ours.notes == ("both models are fixed: the interval says nothing about how they were trained",)


def test_paired_bootstrap_draws_patients_with_all_their_images() -> None:
    """Accuracy over patients of unequal size: the linearised error of a ratio, and that of its images is much smaller."""
    rng = np.random.default_rng(13)
    patients = np.repeat(np.arange(150), rng.integers(1, 8, size=150))
    hits = np.stack([rng.random(150)[patients] < 0.6, rng.random(150)[patients] < 0.5]).astype(float)
    labels = np.zeros(len(patients), int)
    ours = statistics.paired_bootstrap(*arm_of_hits(hits), labels, patients, metric="accuracy", replicates=10_000)
    gaps = hits[0] - hits[1]
    sums = np.bincount(patients, weights=gaps - gaps.mean())
    expected = math.sqrt(150 / 149 * (sums**2).sum()) / len(patients)
    assert ours.standard_error == pytest.approx(expected, rel=0.03)
    assert ours.standard_error > 1.5 * gaps.std(ddof=1) / math.sqrt(len(patients))
    assert ours.degrees_of_freedom == pytest.approx(149)
    assert ours.variances.keys() == {"patient"}
    with pytest.raises(ValueError, match=r"expected \(N, K\)"):
        statistics.paired_bootstrap(arm_of_hits(hits), arm_of_hits(hits), labels, patients)


def found(difference: float, error: float, freedom: float) -> statistics.BootstrapResult:
    """A bootstrap's result as far as a test of equivalence reads it."""
    nothing = dict.fromkeys(("low", "high", "p", "percentile_low", "percentile_high"), math.nan)
    return statistics.BootstrapResult(
        "accuracy", difference, confidence=0.95, standard_error=error, degrees_of_freedom=freedom, replicates=1, variances={},
        notes=(), **nothing,
    )  # fmt: skip


@pytest.mark.parametrize("level", [0.01, 0.05, 0.2])
def test_nested_equivalence_is_two_one_sided_tests(level: float) -> None:
    rng = np.random.default_rng(14)
    for difference, error, freedom, margin in zip(
        rng.normal(0, 0.02, 60), rng.uniform(0.001, 0.02, 60), rng.uniform(2, 40, 60), rng.uniform(0.005, 0.05, 60), strict=True
    ):
        ours = statistics.nested_equivalence(found(difference, error, freedom), margin, level=level)
        above, below = stats.t.sf((difference + margin) / error, freedom), stats.t.cdf((difference - margin) / error, freedom)
        assert ours.p == pytest.approx(max(above, below), rel=1e-12)
        assert (ours.low, ours.high) == pytest.approx(stats.t.interval(1 - 2 * level, freedom, difference, error))
        assert (ours.p < level) == (-margin < ours.low and ours.high < margin)


def test_nested_equivalence_of_the_pairs_is_the_paired_test() -> None:
    """One model on each side and one image a patient: scipy's one-sided tests of the paired differences."""
    rng = np.random.default_rng(15)
    hits = (rng.random((2, 500)) < 0.7).astype(float)
    arms = [arm_of_hits(h[None, None, None]) for h in hits]
    result = statistics.nested_bootstrap(*arms, np.zeros(500, int), np.arange(500), metric="accuracy", replicates=6000)
    for margin in (0.03, 0.06):
        ours = statistics.nested_equivalence(result, margin)
        tests = [
            stats.ttest_1samp(hits[0] - hits[1], end, alternative=side).pvalue
            for end, side in ((-margin, "greater"), (margin, "less"))
        ]
        assert ours.p == pytest.approx(max(tests), rel=0.12)


def test_arms_a_margin_apart_are_seldom_called_equivalent() -> None:
    """Whole simulated studies whose true difference is the margin: 5% of them err. A wide margin is shown in all of them."""
    rng = np.random.default_rng(16)
    studies = [simulated_study(rng, 0.1, 0.05) for _ in range(200)]
    assert np.mean([statistics.nested_equivalence(s, 0.1).p < 0.05 for s in studies]) <= 0.085
    assert np.mean([statistics.nested_equivalence(s, 0.5).p < 0.05 for s in studies]) > 0.95


def test_equivalence_without_spread_or_number() -> None:
    assert statistics.nested_equivalence(found(0.01, 0.0, math.inf), 0.02).p == 0
    assert statistics.nested_equivalence(found(0.03, 0.0, math.inf), 0.02).p == 1
    assert math.isnan(statistics.nested_equivalence(found(0.01, math.nan, 5), 0.02).p)
    for margin in (0, -0.1, math.nan):
        with pytest.raises(ValueError, match="margin is"):
            statistics.nested_equivalence(found(0.0, 0.1, 5), margin)
    with pytest.raises(ValueError, match=r"level is 0\.5"):
        statistics.nested_equivalence(found(0.0, 0.1, 5), 0.1, level=0.5)


def test_pretraining_seeds_alone_give_welchs_standard_error() -> None:
    """Every image of a model is right or wrong together with a share that only the seed decides."""
    images = 400
    shares = [np.array([0.60, 0.70, 0.65]), np.array([0.40, 0.55, 0.50, 0.45])]
    arms = []
    for share in shares:
        hits = (np.arange(images)[None, :] < np.round(share * images)[:, None]).astype(float)
        arms.append(arm_of_hits(np.repeat(np.repeat(hits[:, None, None], 2, axis=1), 3, axis=2)))
    one_patient = ["the only one"] * images
    result = statistics.nested_bootstrap(*arms, np.zeros(images, int), one_patient, metric="accuracy", replicates=20_000)
    expected = stats.ttest_ind(*shares, equal_var=False)
    assert result.standard_error == pytest.approx(np.sqrt(sum(s.var(ddof=1) / len(s) for s in shares)), rel=0.03)
    assert result.degrees_of_freedom == pytest.approx(expected.df, rel=1e-3)
    assert result.p == pytest.approx(expected.pvalue, rel=0.15)


def test_draws_are_shared_by_the_arms() -> None:
    """A label draw that lifts both arms alike leaves their difference alone."""
    images = 300
    share = np.array([0.4, 0.6, 0.8])
    hits = (np.arange(images)[None, :] < np.round(share * images)[:, None]).astype(float)
    arm = arm_of_hits(np.broadcast_to(hits[None, :, None], (2, 3, 2, images)))
    result = statistics.nested_bootstrap(arm, arm, np.zeros(images, int), np.arange(images), metric="accuracy")
    assert result.standard_error < 1e-12
    assert (result.low, result.high) == pytest.approx((0, 0), abs=1e-12)
    assert result.p == 1


def simulated_study(rng: np.random.Generator, truth: float, seed_std: float) -> statistics.BootstrapResult:
    """Two arms of 3 seeds x 3 draws x 3 heads on 80 patients with 3 images each; effects of every kind, known truth."""
    patients = np.repeat(np.arange(80), 3)
    draw, patient = rng.normal(0, 0.02, size=3), rng.normal(0, 0.15, size=80)[patients]
    arms = []
    for mean in (0.5 + truth, 0.5):
        seed = rng.normal(0, seed_std, size=3)
        own = rng.normal(0, 0.1, size=80)[patients]
        chance = mean + seed[:, None, None, None] + draw[None, :, None, None] + patient + own
        # One uniform number per image and arm: head seeds agree on most images, as real heads do.
        base = rng.random(len(patients))
        jitter = rng.normal(0, 0.05, size=(3, 3, 3, len(patients)))
        arms.append(arm_of_hits((base + jitter < chance).astype(float)))
    return statistics.nested_bootstrap(
        *arms, np.zeros(len(patients), int), patients, metric="accuracy", replicates=200, seed=int(rng.integers(2**31))
    )


@pytest.mark.parametrize("seed_std", [0.0, 0.05, 0.15])
def test_intervals_hold_the_truth_as_often_as_they_say(seed_std: float) -> None:
    rng = np.random.default_rng(11)
    studies = [simulated_study(rng, 0.1, seed_std) for _ in range(250)]
    covered = np.mean([s.low <= 0.1 <= s.high for s in studies])
    assert 0.92 <= covered <= 0.995, covered
    assert all((s.low > 0 or s.high < 0) == (s.p < 0.05) for s in studies)
    spread = np.std([s.difference for s in studies])
    claimed = np.sqrt(np.mean([s.standard_error**2 for s in studies]))
    assert 0.93 * spread < claimed < 1.35 * spread
    if seed_std == 0.15:  # why percentiles are not the interval
        assert np.mean([s.percentile_low <= 0.1 <= s.percentile_high for s in studies]) < 0.92


def test_one_of_everything_still_has_an_interval_over_patients() -> None:
    labels = np.random.default_rng(0).integers(0, 3, size=120)
    arms = [random_arm((1, 1, 1), labels, 3, skill, 3) for skill in (1.5, 0.5)]
    result = statistics.nested_bootstrap(*arms, labels, np.arange(120))
    assert result.low < result.difference < result.high
    assert result.standard_error > 0
    assert [note.split(":")[0] for note in result.notes] == [
        "the first arm has one pretraining seed",
        "the first arm has one head seed",
        "the second arm has one pretraining seed",
        "the second arm has one head seed",
        "there is one draw of the labelled images",
    ]
    assert result.variances["pretraining_seed_first"] == 0


def test_a_rare_class_may_vanish_from_a_resample() -> None:
    labels = np.array([0] * 30 + [1])
    arms = [random_arm((2, 1, 2), labels, 2, 1.0, seed) for seed in (0, 1)]
    for metric in METRICS:
        result = statistics.nested_bootstrap(*arms, labels, np.arange(31), metric=metric, replicates=300)
        assert np.isfinite([result.low, result.high, result.p]).all()
        assert ("too few classes" in " ".join(result.notes)) == (metric == "auc")


def test_the_same_seed_gives_the_same_interval() -> None:
    labels = np.random.default_rng(0).integers(0, 3, size=60)
    arms = [random_arm((2, 2, 2), labels, 3, 1.0, seed) for seed in (0, 1)]
    runs = [statistics.nested_bootstrap(*arms, labels, np.arange(60), seed=s) for s in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("second", "metric", "message"),
    [((2, 3, 2), "accuracy", "draws"), ((2, 2, 2), "precision", "choose from"), ((2, 0, 2), "accuracy", "empty")],
)
def test_arms_that_do_not_fit_are_refused(second: tuple[int, int, int], metric: str, message: str) -> None:
    labels = np.zeros(10, int)
    with pytest.raises(ValueError, match=message):
        statistics.nested_bootstrap(
            random_arm((2, 2, 2), labels, 2, 1, 0), random_arm(second, labels, 2, 1, 0), labels, np.arange(10), metric=metric
        )


@pytest.mark.parametrize("one_sided", [True, False])
def test_welch_equals_scipy(one_sided: bool) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, size=35), rng.normal(0, 2, size=20)
    ours = statistics.welch(a, b, one_sided=one_sided)
    expected = stats.ttest_ind(a, b, equal_var=False, alternative="greater" if one_sided else "two-sided")
    assert ours.p == pytest.approx(expected.pvalue)
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert (ours.low, ours.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert (ours.t, ours.degrees_of_freedom, ours.n) == (pytest.approx(expected.statistic), pytest.approx(expected.df), (35, 20))


def test_welch_without_spread() -> None:
    assert statistics.welch([1, 1], [1, 1]).p == 1
    assert statistics.welch([2, 2], [1, 1]).p == 0
    assert statistics.welch([1, 1], [2, 2], one_sided=True).p == 1
    with pytest.raises(ValueError, match="two runs"):
        statistics.welch([1], [1, 2])


def test_summary_recovers_known_variances() -> None:
    """Averaged over many simulated studies the components are the ones that were put in."""
    rng = np.random.default_rng(0)
    squares = []
    for _ in range(400):
        scores = (
            0.5 + rng.normal(0, 0.03, (4, 1, 1)) + rng.normal(0, 0.02, (1, 5, 1))
            + rng.normal(0, 0.01, (4, 5, 1)) + rng.normal(0, 0.04, (4, 5, 6))
        )  # fmt: skip
        summary = statistics.summarise(scores)
        assert summary.mean == pytest.approx(scores.mean())
        assert summary.std == pytest.approx(scores.std(ddof=1))
        assert summary.pretraining_seed.std == pytest.approx(scores.mean(axis=(1, 2)).std(ddof=1))
        kinds = (summary.pretraining_seed, summary.label_draw, summary.head_seed)
        squares.append([kind.component**2 for kind in kinds])
    np.testing.assert_allclose(np.sqrt(np.mean(squares, axis=0)), [0.03, 0.02, 0.04], rtol=0.08)


def test_summary_of_single_repeats_says_unknown() -> None:
    summary = statistics.summarise(np.array([[[0.4, 0.6]]]))
    assert (summary.mean, summary.pretraining_seed.n) == (pytest.approx(0.5), 1)
    assert math.isnan(summary.pretraining_seed.std)
    assert math.isnan(summary.label_draw.component)
    assert summary.head_seed.std == pytest.approx(np.std([0.4, 0.6], ddof=1))


def test_an_arm_against_itself_shows_what_head_seeds_alone_prove() -> None:
    """Seeds differ a little by chance, heads hardly: Welch over heads calls it significant, the nested bootstrap does not."""
    rng = np.random.default_rng(8)
    images = 500
    base, seeds = rng.random((4, 1, 1, images)), rng.normal(0, 0.03, size=(4, 1, 1, 1))
    hits = base + rng.normal(0, 0.01, size=(4, 2, 35, images)) < 0.5 + seeds
    summary = statistics.aa_summary(arm_of_hits(hits.astype(float)), np.zeros(images, int), np.arange(images), metric="accuracy")
    assert summary.pairs == 12
    assert summary.share_significant > 0.6
    assert summary.example is not None
    assert summary.example_seeds == (0, 1)
    assert summary.nested is not None
    assert summary.nested.p > 0.05
    alone = statistics.aa_summary(
        arm_of_hits(hits[:1].astype(float)), np.zeros(images, int), np.arange(images), metric="accuracy"
    )
    assert (alone.pairs, alone.nested, alone.example) == (0, None, None)
    assert math.isnan(alone.share_significant)


def test_a_whole_study_is_resampled_in_seconds() -> None:
    labels = np.random.default_rng(0).integers(0, 7, size=3000)
    arms = [random_arm((3, 3, 35), labels, 7, 1.0, seed) for seed in (0, 1)]
    start = time.perf_counter()
    statistics.nested_bootstrap(*arms, labels, np.arange(3000) // 2)
    assert time.perf_counter() - start < 30  # about 1 s on an idle core
