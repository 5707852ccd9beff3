"""Pins all that medssl needs at run time to the versions installed here: python cluster/lock.py > cluster/requirements.lock

Run it in an environment made by `pip install '.[cluster]'` on the platform and Python of the image.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("cluster",)


def locked(name: str, extras: tuple[str, ...] = ()) -> dict[str, str]:
    """Versions of all that a distribution needs, itself left out, by canonical name."""
    found: dict[str, str] = {}
    seen: set[tuple[str, tuple[str, ...]]] = set()
    waiting = [(name, extras)]
    while waiting:
        owner, wanted = waiting.pop()
        if (owner, wanted) in seen:
            continue
        seen.add((owner, wanted))
        for text in distribution(owner).requires or []:
            needed = Requirement(text)
            if needed.marker is not None and not any(needed.marker.evaluate({"extra": extra}) for extra in ("", *wanted)):
                continue
            other = canonicalize_name(needed.name)
            try:
                found[other] = distribution(other).version
            except PackageNotFoundError:
                raise SystemExit(f"lock.py: {owner} needs {text}, which is not installed: pip install '.[cluster]'") from None
            waiting.append((other, tuple(sorted(needed.extras))))
    return found


def main() -> None:
    """Prints the lock file."""
    print(f"# Made by cluster/lock.py for Python {sys.version_info.major}.{sys.version_info.minor} on {sys.platform}.")
    for name, version in sorted(locked("medssl", EXTRAS).items()):
        if name != "medssl":
            print(f"{name}=={version.partition('+')[0]}")


if __name__ == "__main__":
    main()
