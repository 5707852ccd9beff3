"""Probes and fine-tuning of several findings an image: against scikit-learn, torch's own loss, and one finding at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from medssl.metrics import UNKNOWN
from medssl.probes.heads import apply_heads, fit_heads
from medssl.probes.knn import KnnParams, k_warning, knn_finding_scores, largest_useful_k
from medssl.probes.linear import LinearProbeParams
from medssl.probes.links import finding_weights
from medssl.probes.mlp import MlpProbeParams
from medssl.training.labelled import LabelledImages, Labels

linear_model = pytest.importorskip("sklearn.linear_model")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def lesson(images: int = 120, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Standardised features and labels (N, 3), a third of them unknown."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images, width, generator=generator)
    features = (features - features.mean(0)) / features.std(0, correction=0)
    scores = features @ torch.randn(width, 3, generator=generator) + torch.tensor([-1.5, 0.0, 1.0])
    labels = (scores + torch.randn(images, 3, generator=generator) > 0).long()
    labels[torch.rand(images, 3, generator=generator) < 0.33] = UNKNOWN
    return features, labels


@pytest.mark.parametrize("weights", ["balanced", "none"])
def test_each_finding_of_a_linear_head_is_a_logistic_regression_on_what_is_known(weights: str) -> None:
    features, labels = lesson()
    params = LinearProbeParams(
        epochs=3000, batch_size=len(labels), class_weights=weights, schedule="cosine", vary=("head",), standardise=False
    )
    decay = 0.05
    heads = fit_heads(params, features, labels, 3, [0, 1], {"learning_rate": 0.05, "weight_decay": decay})
    for f in range(3):
        known = (labels[:, f] != UNKNOWN).numpy()
        model = linear_model.LogisticRegression(
            C=1 / (known.sum() * decay), class_weight="balanced" if weights == "balanced" else None, tol=1e-10, max_iter=10_000
        )
        model.fit(features.numpy()[known], labels[:, f].numpy()[known])
        for head in heads:
            assert head["weight"][f].numpy() == pytest.approx(model.coef_[0], abs=1e-3)
            assert float(head["bias"][f]) == pytest.approx(model.intercept_[0], abs=1e-3)


def test_a_finding_comes_out_the_same_whatever_others_are_named() -> None:
    features, labels = lesson()
    params = LinearProbeParams(epochs=400, batch_size=len(labels), schedule="cosine", vary=("head",), standardise=False)
    point = {"learning_rate": 0.05, "weight_decay": 0.1}
    both = fit_heads(params, features, labels, 3, [0], point)[0]["weight"][:1]
    alone = fit_heads(params, features, labels[:, :1], 1, [0], point)[0]["weight"]
    assert both.numpy() == pytest.approx(alone.numpy(), abs=1e-3)


def test_an_mlp_head_follows_autograd() -> None:
    """The written-out gradient of one step of SGD against torch's loss, masked by hand."""
    features, labels = lesson(images=40)
    params = MlpProbeParams(
        epochs=1, batch_size=40, hidden=5, optimiser="sgd", schedule="constant", vary=("head",), standardise=False,
        class_weights="none",
    )  # fmt: skip
    start = fit_heads(params, features, labels, 3, [4], {"learning_rate": 1e-12, "weight_decay": 0.0})[0]
    moved = fit_heads(params, features, labels, 3, [4], {"learning_rate": 0.5, "weight_decay": 0.0})[0]
    tensors = {name: value.double().requires_grad_() for name, value in start.items()}
    hidden = torch.relu(features.double() @ tensors["hidden_SHE"].T + tensors["hidden_bias_SH"])
    logits = hidden @ tensors["out_SKH"].T + tensors["out_bias_SK"]
    loss = torch.zeros((), dtype=torch.float64)
    for f in range(3):
        known = labels[:, f] != UNKNOWN
        loss = loss + nn.functional.binary_cross_entropy_with_logits(logits[known, f], labels[known, f].double())
    loss.backward()
    for name, value in tensors.items():
        assert value.grad is not None
        expected = (value - 0.5 * value.grad).detach().numpy()
        assert moved[name].numpy() == pytest.approx(expected, abs=1e-5), name


