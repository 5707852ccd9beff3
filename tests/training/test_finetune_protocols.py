"""What the papers' fine-tunings add: schedules, steps, stopping, over-sampling, a frozen encoder, test-time augmentation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load
from torch import nn

from medssl.networks.encoder import EncoderParams, build_encoder, save_weights
from medssl.optim import ScheduleParams
from medssl.training.feed import ResidentImages
from medssl.training.finetune import FineTuned, FineTuneParams, finetune
from medssl.training.labelled import LabelledImages, Labels
from medssl.training.stopping import EarlyStopping, EarlyStoppingParams, Plateau, PlateauParams
from medssl.views import ContentView, ViewParams, eval_view

ENCODER = EncoderParams(name="test_resnet", image_px=32)
CONSTANT = ScheduleParams(name="constant")
LABELS = np.random.default_rng(1).choice(3, size=60, p=[0.7, 0.2, 0.1])
TRAIN, VALIDATION = np.arange(40), np.arange(40, 60)
STILL = ViewParams(
    crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), horizontal_flip=0.0, vertical_flip=0.0, jitter=0.0, grey=0.0,
    blur=(0.0, 0.0), solarise=(0.0, 0.0),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ResidentImages:
    """Noise about a brightness that the class decides."""
    rng = np.random.default_rng(0)
    pixels = np.clip(60 + 60 * LABELS[:, None, None, None] + rng.normal(0, 40, (60, 32, 32, 3)), 0, 255).astype(np.uint8)
    return ResidentImages.write(tmp_path_factory.mktemp("resident") / "digest", pixels, [f"image-{i:02d}" for i in range(60)])


def tuned(
    images: ResidentImages, rate: float = 1e-3, *, validation: bool = False,
    after_epoch: Callable[[int, FineTuned], None] | None = None, **fields: Any,
) -> FineTuned:  # fmt: skip
    params = FineTuneParams(**{"epochs": 3, "batch_size": 20, **fields})
    judged = Labels(VALIDATION, LABELS[VALIDATION]) if validation else None
    weights = save_weights(build_encoder(ENCODER, 0))
    return finetune(
        weights, ENCODER, images, TRAIN, LABELS[TRAIN], 3, params, learning_rate=rate, seed=4, validation=judged,
        after_epoch=after_epoch,
    )  # fmt: skip


def test_steps_and_epochs_say_the_same(images: ResidentImages) -> None:
    by_epochs, by_steps = tuned(images, schedule=CONSTANT), tuned(images, schedule=CONSTANT, epochs=None, steps=6)
    assert by_epochs.weights() == by_steps.weights() and len(by_epochs.history) == len(by_steps.history) == 4
    cut = tuned(images, schedule=CONSTANT, epochs=None, steps=5)
    assert len(cut.history) == 4 and cut.weights() != by_steps.weights()
    assert FineTuneParams(epochs=None, steps=30_000, batch_size=256).steps_for(1000) == (4, 30_000)


def test_who_looks_on_after_each_epoch_changes_nothing(images: ResidentImages) -> None:
    seen: list[tuple[int, bytes]] = []

    def look(epoch: int, network: FineTuned) -> None:
        network.predict(images, VALIDATION)
        seen.append((epoch, network.weights()))

    watched = tuned(images, after_epoch=look, head_only_epochs=2)
    assert watched.weights() == tuned(images, head_only_epochs=2).weights() == seen[-1][1]
    assert [epoch for epoch, _ in seen] == [1, 2, 3] and len({weights for _, weights in seen}) == 3


def test_the_schedule_is_the_recipes(images: ResidentImages) -> None:
    step = ScheduleParams(name="step", step_epochs=2, step_factor=0.5)
    rates = [line["learning_rate"] for line in tuned(images, 0.01, schedule=step, epochs=5).history]
    assert rates == pytest.approx([1e-3, 0.01, 0.01, 0.005, 0.005, 0.0025])


def test_sgd_is_torchs(images: ResidentImages) -> None:
    """A frozen encoder and unmoved images: the head alone, step by step by torch's own SGD."""
    fields = {"head_only_epochs": 0, "trained": "head", "optimiser": "sgd", "momentum": 0.8, "schedule": CONSTANT, "views": STILL}
    plain = tuned(images, 1e-30, class_weights="none", batch_size=40, epochs=1, **fields)
    found = tuned(images, 0.05, class_weights="none", batch_size=40, epochs=4, **fields)
    head = nn.Linear(plain.network.head.in_features, 3)
    head.load_state_dict(plain.network.head.state_dict())
    with torch.no_grad():
        features = plain.network.encoder(eval_view(torch.from_numpy(np.array(images.images[:40])), ENCODER))
    optimiser = torch.optim.SGD(head.parameters(), 0.05, momentum=0.8)
    for _ in range(4):
        optimiser.zero_grad()
        nn.functional.cross_entropy(head(features), torch.from_numpy(LABELS[:40])).backward()
        optimiser.step()
    torch.testing.assert_close(found.network.head.weight, head.weight, atol=1e-4, rtol=1e-3)


def test_a_frozen_encoder_is_left_as_it_was(images: ResidentImages) -> None:
    before, found = build_encoder(ENCODER, 0).state_dict(), load(tuned(images, 0.01, trained="head").weights())
    assert all(torch.equal(found[f"encoder.{name}"], value) for name, value in before.items())


