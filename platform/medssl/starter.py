"""`medssl init`: a commented recipe for one's own dataset that runs unchanged."""

from __future__ import annotations

import json
import re

from medssl.datasets.dataset import open_dataset
from medssl.errors import DataError
from medssl.stages.specs import TEST, TRAIN, VALIDATION

_LARGEST_DRAW = 1000
_LARGEST_BATCH = 128
_STEPS_BETWEEN_CHECKPOINTS = 100
"""A checkpoint takes about as long as a few steps."""

_TEMPLATE = """\
# A first study on {uri}: does pretraining on the unlabelled images help, and is that more than chance?
# {images:,} images for pretraining, {labelled:,} of them labelled, {classes} classes; {test:,} labelled test images.
# Written by `medssl init`; every field can be changed here or for one run with --set arms.0.epochs=20.
#   medssl plan {file} --store URI     what it will do, and what that costs in images
#   medssl run {file} --store URI      do it; run it again to go on or to add what changed
study: {name}
description: {description}
dataset: {quoted}

images:
  decode_px: 96            # images are kept at this size; larger than the view, so that crops are crops
  resize: squash           # squash | crop | pad: how an oblong image becomes a square
  feeding: resident        # resident: decoded once per node; streaming: pretraining reads them anew each epoch

encoder:
  name: resnet18           # any timm model; resnet50 for the papers' size
  image_px: 64             # what the network sees; 224 on a GPU

arms:
  - name: barlow_twins     # pretrained on the images of the train split, without their labels
    objective: {{name: barlow_twins, lambda_: 0.0051, projector: [1024, 1024, 1024]}}
    epochs: {epochs}             # more is better up to hundreds; see `medssl plan` for the cost
    batch_size: {batch}
    optimiser: {{name: adamw, learning_rate: 0.0015, weight_decay: 1.0e-5}}
    schedule: {{name: one_cycle}}
    views:                 # colour is often evidence in medical images: keep its jitter weak
      crop_scale: [0.3, 1.0]
      quarter_turns: true  # set false where up and down matter, as in chest X-rays
      brightness: 0.2
      contrast: 0.2
      saturation: 0.1
      hue: 0.02
      grey: 0.0
      blur: [0.1, 0.1]
      solarise: [0.0, 0.0]
  - name: random           # the same network without pretraining: what the architecture gives for nothing
  - name: colour           # no network: colour and intensity statistics. What does not beat this has learnt little
    features: colour

repeats:                   # a claim needs several of each
  pretraining_seeds: 3
  label_draws: {draws}           # draws of the labelled subset
  labels: {labels}             # labelled images in each draw; null takes all

protocols:
  - name: linear_probe     # a linear classifier on the frozen features
    kind: linear_probe
    head_seeds: 35
    search: {{learning_rate: [0.001, 0.003, 0.01], weight_decay: [0.001, 0.01, 0.1]}}
  - name: fine_tune        # the whole network on the labels
    kind: fine_tune
    head_seeds: 5
    label_draws: 1
    search: {{learning_rate: [0.0003, 0.001], weight_decay: [0.0], head_seeds: 1}}

comparisons:
  - {{better: barlow_twins, than: random, protocol: linear_probe}}
  - {{better: barlow_twins, than: colour, protocol: linear_probe}}
  - {{better: barlow_twins, than: random, protocol: fine_tune}}

compute:                   # where it runs; changes no result
  workers: {workers}               # more share a batch, which pays for large ones
  cpus_per_worker: 2
  checkpoint_every_epochs: {checkpoints}  # what a lost worker costs at most
  gpus_per_worker: 0       # 1 on a machine with GPUs
"""


def starter_recipe(uri: str, file: str = "study.yaml") -> str:
    """The recipe's text, sized to the dataset.

    Raises:
        DataError: there is no dataset, or one that no evaluation can be made with.
    """
    dataset = open_dataset(uri)
    index = dataset.index()
    labelled = {
        split: int((index["label"].notna() & (index["split"] == split)).sum()) for split in (TRAIN, VALIDATION, TEST)
    }
    for split, count in labelled.items():
        if not count:
            raise DataError(
                f"dataset {uri} has no labelled images in split '{split}', and a study needs train, val and test"
            )
    images = int((index["split"] == TRAIN).sum())
    if images < 4:
        raise DataError(f"dataset {uri} has {images} images to train on: too few for a study")
    batch = min(_LARGEST_BATCH, 2 ** (max(2, images // 4).bit_length() - 1))
    every = labelled[TRAIN] <= _LARGEST_DRAW
    return _TEMPLATE.format(
        uri=dataset.uri, quoted=json.dumps(dataset.uri), file=file,
        description=json.dumps(f"Barlow Twins against random weights and colour statistics on {dataset.name}."),
        name=_slug(dataset.name), images=images, labelled=labelled[TRAIN],
        classes=len(dataset.classes), test=labelled[TEST], epochs=max(10, min(200, 20_000 // images)), batch=batch,
        draws=1 if every else 3, labels="null" if every else _LARGEST_DRAW, workers=1,
        checkpoints=-(-_STEPS_BETWEEN_CHECKPOINTS * batch // images),
    )  # fmt: skip


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_.-]+", "-", name.lower()).strip("-.") or "study"
