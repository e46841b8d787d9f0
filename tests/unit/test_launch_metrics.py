"""Following metrics.jsonl, also when a rollback rewrites it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from workers.launch.live import LiveDisplay
from workers.launch.metrics import Progress, Tail, clock, last_evaluation
from workers.launch.progress import LineDisplay, choose_display


def step(number: int, loss: float = 2.0) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": number,
        "loss": loss,
        "learning_rate": 1e-3,
        "tokens": 100,
        "step_seconds": 0.5,
    }


def evaluation(version: int, loss: float) -> dict[str, Any]:
    return {
        "kind": "evaluation",
        "version": version,
        "loss": loss,
        "perplexity": 7.4,
        "bits_per_byte": 1.9,
        "tokens": 1000,
        "bytes": 3000,
    }


def lines(*records: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def steps(records: Any) -> list[int]:
    return [record["step"] for record in records]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_tail_gives_each_line_once_and_waits_for_its_end(path: Path) -> None:
    tail = Tail(path)
    assert tail.poll() == (False, [])
    path.write_bytes(lines(step(0)) + b'{"kind": "st')
    assert steps(tail.poll()[1]) == [0]
    assert tail.poll() == (False, [])
    with path.open("ab") as file:
        file.write(b'ep", "step": 1}\nnot json\n' + lines(step(2)))
    assert steps(tail.poll()[1]) == [1, 2]


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_tail_sees_a_rewrite_of_any_length(path: Path, kept: int) -> None:
    tail = Tail(path)
    path.write_bytes(lines(*map(step, range(5))))
    tail.poll()
    again = [step(number) for number in range(kept)] + [step(kept, loss=9.0)]
    path.write_bytes(lines(*again))
    rewritten, records = tail.poll()
    assert rewritten
    assert list(records) == again
    with path.open("ab") as file:
        file.write(lines(step(kept + 1)))
    assert tail.poll() == (False, [step(kept + 1)])


def test_tail_sees_a_rewrite_that_is_longer_than_what_it_read(path: Path) -> None:
    tail = Tail(path)
    path.write_bytes(lines(step(0), step(1)))
    tail.poll()
    path.write_bytes(lines(step(0), step(1, loss=3.0), step(2)))
    assert tail.poll() == (True, [step(0), step(1, loss=3.0), step(2)])


def test_progress_adds_up() -> None:
    progress = Progress(steps=20)
    assert str(progress) == "step 0/20"
    for number in range(10):
        progress.feed(step(number, loss=5.0 - number / 10))
    progress.feed(evaluation(10, 4.5))
    assert str(progress) == ("step 10/20  loss 4.1000  held-out 4.5000  lr 1.00e-03  200 tokens/s  0:05 left")
    progress.restart([step(0)])
    assert (progress.version, progress.held_out_loss) == (1, None)


def test_progress_survives_what_a_diverged_run_writes() -> None:
    progress = Progress(steps=20)
    progress.feed(json.loads('{"kind": "step", "step": 3, "loss": NaN, "learning_rate": null}'))
    assert str(progress) == "step 4/20  loss nan"


def test_lines_come_every_so_many_steps_at_evaluations_and_at_the_end() -> None:
    out = io.StringIO()
    display, progress = LineDisplay(out, every_steps=4), Progress(steps=10)
    for record in [*map(step, range(6)), evaluation(6, 4.5), *map(step, range(6, 10))]:
        progress.feed(record)
        display.show(record, progress)
    display.went_back(progress)
    shown = [line.split("  ")[0].split(":")[0] for line in out.getvalue().splitlines()]
    assert shown == ["step 4/10", "held-out at step 6", "step 8/10", "step 10/10", "went back to step 10"]


class GoneTerminal(io.StringIO):
    def write(self, _: str) -> int:
        raise OSError(5, "Input/output error")

    def isatty(self) -> bool:
        return True


def test_a_terminal_that_is_gone_does_not_stop_a_run() -> None:
    for display in (LiveDisplay(GoneTerminal(), "runs/a"), LineDisplay(GoneTerminal(), 1)):
        progress = Progress(steps=10)
        display.open(progress)
        display.say("hello")
        display.show(step(0), progress)
        display.refresh()
        display.close()


def test_who_watches_gets_a_view_and_who_reads_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(choose_display(GoneTerminal(), 10, "runs/a"), LiveDisplay)
    assert isinstance(choose_display(io.StringIO(), 10, "runs/a"), LineDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(choose_display(GoneTerminal(), 10, "runs/a"), LineDisplay)


def test_last_evaluation(path: Path) -> None:
    assert last_evaluation(path) is None
    path.write_bytes(lines(evaluation(1, 3.0), step(1), evaluation(2, 2.5), step(2)))
    found = last_evaluation(path)
    assert found is not None
    assert found["version"] == 2


def test_clock() -> None:
    assert [clock(seconds) for seconds in (7.4, 754, 3723)] == ["0:07", "12:34", "1:02:03"]
