"""The launcher with real processes: small roles that live and die, no training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.support.eventually import eventually
from tests.support.fake_cluster import command, members

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(60)]

NAMES = members(shards=2, workers=2)


@dataclass
class Cluster:
    """A launcher's process, its folder, and what its roles wrote down."""

    run: Path
    behaviour: dict[str, str]
    arguments: list[str]
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        self.run.mkdir(exist_ok=True)
        (self.run / "behaviour.json").write_text(json.dumps(self.behaviour))
        self.process = subprocess.Popen(
            command("fake_cluster", str(self.run), *self.arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def events(self) -> list[list[str]]:
        path = self.run / "events"
        return [line.split(" ", 2) for line in path.read_text().splitlines()] if path.exists() else []

    def pids(self, name: str | None = None) -> list[int]:
        """Every process that ever started as this role, or as any."""
        return [int(pid) for who, pid, what in self.events() if what[:5] == "start" and name in (None, who)]

    def up(self) -> list[int]:
        """Wait for a whole cluster, and return its processes."""
        eventually(lambda: {who for who, _, _ in self.events()} == set(NAMES), 20, "every role to start")
        return self.pids()

    def end(self, timeout_s: float = 20) -> tuple[int, str]:
        """Wait for the launcher's end; nobody is left then."""
        out, _ = self.process.communicate(timeout=timeout_s)
        assert [pid for pid in self.pids() if lives(pid)] == []
        return self.process.returncode, out


def lives(pid: int) -> bool:
    """Whether a process runs; an orphan that nobody reaps does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(*arguments: str, **behaviour: str) -> Cluster:
        modes = {name.replace("_", "-"): mode for name, mode in behaviour.items()}
        made.append(Cluster(tmp_path / "run", modes, list(arguments)))
        return made[-1]

    yield make
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()
        for pid in one.pids():
            if lives(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_run_goes_to_its_end(cluster: Callable[..., Cluster]) -> None:
    made = cluster("prepare=ok")
    made.up()
    (made.run / "finish").touch()
    code, out = made.end()
    assert code == 0, out
    assert "finished=True" in out
    assert "looking at the text" in out
    assert "step 1/400  loss 3.5000" in out
    assert json.loads((made.run / "config.json").read_text())["cluster"]["workers"] == 2
    starts = {name: what for name, _, what in made.events() if what.startswith("start")}
    assert starts.pop("coordinator-0") == "start 127.0.0.1:0 glibc"
    assert set(starts.values()) == {"start 127.0.0.1:4242 glibc"}
    assert {path.name for path in (made.run / "logs").iterdir()} == {f"{n}.log" for n in [*NAMES, "prepare"]}


@pytest.mark.parametrize("name", ["coordinator-0", "shard-1", "worker-0"])
def test_what_is_killed_is_started_again_in_its_place(cluster: Callable[..., Cluster], name: str) -> None:
    made = cluster()
    made.up()
    os.kill(made.pids(name)[0], signal.SIGKILL)
    eventually(lambda: len(made.pids(name)) == 2, 10, f"{name} to start again")
    (made.run / "finish").touch()
    code, out = made.end()
    assert code == 0, out
    assert f"{name} was killed by SIGKILL; starting it again" in out
    assert len(made.pids()) == len(NAMES) + 1
    # The coordinator comes back where the others look for it.
    last = [what for who, _, what in made.events() if who == name and what.startswith("start")][-1]
    assert last.split()[1] == "127.0.0.1:4242"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_in_good_order(
    cluster: Callable[..., Cluster], signum: signal.Signals, code: int
) -> None:
    made = cluster()
    made.up()
    made.process.send_signal(signum)
    ended, out = made.end()
    assert ended == code, out
    assert "waiting for the last checkpoint, for up to 600 s" in out
    assert sorted(who for who, _, what in made.events() if what == "end") == sorted(NAMES)


def test_a_deadline_ends_a_run_that_does_not_stop(cluster: Callable[..., Cluster]) -> None:
    made = cluster("checkpoint.timeout_s=0.3", coordinator_0="deaf")
    made.up()
    made.process.send_signal(signal.SIGTERM)
    eventually(lambda: made.process.poll() is not None, 15, "the launcher to end")
    code, out = made.end()
    assert code == 143, out
    assert "no checkpoint within 0.3 s" in out


def test_a_second_ctrl_c_kills_at_once(cluster: Callable[..., Cluster]) -> None:
    made = cluster(coordinator_0="deaf")
    made.up()
    made.process.send_signal(signal.SIGINT)
    assert made.process.stdout is not None
    seen = next(line for line in made.process.stdout if line.startswith("stopping"))
    assert "again kills at once" in seen
    made.process.send_signal(signal.SIGINT)
    code, out = made.end(timeout_s=5)
    assert code == 130, out


def test_roles_end_when_the_launcher_is_killed_and_the_folder_is_free_again(
    cluster: Callable[..., Cluster],
) -> None:
    made = cluster()
    pids = made.up()
    made.process.kill()
    made.process.wait()
    # The roles have the folder until they are gone: this one waits for them, and then is refused nothing.
    (made.run / "config.json").unlink()
    second = subprocess.Popen(
        command("fake_cluster", str(made.run)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        eventually(lambda: not any(map(lives, pids)), 5, "every role to end")
        gone = {who for who, _, what in made.events() if what == "launcher gone"}
        assert gone == set(NAMES)
        eventually(lambda: len(made.pids()) == 2 * len(NAMES), 20, "the second cluster to be up")
        (made.run / "finish").touch()
        out, _ = second.communicate(timeout=20)
        assert "is in use" in out
        assert second.returncode == 0, out
    finally:
        if second.poll() is None:
            second.kill()
        second.communicate()


def test_a_role_that_cannot_start_says_why_in_one_line(cluster: Callable[..., Cluster]) -> None:
    made = cluster(worker_1="cannot start")
    code, out = made.end()
    assert code == 1
    assert "error='worker-1: worker-1 has no port'" in out
    # A step was made: there is a run to go on with.
    assert (made.run / "config.json").exists()


@pytest.mark.parametrize("journal_was_there", [False, True])
def test_a_start_of_which_nothing_came_leaves_no_run_behind(
    cluster: Callable[..., Cluster], tmp_path: Path, journal_was_there: bool
) -> None:
    if journal_was_there:
        (tmp_path / "run" / "journal").mkdir(parents=True)
    made = cluster(coordinator_0="cannot start")
    code, out = made.end()
    assert code == 1
    assert "error='coordinator-0: coordinator-0 has no port'" in out
    assert not (made.run / "config.json").exists()
    assert (made.run / "journal").exists() == journal_was_there
    assert (made.run / "logs" / "coordinator-0.log").exists()


def test_what_the_coordinator_logs_as_an_error_is_said(cluster: Callable[..., Cluster]) -> None:
    made = cluster(coordinator_0="complains")
    made.up()
    (made.run / "finish").touch()
    code, out = made.end()
    assert code == 0, out
    assert out.count("coordinator-0: step-00000003 is damaged\n") == 1
    assert "nothing new" not in out


def test_a_role_that_keeps_dying_ends_the_run_with_its_last_words(cluster: Callable[..., Cluster]) -> None:
    made = cluster("launch.restart_limit=2", worker_0="crash")
    code, out = made.end()
    assert code == 1
    assert "worker-0 ended with exit code 1, for the 3. time within a minute" in out
    assert "ValueError: by design" in out
    assert len(made.pids("worker-0")) == 3


def test_data_that_cannot_be_used_leaves_no_run_behind(cluster: Callable[..., Cluster]) -> None:
    made = cluster("prepare=fail")
    code, out = made.end()
    assert code == 1
    assert "error='a.txt is not UTF-8'" in out
    assert out.count("UTF-8") == 1
    assert not (made.run / "config.json").exists()


def test_preparing_can_be_interrupted(cluster: Callable[..., Cluster]) -> None:
    made = cluster("prepare=hang")
    assert made.process.stdout is not None
    assert any(line.startswith("looking") for line in iter(made.process.stdout.readline, ""))
    children = psutil.Process(made.process.pid).children(recursive=True)
    made.process.send_signal(signal.SIGINT)
    code, out = made.end(timeout_s=5)
    assert code == 130, out
    assert [child.pid for child in children if lives(child.pid)] == []
    assert not (made.run / "config.json").exists()
