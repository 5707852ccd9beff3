"""The study recipe: typed, frozen, validated; what stands in it is what is used.

Parameter groups are declared beside the code they steer (objectives, optimisers, views, probes); here they are put
together. `recipe_file` reads one from YAML.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from medssl.arms import Arm, MixPart
from medssl.comparison import Bootstrap, Comparison
from medssl.compute import Compute
from medssl.datasets.findings import FindingsParams
from medssl.datasets.read import Decoding
from medssl.errors import RecipeError, nearest
from medssl.forms import FigureForm, TableForm, check_forms
from medssl.label_curves import expanded
from medssl.lineage import ARM, check_lineage
from medssl.matrix import written_out
from medssl.networks.encoder import EncoderParams
from medssl.outside import OutsideParams, split_arms
from medssl.params import Params
from medssl.protocols import NAME, Protocol, check_metric, views_of
from medssl.published import PublishedParams
from medssl.report_params import ReportParams
from medssl.shifted import ShiftedParams
from medssl.training.plan import PretrainPlan


class ImageParams(Params):
    """How images are decoded and fed."""

    decode_px: int = Field(80, ge=16, le=2048)
    """Side in pixels at which images are decoded and kept; larger than the view, so that crops are not enlargements."""
    resize: Literal["squash", "crop", "pad"] = "squash"
    """How an oblong image becomes a square: squashed, centre-cropped, or padded with black."""
    depth: Literal["window", "detector"] = "window"
    """How 16-bit samples become 8-bit ones. window: each image from its 0.1% to its 99.9% quantile, for radiographs. detector: 0
    to the detector's full scale, for calibrated images such as CT."""
    feeding: Literal["resident", "streaming"] = "resident"
    """resident: decoded once into a memory-mapped file on each node. streaming: decoded anew by Ray Data each epoch."""


class Repeats(Params):
    """How often each kind of chance is drawn. A claim about a pretraining needs several of each."""

    pretraining_seeds: int = Field(3, ge=1)
    """Independent pretrainings (or random initialisations) of every encoder arm that does not say otherwise."""
    label_draws: int = Field(3, ge=1)
    """Draws of the labelled subset, the same for every arm."""
    labels: int | None = Field(1000, ge=2)
    """Labelled training images in one draw, stratified by class; null uses all (then one draw)."""


