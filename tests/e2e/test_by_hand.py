"""The commands that `windlass train --print-commands` prints, each started by hand."""

from __future__ import annotations

import json
import signal
import subprocess
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.eventually import eventually
from tests.support.launched import START_S, LaunchedRun, tiny_job, windlass

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(240)]


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait(30)


def test_the_printed_commands_train(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, "run", "training.steps=60")
    printed = windlass("train", *job, "--print-commands")
    assert printed.returncode == 0, printed.stderr
    lines = printed.stdout.splitlines()
    assert len(lines) == 5
    with ExitStack() as stack:
        processes = []
        # In any order: whoever comes early waits for the coordinator.
        for number, line in enumerate(reversed(lines)):
            log = stack.enter_context((tmp_path / f"{number}.log").open("wb"))
            process = subprocess.Popen(["/bin/sh", "-c", f"exec {line}"], stdout=log, stderr=subprocess.STDOUT)
            stack.callback(end, process)
            processes.append(process)
        run = LaunchedRun(processes[-1], tmp_path / "run")  # type: ignore[arg-type]
        eventually(lambda: run.steps() >= 1 or processes[-1].poll() is not None, START_S, "the first step")
        metrics = next(word for word in lines[0].split() if word.startswith("127.0.0.1:") and word not in lines[1])
        with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10.0) as answer:
            assert b'windlass_term{rank="0",role="coordinator",run="run"} 1.0' in answer.read()
        codes = [process.wait(120) for process in processes]
    logs = "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))
    assert codes == [0] * 5, logs
    assert run.steps() == 60
    targets = json.loads((tmp_path / "run" / "targets.json").read_text())
    assert any(metrics in entry["targets"] for entry in targets)
