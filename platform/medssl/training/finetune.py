"""Fine-tuning: a linear head on an encoder, first alone, then with the whole network.

Paper 000's recipe: an epoch of the head at a fixed learning rate, then all weights with Adam on one cycle, crops of 0.7-1 of
the image, flips and small rotations. The loss is the class-weighted cross-entropy averaged over the batch.

While the head trains alone the encoder is in evaluation mode: its batch norms use the statistics of the pretraining and
keep them, so the head meets the features that a linear probe would. Afterwards all batch norms train.

Shapes: N labelled images, B batch, H, W, C stored images, E feature width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from medssl.errors import NonFiniteLoss
from medssl.networks.encoder import EncoderParams, build_encoder, feature_width, load_weights
from medssl.optim import OptimiserParams, ScheduleParams, apply_rate, build_optimiser, scheduled
from medssl.params import Params
from medssl.views import RandomView, ViewParams, eval_view, generator_for

if TYPE_CHECKING:
    from medssl.training.feed import ResidentImages

_JUDGED_AT_ONCE = 256


class FineTuneParams(Params):
    """Training of network and head on the labels. Learning rate and weight decay come from the protocol's search."""

    head_only_epochs: int = Field(1, ge=0)
    """Epochs with frozen encoder, in evaluation mode."""
    head_learning_rate: float = Field(1e-3, gt=0)
    """Adam's constant learning rate in these epochs."""
    epochs: int = Field(10, ge=1)
    """Epochs of the whole network: Adam on one cycle (from peak/25 up over a quarter, down to peak/1e5)."""
    batch_size: int = Field(64, ge=2)
    """Images in one step, at most: an epoch's steps share its images evenly, so that no batch is left tiny."""
    class_weights: Literal["balanced", "none"] = "balanced"
    """balanced: an image weighs (labels / classes present / labels of its class)."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target spread evenly over all classes."""
    views: ViewParams = ViewParams(
        crop_scale=(0.7, 1.0), horizontal_flip=0.25, vertical_flip=0.25, rotation=0.25, rotation_degrees=45.0, jitter=0.0,
        grey=0.0, blur=(0.0, 0.0), solarise=(0.0, 0.0),
    )  # fmt: skip
    """Augmentation of the training images."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 trains the network under autocast (the loss stays in float32); predictions are in float32."""
    keep_weights: Literal["first", "all"] = "first"
    """Which head seeds leave their network's weights for `predict`: the first only, or all."""


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


