"""Disks that are full, fail or lie: training goes on, older checkpoints stay as they are, and somebody says so."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

from ps import failpoints
from ps.storage import checkpoints, verify, version_of
from tests.support import kneading
from tests.support.checkpoints import flip
from tests.support.cluster import Finished
from tests.support.eventually import eventually
from windlass.testing import LocalCluster
from workers.launch.jobs import resolve

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(120)]

WAIT_S = 60.0
KEEP_ALL = ("checkpoint.keep=9", "checkpoint.every_steps=1")
#: One thing goes wrong with each of six checkpoints.
FAULTS = {
    1: ("shard-1/write.before~step-00000001/*:error=ENOSPC", "No space left on device"),
    2: ("shard-1/fsync.before~step-00000002/*:error=EIO", "Input/output error"),
    3: ("shard-1/rename.before~step-00000003/*:error=EIO", "Input/output error"),
    4: ("coordinator/manifest.before~step-00000004:error=ENOSPC", "No space left on device"),
    5: ("coordinator/fsync.before~step-00000005/*:error=EIO", "Input/output error"),
    6: ("coordinator/rename.before~step-00000006/*:error=ENOSPC", "No space left on device"),
}


@pytest.fixture(scope="module")
def undisturbed() -> str:
    return kneading.digest(resolve(None, kneading.JOB), kneading.STEPS)


def good_versions(run_dir: Path) -> list[int | None]:
    """The versions of all checkpoints; each is read whole."""
    found = checkpoints(run_dir / "checkpoints")
    for folder in found:
        verify(folder)
    return [version_of(folder) for folder in found]


def log(run_dir: Path, name: str) -> str:
    return (run_dir / "logs" / f"{name}.log").read_text()


def counted(run_dir: Path, metric: str) -> float:
    """The sum of a counter over the roles."""
    members = json.loads((run_dir / "cluster.json").read_text())
    total = 0.0
    for address in [member["metrics_address"] for member in members if member["metrics_address"]]:
        with urlopen(f"http://{address}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        total += sum(float(line.split()[-1]) for line in lines if line.startswith(metric))
    return total


def test_failing_writes_cost_their_checkpoints_and_nothing_else(
    undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setenv(failpoints.VARIABLE, ",".join(point for point, _ in FAULTS.values()))
    overrides = (*kneading.JOB, *KEEP_ALL, "telemetry.metrics=true")
    with LocalCluster(*overrides, shards=2, run_dir=run_dir) as cluster:
        before = cluster.pids

        def look(step: int) -> None:
            if step == kneading.STEPS - 1:
                # Three by a shard, three by the coordinator.
                for metric in ("windlass_snapshot_failures_total", "windlass_checkpoint_failures_total"):
                    eventually(lambda m=metric: counted(run_dir, m) == 3, WAIT_S, metric)
                assert cluster.pids == before, "nobody was started again"

        assert kneading.work(cluster.address, look) == f"finished: {kneading.STEPS} steps"
        cluster.wait(WAIT_S)
    assert Finished(cluster.job).digest() == undisturbed
    assert good_versions(run_dir) == [0, 7, 8]
    for version, (point, words) in FAULTS.items():
        lines = [line for line in log(run_dir, "coordinator-0").splitlines() if "there is no checkpoint of" in line]
        said = [line for line in lines if f"version {version}:" in line]
        assert len(said) == 1, lines
        assert words in said[0]
        assert ("shard 1: " in said[0]) == point.startswith("shard-1")
    assert list((run_dir / "checkpoints").rglob(".*")) == [], "a failed write holds no space"


def test_an_old_checkpoint_that_cannot_be_removed_stays(
    undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, "coordinator/remove.before~step-00000000:error=EIO")
    with LocalCluster(*kneading.JOB, shards=2, run_dir=tmp_path / "run") as cluster:
        there = tmp_path / "run" / "checkpoints"

        def look(step: int) -> None:
            if step == 7:
                # What is still being completed when the last one is would stay as well.
                eventually(lambda: set(map(version_of, checkpoints(there))) == {0, 6}, WAIT_S, "version 3 to go")

        kneading.work(cluster.address, look)
        cluster.wait(WAIT_S)
    assert Finished(cluster.job).digest() == undisturbed
    assert good_versions(tmp_path / "run") == [0, 8]
    assert "an old checkpoint stays: " in log(tmp_path / "run", "coordinator-0")


def test_a_shards_journal_that_cannot_be_written_stops_nobody(
    undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins again with the next checkpoint, and is as good as before."""
    run_dir = tmp_path / "run"
    full, broken = "log.append.before~reduced:error=ENOSPC@3", "log.begin.before~from-00000006.log:error=EIO"
    monkeypatch.setenv(failpoints.VARIABLE, f"shard-1/{full},shard-1/{broken}")
    with LocalCluster(
        *kneading.JOB, "durability=journal", "telemetry.metrics=true", shards=2, run_dir=run_dir
    ) as cluster:
        before = cluster.pids

        def look(step: int) -> None:
            if step == kneading.STEPS - 1:
                eventually(lambda: counted(run_dir, "windlass_journal_failures_total") == 2, WAIT_S, "two failures")
                assert counted(run_dir, "windlass_journal_on") == 1, "the other shard's"
                assert cluster.pids == before, "nobody was started again"

        kneading.work(cluster.address, look)
        cluster.wait(WAIT_S)
    assert Finished(cluster.job).digest() == undisturbed
    lines = [line for line in log(run_dir, "shard-1").splitlines() if "no journal until the next checkpoint" in line]
    assert ["No space left" in line for line in lines] == [True, False]
    assert ["Input/output error" in line for line in lines] == [False, True]


