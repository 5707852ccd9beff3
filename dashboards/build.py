"""Grafana dashboards from one short description each: python dashboards/build.py writes dashboards/grafana/*.json.

A panel is a title, a unit and expressions with legends; `S` stands for the selection of studies. The JSON files are what is
provisioned; a test holds them equal to this file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "grafana"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
S = '{study=~"$study"}'
RATE = "[5m]"
TRIALS = "{{study}} {{stage}} {{arm}}"


@dataclass(frozen=True)
class Panel:
    """One panel of a dashboard."""

    title: str
    unit: str
    queries: dict[str, str]
    """Legend -> PromQL."""
    kind: str = "timeseries"
    text: str = ""
    """What it tells, shown at the panel's corner."""


def by_arm(name: str) -> dict[str, str]:
    """The usual query: a gauge of pretrainings, a line per study and arm."""
    return {"{{study}} {{arm}}": f"ray_medssl_{name}{S}"}


def counted(name: str) -> str:
    """How often something was counted within RATE. A process's series begins with its first count and not with 0, so `increase`
    sees none of what a new series brings: that is taken whole."""
    series = f"ray_medssl_{name}_total"
    return f"(last_over_time({series}{RATE}) unless {series} offset {RATE[1:-1]}) or increase({series}{RATE})"


OVERVIEW = (
    Panel("Pretrainings under way", "short", {"": f"sum(ray_medssl_running{S}) or vector(0)"}, "stat"),
    Panel("Progress", "percentunit", {"{{study}} {{arm}}": f"ray_medssl_epochs_done{S} / ray_medssl_epochs{S}"}, "bargauge",
          "Epochs done of all, for each pretraining."),
    Panel("Time left", "s", {"{{study}} {{arm}}": f"clamp_min(ray_medssl_expected_end_time_seconds{S} - time(), 0)"}, "stat",
          "At the present rate."),
    Panel("Trials done", "percentunit", {TRIALS: f"ray_medssl_trials_done{S} / ray_medssl_trials_planned{S}"}, "bargauge",
          "Searches and evaluations."),
    Panel("Loss", "short", by_arm("loss")),
    Panel("Images a second", "short", by_arm("images_per_second")),
    Panel("Seconds since the last logged step", "s", {"{{study}} {{arm}}": f"time() - ray_medssl_progress_time_seconds{S}"},
          text="A line that rises: nothing gets on."),
    Panel("Steps that were not finite", "short", {"{{study}} {{arm}}": f"ray_medssl_non_finite_steps_total{S} or vector(0)"},
          "stat", "The first ends a pretraining; the job's log says where."),
)
TRAINING = (
    Panel("Loss", "short", by_arm("loss")),
    Panel("Terms of the loss", "short", {"{{arm}} {{term}}": f"ray_medssl_loss_term{S}"}),
    Panel("Learning rate", "sci", by_arm("learning_rate")),
    Panel("Effective rank of the features", "short", by_arm("effective_rank"), text="Near 1: collapse onto one direction."),
    Panel("Spread of the features", "short", by_arm("embedding_std"), text="Near 0: collapse onto one point."),
    Panel("Images a second", "short", by_arm("images_per_second")),
    Panel("Seconds of a step", "s", by_arm("step_seconds")),
    Panel("Share of time waiting for images", "percentunit", by_arm("data_wait_share"), text="Above a half: data are the brake."),
    Panel("Age of the last checkpoint", "s", {"{{study}} {{arm}}": f"time() - ray_medssl_checkpoint_time_seconds{S}"}),
    Panel("Seconds to write a checkpoint", "s", by_arm("checkpoint_upload_seconds")),
)
SEARCH = (
    Panel("Trials under way", "short", {TRIALS: f"ray_medssl_trials_running{S}"}),
    Panel("Trials done", "short", {TRIALS: f"ray_medssl_trials_done{S}"}),
    Panel("Trials failed", "short", {TRIALS: f"ray_medssl_trials_failed{S}"}, "stat",
          "Each lost attempt once, and each trial that failed by itself, which ends the stage."),
    Panel("Trials planned", "short", {TRIALS: f"ray_medssl_trials_planned{S}"}, "stat"),
    Panel("Seeds done", "percentunit", {TRIALS: f"ray_medssl_seeds_done{S} / ray_medssl_seeds_planned{S}"}, "bargauge",
          "Head seeds of the evaluations; all of a probe's cell end together, in one trial."),
    Panel("Best validation score", "percentunit", {"{{study}} {{arm}} {{protocol}}": f"ray_medssl_best_score{S}"}),
)
STORAGE = (
    Panel("Requests a second", "reqps", {"": f"sum(rate(ray_medssl_store_requests_total{RATE}))"}),
    Panel("Retries a second", "reqps", {"": f"sum(rate(ray_medssl_store_retries_total{RATE})) or vector(0)"},
          text="The store did not answer, or answered in part; requests are repeated for two minutes."),
    Panel("Errors", "short", {"": f"sum({counted('store_errors')}) or vector(0)"}, "stat",
          "Requests given up or refused."),
    Panel("Bytes read a second", "Bps", {"": f"sum(rate(ray_medssl_store_read_bytes_total{RATE}))"}),
    Panel("Bytes written a second", "Bps", {"": f"sum(rate(ray_medssl_store_written_bytes_total{RATE}))"}),
    Panel("Images set aside by ingests", "short", {"{{dataset}}": "ray_medssl_images_set_aside or vector(0)"}, "stat"),
    Panel("Share of time waiting for images", "percentunit", by_arm("data_wait_share")),
)
CLUSTER = (
    Panel("Nodes", "short", {"": "count(ray_node_mem_total)"}, "stat"),
    Panel("CPU", "percent", {"{{instance}}": "ray_node_cpu_utilization"}),
    Panel("Memory", "percentunit", {"{{instance}}": "ray_node_mem_used / ray_node_mem_total"}),
    Panel("GPU", "percent", {"{{instance}} {{GpuIndex}}": "ray_node_gpus_utilization or vector(0)"}),
    Panel("GPU memory", "decmbytes", {"{{instance}} {{GpuIndex}}": "ray_node_gram_used or vector(0)"}),
    Panel("Object store", "bytes", {"{{Location}}": "sum by (Location) (ray_object_store_memory)"}),
    Panel("Disk used", "percentunit", {"{{instance}}": "1 - ray_node_disk_free / (ray_node_disk_free + ray_node_disk_usage)"}),
)
DASHBOARDS = {
    "overview": ("medssl: studies", OVERVIEW),
    "training": ("medssl: training", TRAINING),
    "search": ("medssl: search and seeds", SEARCH),
    "storage": ("medssl: storage and data", STORAGE),
    "cluster": ("medssl: cluster", CLUSTER),
}


