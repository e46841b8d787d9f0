"""What a job will take: the formulas against the modules, files and protocol that they speak of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ps.errors import StartupError
from ps.shard import snapshot
from ps.sharding import make_plan
from ps.storage.gradient_log import usual_limit
from tests.support.untrained import make_run, write_model
from workers.cli.main import main
from workers.config import JobConfig, load_job
from workers.launch import estimate as estimates
from workers.launch.estimate import estimate
from workers.launch.folder import RunFolder
from workers.models import groups, shapes
from workers.models.gpt import GPT


def a_job(*overrides: str) -> JobConfig:
    return load_job(None, ["run_dir=runs/none", *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.num_layers=1", "model.intermediate_size=100", "data.vocab_size=301"),
        ("optimizer.decay_all=true", "model.num_heads=2"),
    ],
)
def test_the_table_is_the_modules(overrides: tuple[str, ...]) -> None:
    job = a_job(*overrides)
    vocab_size, decay_all = job.data.vocab_size, job.optimizer.decay_all
    with torch.device("meta"):
        model = GPT(job.model, vocab_size, job.data.sequence_length)
    assert (groups.DECAYED, groups.NOT_DECAYED) == (shapes.DECAYED, shapes.NOT_DECAYED)
    assert shapes.parameter_table(job.model, vocab_size, decay_all) == groups.parameter_table(model, decay_all)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.hidden_size=128",),
        ("model.hidden_size=256", "model.num_layers=2", "batch.micro_batch_size=4"),
        ("model.hidden_size=128", "model.dropout=0.1", "data.sequence_length=128"),
    ],
)
def test_backward_needs_so_many_elements(overrides: tuple[str, ...]) -> None:
    job = a_job("data.vocab_size=300", "model.num_layers=3", *overrides)
    model = GPT(job.model, 300, job.data.sequence_length)
    mine = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    shape = (job.batch.micro_batch_size, job.data.sequence_length + 1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.loss(torch.zeros(shape, dtype=torch.long))
    tokens = shape[0] * (shape[1] - 1)
    expected = 4 * (shapes.saved_elements(job.model, tokens) + 300 * tokens)
    assert sum(saved.values()) == pytest.approx(expected, rel=0.06)
    assert loss.requires_grad


def test_standbys_and_journals_take_what_a_shard_holds_and_reduces() -> None:
    alone, kept = estimate(a_job()), estimate(a_job("cluster.standbys=1", "durability=journal"))
    assert kept.host_bytes - alone.host_bytes == sum(shard.num_bytes for shard in alone.shards)
    assert kept.reduced_bytes == tuple(4 * size for size in kept.shard_elements)
    assert alone.journal_bytes == (0, 0)
    assert kept.journal_bytes == tuple(2 * usual_limit(size) for size in kept.shard_elements)
    assert estimate(a_job("durability=journal", "journal.max_bytes=1000")).journal_bytes == (2000, 2000)


def test_flops_are_six_for_each_matrix_element_and_the_attention() -> None:
    job = a_job("model.num_layers=1")
    with torch.device("meta"):
        model = GPT(job.model, 4096, 256)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    assert shapes.flops_per_token(job.model, 4096, 256) == 6 * matrices + 12 * 256 * 256


def test_a_checkpoint_is_so_large(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "".join(f"Line {n}: {n * n}.\n" for n in range(4000)), "model.hidden_size=256")
    checkpoint = write_model(folder, folder.read_job(), 40)
    written = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert written == pytest.approx(estimate(folder.read_job()).checkpoint_bytes, rel=0.005)


def test_a_shard_holds_what_the_architecture_says() -> None:
    job = a_job(
        "cluster.shards=3",
        "batch.micro_batches_per_step=16",
        "batch.contributions_per_step=2",
        "launch.transport=grpc",
    )
    found = estimate(job)
    plan = make_plan(shapes.parameter_table(job.model, 4096, False), 3)
    assert sum(found.shard_elements) == plan.size
    for shard, size in zip(found.shards, found.shard_elements, strict=True):
        held = {part.name: part.num_bytes / size for part in shard.parts[1:]}
        assert held.pop("messages") < 1
        # At most 22 bytes at C = 2, of which the last contribution is reduced as it comes.
        assert sum(held.values()) == 20
        assert shard.snapshot_bytes == 12 * size
    assert estimates.MAX_COPY_BYTES == snapshot.MAX_COPY_BYTES


@pytest.mark.parametrize(("contributions", "num_bytes"), [(1, 0), (2, 2), (4, 6), (5, 14), (16, 14)])
def test_contributions_that_wait_are_bounded(contributions: int, num_bytes: int) -> None:
    sizes = ("batch.micro_batches_per_step=16", f"batch.contributions_per_step={contributions}")
    job = a_job(*sizes, "launch.transport=grpc")
    shard = estimate(job).shards[0]
    waiting = next(part.num_bytes for part in shard.parts if part.name == "contributions that wait for others")
    assert waiting == num_bytes * estimate(job).shard_elements[0]


def test_what_is_shared_counts_in_each_process_and_once_on_the_host() -> None:
    sizes = ("batch.micro_batches_per_step=16", "batch.contributions_per_step=2", "cluster.workers=2")
    framed, shared = estimate(a_job(*sizes, "launch.transport=grpc")), estimate(a_job(*sizes))
    size = sum(shared.shard_elements)
    # A place for one contribution, and the published weights.
    assert shared.worker.num_bytes - framed.worker.num_bytes == 4 * size
    parts = [part for shard in shared.shards for part in shard.parts]
    places = sum(part.num_bytes for part in parts if part.name == "shared with workers")
    assert places == 2 * 2 * size
    roles = (shared.coordinator, *shared.shards, shared.worker, shared.worker)
    assert sum(role.num_bytes for role in roles) - shared.host_bytes == 2 * 4 * size


def test_sgd_and_another_wire_take_other_memory() -> None:
    plain = estimate(a_job("optimizer.name=sgd", "optimizer.momentum=0", "precision.wire=fp32"))
    held = {part.name: part.num_bytes / plain.shard_elements[0] for part in plain.shards[0].parts}
    assert (held["optimizer state"], held["published weights"]) == (0, 4)
    assert plain.checkpoint_bytes == 4 * sum(plain.shard_elements)


def test_links_carry_the_weights_down_and_each_contribution_up() -> None:
    job = a_job(
        "cluster.workers=3", "cluster.shards=2", "batch.micro_batches_per_step=8", "batch.contributions_per_step=4"
    )
    found = estimate(job)
    assert sorted(found.contributions) == [1, 1, 2]
    size = sum(found.shard_elements)
    assert (found.push_total, found.pull_total) == (4 * 2 * size, 3 * 2 * size)
    assert found.push_total == sum(found.push_bytes(worker, shard) for worker in range(3) for shard in range(2))
    # One worker too many has nothing to push.
    idle = estimate(a_job("cluster.workers=3", "batch.contributions_per_step=2"))
    assert sorted(idle.contributions) == [0, 1, 1]


def test_on_a_gpu_the_weights_are_there_and_not_in_the_hosts_memory() -> None:
    found = estimate(a_job("worker.device=cuda"))
    assert found.device is not None
    parts = {part.name: part.num_bytes / sum(found.shard_elements) for part in found.device.parts}
    assert (parts["weights"], parts["gradients"]) == (2, 4)
    assert {part.name for part in found.worker.parts} == {"process", "staging", "shared with shards"}
    half = estimate(a_job("worker.device=cuda", "precision.accumulate=fp16")).device
    assert half is not None
    assert half.parts[1].num_bytes == 2 * sum(found.shard_elements)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["validate", *arguments])
    return code, *capsys.readouterr()


def test_validate_prints_every_key_and_where_it_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("seed: 5\noptimizer: {lr: 1e-3}\ncluster: {shards: 1, workers: 2}\n")
    code, out, err = call(capsys, "my.yaml", "optimizer.lr=2e-3")
    assert (code, err) == (0, "")
    for line in (
        "seed: 5  # my.yaml",
        "  lr: 0.002  # command line",
        "  contributions_per_step: 2  # computed",
        "  shards: 1  # my.yaml",
        "  workers: 2",
    ):
        assert line in out.splitlines()
    for words in ("3,458,816 in 29 tensors", "worker 1 - shard 0: push 6.9 MB, pull 6.9 MB", "41.5 MB on disk"):
        assert words in out
    assert [path.name for path in tmp_path.iterdir()] == ["my.yaml"]


def test_validate_says_whether_steps_are_eager(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eager = ["precision.wire=bf16", "optimizer.clip_norm=0"]
    for overrides, kind in (([], "decided"), (eager, "eager"), ([*eager, "training.eager=false"], "decided")):
        _, out, _ = call(capsys, f"run_dir={tmp_path / 'run'}", *overrides)
        assert f"steps        {kind}: " in out


def test_validate_as_json_is_the_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--json", f"run_dir={tmp_path / 'run'}", "cluster.workers=3")
    assert code == 0
    content = json.loads(out)
    job = JobConfig.model_validate(content["job"])
    found = estimate(job)
    assert content["origins"]["cluster.workers"] == "command line"
    assert content["estimate"]["worker"]["num_bytes"] == found.worker.num_bytes
    assert [shard["num_bytes"] for shard in content["estimate"]["shards"]] == [s.num_bytes for s in found.shards]
    assert content["estimate"]["push_bytes_per_step"] == found.push_total
    assert content["estimate"]["host_bytes"] == found.host_bytes


def test_a_run_that_needs_more_workers_than_it_starts_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may join by hand, so it is no error."""
    job = [f"run_dir={tmp_path / 'run'}", "membership.min_workers=4", "cluster.workers=2"]
    warning = "windlass: warning: membership.min_workers=4 is more than cluster.workers=2: nothing is computed until"
    code, _, err = call(capsys, *job)
    assert code == 0
    assert err.startswith(warning)
    assert call(capsys, *job[:2], "cluster.workers=4")[2] == ""

    def launcher(*_: object) -> None:
        raise StartupError("as far as this test goes")

    monkeypatch.setattr("workers.cli.train.Launcher", launcher)
    assert main(["train", *job]) == 1
    assert capsys.readouterr().err.startswith(warning)


def test_validate_refuses_what_train_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunFolder(tmp_path / "run").write_job(a_job())
    for arguments, expected, words in (
        (["optimizer.lrr=1"], 2, "did you mean optimizer.lr?"),
        (["no.yaml"], 2, "no job file no.yaml"),
        (["cluster.shards=1000"], 2, "use at most"),
        ([f"run_dir={tmp_path / 'run'}"], 2, "holds a run already"),
        ([f"data.paths=['{tmp_path / 'gone.txt'}']"], 1, "gone.txt does not exist"),
    ):
        code, out, err = call(capsys, *arguments)
        assert (code, out) == (expected, "")
        assert words in err
        assert err.count("\n") == 1


def test_many_links_are_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "cluster.workers=64", "cluster.shards=20", "batch.micro_batches_per_step=64")
    assert code == 0
    assert "each of 1280 links: push" in out
    assert out.count("shard ") < 12


def test_validate_needs_no_torch() -> None:
    check = (
        "import sys\n"
        "from workers.cli.main import main\n"
        "assert main(['validate']) == 0\n"
        "heavy = {'torch', 'tokenizers', 'numba', 'grpc'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True, stdout=subprocess.DEVNULL)
