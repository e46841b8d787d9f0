"""Who is there, and what a step waits for."""

from __future__ import annotations

from compose.grafana.panel import FIRING, RATE, RED_ABOVE_0, RUN, Panel, Query, heatmap, stat

PANELS = (
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
        "Live workers and shards, how many the job starts with, and standbys that may take over.",
        "none",
        (
            Query(f"windlass_workers_live{RUN}", "{{run}} workers"),
            Query(f"windlass_workers_expected{RUN}", "{{run}} workers at the start"),
            Query(f"windlass_workers_lost{RUN}", "{{run}} workers lost"),
            Query(f"windlass_shards_live{RUN}", "{{run}} shards"),
            Query(f"windlass_shards_expected{RUN}", "{{run}} shards needed"),
            Query(f"windlass_standbys_in_sync{RUN}", "{{run}} standbys in sync"),
        ),
        defaults={"decimals": 0, "min": 0},
    ),
    heatmap(
        "Push latency",
        "Sending what a contribution's backward had not sent, to all shards.",
        "windlass_push_seconds",
    ),
    heatmap(
        "Pull latency",
        "Waiting for a version where nothing is computed: the other workers, the decision and the update are in it.",
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