def dashboard(name: str) -> dict[str, Any]:
    """A dashboard as Grafana reads it."""
    title, panels = DASHBOARDS[name]
    study = {
        "type": "query", "name": "study", "label": "study", "datasource": SOURCE, "refresh": 2, "includeAll": True, "multi": True,
        "allValue": ".*", "query": "label_values(ray_medssl_progress_time_seconds, study)",
        "current": {"text": "All", "value": "$__all"},
    }  # fmt: skip
    source = {"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus"}
    return {
        "uid": f"medssl-{name}", "title": title, "tags": ["medssl"], "schemaVersion": 41, "version": 1, "editable": True,
        "annotations": {"list": []}, "refresh": "10s", "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source] if name in ("cluster", "storage") and "$study" not in str(panels) else [source, study]},
        "links": [{"type": "dashboards", "title": "medssl", "tags": ["medssl"], "asDropdown": True, "icon": "external link",
                   "includeVars": True, "keepTime": True, "targetBlank": False, "tooltip": "", "url": ""}],
        "panels": [_panel(number, panel) for number, panel in enumerate(panels)],
    }  # fmt: skip


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expression, "legendFormat": legend or "__auto", "range": True}
        for i, (legend, expression) in enumerate(panel.queries.items())
    ]
    return {
        "id": number + 1, "type": panel.kind, "title": panel.title, "description": panel.text, "datasource": SOURCE,
        "targets": targets,
        "gridPos": {"x": 12 * (number % 2), "y": 8 * (number // 2), "w": 12, "h": 8},
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
    }  # fmt: skip


def render(name: str) -> str:
    """The file's text."""
    return json.dumps(dashboard(name), indent=1) + "\n"


def main() -> None:
    """Writes all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(render(name), encoding="utf-8")


if __name__ == "__main__":
    main()
