"""`windlass.testing`: real processes for a `with` block, and what is left of them afterwards: nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import windlass
from tests.support.eventually import eventually
from tests.support.launched import tiny_job
from windlass.testing import LocalCluster
from workers.launch.folder import RunFolder

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]


def lives(pid: int) -> bool:
    """Whether a process runs; an orphan that nobody reaps does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_processes_are_killed_started_again_and_gone_at_the_end(tmp_path: Path) -> None:
    seen: set[int] = set()
    with LocalCluster(run_dir=tmp_path / "run") as cluster:
        assert set(cluster.pids) == {"coordinator-0", "shard-0"}
        address, first = cluster.address, cluster.pids
        seen |= set(first.values())

        assert cluster.kill("shard", restart=False) == first["shard-0"]
        assert set(cluster.pids) == {"coordinator-0"}
        with pytest.raises(windlass.ConfigError, match="shard 1 is not in this cluster: coordinator-0, shard-0"):
            cluster.kill("shard", 1)
        with pytest.raises(windlass.ConfigError, match="was not killed with restart=False"):
            cluster.start("coordinator")
        cluster.start("shard")
        cluster.wait_until_complete(60.0)
        assert cluster.pids["shard-0"] != first["shard-0"]

        cluster.kill("coordinator")
        cluster.wait_until_complete(60.0)
        assert cluster.address == address
        assert cluster.pids["coordinator-0"] != first["coordinator-0"]
        seen |= set(cluster.pids.values())
    assert len(seen) == 4
    assert not [pid for pid in seen if lives(pid)]
    assert cluster.pids == {}


def test_an_exception_ends_the_processes_and_shows_their_logs(capfd: pytest.CaptureFixture[str]) -> None:
    pids: list[int] = []
    cluster = LocalCluster()

    def interrupted() -> None:
        with cluster:
            pids.extend(cluster.pids.values())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(pids) == 2
    assert not [pid for pid in pids if lives(pid)]
    err = capfd.readouterr().err
    assert "--- coordinator-0.log" in err
    assert "listening on" in err
    # It was temporary.
    assert not cluster.run_dir.exists()


def test_a_run_that_fails_fails_the_block(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cluster = LocalCluster("membership.start_timeout_s=6", run_dir=tmp_path / "run")

    def nobody_comes() -> None:
        with cluster, pytest.raises(windlass.StartupError, match="start_timeout_s is over"):
            cluster.wait(60.0)

    with pytest.raises(
        windlass.StartupError, match=r"coordinator-0: gathering: waiting for any worker.*start_timeout_s is over"
    ):
        nobody_comes()
    assert cluster.pids == {}
    assert "start_timeout_s is over" in capfd.readouterr().err
    # No step was made: the folder is as free as it was. One that holds a run is not.
    assert not (tmp_path / "run" / "config.json").exists()
    RunFolder(tmp_path / "run").write_job(cluster.job)
    with pytest.raises(windlass.ConfigError, match="holds a run already"), LocalCluster(run_dir=tmp_path / "run"):
        pass


def test_a_death_that_nobody_asked_for_shows_the_logs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with LocalCluster(run_dir=tmp_path / "run") as cluster:
        pid = cluster.pids["shard-0"]
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: cluster.pids.get("shard-0", pid) != pid, 30.0, "the shard to be started again")
    assert "shard-0 was killed by SIGKILL; starting it again" in capfd.readouterr().err


def test_what_waits_in_vain_says_for_what(tmp_path: Path) -> None:
    with LocalCluster(run_dir=tmp_path / "run") as cluster:
        with pytest.raises(windlass.WaitTimeout, match=r"waited 0\.1 s for the run in .* to end"):
            cluster.wait(0.1)
        cluster.kill("coordinator", restart=False)
        cluster.kill("shard", restart=False)
        cluster.start("coordinator")
        cluster.wait_until_complete(60.0)
        cluster._away.clear()
        with pytest.raises(windlass.WaitTimeout, match="for shard-0; see the logs"):
            cluster.wait_until_complete(0.1)


PARENT = """
import sys, threading
from windlass.testing import LocalCluster
from workers.launch.folder import RunFolder
with LocalCluster(run_dir=sys.argv[1]) as cluster:
    print(*cluster.pids.values(), flush=True)
    threading.Event().wait()
"""


def test_the_processes_end_when_the_test_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        parent.kill()
        assert len(pids) == 2
        eventually(lambda: not [pid for pid in pids if lives(pid)], 15.0, "the roles to end")


def test_built_in_workers_train(tmp_path: Path) -> None:
    overrides = [word for word in tiny_job(tmp_path, "run") if not word.startswith("run_dir=")]
    with LocalCluster(*overrides, "training.steps=3", workers=1, run_dir=tmp_path / "run") as cluster:
        cluster.wait(120.0)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"kind": "step"') == 3


def run_pytest(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Run a user's test file with the plugin, whether this environment's windlass is installed with it or not."""
    (folder / "test_mine.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "windlass.testing_plugin", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, str(folder / "test_mine.py"), f"--basetemp={folder / 'tmp'}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_example_of_the_documents_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "testing.md").read_text(), re.DOTALL)
    ran = run_pytest(tmp_path, blocks[-1])
    assert ran.returncode == 0, ran.stdout
    assert "2 passed" in ran.stdout


def test_a_failed_test_shows_the_logs_of_its_clusters(tmp_path: Path) -> None:
    text = "def test_it(windlass_cluster):\n    cluster = windlass_cluster()\n    assert cluster.pids == {}\n"
    ran = run_pytest(tmp_path, text)
    assert ran.returncode == 1, ran.stdout
    assert "windlass cluster in " in ran.stdout
    assert "--- shard-0.log" in ran.stdout
    assert re.search(r"listening on 127\.0\.0\.1:\d+, term 1", ran.stdout)


def test_the_plugin_imports_nothing_before_it_is_asked() -> None:
    check = (
        "import sys, windlass.testing_plugin\n"
        "assert not {'torch', 'grpc', 'numba', 'numpy', 'pydantic'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_a_job_is_checked_before_anything_starts() -> None:
    with pytest.raises(windlass.ConfigError, match="did you mean training"):
        LocalCluster("trainin.steps=3")
    # One that is never entered leaves nothing behind.
    assert not LocalCluster().run_dir.exists()
