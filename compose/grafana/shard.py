"""Memory, kernels and checkpoints of the parameter server."""

from __future__ import annotations

from compose.grafana.panel import FIRING, RATE, RED_ABOVE_0, RUN, Panel, Query, heatmap, stat


def per_parameter(kernel: str, elements: str, legend: str) -> Query:
    """Nanoseconds of a kernel for each element."""
    return Query(
        f"1e9 * sum by (run, rank) (rate(windlass_{kernel}_seconds_sum{RUN}{RATE}))"
        f" / sum by (run, rank) (rate(windlass_{elements}_elements_total{RUN}{RATE}))",
        f"{{{{run}}}} shard-{{{{rank}}}} {legend}",
    )


BY_SHARD = "{{run}} shard-{{rank}}"
PANELS = (
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
        (Query('process_resident_memory_bytes{run=~"$run", role="shard"}', BY_SHARD),),
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
        "Kernel seconds per second, by shard, and its threads (cluster.threads_per_shard): where they meet nothing is "
        "left.",
        "none",
        (
            Query(
                f"sum by (run, rank) (rate(windlass_reduce_seconds_sum{RUN}{RATE}))"
                f" + sum by (run, rank) (rate(windlass_apply_seconds_sum{RUN}{RATE}))",
                BY_SHARD,
            ),
            Query(f"windlass_kernel_threads{RUN}", f"{BY_SHARD}: threads"),
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
