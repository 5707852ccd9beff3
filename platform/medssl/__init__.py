"""medssl: self-supervised learning on unlabelled medical images, and the evidence that it helps.

import medssl
result = medssl.run("study.yaml", "s3://bucket/medssl")
result.scores, result.summary, result.comparisons   # pandas DataFrames
result.report_uri
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medssl.family import plan_all, report_all, run_all
    from medssl.recipe import Recipe
    from medssl.recipe_file import load
    from medssl.results import StudyResult
    from medssl.study import plan, report, run

__version__ = "0.1.0"

_HOME = {
    "Recipe": "medssl.recipe",
    "load": "medssl.recipe_file",
    "StudyResult": "medssl.results",
    "plan": "medssl.study",
    "report": "medssl.study",
    "run": "medssl.study",
    "plan_all": "medssl.family",
    "report_all": "medssl.family",
    "run_all": "medssl.family",
}

__all__ = ["Recipe", "StudyResult", "__version__", "load", "plan", "plan_all", "report", "report_all", "run", "run_all"]


def __getattr__(name: str) -> Any:
    """Imports on first use: `import medssl` for a loss or a version must not pull in Ray."""
    if name not in _HOME:
        raise AttributeError(f"module 'medssl' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
