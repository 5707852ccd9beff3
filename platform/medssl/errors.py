"""Errors that speak to the user: one line with what was wrong, the value, the bounds, and what to do.

The command line prints the message of a :class:`MedsslError` without a traceback and leaves with its exit code;
anything else that escapes is a defect of medssl and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medssl.leases import Owner


class MedsslError(Exception):
    """A failure whose message is meant for the user. `exit_code` becomes the exit status of the command line."""

    exit_code = 2


class RecipeError(MedsslError):
    """A study recipe, an override of it, or a command-line value is not valid."""


class DataError(MedsslError):
    """Input images, tables or a dataset in the store cannot be used as they are."""


class StoreError(MedsslError):
    """The object store refused, is unreachable, or holds something unexpected."""


class MissingKey(StoreError):
    """No object of that name is in the store."""


class NonFiniteLoss(MedsslError):
    """Training met a NaN or an infinite loss: a result of the recipe, not a fault to retry."""

    exit_code = 3


class LeaseHeld(MedsslError):
    """Another run holds the lease of a stage and the caller did not want to wait."""

    exit_code = 4

    def __init__(self, message: str, owner: Owner | None = None) -> None:
        super().__init__(message)
        self.owner = owner
        """Who holds it, where the caller asked for one that is held."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """`did you mean 'x'? ` for the choice most like `name`, or the sorted choices when none is near."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"choices: {', '.join(known)}"
