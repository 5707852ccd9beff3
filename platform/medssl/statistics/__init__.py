"""Is one arm better than another? Intervals that vary everything a repeat could vary, and the papers' test beside them.

A study repeats at several levels: P pretraining seeds (of each arm), D draws of the labelled images (the same draws for
all arms), S head seeds (within each pretraining seed and draw), and N test images of a sample of patients. Over head
seeds alone nearly every difference is significant, even between two random encoders (`aa_summary` shows it on one's own
data), so a claim about a method rests on `nested_bootstrap`, a claim of "as good as" on `nested_equivalence`.
`smallest_detectable_difference` says beforehand what a design can show.
"""

from medssl.statistics.design import Scatter, smallest_detectable_difference, smallest_equivalence_margin
from medssl.statistics.nested import BootstrapResult, nested_bootstrap, nested_equivalence, paired_bootstrap, run_scores
from medssl.statistics.published import PublishedTest, RecomputedTest, recompute_published
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
    "PublishedTest",
    "RecomputedTest",
    "RepeatSummary",
    "Scatter",
    "WelchResult",
    "aa_summary",
    "effect_size",
    "equivalence",
    "holm",
    "nested_bootstrap",
    "nested_equivalence",
    "paired_bootstrap",
    "recompute_published",
    "run_scores",
    "smallest_detectable_difference",
    "smallest_equivalence_margin",
    "summarise",
    "welch",
    "welch_from_summary",
]