def test_a_limit_of_the_kernels_costs_checkpoints_until_it_is_lifted(undisturbed: str, tmp_path: Path) -> None:
    """A real short write in a running shard, without a full disk: its files may not grow past a limit."""
    run_dir = tmp_path / "run"
    with LocalCluster(*kneading.JOB, *KEEP_ALL, shards=2, run_dir=run_dir) as cluster:
        pid = cluster.pids["shard-0"]
        limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)

        def change(step: int) -> None:
            if step == 2:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (300_001, limits[1]))
            elif step == 5:
                # Versions 3 and 4 are asked for by now, and fail however slow the disk is.
                failed = "the checkpoint of version 4 could not be written"
                eventually(lambda: failed in log(run_dir, "shard-0"), WAIT_S, failed)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)

        kneading.work(cluster.address, change)
        cluster.wait(WAIT_S)
    assert Finished(cluster.job).digest() == undisturbed
    found = good_versions(run_dir)
    assert {3, 4}.isdisjoint(found)
    assert {0, 1, 6, 7, 8} <= set(found)
    assert "File too large" in log(run_dir, "shard-0")


def test_a_full_disk_under_the_whole_run(undisturbed: str, tmp_path: Path) -> None:
    """Checkpoints, journal and metrics on one disk that a checkpoint fills: the others wait until it is given up."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = f"mount -t tmpfs -o size=9m tmpfs {disk}"
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*unshare, mounted], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs mounts of one's own: unshare --user --mount")
    command = f"{mounted} && exec {sys.executable} -m tests.e2e.test_checkpoints_under_fire {tmp_path}"
    ended = subprocess.run([*unshare, command], capture_output=True, text=True, check=False, timeout=100)
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)
    assert said == {"digest": undisturbed, "versions": [1, 2, 7, 8]}
    lines = [line for line in log(tmp_path, "coordinator-0").splitlines() if "there is no checkpoint of" in line]
    assert len(lines) == 4, "of versions 3 to 6"
    assert all("No space left on device" in line for line in lines)


def _run_on_a_small_disk(folder: Path) -> dict[str, object]:
    """With room for a part of one more checkpoint from step 2 to step 6; its logs are elsewhere."""
    filler, run_dir = folder / "disk" / "filler", folder / "disk" / "run"
    run_dir.mkdir()
    (folder / "logs").mkdir()
    (run_dir / "logs").symlink_to(folder / "logs")
    overrides = (*kneading.JOB, "checkpoint.keep=4", "checkpoint.every_steps=1")
    with LocalCluster(*overrides, shards=2, run_dir=run_dir) as cluster:

        def change(step: int) -> None:
            if step == 2:
                eventually(lambda: len(checkpoints(run_dir / "checkpoints")) == 3, WAIT_S, "three checkpoints")
                disk = os.statvfs(folder / "disk")
                filler.write_bytes(bytes(disk.f_bavail * disk.f_frsize - 700_000))
            elif step == 6:
                failed = "there is no checkpoint of version 6"
                eventually(lambda: failed in log(folder, "coordinator-0"), WAIT_S, failed)
                filler.unlink()

        kneading.work(cluster.address, change)
        cluster.wait(WAIT_S)
    return {"digest": Finished(cluster.job).digest(), "versions": good_versions(run_dir)}


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(undisturbed: str, tmp_path: Path) -> None:
    """With the cluster running: a shard dies, and what it would have to load is not what was written."""
    run_dir = tmp_path / "run"
    harms = [(4, 3, "bit"), (7, 6, "cut"), (7, 6, "manifest")]
    harmed: list[Path] = []
    with LocalCluster(*kneading.JOB, "checkpoint.keep=3", shards=2, run_dir=run_dir) as cluster:

        def damage(step: int) -> None:
            if not harms or step != harms[0][0]:
                return
            _, version, harm = harms.pop(0)
            newest = run_dir / "checkpoints" / f"step-{version:08d}"
            eventually(lambda: (newest / "manifest.json").exists(), WAIT_S, f"version {version}")
            file = newest / ("manifest.json" if harm == "manifest" else "shard-00001-of-00002.safetensors")
            if harm == "cut":
                os.truncate(file, 1000)
            else:
                flip(file, 200)
            harmed.append(file)
            cluster.kill("shard", 0)

        kneading.work(cluster.address, damage)
        cluster.wait(WAIT_S)
    assert Finished(cluster.job).digest() == undisturbed
    refused = [line for line in log(run_dir, "coordinator-0").splitlines() if "going back to the one before" in line]
    assert len(refused) == len(harmed) == 3
    assert all(str(file) in line for file, line in zip(harmed, refused, strict=True)), "the damaged file is named"
    said = [line for line in log(run_dir, "launcher").splitlines() if "going back to the one before" in line]
    assert [line.split()[2] for line in said] == ["step-00000003", "step-00000006", "step-00000006"]
    assert good_versions(run_dir) == [3, 6, 8], "they are written again"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_run_on_a_small_disk(Path(sys.argv[1]))))
