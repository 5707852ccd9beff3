"""What each metric means, in words for a reader."""

from __future__ import annotations

_CLASSES = {
    "accuracy": "Accuracy is the share of images that were named correctly.",
    "balanced_accuracy": (
        "Balanced accuracy is the mean over the classes of the share of a class's images that were named correctly, so "
        "that rare classes count as much as common ones."
    ),
    "f1_macro": "Macro F1 is the mean over the classes of the harmonic mean of recall and precision.",
    "f1_weighted": "Weighted F1 is the harmonic mean of recall and precision, averaged over images.",
    "auc": (
        "AUC (one-vs-rest) is the chance that an image of a class is ranked above an image of another class, averaged "
        "over classes; 0.5 is guessing."
    ),
    "average_precision": (
        "Average precision is the precision averaged over the thresholds that find one image of a class after the other, "
        "averaged over classes; guessing gives a class's share of the images."
    ),
    "expected_calibration_error": (
        "The calibration error (ECE) is how far the classifier's confidence is from the share of images that it names correctly; "
        "lower is better."
    ),
}
_FINDINGS = {
    "accuracy": "Accuracy is the share of images of which a finding was told rightly, averaged over the findings.",
    "balanced_accuracy": (
        "Balanced accuracy is the mean of sensitivity and specificity, averaged over the findings; 0.5 is guessing."
    ),
    "f1_macro": "Macro F1 is the harmonic mean of a finding's recall and precision, averaged over the findings.",
    "f1_weighted": "Weighted F1 is the harmonic mean of a finding's recall and precision, averaged by how often each is there.",
    "auc": (
        "AUC is the chance that an image with a finding is ranked above one without it, averaged over the findings; 0.5 is "
        "guessing."
    ),
    "average_precision": (
        "Average precision is the precision averaged over the thresholds that find one image with a finding after the other, "
        "averaged over the findings; guessing gives a finding's share of the images."
    ),
    "expected_calibration_error": (
        "The calibration error (ECE) is how far the classifier's confidence in what it says of each finding is from the share of "
        "images of which that is right; lower is better."
    ),
}
_ALSO = " A finding counts where it is known of an image, and is named where its probability is above one half."


def meaning(metric: str, *, findings: bool) -> str:
    """A sentence or two; empty for a metric that has none."""
    if not findings:
        return _CLASSES.get(metric, "")
    return _FINDINGS[metric] + _ALSO if metric in _FINDINGS else ""
