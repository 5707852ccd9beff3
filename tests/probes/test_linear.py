"""The linear probe against scikit-learn, one by one against lockstep, and its standardisation, weights and draws."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from medssl.probes.linear import LinearProbeParams, predict_heads, schedule_factor, train_linear_heads

SHARED = LinearProbeParams(vary=("head",))
OWN_ORDER = LinearProbeParams(vary=("head", "order"))


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem(images: int = 300, width: int = 24, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features with badly scaled columns and imbalanced, overlapping classes."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, size=images, p=np.array([8, 4, 2, 1])[:classes] / sum([8, 4, 2, 1][:classes]))
    labels[:classes] = range(classes)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    features = centres[labels] + 2.5 * rng.normal(size=(images, width))
    features = features * np.geomspace(0.01, 50, width) + np.linspace(-30, 30, width)
    return torch.from_numpy(features.astype(np.float32)), torch.from_numpy(labels)


def bank_of(features: torch.Tensor, passes: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(passes, *features.shape, generator=generator)
    return features + 0.3 * features.std(dim=0) * noise


@pytest.mark.parametrize("vary", [("head",), ("head", "order"), ("head", "order", "augmentation")])
def test_a_head_in_the_pack_equals_the_head_alone(vary: tuple[str, ...]) -> None:
    features, labels = problem()
    params = LinearProbeParams(vary=vary, epochs=20)
    bank = bank_of(features) if "augmentation" in vary else None
    pack = train_linear_heads(features, labels, 4, range(12), params, learning_rate=0.03, bank_PNE=bank)
    together = predict_heads(features, *pack)
    for seed in (0, 3, 11):
        alone = train_linear_heads(features, labels, 4, [seed], params, learning_rate=0.03, bank_PNE=bank)
        probabilities = predict_heads(features, *alone)[0]
        assert torch.equal(probabilities.argmax(dim=1), together[seed].argmax(dim=1))
        torch.testing.assert_close(probabilities, together[seed], atol=1e-5, rtol=0)


def test_training_repeats_itself_exactly() -> None:
    features, labels = problem()
    runs = [train_linear_heads(features, labels, 4, [3, 4], OWN_ORDER, learning_rate=0.01) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_a_grid_in_one_pack_equals_its_points_one_by_one() -> None:
    features, labels = problem()
    points = [(0.003, 0.1), (0.03, 0.001)]
    packed = train_linear_heads(
        features, labels, 4, [7, 8, 7, 8], OWN_ORDER,
        learning_rate=[p[0] for p in points for _ in range(2)], weight_decay=[p[1] for p in points for _ in range(2)],
    )  # fmt: skip
    for i, (rate, decay) in enumerate(points):
        single = train_linear_heads(features, labels, 4, [7, 8], OWN_ORDER, learning_rate=rate, weight_decay=decay)
        torch.testing.assert_close(packed[0][2 * i : 2 * i + 2], single[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("balanced", [True, False])
def test_the_minimum_is_scikit_learns(balanced: bool) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    features, labels = problem()
    scaled = preprocessing.StandardScaler().fit_transform(features.numpy().astype(np.float64))
    decay = 0.03
    reference = linear_model.LogisticRegression(
        class_weight="balanced" if balanced else None, C=1 / (len(labels) * decay), max_iter=10_000, tol=1e-10
    ).fit(scaled, labels.numpy())
    params = LinearProbeParams(
        vary=("head",), class_weights="balanced" if balanced else "none", epochs=600, batch_size=len(labels)
    )
    heads = train_linear_heads(features, labels, 4, [0, 1], params, learning_rate=0.03, weight_decay=decay)
    for probabilities in predict_heads(features, *heads).numpy():
        np.testing.assert_allclose(probabilities, reference.predict_proba(scaled), atol=2e-3)


def test_default_training_is_as_good_as_scikit_learn_on_new_images() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    balanced_accuracy_score = pytest.importorskip("sklearn.metrics").balanced_accuracy_score
    features, labels = problem(600, 64)
    new_features, new_labels = problem(3000, 64, seed=1)
    scaler = preprocessing.StandardScaler().fit(features.numpy())
    best = max(
        balanced_accuracy_score(
            new_labels,
            linear_model.LogisticRegression(class_weight="balanced", C=c, max_iter=5000)
            .fit(scaler.transform(features.numpy()), labels)
            .predict(scaler.transform(new_features.numpy())),
        )
        for c in (0.001, 0.01, 0.1, 1, 10)
    )
    ours = []
    for rate in (0.003, 0.01):
        for decay in (0.01, 0.1, 1.0):
            heads = train_linear_heads(features, labels, 4, [0, 1, 2], OWN_ORDER, learning_rate=rate, weight_decay=decay)
            predicted = predict_heads(new_features, *heads).argmax(dim=2)
            ours.append(np.mean([balanced_accuracy_score(new_labels, p) for p in predicted]))
    assert best > 0.5  # the problem can be learnt
    assert max(ours) > best - 0.01


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_steps_equal_torchs_own_optimisers(optimiser: str) -> None:
    features, labels = problem(50, 6)
    params = LinearProbeParams(
        vary=("head",), optimiser=optimiser, schedule="constant", epochs=5, batch_size=50, standardise=False,
        class_weights="none",
    )  # fmt: skip
    features = features / 50
    start = train_linear_heads(features, labels, 4, [0], params, learning_rate=1e-30)
    weights, biases = (t[0].clone().requires_grad_() for t in start)
    groups = [{"params": [weights], "weight_decay": 0.1}, {"params": [biases], "weight_decay": 0.0}]
    reference = torch.optim.Adam(groups, lr=0.02) if optimiser == "adam" else torch.optim.SGD(groups, lr=0.02, momentum=0.9)
    for _ in range(5):
        reference.zero_grad()
        torch.nn.functional.cross_entropy(features @ weights.T + biases, labels).backward()
        reference.step()
    ours = train_linear_heads(features, labels, 4, [0], params, learning_rate=0.02, weight_decay=0.1)
    torch.testing.assert_close(ours[0][0], weights.detach(), atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(ours[1][0], biases.detach(), atol=2e-5, rtol=1e-3)


def test_heads_take_features_as_they_are_and_constant_features_do_no_harm() -> None:
    features, labels = problem()
    constant = torch.cat([features, torch.full((len(features), 1), 7.0)], dim=1)
    heads = train_linear_heads(constant, labels, 4, [0], OWN_ORDER, learning_rate=0.01)
    probabilities = predict_heads(constant, *heads)
    assert torch.isfinite(probabilities).all()
    torch.testing.assert_close(probabilities.sum(dim=2), torch.ones(1, len(labels)))
    shifted = train_linear_heads(constant * 3 + 100, labels, 4, [0], OWN_ORDER, learning_rate=0.01)
    torch.testing.assert_close(predict_heads(constant * 3 + 100, *shifted), probabilities, atol=5e-3, rtol=0)


def test_what_is_not_varied_is_shared() -> None:
    features, labels = problem()
    spread = {}
    for params in (SHARED, OWN_ORDER):
        heads = train_linear_heads(features, labels, 4, range(6), params, learning_rate=0.03)
        spread[params.vary] = float(predict_heads(features, *heads).std(dim=0).mean())
    assert spread[("head",)] < spread[("head", "order")]
    first, second = (train_linear_heads(features, labels, 4, [0], SHARED, learning_rate=0.03, order_seed=s)[0] for s in (0, 1))
    assert not torch.equal(first, second)


def test_heads_draw_from_every_pass_of_the_bank() -> None:
    """Each pass carries a column of its own that tells the class; only a head that sees the pass can use it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    features = torch.randn(200, 5, generator=generator)
    bank = features.repeat(4, 1, 1)
    for p in range(4):
        bank[p, :, p] = labels * 2.0 - 1
    params = LinearProbeParams(epochs=40)
    weights, _ = train_linear_heads(features, labels, 2, range(3), params, learning_rate=0.01, bank_PNE=bank)
    used = (weights[:, 1] - weights[:, 0]).abs()
    assert (used[:, :4].min(dim=1).values > 3 * used[:, 4]).all()


