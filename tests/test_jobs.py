"""The papers' recipes in jobs/: each can be planned, says what it shares, what it costs, and what it reproduces."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import index_only

from medssl.costs import Hardware, cost
from medssl.family import plan_all
from medssl.recipe_file import load_all
from medssl.store import Store, open_store

JOBS = Path(__file__).resolve().parents[1] / "jobs"
PAPERS = sorted(JOBS.glob("00?-*.yaml"))
DATASETS = ("isic2019-paper000", *index_only.PUBLIC, *index_only.FINDINGS)
RESNET_50 = [f"{method}_resnet50" for method in ("barlow_twins", "simclr", "swav", "byol")]
WEIGHTS = (*RESNET_50, "simclr_r50_1x", "simclr_r50_4x", "simclr_r152_2x", "supervised_r152_2x")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """All datasets that the recipes name, without images and the larger ones cut, and files in place of weights."""
    made = open_store(str(tmp_path_factory.mktemp("jobs")), create=True)
    for name in DATASETS:
        index_only.write_public(made.sub(f"datasets/{name}"), name)
    for name in WEIGHTS:
        made.write(f"weights/{name}.pth", name.encode())
    return made


def test_there_are_two_recipes_of_each_paper() -> None:
    names = [path.stem for path in PAPERS]
    assert len(names) == 10 and {f"{name}-small" for name in names if not name.endswith("-small")} <= set(names)


def test_encoders_that_two_datasets_start_from_are_planned_once(store: Store) -> None:
    path = JOBS / "000-further-pretraining-small.yaml"
    skin, chest = plan_all(path, store).values()
    assert not [line for line in skin if line.state == "shared"]
    assert {line.label for line in chest if line.state == "shared"} == {"pretrain sl seed 0", "pretrain ssl seed 0"}


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_it_is_planned_with_its_cost(path: Path, store: Store) -> None:
    plans = plan_all(path, store)
    for recipe in load_all(path).recipes.values():
        lines = plans[recipe.study]
        assert lines[-1].stage == "report" and len(lines[-1].comparisons) == len(recipe.comparisons) > 0
        pretrained = {line.arm for line in lines if line.stage == "pretrain"}
        assert pretrained == {arm.name for arm in recipe.arms if arm.objective is not None}
        assert all((line.images > 0) == (line.state != "shared") for line in lines if line.stage in ("pretrain", "embed"))
        found = cost(recipe, lines, Hardware("one", 1, 1e12, ""))
        assert found.total > 0 and {stage for stage, hours in found.hours.items() if hours} <= {
            "pretrain", "initialise", "embed", "search", "evaluate", "transfer",
        }  # fmt: skip


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_its_header_says_what_it_is(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert header[0].startswith(f"# Paper {path.stem[:3]}")
    for part in ("# Data:", "# Command:", "# Hardware:", "# Compare:"):
        assert sum(line.startswith(part) for line in header) == 1
    family = load_all(path)
    shown = [table.title for recipe in family.recipes.values() for table in recipe.tables]
    assert shown or (family.together is not None and family.together.tables), "it fills the paper's tables"
