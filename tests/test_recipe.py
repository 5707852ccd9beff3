"""The recipe: what is refused, in which words, and what is taken as given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from medssl.datasets.read import Decoding
from medssl.errors import RecipeError
from medssl.recipe import Recipe
from medssl.recipe_file import dump, load, load_all

ROOT = Path(__file__).resolve().parents[1]


def raw(**changes: Any) -> dict[str, Any]:
    return {
        "study": "s",
        "dataset": "datasets/d",
        "arms": [
            {"name": "bt", "objective": {"name": "barlow_twins", "projector": [8, 8]}, "epochs": 2, "batch_size": 8},
            {"name": "random"},
            {"name": "colour", "features": "colour"},
        ],
        "protocols": [
            {"name": "probe", "kind": "linear_probe"},
            {"name": "tune", "kind": "fine_tune", "head_seeds": 5},
        ],
        "comparisons": [{"better": "bt", "than": "random", "protocol": "probe"}],
    } | changes


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_recipes_are_valid_and_open_with_a_header(path: Path) -> None:
    assert load_all(path).recipes
    assert path.read_text().startswith("#")


def test_fields_are_taken_over_by_a_merge_key(tmp_path: Path) -> None:
    arms = "arms:\n- &a {name: random, pretraining_seeds: 2}\n- {<<: *a, name: more}"
    path = tmp_path / "merged.yaml"
    path.write_text(yaml.safe_dump(raw(arms=[], comparisons=[])).replace("arms: []", arms))
    assert [(arm.name, arm.pretraining_seeds) for arm in load(path).arms] == [("random", 2), ("more", 2)]
    path.write_text(path.read_text().replace("<<: *a, name: more", "<<: *a, name: more, name: again"))
    with pytest.raises(RecipeError, match="field 'name' is given twice"):
        load(path)


BLOCK = {"subgroups": ["age"], "bands": {"age": [40, 60.5]}, "deployment_prior": {"a": 1, "b": 3}}


@pytest.mark.parametrize("report", [{}, BLOCK])
def test_dump_and_load_are_inverse(tmp_path: Path, report: dict[str, Any]) -> None:
    recipe = load(raw(report=report))
    path = tmp_path / "r.yaml"
    path.write_text(dump(recipe))
    assert load(path) == recipe


def test_scores_without_a_nested_bootstrap_are_listed_and_searched_for() -> None:
    search = {"metric": "average_precision", "learning_rate": [0.1, 0.01]}
    protocols = [{"name": "probe", "kind": "linear_probe", "search": search}]
    recipe = load(raw(metrics=["balanced_accuracy", "average_precision", "expected_calibration_error"], protocols=protocols))
    assert recipe.metrics[1:] == ("average_precision", "expected_calibration_error")


def test_every_field_is_described() -> None:
    def walk(schema: Any) -> Any:
        if isinstance(schema, dict):
            for name, field in schema.get("properties", {}).items():
                if not (field.get("description") or "$ref" in field or "allOf" in field):
                    yield name
            for value in schema.values():
                yield from walk(value)
        elif isinstance(schema, list):
            for value in schema:
                yield from walk(value)

    assert list(walk(Recipe.model_json_schema())) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"comparisonss": []}, ["unknown field 'comparisonss'", "did you mean 'comparisons'?"]),
        ({"arms": [{"name": "a", "epoch": 3}]}, ["unknown field 'arms.0.epoch'", "did you mean 'epochs'?"]),
        ({"protocols": [{"name": "p", "kind": "linear_probe", "head_seed": 3}]}, ["'protocols.0.head_seed'", "'head_seeds'"]),
        ({"protocols": [{"name": "p", "kind": "linear_prob"}]}, ["linear_prob", "linear_probe", "fine_tune"]),
        ({"arms": [{"name": "a", "objective": {"name": "simclr"}, "epochs": 3, "steps": 5}]}, ["epochs is 3 and steps 5"]),
        ({"arms": [{"name": "a", "steps": 3}]}, ["objective and epochs go together, objective is missing"]),
        ({"arms": [{"name": "a", "epochs": 3}]}, ["objective and epochs go together, objective is missing"]),
        ({"arms": [{"name": "bt", "objective": {"name": "barlow_twins"}, "epochs": 0}]}, ["epochs", "equal to 1", "not 0"]),
        ({"metrics": ["balanced_acuracy"]}, ["balanced_acuracy", "did you mean 'balanced_accuracy'?"]),
        (
            {"comparisons": [{"better": "bt", "than": "random", "protocol": "probe", "metric": "average_precision"}]},
            ["comparison metric 'average_precision' has no nested bootstrap", "balanced_accuracy"],
        ),
        (
            {"protocols": [{"name": "p", "kind": "linear_probe", "search": {"metric": "expected_calibration_error"}}]},
            ["a search takes the highest expected_calibration_error, of which less is better", "average_precision"],
        ),
        ({"report": {"specifity": 0.9}}, ["unknown field 'report.specifity'", "did you mean 'specificity'?"]),
        ({"report": {"specificity": 95}}, ["report.specificity", "less than 1", "not 95"]),
        ({"report": {"subgroups": ["site", "site"]}}, ["subgroups names column 'site' twice"]),
        ({"report": {"bands": {"age": [40]}}}, ["bands cuts column 'age', which subgroups does not name"]),
        ({"report": {"subgroups": ["age"], "bands": {"age": [60, 40]}}}, ["bands of 'age' are [60.0, 40.0]: limits ascend"]),
        ({"report": {"subgroups": ["age"], "bands": {"age": []}}}, ["report.bands.age", "at least 1 item"]),
        ({"report": {"deployment_prior": {"a": 1.0, "b": 0.0}}}, ["deployment_prior has fewer than two classes above 0"]),
        ({"report": {"deployment_prior": {"a": -1.0, "b": 2.0}}}, ["report.deployment_prior.a", "greater than or equal to 0"]),
        ({"comparisons": [{"better": "btt", "than": "random", "protocol": "probe"}]}, ["'btt'", "did you mean 'bt'?"]),
        ({"comparisons": [{"better": "bt", "than": "colour", "protocol": "tune"}]}, ["'colour' has no network to fine-tune"]),
        ({"arms": [{"name": "a"}, {"name": "a"}]}, ["two arms are named 'a'"]),
        ({"compute": {"workers": 3}}, ["batch_size 8 is not a multiple of compute.workers 3"]),
        ({"repeats": {"labels": None, "label_draws": 2}}, ["label_draws must be 1"]),
        ({"dataset": None}, ["dataset", "string"]),
        (
            {"protocols": [{"name": "p", "kind": "linear_probe", "search": {"learning_rate": [-0.1]}}], "comparisons": []},
            ["protocols.0.search", "learning_rate holds -0.1", "above 0"],
        ),
        (
            {"protocols": [{"name": "p", "kind": "linear_probe", "search": {"weight_decay": [0, -1e-4]}}], "comparisons": []},
            ["weight_decay holds -0.0001", "0 or more"],
        ),
        (
            {"arms": [{"name": "a", "encoder": {"channels": 1, "mean": [0.5], "std": [0.2]}}], "comparisons": []},
            ["encoder.channels"],
        ),
    ],
)  # fmt: skip
def test_what_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load(raw(**changes))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def pretrained(**arm: Any) -> dict[str, Any]:
    fields = {"name": "bt", "objective": {"name": "barlow_twins", "projector": [8, 8]}, "epochs": 2, "batch_size": 8} | arm
    return raw(arms=[fields, {"name": "random"}])


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ({"objective": {"name": "barlow_twin"}}, ["barlow_twin", "barlow_twins", "simclr", "swav"]),
        ({"objective": {"name": "simclr", "projector": [0]}}, ["projector", "equal to 1", "not 0"]),
        ({"objective": {"name": "simclr", "projector": []}}, ["projector"]),
        ({"objective": {"name": "simclr", "temperatur": 1}}, ["temperatur", "did you mean 'temperature'?"]),
        ({"batch_size": 1}, ["batch_size", "equal to 2", "not 1"]),
        ({"batch_size": 2}, ["batch_size 2 gives 2 workers one image each"]),
        ({"objective": {"name": "swav", "queue": 100}}, ["queue 100 is not a multiple of batch_size 8", "use 96"]),
        ({"views": {"small_crops": 4, "small_px": 32}}, ["barlow_twins takes two views", "small_crops"]),
        ({"objective": {"name": "swav"}, "views": {"preset": "swav"}}, ["small_px 96 is larger than encoder.image_px 64"]),
        ({"further": {"trained": "last_block"}}, ["further is for weights that are given", "initial_weights is random"]),
        ({"surgery": {}}, ["surgery is for weights that are given"]),
        (
            {"initial_weights": "timm", "objective": None, "epochs": None, "surgery": {}},
            ["arm 'bt': surgery precedes a pretraining, and the arm has no objective: add one or leave surgery out"],
        ),
        (
            {"initial_weights": "timm", "objective": None, "epochs": None, "further": {"head_only_epochs": 1}},
            ["arm 'bt': further says how given weights are pretrained, and the arm has no objective", "or leave further out"],
        ),
        ({"encoder_parts": 3}, ["encoder_parts 3 does not divide a worker's 4 images"]),
        ({"views": {"preset": "simclrr"}}, ["simclrr", "simclr"]),
        ({"mix": [{"times": 0}]}, ["mix.0.times", "equal to 1", "not 0"]),
        ({"mix": [{"splits": ["train"]}, {"splits": ["val", "train"]}]}, ["split 'train' of the study's dataset twice", "times"]),
        ({"mix": [{"dataset": "datasets/d"}]}, ["datasets/d is the study's own", "leave `dataset` out"]),
        ({"mix": [{"dataset": "datasets/b", "times": 3}], "pairs": "bag"}, ["each bag once an epoch", "times 3 must be 1"]),
        ({"mix": [{}], "objective": None, "epochs": None}, ["the arm has no objective"]),
        ({"mix": [{"splits": ["train", "test"]}]}, ["'bt' pretrains on images of split 'test'", "allow_judged_in_pretraining"]),
    ],
)  # fmt: skip
def test_which_pretrainings_are_refused(arm: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load(pretrained(**arm) | {"compute": {"workers": 2}})
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_a_pretraining_sees_what_is_judged_only_where_the_recipe_allows_it() -> None:
    shown = pretrained() | {"pretraining_splits": ["train", "val", "test"]}
    with pytest.raises(RecipeError, match="'bt' pretrains on images of split 'test', which the scores are measured on"):
        load(shown)
    assert load(shown | {"allow_judged_in_pretraining": True}).judged_in_pretraining == ["bt"]
    on_val = pretrained() | {"pretraining_splits": ["train", "val"]}
    assert load(on_val).judged_in_pretraining == []
    with pytest.raises(RecipeError, match="split 'val'"):
        load(on_val | {"evaluation_split": "val"})
    child = {"name": "child", "initial_weights": "arm:bt", "objective": {"name": "barlow_twins", "projector": [8, 8]},
             "epochs": 1, "batch_size": 8, "mix": [{"splits": ["train"]}]}  # fmt: skip
    line = shown | {"arms": [*shown["arms"], child], "allow_judged_in_pretraining": True}
    assert load(line).judged_in_pretraining == ["bt", "child"]
    with pytest.raises(RecipeError, match="arm 'bt' pretrains on images of split 'test'"):
        load(line | {"allow_judged_in_pretraining": False, "arms": [child, *shown["arms"]]})
    elsewhere = pretrained(mix=[{"dataset": "datasets/b", "splits": ["train", "test"]}])
    assert load(elsewhere | {"pretraining_splits": ["test"]}).judged_in_pretraining == []


def test_decoding_is_what_the_recipe_says() -> None:
    images = {"decode_px": 40, "resize": "pad", "depth": "detector"}
    recipe = load(raw(images=images, encoder={"channels": 1, "mean": [0.5], "std": [0.2]}))
    assert recipe.decoding == Decoding(40, "pad", 1, "detector") != load(raw(images={"decode_px": 40, "resize": "pad"})).decoding
    with pytest.raises(RecipeError, match=r"images\.depth.*'window' or 'detector'.*'dicom'"):
        load(raw(images={"depth": "dicom"}))


def test_the_finder_is_refused_with_streaming() -> None:
    with pytest.raises(RecipeError, match=r"finder needs images\.feeding resident"):
        load(pretrained(learning_rate_finder=True) | {"images": {"feeding": "streaming"}})


def test_streamed_bags_of_a_mix_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"pairs of a bag from a mix need images\.feeding resident"):
        load(pretrained(pairs="bag", mix=[{}, {"dataset": "datasets/b"}]) | {"images": {"feeding": "streaming"}})


def test_overrides_are_typed_validated_and_in_order() -> None:
    recipe = load(raw(), ["arms.0.epochs=5", "arms.bt.optimiser.learning_rate=1e-2", "arms.0.epochs=7"])
    assert recipe.arms[0].epochs == 7
    assert recipe.arms[0].optimiser.learning_rate == 0.01


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("arms.0.epochs", ["path.to.field=value"]),
        ("arms.9.epochs=1", ["no item '9'", "bt"]),
        ("arms.0.epochs=x", ["arms.0.epochs", "'x'"]),
        ("arms.0.epochz=1", ["did you mean 'epochs'?"]),
        ("study.name=1", ["single value"]),
        ("arms.0.epochs=[5", ["not valid YAML"]),
    ],
)
def test_overrides_that_are_refused(override: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load(raw(), [override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("study: [", ["not valid YAML"]),
        ("- a\n- b\n", ["list"]),
        ("study: a\nstudy: b\n", ["'study' is given twice"]),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_is_one_line() -> None:
    with pytest.raises(RecipeError, match=r"no recipe at nowhere\.yaml"):
        load("nowhere.yaml")


def test_numbers_in_scientific_form_are_numbers(tmp_path: Path) -> None:
    """YAML 1.1 would read 1e-3 as text."""
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(raw()).replace("batch_size: 8", "batch_size: 8\n  optimiser: {learning_rate: 1e-3}"))
    assert load(path).arms[0].optimiser.learning_rate == 1e-3