class FineTuned:
    """A finished fine-tuning."""

    def __init__(self, network: Classifier, encoder: EncoderParams, device: torch.device) -> None:
        self.network = network.eval()
        self.encoder = encoder
        self.device = device

    @torch.inference_mode()
    def predict(self, images: ResidentImages, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Class probabilities (N, K) of the images in `rows`, each taken whole."""
        chosen, parts = np.asarray(rows, dtype=np.int64), []
        for start in range(0, len(chosen), _JUDGED_AT_ONCE):
            views_BCHW = eval_view(_read(images, chosen[start : start + _JUDGED_AT_ONCE], self.device), self.encoder)
            logits_BK = self.network(views_BCHW.contiguous(memory_format=torch.channels_last))
            parts.append(torch.softmax(logits_BK.float(), dim=1).cpu())
        probabilities: NDArray[np.float32] = torch.cat(parts).numpy()
        return probabilities

    def weights(self) -> bytes:
        """Safetensors of the whole network: `encoder.*`, `head.weight` (K, E) and `head.bias` (K,)."""
        from safetensors.torch import save

        return save({name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()})


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
    device: str | torch.device = "cpu",
) -> FineTuned:
    """Trains a classifier on the images in `rows`; the seed decides the head's start, the order and the augmentation.

    The same seed gives the same network on the CPU with the same number of threads; GPUs sum in varying order. Torch's
    global generator is left as it was.

    Args:
        encoder_weights: safetensors to start from; None starts from the random network of `seed`.
        labels: class of each of `rows`.
        learning_rate: peak of the one cycle of the whole network.
        weight_decay: L2 penalty of Adam, biases and batch norms excluded.

    Raises:
        NonFiniteLoss: the loss turned NaN or infinite.
    """
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(generator_for("finetune", seed).initial_seed())  # the head's start, and dropout where there is any
        network = Classifier(_start(encoder_weights, encoder, seed), classes)
        network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        labelled = _Labelled(images, np.asarray(rows, np.int64), np.asarray(labels, np.int64), classes, params, device)
        view = RandomView(params.views, encoder)
        alone, whole = _phases(params, learning_rate, weight_decay)
        _train(
            network,
            network.head,
            labelled,
            view,
            params,
            alone,
            ScheduleParams(name="constant"),
            (0, params.head_only_epochs),
            seed,
        )
        ends = (params.head_only_epochs, params.head_only_epochs + params.epochs)
        _train(network, network, labelled, view, params, whole, ScheduleParams(name="one_cycle"), ends, seed)
    return FineTuned(network, encoder, device)


def _start(weights: bytes | None, encoder: EncoderParams, seed: int) -> nn.Module:
    network = build_encoder(encoder, seed)
    if weights is not None:
        load_weights(network, weights)
    return network


def _phases(params: FineTuneParams, learning_rate: float, weight_decay: float) -> tuple[OptimiserParams, OptimiserParams]:
    """Optimisers of the head alone and of the whole network."""
    alone = OptimiserParams(name="adam", learning_rate=params.head_learning_rate, weight_decay=0)
    return alone, OptimiserParams(name="adam", learning_rate=learning_rate, weight_decay=weight_decay)


class _Labelled:
    """The labelled images with their targets and weights."""

    def __init__(
        self, images: ResidentImages, rows: NDArray[np.int64], labels: NDArray[np.int64], classes: int, params: FineTuneParams,
        device: torch.device,
    ) -> None:  # fmt: skip
        if len(rows) != len(labels) or len(rows) < 2:
            raise ValueError(f"{len(rows)} rows and {len(labels)} labels: expected as many, two or more")
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"labels lie in {labels.min()}..{labels.max()}: expected 0..{classes - 1}")
        self.images, self.rows, self.device = images, rows, device
        self.labels_N = torch.from_numpy(labels).to(device)
        counts_K = np.bincount(labels, minlength=classes)
        weights_K = np.ones(classes)
        if params.class_weights == "balanced":
            weights_K = len(labels) / ((counts_K > 0).sum() * np.maximum(counts_K, 1))
        self.weights_N = torch.from_numpy(weights_K[labels].astype(np.float32)).to(device)

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int, generator: torch.Generator) -> list[Tensor]:
        """Positions of an epoch's batches: a permutation in equal parts of at most `size`."""
        order = torch.randperm(len(self.rows), generator=generator)
        return list(torch.tensor_split(order, -(-len(order) // size)))


def _train(
    network: Classifier, trained: nn.Module, labelled: _Labelled, view: RandomView, params: FineTuneParams,
    optimiser_params: OptimiserParams, schedule: ScheduleParams, epochs: tuple[int, int], seed: int,
) -> None:  # fmt: skip
    """Trains `trained` (the head or all) over the epochs from the first to before the last."""
    network.eval() if trained is network.head else network.train()
    optimiser = build_optimiser(trained, optimiser_params)
    steps_per_epoch = -(-len(labelled) // params.batch_size)
    total, done = (epochs[1] - epochs[0]) * steps_per_epoch, 0
    for epoch in range(*epochs):
        total_loss = torch.zeros((), device=labelled.device)
        for step, positions_B in enumerate(labelled.batches(params.batch_size, generator_for("finetune", "order", seed, epoch))):
            rate = apply_rate(optimiser, scheduled(schedule, done, total, steps_per_epoch))
            stored_BHWC = _read(labelled.images, labelled.rows[positions_B.numpy()], labelled.device)
            views_BCHW = view(stored_BHWC, seed=seed, step=epoch * steps_per_epoch + step)
            loss = _loss(network, trained, views_BCHW, positions_B.to(labelled.device), labelled, params)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            total_loss += loss.detach()
            done += 1
        if not bool(torch.isfinite(total_loss)):
            raise NonFiniteLoss(
                f"fine-tuning seed {seed}: the loss is not finite in epoch {epoch + 1} (learning rate {rate:.3g}): lower it"
            )


def _loss(
    network: Classifier, trained: nn.Module, views_BCHW: Tensor, positions_B: Tensor, labelled: _Labelled, params: FineTuneParams
) -> Tensor:
    reduced = params.precision == "bfloat16"
    with torch.autocast(labelled.device.type, torch.bfloat16, enabled=reduced):
        views_BCHW = views_BCHW.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(trained is network):
            features_BE = network.encoder(views_BCHW)
        logits_BK = network.head(features_BE)
    losses_B = nn.functional.cross_entropy(
        logits_BK.float(), labelled.labels_N[positions_B], reduction="none", label_smoothing=params.label_smoothing
    )
    # Over the number of images, not over their weights as torch does: a batch of rare classes is to count more.
    return (losses_B * labelled.weights_N[positions_B]).mean()


def _read(images: ResidentImages, rows: NDArray[np.int64], device: torch.device) -> Tensor:
    """Stored images (B, H, W, C) uint8 on the device."""
    return torch.from_numpy(np.ascontiguousarray(images.images[rows])).to(device)
