"""The layer rule: imports point down only, Ray and torch.distributed stay where they belong."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "platform"
PACKAGE = SOURCE / "medssl"

LEVELS = {
    0: "errors stopping events params given retry store s3 s3_client s3_errors filesystem leases artifacts images metadata views"
    " collectives optim metrics calibration influence subgroups statistics telemetry networks probes datasets",
    1: "objectives checkpoint training",
    2: "protocols shifted outside label_curves published report_params comparison compute matrix arms recipe recipe_file mixes"
    " lineage forms exporter streams rows bag_rows",
    3: "stages",
    4: "claims costs comparing judging shifting guards checks pictures results runner study family quickstart starter"
    " job_server submit leftovers forgetting usage",
    5: "console cli cli_jobs __main__",
}
LEVEL_OF = {name: level for level, names in LEVELS.items() for name in names.split()}
RAY_HOMES = {"exporter", "streams", "rows", "bag_rows", "stages", "study", "runner", "submit"}
DISTRIBUTED_HOMES = {"collectives", "training.step"}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, *, runtime_only: bool = False) -> Iterator[str]:
    """Absolute names of everything a file imports, wherever in it."""
    tree = ast.parse(path.read_text())
    skipped = (
        {id(inner) for node in ast.walk(tree) if is_type_checking(node) for inner in ast.walk(node)} if runtime_only else set()
    )
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_point_down(path: Path) -> None:
    here = dotted(path).split(".")[0]
    assert here in LEVEL_OF, f"{here} has no level: add it to LEVELS and to the README's tree"
    for name in imported(path, runtime_only=True):
        parts = name.split(".")
        if parts[0] != "medssl" or len(parts) == 1 or parts[1] == "__version__":
            continue
        assert parts[1] in LEVEL_OF, f"{dotted(path)} imports {name}, which has no level"
        assert LEVEL_OF[parts[1]] <= LEVEL_OF[here], (
            f"{dotted(path)} (level {LEVEL_OF[here]}) imports {name} (level {LEVEL_OF[parts[1]]})"
        )


def test_modules_of_one_level_have_no_import_cycle() -> None:
    edges: dict[str, set[str]] = {}
    for path in modules():
        here = dotted(path).split(".")[0]
        there = {n.split(".")[1] for n in imported_at_top(path) if n.startswith("medssl.") and n.split(".")[1] != here}
        edges.setdefault(here, set()).update(there)
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for other in edges.get(name, ()):
                visit(other, (*trail, name))
            done.add(name)

    for name in list(edges):
        visit(name, ())


def imported_at_top(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_ray_and_torch_distributed_stay_at_home(path: Path) -> None:
    here = dotted(path)
    for name in imported(path):
        if name == "ray" or name.startswith("ray."):
            assert here.split(".")[0] in RAY_HOMES, f"{here} imports {name}"
        if name.startswith("torch.distributed"):
            assert here in DISTRIBUTED_HOMES, f"{here} imports {name}"


def test_the_source_root_is_no_package() -> None:
    """platform/__init__.py would shadow Python's own platform module and hang Ray's workers without a message."""
    assert not (SOURCE / "__init__.py").exists()


def test_top_level_entries() -> None:
    import subprocess

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    entries = {line.split("/")[0] for line in listed.stdout.splitlines()}
    allowed = {"pyproject.toml", "README.md", "LICENSE", "platform", "jobs", "cluster", "tests", "dashboards"}
    assert {e for e in entries if not e.startswith(".")} <= allowed
