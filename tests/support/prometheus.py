"""The real Prometheus: started on a port of its own, asked as Grafana asks it, stopped by its pid."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.eventually import eventually

COMPOSE = Path(__file__).parents[2] / "compose"
START_S = 30.0
_LISTENING = re.compile(r'msg="Listening on" address=(\S+)')

Series = Mapping[str, Any]


def require(program: str) -> str:
    """The path of `prometheus` or `promtool`; skips the test where it is not installed."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed (on Debian: apt-get install prometheus)")
    return found


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus that serves."""

    url: str

    def ask(self, path: str, **parameters: str | float) -> Any:
        """The data of an answer of its API; a query that it refuses fails the test with its words."""
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(address, timeout=30.0) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as refused:
            with refused:
                raise AssertionError(f"{path} {parameters}: {refused.read().decode()}") from None

    def is_ready(self) -> bool:
        """Whether it answers queries."""
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=10.0):
                return True
        except urllib.error.HTTPError as not_yet:
            not_yet.close()
            return False

    def values(self, expr: str) -> list[tuple[Mapping[str, str], float]]:
        """An expression now: labels and value of each series; what is not a number is no value."""
        data = self.ask("query", query=expr)
        if data["resultType"] == "scalar":
            data["result"] = [{"metric": {}, "value": data["result"]}]
        found = [(series["metric"], float(series["value"][1])) for series in data["result"]]
        return [(labels, value) for labels, value in found if not math.isnan(value)]

    def graph(self, expr: str, seconds: float) -> list[Series]:
        """An expression over the last seconds, as a panel has it: series with at least one number in them."""
        now = time.time()
        data = self.ask("query_range", query=expr, start=now - seconds, end=now, step=1)
        return [series for series in data["result"] if any(value != "NaN" for _, value in series["values"])]

    def rules(self) -> list[dict[str, Any]]:
        """All rules that it has loaded, as it sees them: recording rules and alerts."""
        return [rule for group in self.ask("rules")["groups"] for rule in group["rules"]]


@contextmanager
def prometheus(folder: Path, targets: Sequence[Path]) -> Iterator[Prometheus]:
    """Start Prometheus with compose/prometheus/local.yml, scraping every second.

    Args:
        folder: where its configuration, data and log go.
        targets: the targets.json of each run, linked as local.sh does.
    """
    program = require("prometheus")
    (folder / "targets").mkdir(parents=True)
    for path in targets:
        (folder / "targets" / f"{path.parent.name}.json").symlink_to(path)
    config = yaml.safe_load((COMPOSE / "prometheus" / "local.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(COMPOSE / "prometheus" / name) for name in config["rule_files"]]
    discovery = config["scrape_configs"][0]["file_sd_configs"][0]
    discovery.update(files=[str(folder / "targets" / Path(discovery["files"][0]).name)], refresh_interval="1s")
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    log = folder / "prometheus.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                "--web.listen-address=127.0.0.1:0",
            ],
            stdout=file,
            stderr=subprocess.STDOUT,
        )

    def address() -> str | None:
        assert process.poll() is None, log.read_text()
        found = _LISTENING.search(log.read_text())
        return found[1] if found else None

    try:
        server = Prometheus(f"http://{eventually(address, START_S, 'the address of Prometheus')}")
        eventually(server.is_ready, START_S, "Prometheus to be ready")
        yield server
    finally:
        process.kill()
        process.wait(10)


def as_grafana_asks(expr: str, run: str) -> str:
    """Put in what Grafana puts in for its variables, with a scrape interval of a second."""
    # A chosen value is a regular expression inside a string.
    chosen = re.escape(run).replace("\\", "\\\\")
    variables = {"$__rate_interval": "15s", "$__interval": "5s", "$__range": "300s", "$run": chosen}
    for name, value in variables.items():
        expr = re.sub(re.escape(name) + r"\b", lambda _, value=value: value, expr)
    assert "$" not in expr, f"a variable that the test does not know: {expr}"
    return expr
