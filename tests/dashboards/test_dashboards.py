"""Dashboards and alert rules: what they name is what the code exports, and the programs that read them take them."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from medssl.telemetry import METRICS

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
DASHBOARDS = ROOT / "dashboards"
RULES = DASHBOARDS / "alerts.yml"
EXPORTED = {f"ray_medssl_{name}{'_total' if metric.kind == 'counter' else ''}" for name, metric in METRICS.items()}


def named(text: str) -> set[str]:
    return set(re.findall(r"ray_medssl_[a-z_]+", text))


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def build() -> Any:
    spec = importlib.util.spec_from_file_location("dashboards_build", DASHBOARDS / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def promtool(*arguments: Any) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        pytest.skip("no promtool: apt-get install -y --no-install-recommends prometheus")
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)


def test_the_files_are_what_their_source_makes_of_them() -> None:
    made = build()
    assert {path.stem for path in (DASHBOARDS / "grafana").glob("*.json")} == set(made.DASHBOARDS)
    for name in made.DASHBOARDS:
        text = (DASHBOARDS / "grafana" / f"{name}.json").read_text()
        assert text == made.render(name), f"{name} is not as its source has it: python dashboards/build.py"


def test_grafanas_schema_takes_the_dashboards(shared_data: Path, tmp_path: Path) -> None:
    checker = shared_data.parent / "tools" / "check_manifests.py"
    files = sorted((DASHBOARDS / "grafana").glob("*.json"))
    done = subprocess.run([sys.executable, checker, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    wrong = json.loads(files[0].read_text())
    wrong["panels"][0]["titel"] = "x"
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    assert subprocess.run([sys.executable, checker, tmp_path / "wrong.json"], capture_output=True, check=False).returncode == 1


def test_what_is_shown_is_exported_and_what_is_exported_is_shown() -> None:
    shown = set()
    for path in (DASHBOARDS / "grafana").glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                shown |= named(target["expr"])
    ruled = {name for rule in rules() for name in named(rule["expr"])}
    assert shown | ruled <= EXPORTED
    assert shown == EXPORTED


def test_every_alert_has_a_line_of_what_to_do_and_a_place_in_the_readme() -> None:
    text = (DASHBOARDS / "README.md").read_text()
    assert len(rules()) == 7
    for rule in rules():
        anchor = rule["alert"].lower()
        assert rule["annotations"]["runbook"].endswith(f"(README.md#{anchor})") and f"\n### {rule['alert']}\n" in text


def test_prometheus_takes_configuration_and_rules() -> None:
    for what, path in (("config", DASHBOARDS / "prometheus.yml"), ("rules", RULES)):
        done = promtool("check", what, path)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_when_it_should_and_not_when_it_should_not(tmp_path: Path) -> None:
    text = (HERE / "alerts.test.yml").read_text()
    (tmp_path / "alerts.test.yml").write_text(text.replace("RULES", str(RULES)))
    done = promtool("test", "rules", tmp_path / "alerts.test.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    expected = [test for case in yaml.safe_load(text)["tests"] for test in case["alert_rule_test"]]
    assert {test["alertname"] for test in expected if "exp_alerts" in test} == {rule["alert"] for rule in rules()}


def evaluated(folder: Path, series: dict[str, str], asked: list[tuple[str, int, float]]) -> None:
    """Has Prometheus evaluate expressions at minutes: one number each, without labels."""
    given = [{"series": name, "values": values} for name, values in series.items()]
    tests = [
        {"expr": text, "eval_time": f"{at}m", "exp_samples": [{"value": value, "labels": "{}"}]} for text, at, value in asked
    ]
    case = {"interval": "1m", "input_series": given, "promql_expr_test": tests}
    (folder / "panels.yml").write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": [case]}))
    done = promtool("test", "rules", folder / "panels.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def expressions() -> dict[str, str]:
    """What each panel asks, of all studies."""
    panels = [panel for path in (DASHBOARDS / "grafana").glob("*.json") for panel in json.loads(path.read_text())["panels"]]
    return {panel["title"]: target["expr"].replace("$study", ".*") for panel in panels for target in panel["targets"]}


def test_the_errors_panel_sees_a_process_whose_first_count_is_an_error(tmp_path: Path) -> None:
    values = {"old": "7x40", "new": "_x10 3x30", "gone": "_x30 1 stale"}
    series = {f'ray_medssl_store_errors_total{{WorkerId="{worker}"}}': each for worker, each in values.items()}
    wanted = {5: 0, 12: 3, 20: 0, 32: 1, 38: 0}
    evaluated(tmp_path, series, [(expressions()["Errors"], at, value) for at, value in wanted.items()])


def test_a_panel_that_falls_back_on_0_shows_what_there_is(tmp_path: Path) -> None:
    series = {
        'ray_medssl_running{study="s",arm="a"}': "1x20",
        'ray_medssl_non_finite_steps_total{study="s",arm="a"}': "2x20",
        "ray_medssl_store_retries_total": "0+60x20",
        "ray_medssl_store_errors_total": "_x9 4x11",
        'ray_medssl_images_set_aside{dataset="d"}': "3x20",
        'ray_node_gpus_utilization{GpuIndex="0"}': "90x20",
        'ray_node_gram_used{GpuIndex="0"}': "70x20",
    }
    wanted = {
        "Pretrainings under way": 1, "Steps that were not finite": 2, "Retries a second": 1, "Errors": 4,
        "Images set aside by ingests": 3, "GPU": 90, "GPU memory": 70,
    }  # fmt: skip
    asked = {title: text for title, text in expressions().items() if text.endswith(" or vector(0)")}
    assert set(asked) == set(wanted)
    evaluated(tmp_path, series, [(f"sum({text})", 12, wanted[title]) for title, text in asked.items()])


def test_provisioning_names_what_is_there() -> None:
    source = yaml.safe_load((DASHBOARDS / "provisioning" / "datasources" / "prometheus.yaml").read_text())
    provider = yaml.safe_load((DASHBOARDS / "provisioning" / "dashboards" / "medssl.yaml").read_text())
    assert source["apiVersion"] == provider["apiVersion"] == 1
    assert source["datasources"][0]["type"] == "prometheus" and provider["providers"][0]["type"] == "file"
    assert provider["providers"][0]["options"]["path"] in (DASHBOARDS / "README.md").read_text()
