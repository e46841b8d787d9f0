"""`windlass evaluate`, `sample` and `digest` on a checkpoint that nobody trained."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ps.errors import StorageError
from ps.storage import checkpoint_folder, read_manifest
from ps.storage.manifest import MANIFEST_NAME
from tests.support.checkpoints import sealed
from tests.support.untrained import fresh_model, make_run, write_model
from workers.cli import report
from workers.cli.main import main
from workers.data.batches import HeldOut
from workers.data.prepare import prepare
from workers.launch.folder import RunFolder, from_newest
from workers.models.evaluate import evaluate_windows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint of two shards at version 40."""
    text = "".join(f"Line {n}: {n * n} is the square of {n}.\n" for n in range(4000))
    folder = make_run(tmp_path_factory.mktemp("inspect"), text)
    write_model(folder, folder.read_job(), 40)
    return folder.path


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    return code, *capsys.readouterr()


def test_evaluate_says_what_the_workers_would_say(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = RunFolder(run).read_job()
    model = fresh_model(job)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    held_out = HeldOut(prepare(job.data), 32, 20, parts=1)
    loss_sum, tokens = evaluate_windows(model, held_out.part(0), 8)
    bits = loss_sum / np.log(2) / held_out.bytes_of(0)
    code, out, err = call(capsys, "evaluate", str(run))
    assert (code, err) == (0, "")
    assert "(step 40)" in out
    assert f"loss {loss_sum / tokens:.4f} nats" in out
    assert f"{bits:.4f} bits per byte ({tokens:,} tokens, {held_out.bytes_of(0):,} bytes)" in out


def test_a_checkpoint_that_a_running_job_removes_meanwhile_is_not_missed(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "One line of text.\n" * 400)
    for version in (40, 50):
        write_model(folder, folder.read_job(), version)
    seen = []

    def use(checkpoint: Path) -> str:
        seen.append(checkpoint.name)
        if len(seen) == 1:
            write_model(folder, folder.read_job(), 60)
            (checkpoint / MANIFEST_NAME).unlink()
        read_manifest(checkpoint)
        return checkpoint.name

    assert from_newest(folder.path, use) == "step-00000060"
    assert seen == ["step-00000050", "step-00000060"]
    # One that was named is that one and no other.
    named = checkpoint_folder(folder.path / "checkpoints", 60)

    def remove(checkpoint: Path) -> None:
        (checkpoint / MANIFEST_NAME).unlink()
        read_manifest(checkpoint)

    with pytest.raises(StorageError, match="step-00000060"):
        from_newest(named, remove)


def test_what_is_evaluated_is_what_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A running job may complete another one meanwhile."""
    found = checkpoint_folder(run / "checkpoints", 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.cli.inspect.find_checkpoint", lambda _: Path("another one"))
        assert call(capsys, "evaluate", str(run))[1].startswith(f"{found} (step 40)")


def test_of_a_damaged_checkpoint_the_one_before_it_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path, "One line of text.\n" * 400)
    for version in (40, 50):
        write_model(folder, folder.read_job(), version)
    damaged = next(checkpoint_folder(folder.path / "checkpoints", 50).glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    code, _, err = call(capsys, "digest", str(folder.path))
    assert code == 1
    before = checkpoint_folder(folder.path / "checkpoints", 40)
    assert re.search(rf"step-00000050.*; the one before it is {before}$", err.strip())
    assert call(capsys, "digest", str(before))[0] == 0


def test_sample_writes_the_same_for_the_same_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sample", str(run), "--prompt", "Line 7", "--tokens", "12"]
    outs = [call(capsys, *arguments, "--seed", seed)[1] for seed in ("3", "3", "4")]
    assert outs[0] == outs[1] != outs[2]
    assert outs[0].startswith("Line 7")
    # A checkpoint's folder will do, and so will nothing to begin with.
    code, _, _ = call(capsys, "sample", str(checkpoint_folder(run / "checkpoints", 40)), "--tokens", "5")
    assert code == 0


def test_digest_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "digest", str(run))
    assert (code, err) == (0, "")
    assert len(bytes.fromhex(out.strip())) == 32


def test_a_damaged_checkpoint_is_named(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    job = RunFolder(run).read_job().model_copy(update={"run_dir": tmp_path})
    folder.write_job(job)
    file = next(write_model(folder, job, 7).glob("shard-00001*"))
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    for command in ("digest", "sample", "evaluate"):
        code, _, err = call(capsys, command, str(tmp_path))
        assert code == 1
        assert err.startswith("windlass: error: ")
        assert str(file) in err
        assert err.count("\n") == 1


def test_a_checkpoint_of_another_text_is_refused(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    manifest = checkpoint_folder(run / "checkpoints", 40) / "manifest.json"
    content = json.loads(manifest.read_text())
    content["job"]["data"]["vocab_size"] = 290
    copy = tmp_path / "step-00000040"
    copy.mkdir()
    for file in manifest.parent.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "manifest.json").write_bytes(sealed(content))
    code, _, err = call(capsys, "sample", str(copy))
    assert code == 1
    assert "embed_tokens" in err


def test_the_result_names_everything(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(run)
    evaluation = {
        "kind": "evaluation",
        "version": 40,
        "loss": 2.0,
        "perplexity": 7.39,
        "bits_per_byte": 1.9,
        "tokens": 640,
        "bytes": 2000,
    }
    folder.metrics.write_text(json.dumps(evaluation) + "\n")
    report.print_result(folder, folder.read_job(), 83.0)
    out = capsys.readouterr().out
    for words in (
        "40 of 50 steps; this took 1:23",
        "loss 2.0000 nats per token, perplexity 7.39, 1.9000 bits per byte (640 tokens, 2,000 bytes)",
        "a sample of its writing",
        str(checkpoint_folder(run / "checkpoints", 40)),
        str(folder.metrics),
        str(folder.logs),
        f"windlass resume {run}\n",
        f"windlass sample {run}",
    ):
        assert words in out


def test_resuming_a_complete_run_says_how_to_go_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "resume", str(run), "training.steps=40")
    assert code == 0
    assert "is complete: 40 of 40 steps" in out
    assert f"windlass resume {run} training.steps=80" in out
    code, out, _ = call(capsys, "resume", str(run), "training.target_loss=1.5")
    assert code == 0
    assert "training.target_loss=null" in out


def test_resuming_to_a_step_behind_what_is_done_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for override in ("training.steps=1", "training.stop_at=12"):
        code, out, err = call(capsys, "resume", str(run), override)
        assert (code, out) == (2, "")
        assert err == f"windlass: error: {override} is behind step 40 of {run}\n"


def test_a_run_that_is_under_way_is_not_judged(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(run)
    lock = folder.try_lock()
    assert lock is not None
    try:
        for override in ("training.steps=1", "training.steps=40"):
            code, out, err = call(capsys, "resume", str(run), override)
            assert (code, out) == (1, "")
            assert f"{run} is in use by the launcher with pid {os.getpid()};" in err
        # Roles without a launcher are on their way out; they are waited for later.
        monkeypatch.setattr(os, "kill", lambda _pid, _signum: (_ for _ in ()).throw(ProcessLookupError))
        folder.refuse_in_use()
    finally:
        os.close(lock)