class Recipe(Params):
    """One study."""

    study: str = Field(pattern=NAME)
    """Name of the study."""
    description: str = ""
    """A sentence for the report."""
    dataset: str
    """Dataset made by `medssl ingest`: a URI, or a path below the study's store such as datasets/ham10000."""
    findings: FindingsParams | None = None
    """Several findings an image in place of one class; null judges by the images' one label."""
    images: ImageParams = ImageParams()
    """Decoding and feeding."""
    pretraining_splits: tuple[str, ...] = Field(("train",), min_length=1)
    """Splits whose images (never labels) are used for pretraining."""
    allow_judged_in_pretraining: bool = False
    """Whether a pretraining may be shown images of `evaluation_split` (without labels); the report then says so in red."""
    encoder: EncoderParams = EncoderParams()
    """Encoder of every arm that names none."""
    arms: tuple[Arm, ...] = Field(min_length=1)
    """What is compared. An entry with `matrix` stands for several (medssl.matrix)."""
    outside: tuple[OutsideParams, ...] = ()
    """Arms that are predictions from a file; they are written among the arms."""
    repeats: Repeats = Repeats()
    """Repeats of each kind of chance."""
    protocols: tuple[Protocol, ...] = Field(min_length=1)
    """How features are judged."""
    evaluation_split: Literal["test", "val"] = "test"
    """Split that the scores are measured on. val: for studies that choose between methods, which must not open the test split;
    learning rates are chosen on the same images then."""
    metrics: tuple[str, ...] = ("balanced_accuracy", "accuracy", "f1_weighted", "f1_macro", "auc")
    """Metrics on the evaluation split, in the order of the tables."""
    shifted: tuple[ShiftedParams, ...] = ()
    """Further datasets that the finished classifiers are judged on."""
    comparisons: tuple[Comparison, ...] = ()
    """Claims to test. The first run of a study fixes the list: reports mark what was added later and list what was dropped."""
    bootstrap: Bootstrap = Bootstrap()
    """Intervals of the comparisons."""
    published: tuple[PublishedParams, ...] = ()
    """Tables of papers that the report shows beside the study's own."""
    tables: tuple[TableForm, ...] = ()
    """Tables in the form of a paper, filled with the study's own scores."""
    figures: tuple[FigureForm, ...] = ()
    """Figures in the form of a paper."""
    report: ReportParams = ReportParams()
    """What the report says of the predictions."""
    compute: Compute = Compute()
    """Where it runs."""

    @model_validator(mode="before")
    @classmethod
    def _write_out(cls, fields: Any) -> Any:
        return expanded(split_arms(written_out(fields)))

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        self._check_names()
        for arm in self.arms:
            check_lineage(self, arm)
        for comparison in self.comparisons:
            self._check_comparison(comparison)
        claims = [c.claim for c in self.comparisons]
        for better, than, name, metric in claims:
            if claims.count((better, than, name, metric)) > 1:
                raise ValueError(f"two comparisons claim {better} over {than} under {name} by {metric}: keep one")
        self._check_shifted()
        self._check_published()
        check_forms(self)
        if self.findings is not None:
            self._check_findings()
        for protocol in self.protocols:
            shown = views_of(protocol)
            if shown is not None and shown.small_crops:
                raise ValueError(f"protocol '{protocol.name}': small_crops belong to pretraining, an evaluation has one view")
        if self.repeats.labels is None and self.repeats.label_draws != 1:
            raise ValueError("labels: null uses every label, so label_draws must be 1")
        channels = {self.encoder_of(arm).channels for arm in self.arms} | {self.encoder.channels}
        if len(channels) > 1:
            raise ValueError(f"arms differ in encoder.channels ({sorted(channels)}): images are decoded once for all of them")
        for arm in self.arms:
            if arm.objective is not None:
                self._check_pretraining(arm)
        return self

    def _check_names(self) -> None:
        for metric in self.metrics:
            check_metric(metric)
        named = {
            "arm": [each.name for each in self.arms] + [each.name for each in self.outside],
            "protocol": [each.name for each in self.protocols],
            "shifted set": [each.name for each in self.shifted],
        }
        for protocol in self.protocols:
            unknown = next((arm for arm in protocol.arms or () if arm not in named["arm"]), None)
            if unknown is not None:
                raise ValueError(f"protocol '{protocol.name}' judges arm '{unknown}': {nearest(unknown, named['arm'])}")
        for kind, names in named.items():
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(f"two {kind}s are named '{twice[0]}': names must differ")

    @property
    def judged_in_pretraining(self) -> list[str]:
        """Arms whose pretraining, or that of an encoder they start from, is shown images that the scores are measured on."""
        return [arm.name for arm in self.arms if any(map(self._shows_judged, self._line_of(arm)))]

    def _line_of(self, arm: Arm) -> list[Arm]:
        """The arm, and those whose encoders it starts from, one from the other."""
        parent = self.parent(arm)
        return [arm] if parent is None else [arm, *self._line_of(parent)]

    def _shows_judged(self, arm: Arm) -> bool:
        own = [part for part in self.mix(arm) if part.dataset is None]
        return arm.objective is not None and any(self.evaluation_split in part.splits for part in own)

    def _check_pretraining(self, arm: Arm) -> None:
        if self._shows_judged(arm) and not self.allow_judged_in_pretraining:
            raise ValueError(
                f"arm '{arm.name}' pretrains on images of split '{self.evaluation_split}', which the scores are measured on: "
                "leave it out of pretraining_splits and mix, or set allow_judged_in_pretraining: true (the report says so in red)"
            )
        workers = self.compute.workers
        share, rest = divmod(arm.batch_size, workers)
        if rest:
            raise ValueError(f"arm '{arm.name}': batch_size {arm.batch_size} is not a multiple of compute.workers {workers}")
        if share < 2:
            raise ValueError(
                f"arm '{arm.name}': batch_size {arm.batch_size} gives {workers} workers one image each, batch norm needs two"
            )
        if share % arm.encoder_parts:
            raise ValueError(f"arm '{arm.name}': encoder_parts {arm.encoder_parts} does not divide a worker's {share} images")
        views, encoder = arm.views, self.encoder_of(arm)
        if views.small_crops and arm.objective is not None and not arm.objective.multi_crop:
            raise ValueError(f"arm '{arm.name}': {arm.objective.name} takes two views: set views.small_crops to 0, or use swav")
        if views.small_crops and views.small_px > encoder.image_px:
            raise ValueError(
                f"arm '{arm.name}': views.small_px {views.small_px} is larger than encoder.image_px {encoder.image_px}: lower it "
                "(SwAV: 96 of 224), or set views.small_crops to 0"
            )
        if any(part.dataset == self.dataset for part in arm.mix):
            raise ValueError(f"arm '{arm.name}': {self.dataset} is the study's own: leave `dataset` out of that part of mix")
        if arm.pairs == "bag" and arm.mix and self.images.feeding == "streaming":
            raise ValueError(f"arm '{arm.name}': pairs of a bag from a mix need images.feeding resident")
        if arm.learning_rate_finder and self.images.feeding == "streaming":
            raise ValueError(f"arm '{arm.name}': the learning-rate finder needs images.feeding resident")

    def _check_findings(self) -> None:
        if self.report.deployment_prior is not None:
            raise ValueError("report.deployment_prior weighs images by their class, and they have findings: leave it out")
        for protocol in self.protocols:
            if protocol.kind == "fine_tune" and protocol.training.over_sample:
                raise ValueError(
                    f"protocol '{protocol.name}': over_sample draws classes equally often, and images have findings: use "
                    "class_weights"
                )

    def _check_published(self) -> None:
        arms, protocols = [a.name for a in self.arms], [p.name for p in self.protocols]
        for table in self.published:
            check_metric(table.metric)
            unknown = next((arm for arm in table.arms.values() if arm not in arms), None)
            if unknown is not None:
                raise ValueError(f"published table of {table.source} names arm '{unknown}': {nearest(unknown, arms)}")
            named = table.protocol.values() if isinstance(table.protocol, dict) else filter(None, [table.protocol])
            absent = next((name for name in named if name not in protocols), None)
            if absent is not None:
                near = nearest(absent, protocols)
                raise ValueError(f"published table of {table.source} names protocol '{absent}': {near}")

    def _check_shifted(self) -> None:
        if any(each.dataset == self.dataset for each in self.shifted):
            raise ValueError(f"shifted names {self.dataset}, the study's own dataset: name another one")
        for protocol in self.protocols:
            if self.shifted and protocol.kind == "fine_tune" and protocol.training.keep_weights != "all":
                raise ValueError(
                    f"protocol '{protocol.name}' keeps the weights of head seed 0 alone, but every seed is judged on shifted set "
                    f"'{self.shifted[0].name}': set training.keep_weights to all"
                )

    def _check_comparison(self, comparison: Comparison) -> None:
        arms, protocols = {a.name: a for a in self.arms}, {p.name: p.kind for p in self.protocols}
        outside = [arm.name for arm in self.outside]
        for name in (comparison.better, comparison.than):
            if name in outside:
                if comparison.shifted is not None:
                    raise ValueError(f"arm '{name}' is predictions of the study's own images: there are none of a shifted set")
                continue
            if name not in arms:
                raise ValueError(f"comparison names arm '{name}': {nearest(name, (*arms, *outside))}")
            if arms[name].features == "colour" and protocols.get(comparison.protocol) == "fine_tune":
                raise ValueError(f"arm '{name}' has no network to fine-tune: compare it by a linear probe")
        if comparison.protocol not in protocols:
            raise ValueError(f"comparison names protocol '{comparison.protocol}': {nearest(comparison.protocol, protocols)}")
        for name in (comparison.better, comparison.than):
            judged = next(p for p in self.protocols if p.name == comparison.protocol).arms
            if judged is not None and name in arms and name not in judged:
                raise ValueError(f"protocol '{comparison.protocol}' does not judge arm '{name}': {nearest(name, judged)}")
        if comparison.shifted is not None and comparison.shifted not in (sets := [each.name for each in self.shifted]):
            near = nearest(comparison.shifted, sets) if sets else "the study has none: add it under `shifted`"
            raise ValueError(f"comparison is on shifted set '{comparison.shifted}': {near}")
        if comparison.metric not in self.metrics:
            near = nearest(comparison.metric, self.metrics)
            raise ValueError(f"comparison metric '{comparison.metric}' is not among the study's metrics: {near}")

    def parent(self, arm: Arm) -> Arm | None:
        """The arm whose encoder this one starts from; None for other weights."""
        named = arm.initial_weights.removeprefix(ARM) if arm.initial_weights.startswith(ARM) else None
        return next((each for each in self.arms if each.name == named), None)

    def seeds_of(self, arm: Arm) -> int:
        """Pretraining seeds of an arm: its parent's where it pretrains nothing itself, and one for features without chance."""
        parent = self.parent(arm)
        if arm.objective is None and parent is not None:  # the same encoders at another size
            return self.seeds_of(parent)
        alike = arm.objective is None and arm.initial_weights != "random"  # given weights, not trained: one encoder
        if arm.features == "colour" or alike:
            return 1
        return arm.pretraining_seeds or self.repeats.pretraining_seeds

    def generation(self, arm: Arm) -> int:
        """Number of arms that have to be pretrained before it."""
        parent = self.parent(arm)
        return 0 if parent is None else 1 + self.generation(parent)

    @staticmethod
    def judges(protocol: Protocol, arm: Arm) -> bool:
        """Whether an arm is judged by a protocol: it is among the protocol's, and has a network where one is fine-tuned."""
        return (protocol.arms is None or arm.name in protocol.arms) and (
            arm.features != "colour" or protocol.kind != "fine_tune"
        )

    def encoder_of(self, arm: Arm) -> EncoderParams:
        """The encoder that an arm uses."""
        return arm.encoder or self.encoder

    def labels_of(self, protocol: Protocol) -> int | float | None:
        """Labelled images in one draw of a protocol: a number, a share of each class, or None for all."""
        return self.repeats.labels if protocol.labels is None else None if protocol.labels == "all" else protocol.labels

    def draws_of(self, protocol: Protocol) -> int:
        """Label draws of a protocol: one where it takes all labels."""
        draws = self.repeats.label_draws
        return 1 if self.labels_of(protocol) is None else min(draws, protocol.label_draws or draws)

    @property
    def decoding(self) -> Decoding:
        """How the study's images become arrays."""
        return Decoding(self.images.decode_px, self.images.resize, self.encoder.channels, self.images.depth)

    def mix(self, arm: Arm) -> tuple[MixPart, ...]:
        """What the arm's pretraining is shown."""
        return arm.mix or (MixPart(splits=self.pretraining_splits),)

    def plan(self, arm: Arm, seed: int) -> PretrainPlan:
        """The pretraining of one seed of an arm that has an objective."""
        if arm.objective is None:
            raise RecipeError(f"arm '{arm.name}' has no objective, so there is nothing to pretrain")
        return PretrainPlan(
            encoder=self.encoder_of(arm), objective=arm.objective, optimiser=arm.optimiser, schedule=arm.schedule,
            views=arm.views, epochs=arm.epochs, steps=arm.steps, batch_size=arm.batch_size, seed=seed, pairs=arm.pairs,
            further=arm.further, surgery=arm.surgery, learning_rate_finder=arm.learning_rate_finder,
            encoder_parts=arm.encoder_parts, precision=arm.precision, gradient_clip=arm.gradient_clip,
        )  # fmt: skip
