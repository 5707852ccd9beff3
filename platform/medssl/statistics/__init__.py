"""Is one arm better than another? Intervals that vary everything a repeat could vary, and the papers' test beside them.

A study repeats at several levels: P pretraining seeds (of each arm), D draws of the labelled images (the same draws for
all arms), S head seeds (within each pretraining seed and draw), and N test images of a sample of patients. Over head
seeds alone nearly every difference is significant, even between two random encoders (`aa_summary` shows it on one's own
data), so a claim about a method rests on `nested_bootstrap`.
"""

from medssl.statistics.nested import BootstrapResult, nested_bootstrap, run_scores
from medssl.statistics.samples import (
    EquivalenceResult,
    WelchResult,
    effect_size,
    equivalence,
    holm,
    welch,
    welch_from_summary,
)
from medssl.statistics.spread import AASummary, KindOfRepeat, RepeatSummary, aa_summary, summarise

__all__ = [
    "AASummary",
    "BootstrapResult",
    "EquivalenceResult",
    "KindOfRepeat",
    "RepeatSummary",
    "WelchResult",
    "aa_summary",
    "effect_size",
    "equivalence",
    "holm",
    "nested_bootstrap",
    "run_scores",
    "summarise",
    "welch",
    "welch_from_summary",
]
