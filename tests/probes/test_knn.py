"""kNN votes against a plain loop, against scikit-learn, and where weights, balance and chunks matter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from medssl.probes.knn import k_warning, knn_scores, largest_useful_k


def problem(images: int = 90, queries: int = 31, width: int = 6, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Bank, labels of three classes (one rare), queries; lengths differ widely, so that normalisation matters."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, size=images, p=[0.6, 0.3, 0.1])
    labels[:3] = range(3)
    centres = rng.normal(size=(3, width))
    bank = centres[labels] + rng.normal(size=(images, width))
    wanted = centres[rng.integers(0, 3, queries)] + rng.normal(size=(queries, width))
    lengths = rng.uniform(0.1, 50, (images, 1))
    arrays = (bank * lengths, labels, wanted * 7)
    return torch.from_numpy(arrays[0]).float(), torch.from_numpy(arrays[1]), torch.from_numpy(arrays[2]).float()


def by_loop(
    bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, k: int, classes: int,
    weights: str, temperature: float, balanced: bool,
) -> list[list[float]]:  # fmt: skip
    """The definition, image by image, in Python's floats."""
    bank_rows, query_rows, names = bank.tolist(), queries.tolist(), labels.tolist()
    shares = []
    for query in query_rows:
        near = []
        for row, name in zip(bank_rows, names, strict=True):
            dot = sum(a * b for a, b in zip(query, row, strict=True))
            near.append((dot / math.hypot(*query) / math.hypot(*row), name))
        near.sort(key=lambda pair: -pair[0])
        votes = [0.0] * classes
        for similarity, name in near[:k]:
            vote = math.exp(similarity / temperature) if weights == "similarity" else 1.0
            votes[name] += vote / (names.count(name) if balanced else 1)
        shares.append([vote / sum(votes) for vote in votes])
    return shares


@pytest.mark.parametrize("weights", ["similarity", "uniform"])
@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (20, 0.5), (90, 0.02)])
def test_votes_are_those_of_a_plain_loop(weights: str, balanced: bool, k: int, temperature: float) -> None:
    bank, labels, queries = problem()
    found = knn_scores(bank, labels, queries, k, 4, weights=weights, temperature=temperature, balanced=balanced)
    expected = torch.tensor(by_loop(bank, labels, queries, k, 4, weights, temperature, balanced))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(len(queries)))
    assert not found[:, 3].any()  # the class without images


@pytest.mark.parametrize("weights", ["similarity", "uniform"])
@pytest.mark.parametrize("k", [1, 5, 15])
def test_votes_are_scikit_learns(weights: str, k: int) -> None:
    neighbours = pytest.importorskip("sklearn.neighbors")
    bank, labels, queries = problem(seed=3)

    def of_distance(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / 0.07)

    rule = "uniform" if weights == "uniform" else of_distance
    model = neighbours.KNeighborsClassifier(n_neighbors=k, metric="cosine", weights=rule).fit(bank.numpy(), labels.numpy())
    expected = torch.from_numpy(model.predict_proba(queries.numpy())).float()
    found = knn_scores(bank, labels, queries, k, 3, weights=weights, balanced=False)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert torch.equal(found.argmax(dim=1), torch.from_numpy(model.predict(queries.numpy())))


def test_balance_lets_a_rare_class_win() -> None:
    """Nine neighbours are of the common class, one of the rare one, all equally near: the rare class has all its images there."""
    bank = torch.cat([torch.ones(10, 2), -torch.ones(90, 2)])
    labels = torch.cat([torch.zeros(9), torch.ones(1), torch.zeros(90)])
    query = torch.ones(1, 2)
    plain = knn_scores(bank, labels, query, 10, 2, balanced=False)
    balanced = knn_scores(bank, labels, query, 10, 2, balanced=True)
    assert plain.tolist() == [[pytest.approx(0.9), pytest.approx(0.1)]]
    assert balanced[0, 1] == pytest.approx(1 / (1 + 9 / 99))


def test_chunks_change_nothing_and_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, labels, queries = problem()
    whole = knn_scores(bank, labels, queries, 9, 3)
    for chunk in (1, 7, 31, 1000):
        torch.testing.assert_close(knn_scores(bank, labels, queries, 9, 3, chunk=chunk), whole, atol=1e-5, rtol=0)
    sizes = []
    topk = torch.Tensor.topk
    monkeypatch.setattr("medssl.probes.knn._CHUNK_ENTRIES", 400)
    monkeypatch.setattr(torch.Tensor, "topk", lambda self, *a, **o: (sizes.append(self.numel()), topk(self, *a, **o))[1])
    torch.testing.assert_close(knn_scores(bank, labels, queries, 9, 3), whole, atol=1e-5, rtol=0)
    assert max(sizes) <= 400 and sum(sizes) == len(bank) * len(queries)


def test_extreme_temperatures_and_features_stay_finite() -> None:
    bank, labels, queries = problem()
    for temperature in (1e-4, 1e4):
        assert torch.isfinite(knn_scores(bank, labels, queries, 20, 3, temperature=temperature)).all()
    alike = knn_scores(torch.zeros(9, 4), torch.arange(9) % 3, torch.zeros(2, 4), 9, 3)  # a dead encoder
    torch.testing.assert_close(alike, torch.full((2, 3), 1 / 3))


def test_the_rarest_class_bounds_k() -> None:
    labels = torch.tensor([0] * 50 + [2] * 7 + [3] * 20)
    assert largest_useful_k(labels, 4) == 7  # class 1 has none: nothing to gain by a smaller k
    assert k_warning(7, labels, ["mel", "nv", "df", "vasc"]) is None
    warning = k_warning(20, labels, ["mel", "nv", "df", "vasc"])
    assert warning is not None and "class 'df' has 7 images" in warning and "at least 13 of the 20" in warning
    assert "\n" not in warning


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0: the bank of 90 images allows 1 to 90"),
        ({"k": 91}, "k is 91"),
        ({"classes": 2}, r"labels lie in 0..2: expected 0..1"),
        ({"queries": torch.ones(3, 5)}, r"queries \(3, 5\) do not fit the bank \(90, 6\)"),
        ({"labels": torch.zeros(4)}, "expected"),
        ({"bank": torch.full((90, 6), float("nan"))}, "features of the bank hold NaN"),
        ({"temperature": 0.0}, "temperature is 0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    bank, labels, queries = problem()
    given = {"bank": bank, "labels": labels, "queries": queries, "k": 5, "classes": 3, "temperature": 0.07, **change}
    with pytest.raises(ValueError, match=message):
        knn_scores(*(given[n] for n in ("bank", "labels", "queries", "k", "classes")), temperature=given["temperature"])
