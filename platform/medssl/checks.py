"""What a study's recipe asks of its datasets, checked before any work: each refusal is one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from medssl.errors import DataError, MedsslError, RecipeError, nearest
from medssl.judging import check_report
from medssl.metrics import UNKNOWN
from medssl.mixes import check_splits, joined_index
from medssl.mixes import shown as all_shown
from medssl.objectives import SupervisedParams
from medssl.stages.initial import given_artifacts, weights_digests
from medssl.stages.specs import TRAIN, VALIDATION

if TYPE_CHECKING:
    from medssl.arms import Arm
    from medssl.recipe import Recipe
    from medssl.store import Store
    from medssl.study import Study


def check_study(study: Study) -> None:
    """Refuses what the datasets cannot give.

    Raises:
        MedsslError: the first thing that is wrong.
    """
    _check_splits(study)
    _check_neighbours(study)
    check_report(study.recipe, study.specs)
    _check_shifted(study)
    _check_pretrainings(study)


def digests_of_files(recipe: Recipe, store: Store) -> dict[str, dict[str, str]]:
    """What files a recipe names: digests of the weights that arms start from and of the sources of a user's own encoders, and
    the store's artifacts in whose folders files lie."""
    return {
        "weights": weights_digests(recipe, store),
        "encoders": own_encoders(recipe),
        "artifacts": given_artifacts(recipe, store),
    }


def own_encoders(recipe: Recipe) -> dict[str, str]:
    """Digest of the source of each encoder that is a user's own function, by its name; built and checked on small inputs.

    Raises:
        RecipeError: there is no such function, or what it returns is no encoder.
    """
    arms = [arm for arm in recipe.arms if arm.features == "encoder" and ":" in recipe.encoder_of(arm).name]
    if not arms:
        return {}
    from medssl.networks.own import check_own, source_digest  # with torch, which a study of known networks can do without here

    kinds = {(recipe.encoder_of(arm), arm.initial_weights == "random") for arm in arms}
    for params, random in sorted(kinds, key=str):
        check_own(params, random=random)
    return {params.name: source_digest(params.name) for params, _ in kinds}


def _check_shifted(study: Study) -> None:
    sets = study.specs.shifted  # refuses sets without classes of the study
    judged = {(each.params.dataset, split) for each in sets.values() for split in each.params.splits}
    for arm in study.recipe.arms:
        for part in arm.mix:
            both = [split for split in part.splits if (part.dataset, split) in judged]
            if both:
                raise RecipeError(
                    f"arm '{arm.name}': mix shows split '{both[0]}' of {part.dataset}, which a shifted set judges by: "
                    "pretrain on its other splits"
                )


def _check_splits(study: Study) -> None:
    index, classes = study.specs.index, study.dataset.classes
    used = (TRAIN, VALIDATION, study.recipe.evaluation_split)
    check_splits(study.dataset.uri, index, (*study.recipe.pretraining_splits, *used))
    for part in (part for arm in study.recipe.arms for part in arm.mix):
        dataset = study.dataset if part.dataset is None else study.others[part.dataset]
        check_splits(dataset.uri, dataset.index(), part.splits)
        absent = sorted(set(part.classes or ()) - set(dataset.index()["label"].dropna()))
        if absent:
            raise DataError(f"mix names class '{absent[0]}': {nearest(absent[0], dataset.classes)} ({dataset.uri})")
    if study.specs.findings:
        _check_findings(study, used)
        return
    if len(classes) < 2:
        raise DataError(f"dataset {study.dataset.uri} has {len(classes)} classes; an evaluation needs two or more")
    for split in dict.fromkeys(used):
        labels = set(index.loc[study.specs.rows(split), "label"])
        absent = sorted(set(classes) - labels)
        if absent:
            raise DataError(
                f"class '{absent[0]}' has no labelled image in split '{split}' of {study.dataset.uri}: "
                "ingest with other splits or leave the class out"
            )
    for protocol in study.recipe.protocols:
        study.specs.draw(0, protocol)  # refuses a number of labels that the split does not have


def _check_findings(study: Study, used: Sequence[str]) -> None:
    """Each finding has images with it and images without it in every split that is used, and in every label draw."""
    specs = study.specs
    places = [(f"in split '{split}' of {study.dataset.uri}", specs.rows(split)) for split in dict.fromkeys(used)]
    for protocol in study.recipe.protocols:
        draws = range(study.recipe.draws_of(protocol))
        places += [(f"in label draw {d} of protocol '{protocol.name}'", specs.draw(d, protocol)) for d in draws]
    for where, rows in places:
        labels_NF = specs.labels(rows)
        for f, name in enumerate(specs.classes):
            lacking = next((what for what, side in (("with", 1), ("without", 0)) if not (labels_NF[:, f] == side).any()), None)
            if lacking is not None:
                raise DataError(
                    f"finding '{name}' has no image that is known to be {lacking} it {where}: use more labels or other splits, "
                    "count missing ones as zeros, or leave the finding out"
                )


