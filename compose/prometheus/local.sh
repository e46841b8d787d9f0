#!/bin/sh
# Prometheus on this host, watching runs of this host.
#   compose/prometheus/local.sh [RUN ...]      default: every folder in runs/
# A run that starts later is added by calling this again, or by linking its targets.json as done here.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
state=$root/.cache/prometheus
mkdir -p "$state/targets"
[ $# -gt 0 ] || set -- "$root"/runs/*/
for run in "$@"; do
    [ -f "$run/targets.json" ] || { echo "$run has no targets.json: it is no run folder, or has not begun" >&2; continue; }
    run=$(cd "$run" && pwd)
    ln -sfn "$run/targets.json" "$state/targets/$(basename "$run").json"
done
exec prometheus --config.file="$root/compose/prometheus/local.yml" --storage.tsdb.path="$state/data" \
    --web.listen-address="${PROMETHEUS_LISTEN:-127.0.0.1:9090}"
