"""Pictures for a study's report: where t-SNE puts its judged images, the worst mistakes as thumbnails, curves of fine-tunings.

Shapes: N judged images, E feature width, K classes, M runs.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medssl.artifacts import folder
from medssl.datasets.read import Decoding, decode_row, stored_images
from medssl.judging import models_of
from medssl.metrics import UNKNOWN
from medssl.stages.report_data import EmbeddingMap, Mistake
from medssl.stages.report_tuning import tuning_frame

if TYPE_CHECKING:
    from medssl.arms import Arm
    from medssl.comparing import Runs
    from medssl.protocols import Probe
    from medssl.study import Study

MAP_POINTS = 1000
"""Images on a map: as many as t-SNE places in a few seconds on one core."""
FEWEST_POINTS = 10
"""Fewer images make no map."""
_COMPONENTS, _PERPLEXITY = 50, 30.0
_MISTAKES, _THUMBNAIL_PX = 8, 96


def tunings(study: Study) -> dict[tuple[str, str], pd.DataFrame]:
    """Curves of the fine-tunings by arm and protocol, see :func:`report_tuning.tuning_frame`."""
    histories: dict[tuple[str, str], list[Any]] = {}
    watched = {p.name: p.training.watched for p in study.recipe.protocols if p.kind == "fine_tune"}
    for cell in study.specs.cells():
        if cell.protocol.name in watched:
            markers = study.markers(list((study.evaluations(cell) or {}).values()))
            runs = [marker.facts["training"]["history"] for marker in markers if "training" in marker.facts]
            histories.setdefault((cell.arm.name, cell.protocol.name), []).extend(runs)
    return {key: tuning_frame(runs, watched[key[1]]) for key, runs in histories.items()}


def embedding_maps(study: Study) -> dict[str, EmbeddingMap]:
    """A map of the same judged images for each arm that a probe judges, by its first encoder; none unless the recipe says so."""
    recipe = study.recipe
    probe = next((protocol for protocol in recipe.protocols if protocol.kind != "fine_tune"), None)
    judged = study.specs.rows(recipe.evaluation_split)
    if probe is None or not recipe.report.embedding_map or len(judged) < FEWEST_POINTS:
        return {}
    chosen = np.sort(np.random.default_rng(0).permutation(judged)[:MAP_POINTS])
    labels_N, marks = _marks(study.specs.labels(chosen), study.specs.classes)
    maps = {}
    for arm in recipe.arms:
        features_NE = _features(study, arm, probe, chosen) if recipe.judges(probe, arm) else None
        if features_NE is not None:
            maps[arm.name] = EmbeddingMap(tsne(features_NE), labels_N, marks)
    return maps


def _marks(labels_N: NDArray[np.int64], classes: list[str]) -> tuple[NDArray[np.int64], list[str]]:
    """What a map marks each image as: its class, or its one finding, several, or none that is known."""
    if labels_N.ndim == 1:
        return labels_N, classes
    there_NF = labels_N == 1
    number_N = there_NF.sum(axis=1)
    several, none = len(classes), len(classes) + 1
    marks_N = np.where(number_N == 1, there_NF.argmax(axis=1), np.where(number_N > 1, several, none))
    return marks_N, [*classes, "several", "none"]


def _features(study: Study, arm: Arm, probe: Probe, rows: NDArray[np.int64]) -> NDArray[np.float32] | None:
    spec = study.embed_spec(arm, 0, probe)
    if spec is None or not study.is_finished(spec):
        return None
    place = folder(study.store, spec.name)
    known = np.load(io.BytesIO(place.read("rows.npy")), allow_pickle=False)
    features: NDArray[np.float32] = np.load(io.BytesIO(place.read("features.npy")), allow_pickle=False)
    return features[np.searchsorted(known, rows)]


def tsne(features_NE: NDArray[np.floating], seed: int = 0) -> NDArray[np.float64]:
    """Places (N, 2) by t-SNE (van der Maaten & Hinton 2008) of standardised features; on one core, so always the same.

    The features are first reduced to 50 principal components, as its authors do. Distances between far points mean nothing.

    Raises:
        ValueError: fewer than FEWEST_POINTS images.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if len(features_NE) < FEWEST_POINTS:
        raise ValueError(f"{len(features_NE)} images: a map needs {FEWEST_POINTS} or more")
    wide_NE = features_NE.astype(np.float64)
    scale_E = wide_NE.std(axis=0)
    wide_NE = (wide_NE - wide_NE.mean(axis=0)) / np.where(scale_E > 0, scale_E, 1)
    with threadpool_limits(1):
        parts = PCA(min(_COMPONENTS, *wide_NE.shape), svd_solver="full").fit_transform(wide_NE)
        perplexity = min(_PERPLEXITY, (len(parts) - 1) / 3)
        map_N2 = TSNE(2, perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(parts)
    return np.asarray(map_N2, dtype=np.float64)


def confident_mistakes(study: Study, runs: Mapping[tuple[str, str], Runs], protocol: str) -> dict[str, list[Mistake]]:
    """The images that each arm names wrongly with the highest mean probability; none unless the recipe allows images."""
    recipe, specs = study.recipe, study.specs
    if not recipe.report.images:
        return {}
    judged, classes = specs.rows(recipe.evaluation_split), specs.classes
    if specs.findings:  # two entries a finding, as `_worst` counts them
        classes = [text for name in classes for text in (f"no {name}", name)]
    worst = {run.arm: _worst(run) for (_, name), run in runs.items() if name == protocol}
    stored = stored_images(study.dataset, {int(judged[n]) for found in worst.values() for n, *_ in found})
    decoding = Decoding(_THUMBNAIL_PX, "pad", 3, recipe.images.depth)
    ids = specs.index["image_id"].to_numpy()

    def mistake(n: int, label: int, predicted: int, confidence: float) -> Mistake:
        row = int(judged[n])
        png = _png(decode_row(row, stored[row], decoding, study.dataset.uri))
        return Mistake(str(ids[row]), classes[label], classes[predicted], confidence, png)

    return {arm: [mistake(*each) for each in found] for arm, found in worst.items() if found}


def _worst(run: Runs) -> list[tuple[int, int, int, float]]:
    """Position, label, predicted class and its mean probability over the runs, of the wrong images, the surest first."""
    mean_NK = models_of(run).mean(axis=0, dtype=np.float64)
    if run.labels_N.ndim == 2:
        return _worst_findings(mean_NK, run.labels_N)
    predicted_N, confidence_N = mean_NK.argmax(axis=1), mean_NK.max(axis=1)
    wrong = np.flatnonzero(predicted_N != run.labels_N)
    order = wrong[np.argsort(-confidence_N[wrong], kind="stable")][:_MISTAKES]
    return [(int(n), int(run.labels_N[n]), int(predicted_N[n]), float(confidence_N[n])) for n in order]


def _worst_findings(mean_NF: NDArray[np.float64], labels_NF: NDArray[np.int64]) -> list[tuple[int, int, int, float]]:
    """The same of findings: of finding f, 2 f stands for its absence and 2 f + 1 for its presence; an image is shown once."""
    sure_NF = np.where(labels_NF == 1, 1 - mean_NF, mean_NF)  # of the wrong answer
    sure_NF[labels_NF == UNKNOWN] = 0
    finding_N, confidence_N = sure_NF.argmax(axis=1), sure_NF.max(axis=1)
    wrong = np.flatnonzero(confidence_N > 0.5)
    order = wrong[np.argsort(-confidence_N[wrong], kind="stable")][:_MISTAKES]
    found = []
    for n in order:
        f = int(finding_N[n])
        label = int(labels_NF[n, f])
        found.append((int(n), 2 * f + label, 2 * f + 1 - label, float(confidence_N[n])))
    return found


def _png(image_HWC: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
