"""The real Prometheus and a real run: every query of every dashboard and of every rule has data."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.eventually import eventually
from tests.support.launched import LaunchedRun, launched, tiny_job
from tests.support.prometheus import COMPOSE, Prometheus, as_grafana_asks, prometheus, require

pytestmark = [pytest.mark.prometheus, pytest.mark.timeout(300)]

#: A name that a regular expression would take for something else.
RUN = "run.1"
#: From the first scrape until windows of rates are filled.
DATA_S = 60.0
PANELS = [
    (path.stem, panel["title"], target["expr"])
    for path in sorted((COMPOSE / "grafana" / "dashboards").glob("*.json"))
    for panel in json.loads(path.read_text())["panels"]
    for target in panel["targets"]
]


class Watched(NamedTuple):
    """A run under way, and Prometheus that scrapes it."""

    run: LaunchedRun
    prometheus: Prometheus


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    require("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    job = tiny_job(
        folder,
        RUN,
        "training.steps=1000000",
        "evaluation.every_steps=20",
        "checkpoint.every_steps=50",
        "membership.lease_s=3",
    )
    with launched("train", folder / RUN, job) as run:
        run.wait_for_step(60)
        with prometheus(folder / "server", [folder / RUN / "targets.json"]) as server:
            yield Watched(run, server)
        run.process.terminate()
        run.finish()


@pytest.mark.multiprocess
def test_every_role_is_scraped_and_says_whose_it_is(watched: Watched) -> None:
    def scraped() -> set[tuple[str, ...]]:
        found = watched.prometheus.values("windlass_step")
        return {tuple(labels[name] for name in ("run", "role", "rank", "instance")) for labels, _ in found}

    wanted = {(RUN, m["role"], str(m["rank"]), m["metrics_address"]) for m in watched.run.members()}
    assert len(wanted) == 5
    eventually(lambda: scraped() == wanted, DATA_S, "all roles to be scraped")
    # What the process itself exports is the run's as well.
    roles = [labels["role"] for labels, _ in watched.prometheus.values(f'process_resident_memory_bytes{{run="{RUN}"}}')]
    assert sorted(roles) == ["coordinator", "shard", "shard", "worker", "worker"]
    # The targets' labels are the same, so that nothing had to be renamed.
    assert watched.prometheus.values('{exported_run=~".+"}') == []
    assert len(watched.prometheus.values(f'up{{run="{RUN}"}} == 1')) == 5


@pytest.mark.multiprocess
def test_the_run_can_be_chosen(watched: Watched) -> None:
    """What the `run` variable of every dashboard asks for."""

    def runs() -> list[str]:
        return list(watched.prometheus.ask("label/run/values", **{"match[]": "windlass_run_info"}))

    eventually(lambda: runs() == [RUN], DATA_S, "the run's name")


@pytest.mark.multiprocess
@pytest.mark.parametrize(("dashboard", "panel", "expr"), PANELS, ids=[f"{p[0]}-{p[1]}" for p in PANELS])
def test_every_query_of_a_panel_has_data(watched: Watched, dashboard: str, panel: str, expr: str) -> None:
    asked = as_grafana_asks(expr, RUN)
    eventually(lambda: watched.prometheus.graph(asked, 60.0), DATA_S, f"data of {panel} ({dashboard}): {asked}")


@pytest.mark.multiprocess
def test_every_rule_has_data_and_no_alert_fires(watched: Watched) -> None:
    rules = watched.prometheus.rules()
    for rule in rules:
        for side in sides(rule):
            eventually(lambda side=side: watched.prometheus.values(side), DATA_S, f"data of {rule['name']}: {side}")
    written = [line for line in rule_lines() if re.match(r"- (record|alert): ", line)]
    assert len(rules) == len(written)

    def healthy() -> bool:
        found = watched.prometheus.rules()
        assert not [rule["lastError"] for rule in found if rule.get("lastError")]
        return all(rule["health"] == "ok" for rule in found)

    eventually(healthy, DATA_S, "all rules to be evaluated")
    assert watched.prometheus.values('ALERTS{alertstate="firing"}') == []


@pytest.mark.multiprocess
def test_a_worker_that_hangs_is_an_alert_until_it_goes_on(watched: Watched) -> None:
    """From the process to the alert; how long it has to last is promtool's to test."""

    def state() -> list[str]:
        found = watched.prometheus.values(f'ALERTS{{alertname="WindlassWorkerLost", run="{RUN}"}}')
        return [labels["alertstate"] for labels, _ in found]

    assert state() == []
    pid = next(m["pid"] for m in watched.run.members() if (m["role"], m["rank"]) == ("worker", 1))
    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: state() != [], DATA_S, "the alert")
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: state() == [], DATA_S, "the end of the alert")


def sides(rule: dict[str, Any]) -> list[str]:
    """What has to have data: a recording rule itself, and both sides of the comparison that an alert is."""
    if rule["type"] == "recording":
        return [rule["query"], rule["name"]]
    left, operator, right = re.split(r" (>|<|>=|<=|==) ", rule["query"])
    assert operator
    return [left, right]


def rule_lines() -> list[str]:
    paths = (COMPOSE / "prometheus" / "rules").glob("*.yml")
    return [line.strip() for path in paths for line in path.read_text().splitlines()]


# -- What promtool says -------------------------------------------------------------------------


def promtool(*arguments: str, cwd: Path | None = None) -> str:
    result = subprocess.run(
        [require("promtool"), *arguments], capture_output=True, text=True, timeout=60, check=False, cwd=cwd
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["prometheus.yml", "local.yml"])
def test_the_configuration_is_valid(name: str) -> None:
    assert "is valid" in promtool("check", "config", str(COMPOSE / "prometheus" / name))


def test_the_rules_are_valid() -> None:
    paths = sorted(map(str, (COMPOSE / "prometheus" / "rules").glob("*.yml")))
    assert len(paths) == 2
    assert promtool("check", "rules", *paths).count("SUCCESS") == len(paths)


def test_the_rules_do_what_they_are_for() -> None:
    paths = sorted(map(str, (COMPOSE / "prometheus" / "tests").glob("*.yml")))
    assert len(paths) == 2
    assert promtool("test", "rules", *paths).count("SUCCESS") == len(paths)