def test_plateau_is_torchs_and_stopping_counts_epochs() -> None:
    scores = [0.5, 0.6, 0.6, 0.59, 0.6, 0.61, 0.6, 0.5, 0.4, 0.3]
    plateau, stopping = Plateau(PlateauParams(), "accuracy"), EarlyStopping(EarlyStoppingParams(), "accuracy")
    factors, better = [], []
    for score in scores:
        plateau.epoch(score)
        factors.append(plateau.factor)
        better.append(stopping.epoch(score))
        if stopping.over:
            break
    # better at epochs 1 and 2; epochs 3, 4 are waited out, 5 lowers the rate, and is the third without a better score
    assert factors == [1, 1, 1, 1, 0.5] and better == [True, True, False, False, False] and stopping.best_epoch == 2
    falling = EarlyStopping(EarlyStoppingParams(patience=1), "loss")
    assert [falling.epoch(loss) for loss in (1.0, 0.5, float("nan"))] == [True, True, False] and falling.over
    lower = Plateau(PlateauParams(patience=0), "loss")
    lower.epoch(1.0)
    lower.epoch(0.5)
    assert lower.factor == 1
    lower.epoch(0.6)
    assert lower.factor == 0.5


def test_training_stops_early_and_keeps_the_best_epoch(images: ResidentImages) -> None:
    fields: dict[str, Any] = {"schedule": CONSTANT, "plateau": {"patience": 0}, "watched": "loss", "epochs": 30}
    fields["early_stopping"] = {"patience": 2}
    found = tuned(images, 0.02, validation=True, **fields)
    scores = [line["validation"] for line in found.history[1:]]
    assert [line["validation_loss"] for line in found.history[1:]] == scores, "the loss is what was watched"
    assert len(scores) < 30 and found.best_epoch == 2 + int(np.argmin(scores)) and len(scores) == int(np.argmin(scores)) + 3
    rates = [line["learning_rate"] for line in found.history[1:]]
    risen = next(n for n in range(1, len(scores)) if scores[n] >= min(scores[:n]))
    assert rates[: risen + 1] == [0.02] * (risen + 1) and rates[risen + 1] == 0.01
    probabilities = torch.from_numpy(found.predict(images, VALIDATION))
    loss = nn.functional.nll_loss(probabilities.log(), torch.from_numpy(LABELS[VALIDATION]))
    assert float(loss) == pytest.approx(min(scores), rel=1e-5)
    with pytest.raises(ValueError, match="go by validation images"):
        tuned(images, **fields)


def test_over_sampling_draws_classes_alike(images: ResidentImages) -> None:
    labelled = LabelledImages(images, Labels(TRAIN, LABELS[TRAIN]), 3, torch.device("cpu"), over_sample=True)
    generator = torch.Generator().manual_seed(0)
    epochs = [torch.cat(labelled.batches(16, generator)) for _ in range(300)]
    assert all(len(epoch) == 40 for epoch in epochs)
    shares = np.bincount(LABELS[TRAIN][torch.cat(epochs).numpy()], minlength=3) / (300 * 40)
    np.testing.assert_allclose(shares, 1 / 3, atol=0.02)  # 4.6 standard errors


def test_test_time_augmentation_is_the_mean_of_passes(images: ResidentImages) -> None:
    found = tuned(images, test_passes=3)
    stored = torch.from_numpy(np.array(images.images[:10]))
    view = ContentView(found.params.views, ENCODER)
    with torch.no_grad():
        passes = [found.network(view(stored, number)).softmax(1) for number in range(3)]
    assert not torch.allclose(passes[0], passes[1], atol=1e-4)
    expected = torch.stack(passes).mean(0).numpy()
    np.testing.assert_allclose(found.predict(images, range(10)), expected, atol=1e-6)
    np.testing.assert_allclose(found.predict(images, [7, 3]), expected[[7, 3]], atol=1e-6)
    assert tuned(images).weights() == found.weights(), "training is what it is without"


def test_the_finder_picks_each_seeds_rate(images: ResidentImages) -> None:
    found = tuned(images, 123.0, learning_rate_finder=True, epochs=1)
    assert found.finder is not None and found.facts()["learning_rate_found"] == found.finder.chosen < 10
    given = tuned(images, found.finder.chosen, epochs=1)
    assert given.weights() == found.weights(), "the range test leaves no trace"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"steps": 5}, "epochs is 10 and steps 5: give one"),
        ({"epochs": None}, "epochs is None and steps None"),
        ({"over_sample": True}, "set class_weights to none"),
        ({"plateau": {}}, "schedule is one_cycle: set it to constant"),
    ],
)
def test_bad_combinations_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        FineTuneParams(**fields)


def test_content_views_follow_the_image_alone(tmp_path: Path) -> None:
    stored = torch.randint(0, 256, (4, 40, 40, 3), dtype=torch.uint8)
    view = ContentView(ViewParams(cutout=1.0), ENCODER)
    together = view(stored, 1)
    assert together.shape == (4, 3, 32, 32)
    torch.testing.assert_close(view(stored[2:3], 1)[0], together[2], atol=1e-5, rtol=0)
    assert not torch.allclose(view(stored, 0), together, atol=1e-3)
