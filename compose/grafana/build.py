"""Makes the dashboards: `python compose/grafana/build.py` writes dashboards/*.json, which are committed.

A panel is a title, a sentence, a unit and queries; where it stands and what all panels have in common follows. A
test holds that the files are what this makes, and another that every query returns data in a real run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
#: The grid is 24 wide.
WIDTH = 24
RUN = '{run=~"$run"}'
RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Query:
    """One query of a panel."""

    expr: str
    legend: str = "{{run}}"
    heatmap: bool = False


@dataclass(frozen=True)
class Panel:
    """One panel; its place follows from the order."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: str = "timeseries"
    width: int = 12
    height: int = 8
    #: Further keys of fieldConfig.defaults.
    defaults: dict[str, Any] = field(default_factory=dict)
    stacked: bool = False
    log_scale: bool = False


def stat(title: str, description: str, unit: str, expr: str, **defaults: Any) -> Panel:
    """One number for each run."""
    return Panel(title, description, unit, (Query(expr),), "stat", width=4, height=4, defaults=defaults)


def heatmap(title: str, description: str, histogram: str) -> Panel:
    """How a histogram of seconds moves, over all processes of the chosen runs."""
    expr = f"sum by (le) (increase({histogram}_bucket{RUN}{RATE}))"
    return Panel(title, description, "s", (Query(expr, "{{le}}", heatmap=True),), "heatmap")


def thresholds(*steps: tuple[str, float | None]) -> dict[str, Any]:
    return {"mode": "absolute", "steps": [{"color": color, "value": value} for color, value in steps]}


RED_ABOVE_0 = thresholds(("green", None), ("red", 1))
FIRING = stat(
    "Firing alerts",
    "Alerts of these runs that are firing now; Prometheus' page of alerts says what to do about each.",
    "none",
    'count(ALERTS{run=~"$run", alertstate="firing"}) or vector(0)',
    thresholds=RED_ABOVE_0,
)

TRAINING = (
    stat(
        "Progress",
        "Decided steps of those that the run, or this part of it, has.",
        "percentunit",
        f'windlass_step{{run=~"$run", role="coordinator"}} / windlass_target_steps{RUN}',
        max=1,
        min=0,
    ),
    stat("Loss", "Mean training loss of the last step, in nats.", "none", f"windlass_loss{RUN}", decimals=4),
    stat(
        "Held-out loss",
        "Loss of the last evaluation, in nats per token.",
        "none",
        f"windlass_evaluation_loss{RUN}",
        decimals=4,
    ),
    stat("Tokens per second", "Over the last minute.", "short", f"windlass:tokens:rate1m{RUN}", decimals=0),
    stat(
        "Time left",
        "Steps that are left, at the mean of the last 5 minutes.",
        "s",
        f'sum by (run) (windlass_target_steps{RUN} - windlass_step{{run=~"$run", role="coordinator"}})'
        f" * on (run) windlass:step_seconds:mean5m{RUN}",
    ),
    FIRING,
    Panel("Loss", "Mean training loss of each step, in nats.", "none", (Query(f"windlass_loss{RUN}"),)),
    Panel(
        "Held-out loss",
        "Loss on text that is never trained on, in nats per token; it moves with each evaluation.",
        "none",
        (Query(f"windlass_evaluation_loss{RUN}"),),
    ),
    Panel("Learning rate", "What the schedule gave each step.", "sci", (Query(f"windlass_learning_rate{RUN}"),)),
    Panel(
        "Gradient norm",
        "Norm of the mean, unscaled gradient of all parameters, before clipping. A step that overflowed has none.",
        "none",
        (Query(f"windlass_gradient_norm{RUN}"),),
        log_scale=True,
    ),
    Panel(
        "Loss scale",
        "With FP16 gradients: doubles after a window without overflow, halves at overflows, and stays at its floor.",
        "short",
        (Query(f"windlass_loss_scale{RUN}"), Query(f"windlass_loss_scale_floor{RUN} > 0", "{{run}} floor")),
        log_scale=True,
    ),
    Panel(
        "Skipped steps",
        "Steps since the coordinator's start whose gradients were not finite, so that nothing was updated.",
        "none",
        (Query(f"windlass_skipped_steps_total{RUN}"),),
        defaults={"decimals": 0},
    ),
    Panel(
        "Tokens per second",
        "Predicted tokens that were trained on.",
        "short",
        (Query(f"sum by (run) (rate(windlass_tokens_total{RUN}{RATE}))"),),
    ),
    Panel(
        "Steps per second",
        "Decided and carried out by every shard; skipped ones count.",
        "none",
        (Query(f"sum by (run) (rate(windlass_step_seconds_count{RUN}{RATE}))"),),
    ),
)

