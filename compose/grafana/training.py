"""Is it learning, and how fast."""

from __future__ import annotations

from compose.grafana.panel import FIRING, RATE, RUN, Panel, Query, stat

PANELS = (
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
