"""Warm-up, the cache of compiled kernels, and the check for denormals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ps.errors import StartupError
from ps.kernels import convert, digest, hashing, jit, reduce, update
from ps.kernels.compile import cache_directory, check_denormals, warm_up, warm_up_worker
from ps.types import WireDtype
from tests.unit import test_kernels_reduce as reduce_tests
from tests.unit import test_kernels_update as update_tests

DISPATCHERS = (
    convert._encode,
    convert._decode,
    digest._hash_payload,
    reduce._fold,
    reduce._reduce,
    update._apply,
    hashing._hash_chunk,
)


def run_python(code: str, **environment: str) -> str:
    """Run code in a process of its own, with warnings as errors; return what it prints."""
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_after_the_warm_up_nothing_is_compiled():
    warm_up(update.Update(update_tests.OPTIMIZERS["adamw"], WireDtype.FP16), WireDtype.FP16)
    warm_up_worker(WireDtype.FP16)
    compiled = [len(dispatcher.signatures) for dispatcher in DISPATCHERS]
    update_tests.test_fifty_steps_follow_torch("adamw")
    update_tests.test_absent_runs_and_padding_are_published_and_hashed_but_not_updated("momentum", WireDtype.FP16)
    reduce_tests.test_readonly_payloads_at_an_offset_need_no_second_compilation()
    for count in (1, 4):
        reduce_tests.test_folding_equals_numpy_and_reducing_at_once(WireDtype.FP16, count)
    assert [len(dispatcher.signatures) for dispatcher in DISPATCHERS] == compiled


def test_the_cache_is_the_first_writable_place(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "chosen"))
    assert cache_directory() == tmp_path / "chosen"
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "windlass" / "numba"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory() == tmp_path / "home" / ".cache" / "windlass" / "numba"


def test_a_place_that_cannot_be_made_falls_back_to_the_temporary_directory(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "file" / "below"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    assert cache_directory() == tmp_path / "tmp" / f"windlass-{os.getuid()}" / "numba"
    assert cache_directory().stat().st_mode & 0o777 == 0o700


def test_a_temporary_folder_of_somebody_else_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.getuid", lambda: 12345)
    assert not jit._is_writable(tmp_path / "windlass-12345" / "numba")


CONVERT = """
import numpy as np
from ps.kernels import jit, convert
from ps.kernels.formats import has_half_conversion
from ps.types import WireDtype
bits = np.arange(65536, dtype=np.uint16)
values, back = np.empty(65536, np.float32), np.empty(65536, np.uint16)
convert.decode(bits, WireDtype.FP16, values)
expected = bits.view(np.float16).astype(np.float32)
assert np.array_equal(values, expected, equal_nan=True)
assert np.array_equal(np.signbit(values), np.signbit(expected))
convert.encode(values, 1, WireDtype.FP16, back)
number = ~np.isnan(expected)
assert np.array_equal(back[number], bits[number])
print(has_half_conversion(), jit.CACHE)
"""


def test_a_processor_without_f16c_gives_the_same_conversions(tmp_path):
    output = run_python(CONVERT, NUMBA_CPU_NAME="x86-64-v2", NUMBA_CPU_FEATURES="-f16c", NUMBA_CACHE_DIR=str(tmp_path))
    assert output.split()[0] == "False"


def test_without_a_writable_cache_kernels_are_compiled_and_work(tmp_path):
    (tmp_path / "file").touch()
    nowhere = str(tmp_path / "file" / "below")
    code = f"import tempfile; tempfile.tempdir = {nowhere!r}\n{CONVERT}"
    assert run_python(code, NUMBA_CACHE_DIR=nowhere, XDG_CACHE_HOME=nowhere).split()[1] == "None"


WARM = "from ps.kernels.compile import warm_up_worker as w; from ps.types import WireDtype as D; w(D.BF16)"


@pytest.mark.parametrize(("suffix", "kept_bytes"), [("nbi", 0), ("nbc", 100)])
def test_a_damaged_cache_is_made_anew(tmp_path, suffix, kept_bytes):
    run_python(WARM, NUMBA_CACHE_DIR=str(tmp_path))
    files = list(tmp_path.rglob(f"*.{suffix}"))
    sizes = [path.stat().st_size for path in files]
    assert len(files) == 3
    for path in files:
        path.write_bytes(path.read_bytes()[:kept_bytes])
    run_python(WARM, NUMBA_CACHE_DIR=str(tmp_path))
    assert [path.stat().st_size for path in files] == sizes


def test_a_full_disk_does_not_stop_the_start(tmp_path):
    limit = "import resource, ps.kernels.compile; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
    run_python(limit + WARM, NUMBA_CACHE_DIR=str(tmp_path))
    assert not any(path.stat().st_size for path in tmp_path.rglob("*.nb?"))


def test_the_cache_is_of_these_sources():
    assert jit.CACHE is not None
    assert jit.CACHE.name == f"windlass-{jit._sources_digest()}"
    assert list(Path(jit.CACHE).rglob("*.nbi"))


@pytest.mark.parametrize("dtype", WireDtype)
def test_flushed_denormals_stop_the_start(dtype):
    check_denormals(dtype)
    torch.set_flush_denormal(True)
    try:
        with pytest.raises(StartupError, match="denormal"):
            check_denormals(dtype)
    finally:
        torch.set_flush_denormal(False)
    check_denormals(dtype)


def test_kernels_import_neither_torch_nor_the_network():
    code = "import sys, ps.kernels.compile; print([m for m in ('torch', 'grpc') if m in sys.modules])"
    assert run_python(code).strip() == "[]"
