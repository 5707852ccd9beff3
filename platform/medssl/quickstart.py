"""`medssl quickstart`: the whole road on synthetic images, in a folder, in minutes, with nothing to set up."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from medssl.artifacts import DATASETS
from medssl.datasets.synthetic import write_synthetic
from medssl.errors import DataError
from medssl.events import Event, OnEvent
from medssl.recipe_file import load
from medssl.results import StudyResult
from medssl.stages.ingest import IngestOptions, ingest
from medssl.store import open_store
from medssl.study import run

IMAGES = 800
NAME = "synthetic-lesions"


def recipe_text() -> str:
    """The quickstart's recipe, which the package carries."""
    return files("medssl").joinpath("recipes/quickstart.yaml").read_text(encoding="utf-8")


def quickstart(folder: Path, *, overrides: Sequence[str] = (), on_event: OnEvent | None = None) -> StudyResult:
    """Draws synthetic lesions, ingests them into a local store and runs a small study on them.

    Args:
        folder: where everything goes; a folder that holds an unfinished or finished quickstart goes on from there.

    Raises:
        MedsslError: with a message for the user.
    """
    import yaml

    emit: OnEvent = on_event or (lambda event: None)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file: name a folder with --store")
    fields = yaml.safe_load(recipe_text())
    load(fields, overrides)  # a wrong override is said before anything is drawn
    store = open_store(str(folder), create=True)
    uri = store.uri_of(f"{DATASETS}/{NAME}")
    if not store.exists(f"{DATASETS}/{NAME}/card.json"):
        with tempfile.TemporaryDirectory(prefix="medssl-synthetic-") as drawn:
            emit(Event("begin", f"draw {IMAGES} synthetic lesions"))
            table = write_synthetic(Path(drawn), images=IMAGES, seed=0)
            emit(Event("end", f"draw {IMAGES} synthetic lesions"))
            emit(Event("begin", "ingest"))
            ingest(
                table,
                uri,
                IngestOptions(name=NAME, licence="CC0-1.0 (drawn by a program)", synthetic=True),
                on_progress=lambda done, total: emit(Event("progress", "ingest", done, total)),
            )
            emit(Event("end", "ingest"))
    return run(fields, store, overrides=overrides, on_event=on_event)