CLUSTER = (
    stat("Workers", "Workers that are dealt work.", "none", f"windlass_workers_live{RUN}", decimals=0),
    stat(
        "Workers lost",
        "Gone without leaving, and not back.",
        "none",
        f"windlass_workers_lost{RUN}",
        thresholds=RED_ABOVE_0,
    ),
    stat("Shards", "Shards that are there.", "none", f"windlass_shards_live{RUN}", decimals=0),
    stat(
        "Recoveries",
        "Times that the cluster was made to serve again since the coordinator's start, because a shard was lost.",
        "none",
        f"windlass_recoveries_total{RUN}",
        decimals=0,
    ),
    stat(
        "Slowest worker",
        "Seconds of a contribution at the slowest worker, in terms of the mean of all; 1: all are alike.",
        "none",
        f"windlass:contribution_seconds:slowest_ratio{RUN}",
        decimals=2,
    ),
    FIRING,
    Panel(
        "Phases of a step",
        "Where the seconds of a step go: computing, pushing and waiting for weights as the slowest worker has them; "
        "the rest is deciding, evaluating and what no worker could tell.",
        "s",
        (
            Query(
                f"sum by (run, phase) (rate(windlass_step_phase_seconds_total{RUN}{RATE}))"
                f" / on (run) group_left () sum by (run) (rate(windlass_step_seconds_count{RUN}{RATE}))",
                "{{run}} {{phase}}",
            ),
        ),
        stacked=True,
    ),
    Panel(
        "Members",
        "Live workers and shards, and how many the job starts with.",
        "none",
        (
            Query(f"windlass_workers_live{RUN}", "{{run}} workers"),
            Query(f"windlass_workers_expected{RUN}", "{{run}} workers at the start"),
            Query(f"windlass_workers_lost{RUN}", "{{run}} workers lost"),
            Query(f"windlass_shards_live{RUN}", "{{run}} shards"),
            Query(f"windlass_shards_expected{RUN}", "{{run}} shards needed"),
        ),
        defaults={"decimals": 0, "min": 0},
    ),
    heatmap("Push latency", "Encoding and sending one contribution to all shards.", "windlass_push_seconds"),
    heatmap(
        "Pull latency",
        "From asking for a version to holding all of it: the other workers, the decision and the update are in it.",
        "windlass_pull_seconds",
    ),
    Panel(
        "Stragglers",
        "Seconds of computing and pushing one contribution, by worker. A line above the others is what every step "
        "waits for.",
        "s",
        (
            Query(
                f'sum by (run, worker) (rate(windlass_contribution_seconds_total{{run=~"$run", '
                f'phase=~"compute|push"}}{RATE}))'
                f" / sum by (run, worker) (rate(windlass_contributions_total{RUN}{RATE}))",
                "{{run}} {{worker}}",
            ),
        ),
    ),
    Panel(
        "Contributions per second",
        "Who does the work. A worker without any is not there, or late too often.",
        "none",
        (Query(f"sum by (run, worker) (rate(windlass_contributions_total{RUN}{RATE}))", "{{run}} {{worker}}"),),
    ),
    Panel(
        "Bytes sent per link",
        "By sender and receiver: gradients from workers to shards, weights from shards to workers.",
        "Bps",
        (
            Query(
                f"sum by (run, role, rank, peer) (rate(windlass_sent_bytes_total{RUN}{RATE}))",
                "{{run}} {{role}}-{{rank}} to {{peer}}",
            ),
        ),
        height=9,
    ),
    Panel(
        "Memory by role",
        "Resident memory of each process.",
        "bytes",
        (Query(f"process_resident_memory_bytes{RUN}", "{{run}} {{role}}-{{rank}}"),),
        height=9,
    ),
    Panel(
        "Step as each role knows it",
        "Decided steps. A role that stays behind has lost its connection, or is loading.",
        "none",
        (Query(f"windlass_step{RUN}", "{{run}} {{role}}-{{rank}}"),),
        defaults={"decimals": 0},
    ),
    Panel(
        "Term and epoch",
        "The fence: the coordinator's life, and the record of who serves. A new term is a coordinator that was started "
        "again, a new epoch a cluster that was made to serve again.",
        "none",
        (Query(f"windlass_term{RUN}", "{{run}} term"), Query(f"windlass_epoch{RUN}", "{{run}} epoch")),
        defaults={"decimals": 0},
    ),
)