def test_probabilities_of_findings_need_not_sum_to_one() -> None:
    features, labels = lesson()
    for params in (LinearProbeParams(epochs=30, vary=("head",)), MlpProbeParams(epochs=30, hidden=8, vary=("head",))):
        heads = fit_heads(params, features, labels, 3, [0, 1], {"learning_rate": 0.05, "weight_decay": 0.0})
        found = apply_heads(params, heads, features, 3, findings=True)
        assert found.shape == (2, 120, 3) and float((found.sum(dim=2) - 1).abs().max()) > 0.1
        known = labels != UNKNOWN
        assert float(((found[0] > 0.5) == (labels == 1))[known].double().mean()) > 0.7


def test_neighbours_vote_where_the_finding_is_known() -> None:
    bank = nn.functional.normalize(torch.randn(30, 4, generator=torch.Generator().manual_seed(1)))
    labels = torch.randint(-1, 2, (30, 2), generator=torch.Generator().manual_seed(2))
    queries = torch.randn(7, 4, generator=torch.Generator().manual_seed(3))
    found = knn_finding_scores(bank, labels, queries, 5, weights="uniform", balanced=False)
    for q, query in enumerate(nn.functional.normalize(queries)):
        for f in range(2):
            known = [n for n in range(30) if labels[n, f] != UNKNOWN]
            nearest = sorted(known, key=lambda n: -float(bank[n] @ query))[:5]
            assert float(found[q, f]) == pytest.approx(np.mean([int(labels[n, f]) for n in nearest]), abs=1e-6)
    fewest = min(int((labels[:, f] == side).sum()) for f in range(2) for side in (0, 1))
    assert largest_useful_k(labels, 2) == fewest
    warning = k_warning(fewest + 1, labels, ["edema", "mass"])
    assert warning is not None and f"k is {fewest + 1}" in warning and ("edema" in warning or "mass" in warning)
    params = KnnParams(k=5)
    head = fit_heads(params, bank, labels, 2, [0], {})
    assert apply_heads(params, head, queries, 2, findings=True).shape == (1, 7, 2)


def test_weights_of_a_finding_are_even_over_its_sides_and_zero_where_it_is_not_known() -> None:
    labels = torch.tensor([[1, 0], [0, UNKNOWN], [0, UNKNOWN], [UNKNOWN, 1]])
    assert finding_weights(labels, "balanced").tolist() == [[2.0, 2.0], [1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]
    plain = finding_weights(labels, "none").numpy()
    assert plain == pytest.approx(np.array([[4 / 3, 2], [4 / 3, 0], [4 / 3, 0], [0, 2]]))


def test_loss_of_a_fine_tuning_is_torchs_over_what_is_known() -> None:
    _, labels = lesson(images=20)
    images = LabelledImages(None, Labels(range(20), labels.numpy()), 3, torch.device("cpu"))  # type: ignore[arg-type]
    logits = torch.randn(20, 3, generator=torch.Generator().manual_seed(5))
    found = images.losses(logits, torch.arange(20), 0.2).mean()
    expected = 0.0
    for f in range(3):
        known = labels[:, f] != UNKNOWN
        smoothed = labels[known, f].float() * 0.8 + 0.1
        expected += float(nn.functional.binary_cross_entropy_with_logits(logits[known, f], smoothed)) / 3
    assert float(found) == pytest.approx(expected, abs=1e-6)
    known = labels != UNKNOWN
    watched = nn.functional.binary_cross_entropy(torch.sigmoid(logits)[known], labels[known].float())
    assert images.judged_loss(torch.sigmoid(logits)) == pytest.approx(float(watched), abs=1e-6)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0, 2], [1, 0]], r"labels lie in 0\.\.2: expected -1\.\.1"),
        ([[0, 1, 1], [1, 0, 1]], r"labels \(2, 3\): expected .*\(N, 2\)"),
    ],
)
def test_labels_that_are_none_are_refused(labels: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_heads(LinearProbeParams(vary=("head",)), torch.randn(2, 3), torch.tensor(labels), 2, [0],
                  {"learning_rate": 0.1, "weight_decay": 0.0})  # fmt: skip
    with pytest.raises(ValueError, match=message):
        LabelledImages(None, Labels([0, 1], np.array(labels)), 2, torch.device("cpu"))  # type: ignore[arg-type]