def _check_neighbours(study: Study) -> None:
    """Each bank has k images: of findings those of which one is known, which differ between draws, since these are plain."""
    specs = study.specs
    for protocol in study.recipe.protocols:
        if protocol.kind != "knn":
            continue
        if not specs.findings:
            labelled = len(specs.draw(0, protocol))
            there = f"a draw has {labelled} labelled images"
        else:
            draws = range(study.recipe.draws_of(protocol))
            known_DF = np.stack([(specs.labels(specs.draw(d, protocol)) != UNKNOWN).sum(axis=0) for d in draws])
            d, f = divmod(int(known_DF.argmin()), len(specs.classes))
            labelled = int(known_DF[d, f])
            there = f"label draw {d} has {labelled} images of which finding '{specs.classes[f]}' is known"
        if protocol.probe.k > labelled:
            raise RecipeError(
                f"protocol '{protocol.name}': probe.k is {protocol.probe.k}, but {there}: use {labelled} or less, or more labels"
            )


def _check_pretrainings(study: Study) -> None:
    for arm in study.recipe.arms:
        if arm.objective is None:
            continue
        if arm.pairs == "bag":
            _check_bags(study, arm)
        if isinstance(arm.objective, SupervisedParams):
            _check_labels(study, arm)
        if arm.pairs == "image":
            _check_batch(study, arm)
        if arm.further.trained != "all" or arm.encoder_parts > 1 or arm.surgery is not None or arm.views.small_crops:
            from medssl.training.step import check_plan  # loads the networks' library, which takes seconds

            try:
                check_plan(study.specs.plan(arm, 0))
            except RecipeError as error:
                raise RecipeError(f"arm '{arm.name}': {error}") from None


def _check_batch(study: Study, arm: Arm) -> None:
    """An epoch shows as many images as a step takes, or more: the last, incomplete batch is dropped."""
    parts = study.specs.mix(arm)
    images = sum(part.times * len(part.rows) for part in parts)
    if images < arm.batch_size:
        shown = " and ".join(part.dataset or study.dataset.uri for part in parts)
        raise RecipeError(
            f"arm '{arm.name}': batch_size {arm.batch_size} is larger than the {images} images that an epoch of {shown} shows: "
            f"use {images} or less, or show each more often (times in mix or pretraining_mix)"
        )


def _check_labels(study: Study, arm: Arm) -> None:
    """Each class of a supervised pretraining has images, and there are two or more."""
    parts = study.specs.mix(arm)
    where = " and ".join(str(part.dataset) for part in parts)
    there = {str(label) for part in parts for label in part.index.loc[part.rows, "label"]}
    classes = study.specs.plan(arm, 0).objective.classes  # type: ignore[attr-defined]
    absent = next((name for name in classes if name not in there), None)
    if absent is not None:
        raise DataError(f"arm '{arm.name}': objective.classes has '{absent}', a label no image of {where} has: its labels are "
                        f"{', '.join(sorted({str(v) for p in parts for v in p.index['label'].dropna()})) or 'none'}")
    if len(classes) < 2:
        raise DataError(f"arm '{arm.name}': supervised pretraining needs two classes or more, and {where} has {len(classes)}")


def _check_bags(study: Study, arm: Arm) -> None:
    from medssl.training.bags import Bags  # with torch, which a study without bags can do without here

    parts = study.specs.mix(arm)
    rows = pd.concat([part.index.loc[part.rows] for part in parts])
    shown = " and ".join(part.dataset or study.dataset.uri for part in parts)
    for column, what in (("bag_id", "bag (lesion or case)"), ("patient_id", "patient")):
        if rows[column].isna().all():
            raise RecipeError(
                f"arm '{arm.name}': pairs is bag, but no image of {shown} has a {what} id: ingest with "
                f"--{column.removesuffix('_id')}-column, or use pairs: image"
            )
    try:
        joined = joined_index([part.index for part in parts], [part.dataset for part in parts])
        Bags.of_index(joined, all_shown(study.sources(arm))).steps_per_epoch(arm.batch_size)
    except MedsslError as error:
        raise RecipeError(f"arm '{arm.name}': {error}") from None
