"""Fine-tuning: determinism, what the two phases train, weights for predict, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load

from medssl.errors import NonFiniteLoss
from medssl.networks.encoder import EncoderParams, build_encoder, estimate_batch_norm, save_weights
from medssl.training.feed import ResidentImages
from medssl.training.finetune import Classifier, FineTuneParams, finetune
from medssl.training.labelled import LabelledImages, Labels
from medssl.views import eval_view, generator_for

ENCODER = EncoderParams(name="resnet10t", image_px=32)
SHORT = FineTuneParams(epochs=2, batch_size=16)


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return np.random.default_rng(1).choice(3, size=240, p=[0.6, 0.3, 0.1])


@pytest.fixture(scope="module")
def images(labels: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> ResidentImages:
    """Stripes whose direction is the class, in random colours and phases: no colour statistic tells them apart."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:32, 0:32] / 32
    pixels = np.empty((len(labels), 32, 32, 3), np.uint8)
    for i, label in enumerate(labels):
        wave = np.sin(2 * np.pi * (4 * (x, y, (x + y) / 1.4)[label] + rng.random()))
        colour = rng.random(3)
        pixels[i] = np.clip((0.5 + 0.4 * wave[..., None] * colour + 0.1 * rng.normal(size=(32, 32, 3))) * 255, 0, 255)
    ids = [f"image-{i:04d}" for i in range(len(pixels))]
    return ResidentImages.write(tmp_path_factory.mktemp("resident") / "digest", pixels, ids)


@pytest.fixture(scope="module")
def weights(images: ResidentImages) -> bytes:
    encoder = build_encoder(ENCODER, 0)
    estimate_batch_norm(encoder, [eval_view(torch.from_numpy(np.array(images.images[:64])), ENCODER)])
    return save_weights(encoder)


def test_a_seed_repeats_itself_and_another_differs(images: ResidentImages, labels: np.ndarray, weights: bytes) -> None:
    rows = np.arange(40)
    state = torch.get_rng_state()
    runs = [
        finetune(weights, ENCODER, images, rows, labels[rows], 3, SHORT, learning_rate=1e-3, seed=seed).weights()
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_head_alone_leaves_the_encoder_as_it_was(images: ResidentImages, labels: np.ndarray, weights: bytes) -> None:
    """A whole phase with a vanishing learning rate shows what the head phase did: batch norms move in the second only."""
    params = FineTuneParams(head_only_epochs=2, epochs=1, batch_size=20)
    rows = np.arange(40)
    tuned = finetune(weights, ENCODER, images, rows, labels[rows], 3, params, learning_rate=1e-30, seed=0)
    after, before = load(tuned.weights()), load(weights)
    for name, value in before.items():
        moved = not torch.allclose(after[f"encoder.{name}"].double(), value.double(), atol=1e-12)  # zeros move by 1e-30
        assert moved == any(part in name for part in ("running_mean", "running_var", "num_batches_tracked")), name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for("finetune", 0).initial_seed())
        start = Classifier(build_encoder(ENCODER, 0), 3).head.weight
    assert not torch.equal(after["head.weight"], start.detach())
    steps = {int(v) for k, v in after.items() if k.endswith("num_batches_tracked")}
    assert steps == {int(v) + 2 for k, v in before.items() if k.endswith("num_batches_tracked")}


def test_it_learns_what_colour_cannot_tell(images: ResidentImages, labels: np.ndarray, weights: bytes) -> None:
    train, test = np.arange(160), np.arange(160, 240)
    params = FineTuneParams(epochs=6, batch_size=16, views=FineTuneParams().views.model_copy(update={"rotation": 0.0}))
    tuned = finetune(weights, ENCODER, images, train, labels[train], 3, params, learning_rate=3e-3, seed=0)
    probabilities = tuned.predict(images, test)
    assert probabilities.shape == (80, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    recall = [np.mean(probabilities.argmax(axis=1)[labels[test] == k] == k) for k in range(3)]
    assert np.mean(recall) > 0.8


def test_the_weights_give_the_predictions(images: ResidentImages, labels: np.ndarray, weights: bytes) -> None:
    rows = np.arange(40)
    tuned = finetune(weights, ENCODER, images, rows, labels[rows], 3, SHORT, learning_rate=1e-3, seed=1)
    tensors = load(tuned.weights())
    encoder = build_encoder(ENCODER, 9)
    encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in tensors.items() if k.startswith("encoder.")})
    with torch.inference_mode():
        features = encoder.eval()(eval_view(torch.from_numpy(np.array(images.images[:50])), ENCODER))
        expected = torch.softmax(features @ tensors["head.weight"].T + tensors["head.bias"], dim=1)
    np.testing.assert_allclose(tuned.predict(images, range(50)), expected.numpy(), atol=1e-5)


def test_balanced_weights_raise_the_recall_of_the_rare_class(images: ResidentImages, labels: np.ndarray, weights: bytes) -> None:
    rows = np.arange(100)
    shares = {}
    for kind in ("balanced", "none"):
        params = FineTuneParams(head_only_epochs=3, epochs=1, batch_size=20, head_learning_rate=0.01, class_weights=kind)
        tuned = finetune(weights, ENCODER, images, rows, labels[rows], 3, params, learning_rate=1e-30, seed=0)
        shares[kind] = float(tuned.predict(images, rows)[:, 2].mean())
    assert shares["balanced"] > shares["none"] + 0.05


def test_batches_share_an_epoch_evenly(images: ResidentImages, labels: np.ndarray) -> None:
    labelled = LabelledImages(images, Labels(np.arange(65), labels[:65]), 3, torch.device("cpu"), class_weights="balanced")
    batches = labelled.batches(64, torch.Generator().manual_seed(0))
    assert [len(b) for b in batches] == [33, 32]
    assert sorted(torch.cat(batches).tolist()) == list(range(65))
    assert float(labelled.weights_N.mean()) == pytest.approx(1)


def test_bfloat16_and_weight_decay_train_too(images: ResidentImages, labels: np.ndarray, weights: bytes) -> None:
    rows = np.arange(32)
    params = FineTuneParams(head_only_epochs=0, epochs=1, batch_size=16, precision="bfloat16", label_smoothing=0.1)
    norms = []
    for decay in (0.0, 100.0):
        tuned = finetune(weights, ENCODER, images, rows, labels[rows], 3, params, learning_rate=1e-3, weight_decay=decay, seed=0)
        assert np.isfinite(tuned.predict(images, rows)).all()
        norms.append(float(load(tuned.weights())["encoder.conv1.0.weight"].norm()))
    assert norms[1] < norms[0]


def test_a_diverging_training_says_where(images: ResidentImages, labels: np.ndarray, weights: bytes) -> None:
    rows = np.arange(32)
    with pytest.raises(NonFiniteLoss, match=r"seed 3.*epoch \d.*learning rate"):
        finetune(weights, ENCODER, images, rows, labels[rows], 3, SHORT, learning_rate=1e30, seed=3)


@pytest.mark.parametrize(("rows", "labels_given"), [([0, 1, 2], [0, 1]), ([0], [0]), ([0, 1], [0, 3])])
def test_unusable_labels_are_refused(images: ResidentImages, weights: bytes, rows: list[int], labels_given: list[int]) -> None:
    with pytest.raises(ValueError, match=r"labels"):
        finetune(weights, ENCODER, images, rows, labels_given, 3, SHORT, learning_rate=1e-3, seed=0)
