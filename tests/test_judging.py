"""What is said of saved predictions, against plain loops over runs and scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as theirs
from tests.judged_study import CLASSES, index, recipe, study

from medssl.calibration import change_prior, reliability
from medssl.errors import RecipeError
from medssl.judging import check_report, judge, trained_priors
from medssl.metrics import SCORES
from medssl.recipe import Recipe
from medssl.stages.specs import Specs

PRIOR = {"bcc": 1, "mel": 0, "nv": 9}


@pytest.fixture(scope="module")
def made() -> Any:
    return study(subgroups=["site", "age"], bands={"age": [40, 60]}, decision_class="mel", deployment_prior=PRIOR)


@pytest.fixture(scope="module")
def judged(made: Any) -> dict[str, Any]:
    return judge(*made)


def flat(run: Any) -> np.ndarray:
    return run.probabilities_PDSNK.reshape(-1, *run.probabilities_PDSNK.shape[3:]).astype(float)


def test_scores_of_each_class_are_means_over_runs(made: Any, judged: dict[str, Any]) -> None:
    frame = judged["class_scores"]
    assert len(frame) == 4 * 3
    for row in frame.itertuples():
        run, k, name = made[2][row.arm, row.protocol], CLASSES.index(row[3]), row[3]
        found = []
        for p in flat(run):
            report = theirs.classification_report(
                run.labels_N, p.argmax(1), labels=[0, 1, 2], target_names=CLASSES, output_dict=True, zero_division=np.nan
            )[name]
            truth = run.labels_N == k
            fpr, tpr, _ = theirs.roc_curve(truth, p[:, k], drop_intermediate=False)
            found.append([
                report["precision"], report["recall"], report["f1-score"], theirs.roc_auc_score(truth, p[:, k]),
                theirs.average_precision_score(truth, p[:, k]), tpr[1 - fpr >= 0.95 - 1e-12].max(),
            ])  # fmt: skip
        expected = np.nanmean(found, axis=0)
        ours = [row.precision, row.recall, row.f1, row.auc, row.average_precision, row.sensitivity]
        np.testing.assert_allclose(ours, expected, atol=1e-9)
        assert row.images == (run.labels_N == k).sum()


def test_calibration_is_of_each_run_and_the_correction_is_of_its_training(made: Any, judged: dict[str, Any]) -> None:
    _, specs, runs = made
    frame = judged["calibration"].set_index(["arm", "protocol"])
    seen = [np.bincount(specs.labels(specs.draw(d)), minlength=3) for d in range(2)]
    for key, run in runs.items():
        found = frame.loc[key]
        assert found["ece"] == pytest.approx(np.mean([reliability(p, run.labels_N).expected_error for p in flat(run)]), abs=1e-12)
        one_hot = np.eye(3)[run.labels_N]
        assert found["brier"] == pytest.approx(np.mean([((p - one_hot) ** 2).sum(1).mean() for p in flat(run)]), abs=1e-12)
        together = reliability(flat(run).reshape(-1, 3), np.tile(run.labels_N, len(flat(run))))
        np.testing.assert_allclose(judged["reliabilities"][key][0].accuracy_B, together.accuracy_B)
        assert found["accuracy"] == pytest.approx(run.metrics["accuracy"].mean())
        if key[1] == "tune":  # trained without class weights: nothing to put back
            assert np.isnan(found["ece_corrected"]) and judged["reliabilities"][key][1] is None
            continue
        errors = []
        for p, d, s in np.ndindex(run.probabilities_PDSNK.shape[:3]):
            corrected = change_prior(run.probabilities_PDSNK[p, d, s], np.ones(3), seen[d])
            errors.append(reliability(corrected, run.labels_N).expected_error)
        assert found["ece_corrected"] == pytest.approx(np.mean(errors), abs=1e-12)
        assert found["brier_corrected"] < found["brier"]  # labels are as frequent as in training, the probe thinks them even


def test_another_prior_weighs_images_and_changes_probabilities(made: Any, judged: dict[str, Any]) -> None:
    _, specs, runs = made
    assert judged["deployment_prior"] == {"bcc": 0.1, "mel": 0.0, "nv": 0.9}
    frame = judged["priors"].set_index(["arm", "protocol", "metric"])
    run = runs["random", "tune"]
    assert frame.loc["random", "tune", "accuracy"]["measured"] == run.metrics["accuracy"].mean()
    # accuracy there is the recalls weighed by the classes' shares there
    recalls = np.mean([[(p.argmax(1) == run.labels_N)[run.labels_N == k].mean() for k in range(3)] for p in flat(run)], axis=0)
    assert frame.loc["random", "tune", "accuracy"]["as_it_is"] == pytest.approx(0.1 * recalls[0] + 0.9 * recalls[2], abs=1e-9)
    trained = np.bincount(specs.labels(specs.draw(0)), minlength=3)
    changed = [change_prior(p, trained, np.array([1, 0, 9])) for p in flat(run)]
    weights = np.array([0.1, 0.0, 0.9])[run.labels_N] / np.bincount(run.labels_N)[run.labels_N]
    expected = np.mean([theirs.balanced_accuracy_score(run.labels_N[weights > 0], p.argmax(1)[weights > 0]) for p in changed])
    assert frame.loc["random", "tune", "balanced_accuracy"]["corrected"] == pytest.approx(expected, abs=1e-9)
    assert frame.loc["random", "probe", "accuracy"]["corrected"] > frame.loc["random", "probe", "accuracy"]["as_it_is"]


def over_sampled(recipe: Recipe) -> Recipe:
    tune = next(p for p in recipe.protocols if p.name == "tune").canonical()
    assert tune["training"]["class_weights"] == "none"
    tune["training"] |= {"over_sample": True}
    probe = next(p for p in recipe.protocols if p.name == "probe").canonical()
    return Recipe.model_validate(recipe.canonical() | {"protocols": [probe, tune]})


def test_over_sampling_shows_classes_evenly_as_class_weights_do(made: Any) -> None:
    chosen, specs, runs = made
    found = judge(over_sampled(chosen), specs, runs)
    run, seen = runs["random", "tune"], np.bincount(specs.labels(specs.draw(0)), minlength=3)
    assert len(set(seen)) == 3  # so that it matters
    back = np.mean([reliability(change_prior(p, np.ones(3), seen), run.labels_N).expected_error for p in flat(run)])
    calibration = found["calibration"].set_index(["arm", "protocol"]).loc["random", "tune"]
    assert calibration["ece_corrected"] == pytest.approx(back, abs=1e-12)
    there = np.array([1, 0, 9])
    weights = np.array([0.1, 0.0, 0.9])[run.labels_N] / np.bincount(run.labels_N)[run.labels_N]
    changed = [change_prior(p, np.ones(3), there) for p in flat(run)]
    expected = np.mean([theirs.accuracy_score(run.labels_N, p.argmax(1), sample_weight=weights) for p in changed])
    row = found["priors"].set_index(["arm", "protocol", "metric"]).loc["random", "tune", "accuracy"]
    assert row["corrected"] == pytest.approx(expected, abs=1e-9)


def test_an_over_sampled_model_that_cannot_tell_says_the_prior_of_where_it_is_used(made: Any) -> None:
    chosen, _, runs = made
    tune = next(p for p in over_sampled(chosen).protocols if p.name == "tune")
    trained = trained_priors(tune, [np.array([90, 10])], runs["random", "tune"])
    changed = change_prior(np.array([[0.5, 0.5]]), trained[0], np.array([0.9, 0.1]))
    np.testing.assert_allclose(changed, [[0.9, 0.1]])


def test_decision_curve_is_the_mean_of_the_runs(made: Any, judged: dict[str, Any]) -> None:
    curves, run = judged["decisions"], made[2]["pretrained", "probe"]
    positive = run.labels_N == 1
    assert curves.share == positive.mean() and list(curves.models) == list(made[2])
    seen = [np.bincount(made[1].labels(made[1].draw(d)), minlength=3) for d in range(2)]
    order = [d for _, d, _ in np.ndindex(run.probabilities_PDSNK.shape[:3])]
    believed = np.stack([change_prior(p, np.ones(3), seen[d]) for p, d in zip(flat(run), order, strict=True)])
    acted = believed[:, :, 1] >= curves.thresholds_T[29]
    benefit = np.mean([(a & positive).mean() - (a & ~positive).mean() * 0.3 / 0.7 for a in acted])
    assert curves.models["pretrained", "probe"][29] == pytest.approx(benefit, abs=1e-9)
    unweighted = made[2]["random", "tune"]
    acted = flat(unweighted)[:, :, 1] >= 0.3  # trained without class weights: as it is
    benefit = np.mean([(a & positive).mean() - (a & ~positive).mean() * 0.3 / 0.7 for a in acted])
    assert curves.models["random", "tune"][29] == pytest.approx(benefit, abs=1e-9)


def test_patients_and_bags_by_a_loop(made: Any, judged: dict[str, Any]) -> None:
    _, specs, runs = made
    test = specs.index[specs.index["split"] == "test"].reset_index(drop=True)
    facts = {each.unit: each for each in judged["unit_facts"]}
    frame = judged["units"].set_index(["unit", "arm", "protocol", "metric"])
    for unit, column in (("patient", "patient_id"), ("bag", "bag_id")):
        name = [f"alone {n}" if pd.isna(p) else p for n, p in enumerate(test[column])]
        groups = [rows for _, rows in test.groupby(pd.Series(name), sort=False).groups.items()]
        torn = [rows for rows in groups if test["label"][rows].nunique() > 1]
        whole = [rows for rows in groups if test["label"][rows].nunique() == 1]
        assert facts[unit].torn == len(torn) and facts[unit].torn_images == sum(map(len, torn))
        assert facts[unit].units == len(whole) and facts[unit].images == sum(map(len, whole))
        assert facts[unit].several == sum(len(rows) > 1 for rows in whole) > 5
        run = runs["random", "probe"]
        kept = np.concatenate([np.array(rows) for rows in whole])
        labels = np.array([run.labels_N[rows[0]] for rows in whole])
        per_unit = [theirs.accuracy_score(labels, [p[list(rows)].mean(0).argmax() for rows in whole]) for p in flat(run)]
        per_image = [theirs.accuracy_score(run.labels_N[kept], p[kept].argmax(1)) for p in flat(run)]
        found = frame.loc[unit, "random", "probe", "accuracy"]
        assert found["per_unit"] == pytest.approx(np.mean(per_unit), abs=1e-9)
        assert found["per_image"] == pytest.approx(np.mean(per_image), abs=1e-9)
    assert facts["patient"].torn > 0 == facts["bag"].torn  # two lesions of a patient may differ, a lesion does not


def test_one_image_each_is_no_table_and_equal_groupings_are_one() -> None:
    chosen, specs, runs = study()
    plain = judge(chosen, specs, runs)
    assert plain["decisions"] is None and "priors" not in plain and plain["subgroups"].empty
    alone = specs.index.assign(patient_id=specs.index["image_id"], bag_id=None)
    found = judge(chosen, Specs(chosen, alone, CLASSES), runs)
    assert found["unit_facts"] == [] and found["units"].empty
    same = specs.index.assign(patient_id=specs.index["bag_id"])
    assert [each.unit for each in judge(chosen, Specs(chosen, same, CLASSES), runs)["unit_facts"]] == ["patient"]


def test_subgroups_are_scored_alone_and_small_ones_only_counted(made: Any, judged: dict[str, Any]) -> None:
    _, specs, runs = made
    test = specs.index[specs.index["split"] == "test"]
    frame = judged["subgroups"].set_index(["column", "group", "arm", "protocol", "metric"])
    assert set(judged["subgroups"]["metric"]) == set(SCORES)
    run = runs["pretrained", "probe"]
    inside = (test["site"] == "south").to_numpy()
    for metric, score in SCORES.items():
        row = frame.loc["site", "south", "pretrained", "probe", metric]
        expected = np.mean([score(p[inside], run.labels_N[inside], None) for p in flat(run)])
        assert row["score"] == pytest.approx(expected, abs=1e-9) and row["images"] == inside.sum()
        if metric == "expected_calibration_error":
            assert np.isnan(row["low"])
        else:
            assert 0 < row["low"] < row["score"] < row["high"] < 1
    people = test["patient_id"][inside]
    assert row["patients"] == people.nunique() + people.isna().sum() and row["classes"] == 3
    small = frame.loc["site", "<b>east</b>", "random", "tune", "accuracy"]
    assert small["images"] == (test["site"] == "<b>east</b>").sum() < 20 and np.isnan(small["score"])
    ages = judged["subgroups"][judged["subgroups"]["column"] == "age"]
    assert list(ages["group"].unique()) == ["below 40", "40 to below 60", "60 and above", "not stated"]
    one = ages[(ages["metric"] == "auc") & (ages["arm"] == "random") & (ages["protocol"] == "tune")]
    assert one["images"].sum() == len(test)


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ({"decision_class": "mell"}, "report.decision_class is 'mell': did you mean 'mel'?"),
        ({"deployment_prior": {"mel": 1, "nvv": 2}}, "deployment_prior names class 'nvv': did you mean 'nv'?"),
        ({"deployment_prior": {"mel": 1, "nv": 2}}, "deployment_prior lacks class 'bcc': give every class's frequency"),
        ({"subgroups": ["sitee"]}, "report.subgroups names column 'sitee': did you mean 'site'?"),
        ({"subgroups": ["patient_id"]}, "report.subgroups names column 'patient_id': choices: age, site"),
        ({"subgroups": ["age"]}, "column 'age' has .* different values, 24 at most .* bands"),
        ({"subgroups": ["site"], "bands": {"site": [1]}}, "column 'site' holds .*, not numbers"),
    ],
)  # fmt: skip
def test_what_the_dataset_cannot_answer_is_one_line(report: dict[str, Any], words: str) -> None:
    chosen = recipe(**report)
    with pytest.raises(RecipeError, match=words):
        check_report(chosen, Specs(chosen, index(), CLASSES))
    bare = index().drop(columns=["site", "age"])
    if "subgroups" in report:
        with pytest.raises(RecipeError, match="the dataset has no further columns"):
            check_report(chosen, Specs(chosen, bare, CLASSES))


def test_the_report_block_names_nothing_but_the_report() -> None:
    plain, changed = recipe(), recipe(images=True, subgroups=["site"], specificity=0.8, smallest_group=5)
    arm, marker = plain.arms[0], Any
    for seed in range(2):
        names = [Specs(each, index(), CLASSES).encoder(arm, seed).name for each in (plain, changed)]  # type: ignore[union-attr]
        assert names[0] == names[1]
    marker = type("Marker", (), {"digest": "d"})()
    for number, protocol in enumerate(plain.protocols):
        both = [(Specs(each, index(), CLASSES), each.protocols[number]) for each in (plain, changed)]
        assert len({specs.search(arm, mine, marker).name for specs, mine in both}) == 1
        cells = [specs.cells()[-1] for specs, _ in both]
        point = {"learning_rate": 0.1, "weight_decay": 0.0}
        assert len({specs.evaluate(cell, 0, point, marker).name for (specs, _), cell in zip(both, cells, strict=True)}) == 1
        if protocol.kind != "fine_tune":
            assert len({specs.embed(arm, 0, mine, None).name for specs, mine in both}) == 1  # type: ignore[arg-type]


def test_a_changed_column_is_another_report() -> None:
    from medssl.results import report_name

    def name(chosen: Recipe, frame: pd.DataFrame) -> str:
        return report_name(chosen, ["evaluate-1"], {"name": "d"}, frame)

    moved = index().assign(site="north")
    assert name(recipe(), index()) == name(recipe(), moved)
    assert name(recipe(subgroups=["site"]), index()) != name(recipe(subgroups=["site"]), moved)
    assert name(recipe(subgroups=["site"]), index()) == name(recipe(subgroups=["site"]), index())


def test_temperatures_scale_each_run_by_its_own(made: Any, judged: dict[str, Any]) -> None:
    runs = made[2]
    frame = judged["calibration"].set_index(["arm", "protocol"])
    assert frame["temperature"].notna().tolist() == [protocol == "probe" for _, protocol in frame.index]
    for (arm, protocol), run in runs.items():
        if protocol != "probe":
            continue
        errors, briers = [], []
        for place in np.ndindex(run.temperatures_PDS.shape):
            p_NK = run.probabilities_PDSNK[place].astype(float) ** (1 / run.temperatures_PDS[place])
            p_NK /= p_NK.sum(axis=1, keepdims=True)
            confidence, right = p_NK.max(axis=1), p_NK.argmax(axis=1) == run.labels_N
            bins = np.minimum(np.ceil(confidence * 15).astype(int) - 1, 14)
            gaps = [abs((confidence - right)[bins == b].sum()) for b in range(15)]
            errors.append(sum(gaps) / len(right))
            briers.append(((p_NK - np.eye(3)[run.labels_N]) ** 2).sum(axis=1).mean())
        row = frame.loc[(arm, protocol)]
        assert row["temperature"] == pytest.approx(run.temperatures_PDS.mean())
        assert row["ece_scaled"] == pytest.approx(np.mean(errors), abs=1e-6)
        assert row["brier_scaled"] == pytest.approx(np.mean(briers), abs=1e-6)
