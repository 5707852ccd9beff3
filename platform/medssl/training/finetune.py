"""Fine-tuning: a linear head on an encoder, first alone, then with the whole network.

The defaults are paper 000's recipe in short: an epoch of the head at a fixed learning rate, then all weights with Adam on one
cycle, crops of 0.7-1 of the image, flips and small rotations. With `trained: head` the encoder stays frozen throughout: its
linear probe. Paper 002: Adam at 3e-4, weight decay 1e-4. Paper 003: `plateau` and `early_stopping` on the validation split,
label smoothing. Paper 004: SGD with momentum, `steps` in place of epochs. The loss is the class-weighted cross-entropy averaged
over the batch; of findings (labels (N, F), as in `medssl.metrics`) the binary cross-entropy of each that is known, averaged over
findings and batch, with a sigmoid each.

While the head trains alone the encoder is in evaluation mode: its batch norms use the statistics of the pretraining and
keep them, so the head meets the features that a linear probe would. Afterwards all batch norms train.

Shapes: N labelled images, B batch, H, W, C stored images, E feature width, K classes or findings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from medssl.errors import NonFiniteLoss
from medssl.metrics import SCORES
from medssl.networks.encoder import EncoderParams, build_encoder, feature_width, load_weights
from medssl.optim import OptimiserParams, Rate, ScheduleParams, apply_rate, build_optimiser, scheduled
from medssl.params import Params
from medssl.probes.links import activated
from medssl.training.finder import RangeTest, range_test
from medssl.training.labelled import LabelledImages, Labels, read_images
from medssl.training.stopping import EarlyStopping, EarlyStoppingParams, Plateau, PlateauParams, Watched
from medssl.views import ContentView, RandomView, ViewParams, eval_view, generator_for

if TYPE_CHECKING:
    from medssl.training.feed import ResidentImages

_JUDGED_AT_ONCE = 256


class FineTuneParams(Params):
    """Training of network and head on the labels. Learning rate and weight decay come from the protocol's search."""

    trained: Literal["all", "head"] = "all"
    """What trains after the head's own epochs. head: the encoder stays frozen and in evaluation mode throughout."""
    head_only_epochs: int = Field(1, ge=0)
    """Epochs with frozen encoder, in evaluation mode."""
    head_learning_rate: float = Field(1e-3, gt=0)
    """Adam's constant learning rate in these epochs."""
    epochs: int | None = Field(10, ge=1)
    """Epochs after these; null where `steps` says."""
    steps: int | None = Field(None, ge=1)
    """Steps after these, in place of epochs; 30,000 in paper 004."""
    batch_size: int = Field(64, ge=2)
    """Images in one step, at most: an epoch's steps share its images evenly, so that no batch is left tiny."""
    optimiser: Literal["adam", "adamw", "sgd"] = "adam"
    """adam, sgd: weight decay is an L2 penalty. adamw: decoupled. Biases and batch norms have none."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of sgd, first beta of adam and adamw; one_cycle moves it."""
    schedule: ScheduleParams = ScheduleParams(name="one_cycle")
    """Learning rate after the head's own epochs."""
    learning_rate_finder: bool = False
    """A range test before these epochs picks the peak learning rate, for each seed its own (paper 000)."""
    plateau: PlateauParams | None = None
    """Lowers the learning rate where the validation score stands still; with schedule constant."""
    early_stopping: EarlyStoppingParams | None = None
    """Ends where the validation score stands still; null trains to the end and keeps the last weights."""
    watched: Watched = "accuracy"
    """Validation score that plateau and early stopping go by."""
    class_weights: Literal["balanced", "none"] = "balanced"
    """balanced: an image weighs (labels / classes present / labels of its class); of a finding, images with and without it weigh
    the same together."""
    over_sample: bool = False
    """Draws as many images an epoch as there are, with replacement, each class equally often; with class_weights none."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target spread evenly over all classes; of a finding over there and not there."""
    views: ViewParams = ViewParams(
        crop_scale=(0.7, 1.0), horizontal_flip=0.25, vertical_flip=0.25, rotation=0.25, rotation_degrees=45.0, jitter=0.0,
        grey=0.0, blur=(0.0, 0.0), solarise=(0.0, 0.0),
    )  # fmt: skip
    """Augmentation of the training images."""
    test_passes: int = Field(0, ge=0, le=100)
    """Test-time augmentation: mean probabilities over so many passes with the training augmentation (3 in paper 000); 0 takes
    each image whole, once."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 trains the network under autocast (the loss stays in float32); predictions are in float32."""
    keep_weights: Literal["first", "all"] = "first"
    """Which head seeds leave their network's weights for `predict`: the first only, or all."""

    @model_validator(mode="after")
    def _consistent(self) -> FineTuneParams:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"epochs is {self.epochs} and steps {self.steps}: give one of them, and null for the other")
        if self.over_sample and self.class_weights == "balanced":
            raise ValueError("over_sample and class_weights balanced both make up for rare classes: set class_weights to none")
        if self.plateau is not None and self.schedule.name != "constant":
            raise ValueError(f"plateau lowers a constant learning rate, and schedule is {self.schedule.name}: set it to constant")
        return self

    @property
    def needs_validation(self) -> bool:
        """Whether the validation split steers the training."""
        return self.plateau is not None or self.early_stopping is not None

    def steps_for(self, images: int) -> tuple[int, int]:
        """Steps of an epoch, and of the training after the head's own epochs."""
        per_epoch = -(-images // self.batch_size)
        return per_epoch, self.steps if self.steps is not None else (self.epochs or 0) * per_epoch


class Classifier(nn.Module):
    """An encoder and a linear head."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(feature_width(encoder), classes)

    def forward(self, views_BCHW: Tensor) -> Tensor:
        """Logits (B, K)."""
        logits: Tensor = self.head(self.encoder(views_BCHW))
        return logits


@dataclass
class FineTuned:
    """A finished fine-tuning."""

    network: Classifier
    encoder: EncoderParams
    params: FineTuneParams
    device: torch.device
    findings: bool = False
    """Whether the outputs are findings, not classes."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Per epoch: epoch (from 1, the head's own first), loss, learning_rate at its end, and where it was watched `validation` and
    `validation_loss`."""
    finder: RangeTest | None = None
    """The range test, where one picked the learning rate."""
    best_epoch: int | None = None
    """Epoch whose weights were kept, counted as in `history`; None where they are the last."""

    def predict(self, images: ResidentImages, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Probabilities (N, K) of classes or findings of the images in `rows`."""
        chosen, parts = np.asarray(rows, dtype=np.int64), []
        for start in range(0, len(chosen), _JUDGED_AT_ONCE):
            stored_BHWC = read_images(images, chosen[start : start + _JUDGED_AT_ONCE], self.device)
            found_BK = probabilities(self.network, stored_BHWC, self.encoder, self.params, findings=self.findings)
            parts.append(found_BK.cpu())
        found: NDArray[np.float32] = torch.cat(parts).numpy()
        return found

    def weights(self) -> bytes:
        """Safetensors of the whole network: `encoder.*`, `head.weight` (K, E) and `head.bias` (K,)."""
        from safetensors.torch import save

        return save({name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()})

    def facts(self) -> dict[str, Any]:
        """What a report may show of the training; plain values."""
        return {
            "history": self.history,
            "best_epoch": self.best_epoch,
            "learning_rate_found": self.finder.chosen if self.finder is not None else None,
        }


@torch.inference_mode()
def probabilities(
    network: nn.Module, stored_BHWC: Tensor, encoder: EncoderParams, params: FineTuneParams, *, findings: bool = False
) -> Tensor:
    """Probabilities (B, K) of classes, or of findings, of stored images (B, H, W, C) uint8, by the network in evaluation mode.

    With `test_passes` the mean over augmented passes. Their draws come from an image's own bytes: the same image gets the same
    probabilities whatever others are predicted with it.
    """
    network.eval()
    if params.test_passes:
        view = ContentView(params.views, encoder)
        passes = [view(stored_BHWC, number) for number in range(params.test_passes)]
    else:
        passes = [eval_view(stored_BHWC, encoder)]
    logits = (network(views_BCHW.contiguous(memory_format=torch.channels_last)).float() for views_BCHW in passes)
    return torch.stack([activated(logits_BK, findings=findings) for logits_BK in logits]).mean(dim=0)


def finetune(
    encoder_weights: bytes | None,
    encoder: EncoderParams,
    images: ResidentImages,
    rows: Sequence[int] | NDArray[np.int64],
    labels: Sequence[int] | NDArray[np.int64],
    classes: int,
    params: FineTuneParams,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    seed: int,
    validation: Labels | None = None,
    device: str | torch.device = "cpu",
    after_epoch: Callable[[int, FineTuned], None] | None = None,
) -> FineTuned:
    """Trains a classifier on the images in `rows`; the seed decides the head's start, the order and the augmentation.

    The same seed gives the same network on the CPU with the same number of threads; GPUs sum in varying order. Torch's
    global generator is left as it was.

    Args:
        encoder_weights: safetensors to start from; None starts from the random network of `seed`.
        labels: class of each of `rows`, or labels (N, F) of its findings.
        learning_rate: peak of the schedule; not used where a range test picks it.
        weight_decay: see `FineTuneParams.optimiser`; biases and batch norms excluded.
        validation: labelled images that plateau and early stopping go by; only they look at them.
        after_epoch: called with the number of an epoch (from 1, after the head's own) and the network as it is then, which may
            `predict`. What it raises ends the training.

    Raises:
        NonFiniteLoss: the loss turned NaN or infinite.
        ValueError: unusable labels, or plateau or early stopping without validation images.
    """
    if params.needs_validation and validation is None:
        raise ValueError("plateau and early_stopping go by validation images, and none are given")
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(generator_for("finetune", seed).initial_seed())  # the head's start, and dropout where there is any
        network = Classifier(_start(encoder_weights, encoder, seed), classes)
        network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        labelled = LabelledImages(
            images, Labels(rows, labels), classes, device, class_weights=params.class_weights, over_sample=params.over_sample
        )
        judged = LabelledImages(images, validation, classes, device) if validation and params.needs_validation else None
        tuned = FineTuned(network, encoder, params, device, labelled.findings)
        _Training(tuned, labelled, judged, seed, after_epoch).run(learning_rate, weight_decay)
    network.eval()
    return tuned


def _start(weights: bytes | None, encoder: EncoderParams, seed: int) -> nn.Module:
    network = build_encoder(encoder, seed)
    if weights is not None:
        load_weights(network, weights)
    return network


class _Training:
    """One fine-tuning under way."""

    def __init__(
        self, tuned: FineTuned, labelled: LabelledImages, judged: LabelledImages | None, seed: int,
        after_epoch: Callable[[int, FineTuned], None] | None,
    ) -> None:  # fmt: skip
        self.tuned, self.labelled, self.judged, self.seed = tuned, labelled, judged, seed
        self.after_epoch = after_epoch
        self.network, self.params = tuned.network, tuned.params
        self.view = RandomView(self.params.views, tuned.encoder)
        self.per_epoch, self.steps = self.params.steps_for(len(labelled))

    def run(self, learning_rate: float, weight_decay: float) -> None:
        """The head alone, then what `trained` says."""
        params, head = self.params, self.network.head
        alone = OptimiserParams(name="adam", learning_rate=params.head_learning_rate, weight_decay=0)
        constant = ScheduleParams(name="constant")
        self._phase(head, alone, constant, 0, params.head_only_epochs * self.per_epoch, watching=False)
        trained: nn.Module = self.network if params.trained == "all" else head
        optimiser = OptimiserParams(
            name=params.optimiser, learning_rate=learning_rate, weight_decay=weight_decay, momentum=params.momentum
        )
        if params.learning_rate_finder:
            self.tuned.finder = self._find(trained, optimiser)
            optimiser = optimiser.model_copy(update={"learning_rate": self.tuned.finder.chosen})
        self._phase(trained, optimiser, params.schedule, params.head_only_epochs, self.steps, watching=self.judged is not None)

    def _phase(
        self, trained: nn.Module, optimiser_params: OptimiserParams, schedule: ScheduleParams, first_epoch: int, total: int,
        *, watching: bool,
    ) -> None:  # fmt: skip
        """`total` steps of `trained` (the head or all)."""
        params, done, epoch = self.params, 0, first_epoch
        optimiser = build_optimiser(trained, optimiser_params)
        plateau = Plateau(params.plateau, params.watched) if watching and params.plateau else None
        stopping = EarlyStopping(params.early_stopping, params.watched) if watching and params.early_stopping else None
        kept: dict[str, Tensor] | None = None
        while done < total and not (stopping and stopping.over):
            self.network.train(trained is self.network)
            losses = torch.zeros((), device=self.labelled.device)
            order = generator_for("finetune", "order", self.seed, epoch)
            batches = self.labelled.batches(params.batch_size, order)[: total - done]
            for step, positions_B in enumerate(batches):
                share, momentum = scheduled(schedule, done, total, self.per_epoch)
                rate = apply_rate(optimiser, Rate(share * (plateau.factor if plateau else 1.0), momentum))
                losses += self._step(trained, optimiser, positions_B, epoch * self.per_epoch + step)
                done += 1
            epoch += 1
            mean = float(losses) / len(batches)
            if not np.isfinite(mean):
                raise NonFiniteLoss(
                    f"fine-tuning seed {self.seed}: the loss is not finite in epoch {epoch} (learning rate {rate:.3g}): lower it"
                )
            line = {"epoch": float(epoch), "loss": mean, "learning_rate": rate}
            if watching:
                score, line["validation_loss"] = self._validate()
                line["validation"] = score
                if plateau:
                    plateau.epoch(score)
                if stopping and stopping.epoch(score):
                    kept = copy.deepcopy(self.network.state_dict())
            self.tuned.history.append(line)
            if self.after_epoch is not None and epoch > params.head_only_epochs:
                self.after_epoch(epoch - params.head_only_epochs, self.tuned)
        if stopping and kept is not None:
            self.network.load_state_dict(kept)
            self.tuned.best_epoch = first_epoch + stopping.best_epoch

    def _step(self, trained: nn.Module, optimiser: torch.optim.Optimizer, positions_B: Tensor, step: int) -> Tensor:
        """One step on these images; their loss."""
        views_BCHW = self.view(self.labelled.read(positions_B), seed=self.seed, step=step)
        loss = self._loss(trained, views_BCHW, positions_B.to(self.labelled.device))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        return loss.detach()

    def _loss(self, trained: nn.Module, views_BCHW: Tensor, positions_B: Tensor) -> Tensor:
        reduced = self.params.precision == "bfloat16"
        with torch.autocast(self.labelled.device.type, torch.bfloat16, enabled=reduced):
            views_BCHW = views_BCHW.contiguous(memory_format=torch.channels_last)
            with torch.set_grad_enabled(trained is self.network):
                features_BE = self.network.encoder(views_BCHW)
            logits_BK = self.network.head(features_BE)
        # Over the number of images, not over their weights as torch does: a batch of rare classes is to count more.
        return self.labelled.losses(logits_BK.float(), positions_B, self.params.label_smoothing).mean()

    def _validate(self) -> tuple[float, float]:
        """The watched score and the loss on the validation images, each taken as `predict` takes it."""
        assert self.judged is not None
        found_NK = self.tuned.predict(self.judged.images, self.judged.rows)
        loss = self.judged.judged_loss(torch.from_numpy(found_NK))
        if self.params.watched == "loss":
            return loss, loss
        return SCORES[self.params.watched](found_NK.astype(np.float64), self.judged.labels_N.cpu().numpy(), None), loss

    def _find(self, trained: nn.Module, optimiser_params: OptimiserParams) -> RangeTest:
        """The range test, after which the network is as it was."""
        before = copy.deepcopy(self.network.state_dict())
        optimiser = build_optimiser(trained, optimiser_params)
        self.network.train(trained is self.network)
        batches: list[Tensor] = []
        steps = 0

        def step(rate: float) -> float:
            nonlocal steps
            if not batches:
                order = generator_for("finetune", "finder", self.seed, steps)
                batches.extend(self.labelled.batches(self.params.batch_size, order))
            for group in optimiser.param_groups:
                group["lr"] = rate
            steps += 1
            return float(self._step(trained, optimiser, batches.pop(), -steps))

        found = range_test(step)
        self.network.load_state_dict(before)
        return found