def per_parameter(kernel: str, elements: str, legend: str) -> Query:
    """Nanoseconds of a kernel for each element."""
    return Query(
        f"1e9 * sum by (run, rank) (rate(windlass_{kernel}_seconds_sum{RUN}{RATE}))"
        f" / sum by (run, rank) (rate(windlass_{elements}_elements_total{RUN}{RATE}))",
        f"{{{{run}}}} shard-{{{{rank}}}} {legend}",
    )


BY_SHARD = "{{run}} shard-{{rank}}"
SHARD = (
    stat(
        "Elements",
        "Parameters in the flat space of all shards, padding included.",
        "short",
        f"sum by (run) (windlass_shard_elements{RUN})",
    ),
    stat(
        "Imbalance of work",
        "Kernel seconds of the busiest shard, in terms of the mean of all; 1: all are alike.",
        "none",
        f"windlass:kernel_seconds:imbalance{RUN}",
        decimals=2,
    ),
    stat(
        "Checkpoint",
        "Version of the newest complete checkpoint.",
        "none",
        f"windlass_checkpoint_version{RUN}",
        decimals=0,
    ),
    stat(
        "Checkpoint age",
        "What is computed again if a shard dies now.",
        "s",
        f"windlass:checkpoint_age:seconds{RUN}",
    ),
    stat(
        "Failed writes",
        "Checkpoint files and manifests that could not be written since the roles' start.",
        "none",
        'sum by (run) ({__name__=~"windlass_(checkpoint|snapshot)_failures_total", run=~"$run"})',
        thresholds=RED_ABOVE_0,
    ),
    FIRING,
    Panel(
        "Memory",
        "Resident memory of each shard: weights, moments, reduced gradient, published frames, what waits.",
        "bytes",
        (Query(f'process_resident_memory_bytes{{run=~"$run", role="shard"}}', BY_SHARD),),
    ),
    Panel(
        "Elements held",
        "Elements of the flat space by shard, padding included: how even the plan is.",
        "short",
        (Query(f"windlass_shard_elements{RUN}", BY_SHARD),),
    ),
    Panel(
        "Kernel time per parameter",
        "Nanoseconds of one kernel thread per element: reducing all contributions of a step, and updating and "
        "publishing.",
        "ns",
        (per_parameter("reduce", "reduced", "reduce"), per_parameter("apply", "applied", "update")),
    ),
    Panel(
        "Kernel threads at work",
        "Kernel seconds per second, by shard: at cluster.threads_per_shard nothing is left.",
        "none",
        (
            Query(
                f"sum by (run, rank) (rate(windlass_reduce_seconds_sum{RUN}{RATE}))"
                f" + sum by (run, rank) (rate(windlass_apply_seconds_sum{RUN}{RATE}))",
                BY_SHARD,
            ),
        ),
        defaults={"min": 0},
    ),
    Panel(
        "Queue depth",
        "Kernel jobs (a chunk to reduce or to update) that wait for a thread, when looked at.",
        "none",
        (Query(f"windlass_kernel_jobs_waiting{RUN}", BY_SHARD),),
        defaults={"decimals": 0, "min": 0},
    ),
    Panel(
        "Open streams",
        "Tensor streams of workers, by shard.",
        "none",
        (Query(f"windlass_streams{RUN}", BY_SHARD),),
        defaults={"decimals": 0, "min": 0},
    ),
    heatmap("Update latency", "Updating and publishing one chunk.", "windlass_apply_seconds"),
    heatmap("Reduction latency", "Reducing or folding one chunk.", "windlass_reduce_seconds"),
    Panel(
        "Checkpoint age",
        "Seconds since the newest complete checkpoint, and the age at which an alert fires.",
        "s",
        (
            Query(f"windlass:checkpoint_age:seconds{RUN}"),
            Query(f"windlass:checkpoint_age:limit_seconds{RUN}", "{{run}} limit"),
        ),
        defaults={"min": 0},
    ),
    Panel(
        "Frames that changed nothing",
        "Per second: duplicates (work that was dealt again), refusals by code (ps/errors.py), and chunks that came "
        "again with other bits.",
        "none",
        (
            Query(
                f'sum by (run) (rate(windlass_pushed_frames_total{{run=~"$run", outcome="duplicate"}}{RATE}))',
                "{{run}} duplicates",
            ),
            Query(f"sum by (run, code) (rate(windlass_refused_frames_total{RUN}{RATE}))", "{{run}} {{code}}"),
            Query(f"sum by (run) (rate(windlass_conflicting_contributions_total{RUN}{RATE}))", "{{run}} conflicts"),
        ),
        defaults={"min": 0},
    ),
)

