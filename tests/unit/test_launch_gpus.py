"""Workers on one host take different GPUs, and give them back by dying."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ps.errors import StartupError
from workers.launch.gpus import claim, visible_gpus

HOLD = """
import sys
from pathlib import Path
from workers.launch.gpus import claim
print(claim(sys.argv[2].split(","), Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


def holder(folder: Path, gpus: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), gpus], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_a_dead_workers_gpu_is_free_again(tmp_path: Path) -> None:
    with holder(tmp_path / "locks", "0,GPU-a/b") as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "0\n"
            assert claim(["0", "GPU-a/b"], tmp_path / "locks") == "GPU-a/b"
            with pytest.raises(StartupError, match=r"^all 2 GPUs are claimed .* at most 2 on this host$"):
                claim(["0", "GPU-a/b"], tmp_path / "locks")
        finally:
            first.kill()
        first.wait(10)
        assert claim(["0", "GPU-a/b"], tmp_path / "locks") == "0"


def test_what_there_is_to_choose_from(tmp_path: Path) -> None:
    for name in ("nvidia1", "nvidia3", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == ["0", "1"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3, GPU-x,"}, tmp_path) == ["3", "GPU-x"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []


def test_without_a_gpu_or_a_folder_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="no GPU to claim"):
        claim([], tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match=r"file/locks cannot be written"):
        claim(["0"], tmp_path / "file" / "locks")