def test_balanced_weights_raise_the_recall_of_rare_classes() -> None:
    features, labels = problem(600, 8)
    recall = {}
    for kind in ("balanced", "none"):
        params = LinearProbeParams(vary=("head",), class_weights=kind)
        heads = train_linear_heads(features, labels, 4, [0], params, learning_rate=0.01)
        predicted = predict_heads(features, *heads)[0].argmax(dim=1)
        recall[kind] = float((predicted[labels == 3] == 3).float().mean())
    assert recall["balanced"] > recall["none"] + 0.2


@pytest.mark.parametrize("name", ["one_cycle", "cosine", "constant"])
def test_schedules_stay_within_their_bounds(name: str) -> None:
    for steps in (1, 2, 7, 640):
        factors = [schedule_factor(name, step, steps) for step in range(steps)]
        assert all(0 <= f <= 1 for f in factors)
    if name == "one_cycle":
        assert factors[0] == pytest.approx(1 / 25)
        assert max(factors) == pytest.approx(1)
        assert factors.index(max(factors)) == 160
        assert factors[-1] < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels_N": torch.zeros(3, dtype=torch.long)}, "expected"),
        ({"labels_N": torch.full((300,), 4)}, r"0\.\.3"),
        ({"seeds": []}, "no seed"),
        ({"params": LinearProbeParams()}, "bank"),
        ({"learning_rate": [0.1, 0.2, 0.3]}, "one per head"),
        ({"features_NE": torch.full((300, 24), torch.nan)}, "NaN"),
    ],
)
def test_unusable_input_is_refused(change: dict[str, object], message: str) -> None:
    features, labels = problem()
    arguments: dict[str, object] = {
        "features_NE": features, "labels_N": labels, "classes": 4, "seeds": [0], "params": SHARED, "learning_rate": 0.1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        train_linear_heads(**(arguments | change))  # type: ignore[arg-type]


def test_parameters_are_checked_and_put_in_one_order() -> None:
    with pytest.raises(ValidationError, match="head"):
        LinearProbeParams(vary=("order",))
    assert LinearProbeParams(vary=("augmentation", "order", "head")) == LinearProbeParams()
    assert SHARED.bank_passes == 0
    assert LinearProbeParams(augmented_passes=5).bank_passes == 5


def test_thirty_five_heads_train_in_seconds() -> None:
    features, labels = problem(1000, 512)
    start = time.perf_counter()
    train_linear_heads(features, labels, 4, range(35), OWN_ORDER, learning_rate=0.01)
    assert time.perf_counter() - start < 60  # about 4 s on an idle core; the bound allows for a busy machine
