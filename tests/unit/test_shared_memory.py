"""Segments of shared memory: who may attach them, and that they are gone with their processes."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ps.errors import SharedMemoryError
from ps.wire.shared_memory import Segment
from tests.support.eventually import eventually

SIZE = 1 << 20

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment.create(SIZE)
    made.claim(0, SIZE)
    yield made
    made.close()


def test_what_one_writes_the_other_reads(segment: Segment) -> None:
    assert os.fstat(segment._descriptor).st_mode & 0o777 == 0o600
    other = Segment.attach(segment.name, SIZE)
    assert other.nonce == segment.nonce
    segment.array(np.dtype(np.float16), 128, 1000)[:] = 3.0
    assert (other.array(np.dtype(np.float16), 128, 1000) == 3.0).all()
    assert not other.array(np.dtype(np.float16), 128 + 2048, 1000).any()
    other.close()


def test_a_view_outlives_the_segment(segment: Segment) -> None:
    other = Segment.attach(segment.name, SIZE)
    view = other.array(np.dtype(np.float32), 0, 64)
    segment.array(np.dtype(np.float32), 0, 64)[:] = 7.0
    other.close()
    del other
    segment.close()
    assert (view == 7.0).all()


def test_two_segments_have_two_nonces(segment: Segment) -> None:
    assert Segment.create(64).nonce != segment.nonce


@pytest.mark.parametrize("attached", [False, True])
def test_what_cannot_be_mapped_closes_its_file_once(
    segment: Segment, monkeypatch: pytest.MonkeyPatch, attached: bool
) -> None:
    """A second time it would be somebody else's, who has been given the number meanwhile."""

    def refuse(*_: object) -> None:
        raise OSError(12, "no address space")

    closed: list[int] = []
    close = os.close
    monkeypatch.setattr(mmap, "mmap", refuse)
    monkeypatch.setattr(os, "close", lambda number: (closed.append(number), close(number)))
    with pytest.raises(SharedMemoryError, match="cannot be mapped"):
        Segment.attach(segment.name, SIZE) if attached else Segment.create(SIZE)
    gc.collect()
    assert len(closed) == 1


@pytest.mark.parametrize(
    "name", ["", "1/2/windlass-", "../etc/passwd", f"1/2/windlass-{'g' * 32}", f"1/../2/windlass-{'a' * 32}"]
)
def test_other_names_are_not_opened(name: str) -> None:
    with pytest.raises(SharedMemoryError, match="not the name"):
        Segment.attach(name, SIZE)


def test_what_is_not_there_is_not_attached() -> None:
    with pytest.raises(SharedMemoryError, match="not on this host"):
        Segment.attach(f"{2**31}/3/windlass-{'0' * 32}", SIZE)


def test_another_size_is_refused(segment: Segment) -> None:
    with pytest.raises(SharedMemoryError, match="not a sealed segment of"):
        Segment.attach(segment.name, SIZE + 64)


@pytest.mark.parametrize(("start", "size"), [(-64, 64), (1, 8), (SIZE, 1), (0, SIZE + 1), (64, -1)])
def test_places_outside_are_refused(segment: Segment, start: int, size: int) -> None:
    with pytest.raises(SharedMemoryError, match="not a place"):
        segment.view(start, size)


def test_no_room_is_an_error_and_not_a_crash() -> None:
    """Writing to memory that the system does not have ends a process with SIGBUS."""
    segment = Segment.create(1 << 46)
    with pytest.raises(SharedMemoryError, match="no room"):
        segment.claim(0, 1 << 46)


_OWNER = """
import sys
from ps.wire.shared_memory import Segment
segment = Segment.create(1 << 20)
segment.claim(0, 1 << 20)
segment.view(0, 8)[:] = b"windlass"
print(segment.name, flush=True)
sys.stdin.read()
"""


def test_it_outlives_a_killed_owner_and_is_gone_with_the_last_who_maps_it() -> None:
    with subprocess.Popen([sys.executable, "-c", _OWNER], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        try:
            name = owner.stdout.readline().decode().strip()
            attached = Segment.attach(name, SIZE)
        finally:
            os.kill(owner.pid, signal.SIGKILL)
    assert bytes(attached.view(0, 8)) == b"windlass"
    with pytest.raises(SharedMemoryError, match="not on this host"):
        Segment.attach(name, SIZE)
    before = shared_pages()
    attached.close()
    del attached
    eventually(lambda: shared_pages() <= before - SIZE // 2, 10.0, "the memory to be the system's again")


def test_nothing_has_a_name(segment: Segment) -> None:
    """What has none cannot be left behind, whoever dies."""
    assert segment.name
    assert not list(Path("/dev/shm").glob("*windlass*"))
    owner, descriptor, _ = segment.name.split("/")
    with pytest.raises(SharedMemoryError, match="not on this host"):
        Segment.attach(f"{owner}/{descriptor}/windlass-{'0' * 32}", SIZE)


def test_another_file_of_that_number_is_not_opened() -> None:
    """In another container the same number is another process, whose descriptor may be a pipe that never answers."""
    read, write = os.pipe()
    try:
        with pytest.raises(SharedMemoryError, match="not on this host"):
            Segment.attach(f"{os.getpid()}/{read}/windlass-{'0' * 32}", SIZE)
    finally:
        os.close(read)
        os.close(write)


def test_its_owner_cannot_cut_it_short(segment: Segment) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(segment._descriptor, 64)


def shared_pages() -> int:
    """Bytes of shared memory on this host."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Shmem")
