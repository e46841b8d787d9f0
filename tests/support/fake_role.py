"""A role that does nothing but live and die as roles do; it imports little, so that it starts at once.

    python -m tests.support.fake_role RUN NAME ADDRESS
    python -m tests.support.fake_role prepare MODE

How a role behaves is in RUN/behaviour.json, {name: mode}; what happened is in RUN/events, a line each.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from ps.lifeline import Lifeline

_POLL_S = 0.02


def prepare(mode: str) -> int:
    """Stand in for the preparation of the data."""
    sys.stdout.write("looking at the text\n")
    sys.stdout.flush()
    if mode == "hang":
        threading.Event().wait()
    if mode == "fail":
        sys.stderr.write("windlass: error: a.txt is not UTF-8\n")
        return 1
    return 0


class FakeRole:
    """One role: it ends with 0 when RUN/finish is there, or as its behaviour says."""

    def __init__(self, run: Path, name: str, address: str) -> None:
        self._run = run
        self._name = name
        self._address = address
        modes = run / "behaviour.json"
        self._mode = json.loads(modes.read_text()).get(name, "") if modes.exists() else ""
        self._asked = threading.Event()

    def main(self) -> int:
        if self._mode == "cannot start":
            if self._name == "coordinator-0":
                (self._run / "journal").mkdir(exist_ok=True)
            sys.stderr.write(f"windlass: error: {self._name} has no port\n")
            return 1
        signal.signal(signal.SIGTERM, self._on_sigterm)
        lifeline = Lifeline.from_environment()
        assert lifeline is not None
        lifeline.watch(lambda: self._event("launcher gone"))
        self._event(f"start {self._address} {os.environ.get('GLIBC_TUNABLES', '')[:5]}")
        if self._name == "coordinator-0":
            self._serve()
        elif self._mode == "crash":
            raise ValueError("by design")
        wait = threading.Event()
        while not (self._run / "finish").exists():
            if self._asked.is_set() and self._mode != "deaf":
                (self._run / "finish").touch()
            wait.wait(_POLL_S)
        self._event("end")
        return 0

    def _on_sigterm(self, *_: Any) -> None:
        # Only the coordinator is asked; what the others do without it is their own affair.
        self._asked.set()

    def _serve(self) -> None:
        if self._mode == "complains":
            sys.stderr.write(json.dumps({"level": "error", "message": "step-00000003 is damaged"}) + "\n")
            sys.stderr.write(json.dumps({"level": "info", "message": "nothing new"}) + "\n")
            sys.stderr.flush()
        address = self._address if not self._address.endswith(":0") else "127.0.0.1:4242"
        member = {"role": "coordinator", "rank": 0, "pid": os.getpid(), "address": address}
        temporary = self._run / "cluster.tmp"
        temporary.write_text(json.dumps([member]))
        temporary.replace(self._run / "cluster.json")
        step = {
            "kind": "step",
            "step": 0,
            "loss": 3.5,
            "learning_rate": 0.1,
            "tokens": 8,
            "step_seconds": 0.1,
        }
        with (self._run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(step) + "\n")

    def _event(self, what: str) -> None:
        line = f"{self._name} {os.getpid()} {what}\n"
        events = os.open(self._run / "events", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(events, line.encode())
        os.close(events)


if __name__ == "__main__":
    first, *rest = sys.argv[1:]
    sys.exit(prepare(*rest) if first == "prepare" else FakeRole(Path(first), *rest).main())