DASHBOARDS = {
    "training": ("Windlass: training", "Is it learning, and how fast.", TRAINING),
    "cluster": ("Windlass: cluster", "Who is there, and what a step waits for.", CLUSTER),
    "shard": ("Windlass: shards", "Memory, kernels and checkpoints of the parameter server.", SHARD),
}


def _panel_json(number: int, panel: Panel, x: int, y: int) -> dict[str, Any]:
    custom: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if panel.kind == "timeseries":
        custom = {
            "drawStyle": "line",
            "fillOpacity": 30 if panel.stacked else 0,
            "lineWidth": 1,
            "showPoints": "auto",
            "spanNulls": False,
            "stacking": {"group": "A", "mode": "normal" if panel.stacked else "none"},
            "scaleDistribution": {"type": "log", "log": 2} if panel.log_scale else {"type": "linear"},
        }
        options = {
            "legend": {"calcs": ["lastNotNull"], "displayMode": "table", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    elif panel.kind == "stat":
        options = {
            "colorMode": "value",
            "graphMode": "area",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "textMode": "auto",
        }
    else:
        options = {
            "calculate": False,
            "cellGap": 1,
            "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
            "tooltip": {"mode": "single", "yHistogram": True},
            "yAxis": {"unit": panel.unit, "axisPlacement": "left"},
        }
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {
            "defaults": {
                "color": {"mode": "thresholds" if "thresholds" in panel.defaults else "palette-classic"},
                **panel.defaults,
                "unit": panel.unit,
                "custom": custom,
            },
            "overrides": [],
        },
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "editorMode": "code",
                "expr": query.expr,
                "format": "heatmap" if query.heatmap else "time_series",
                "legendFormat": query.legend,
                "range": True,
            }
            for index, query in enumerate(panel.queries)
        ],
    }


def _panels_json(panels: tuple[Panel, ...]) -> list[dict[str, Any]]:
    """Fill rows from left to right; a row is as high as its first panel."""
    placed, x, y, row = [], 0, 0, 0
    for number, panel in enumerate(panels, start=1):
        if x + panel.width > WIDTH:
            x, y = 0, y + row
        if x == 0:
            row = panel.height
        placed.append(_panel_json(number, panel, x, y))
        x += panel.width
    return placed


def _variables() -> list[dict[str, Any]]:
    runs = "label_values(windlass_run_info, run)"
    return [
        {
            "name": "datasource",
            "label": "Prometheus",
            "type": "datasource",
            "query": "prometheus",
            "refresh": 1,
            "multi": False,
            "includeAll": False,
            "hide": 0,
        },
        {
            "name": "run",
            "label": "Run",
            "type": "query",
            "datasource": DATASOURCE,
            "definition": runs,
            "query": {"qryType": 1, "query": runs, "refId": "run"},
            # When the time range changes: it says which runs there were.
            "refresh": 2,
            "regex": "",
            # Descending: run folders are named by time, and the newest is chosen first.
            "sort": 2,
            "multi": True,
            "includeAll": False,
            "hide": 0,
        },
    ]


def dashboard(name: str) -> dict[str, Any]:
    """One dashboard, as Grafana's JSON model."""
    title, description, panels = DASHBOARDS[name]
    return {
        "uid": f"windlass-{name}",
        "title": title,
        "description": description,
        "tags": ["windlass"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [
            {
                "type": "dashboards",
                "title": "Windlass",
                "tags": ["windlass"],
                "asDropdown": False,
                "includeVars": True,
                "keepTime": True,
                "targetBlank": False,
                "icon": "external link",
            }
        ],
        "templating": {"list": _variables()},
        "panels": _panels_json(panels),
    }


def rendered(name: str) -> str:
    """The text of dashboards/NAME.json."""
    return json.dumps(dashboard(name), indent=2) + "\n"


if __name__ == "__main__":
    for each in DASHBOARDS:
        (FOLDER / f"{each}.json").write_text(rendered(each), encoding="utf-8")
