"""How text becomes configuration; the command line's part is in test_cli_*.py and test_launch_jobs.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ps.config import RunConfig, field_names, from_json, load_mapping, merge, nest, parse_override, validate
from ps.errors import ConfigError
from ps.types import WireDtype
from workers.config import JobConfig, load_job


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("seed=1", "seed", 1),
        ("a=true", "a", True),
        ("a=null", "a", None),
        ("a=", "a", None),
        ("a=b=c", "a", "b=c"),
        ("a=x.txt", "a", "x.txt"),
        ("a=3d", "a", "3d"),
        ('data.paths=["a.txt","books/"]', "data.paths", ["a.txt", "books/"]),
        ("betas=[0.9, 1e-1]", "betas", [0.9, 0.1]),
        ("a={b: 1e4}", "a", {"b": 1e4}),
        (" a =1", "a", 1),
        # YAML 1.1 would make 615 of it.
        ("trace.steps=10:15", "trace.steps", "10:15"),
        ("a=1:30.5", "a", "1:30.5"),
    ],
)
def test_overrides(text: str, key: str, value: Any) -> None:
    assert parse_override(text) == (key, value)


@pytest.mark.parametrize("text", ["", "seed", "=1", "a=[1", "a={", "a={b: 1, b: 2}"])
def test_what_is_no_override(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_override(text)
    assert "\n" not in str(caught.value)


def test_merging_and_nesting() -> None:
    assert nest([("a.b", 1), ("a.c.d", 2), ("a.b", 3)]) == {"a": {"b": 3, "c": {"d": 2}}}
    base = {"a": {"b": 1, "c": 2}, "d": 3}
    assert merge(base, {"a": {"b": 5}, "e": 1}) == {"a": {"b": 5, "c": 2}, "d": 3, "e": 1}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}
    assert merge(base, {"a": 1}) == {"a": 1, "d": 3}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["clutser.shards=1"], ["clutser is not a key; did you mean cluster?"]),
        (["cluster.shard=1"], ["cluster.shard is not a key; did you mean cluster.shards?", "threads_per_shard"]),
        (["lr=1"], ["did you mean optimizer.lr?"]),
        (["zzz=1"], ["zzz is not a key (a job has: run_dir"]),
        (["cluster.shards=0"], ["cluster.shards=0", "greater than or equal to 1"]),
        (["cluster.shards=1.5"], ["cluster.shards=1.5", "integer"]),
        (["cluster.shards=many"], ["cluster.shards=many", "integer"]),
        (["cluster=3"], ["cluster=3"]),
        (["optimizer.lr=.nan"], ["optimizer.lr=nan", "finite"]),
        (["optimizer.lr=-1"], ["optimizer.lr=-1", "greater than or equal to 0"]),
        (["optimizer.name=lion"], ["optimizer.name=lion", "'adamw', 'adam' or 'sgd'"]),
        (["optimizer.betas=[0.9]"], ["optimizer.betas"]),
        (["optimizer.betas=[0.9, 1.0]"], ["optimizer.betas.1=1.0", "less than 1"]),
        (["optimizer.betas=[0.9]"], ["optimizer.betas=[0.9]: a list of two numbers is needed, such as [0.9,0.95]"]),
        (["optimizer.betas=0.9,0.99"], ["optimizer.betas=0.9,0.99: a list of two numbers is needed"]),
        (["optimizer.betas=[0.9,0.9,0.9]"], ["optimizer.betas=[0.9, 0.9, 0.9]: a list of two numbers is needed"]),
        (["data.paths=3"], ["data.paths=3: a list is needed"]),
        (["model=3"], ["model=3: a section is needed, with its keys: name, num_layers, "]),
        (["model="], ["model=null: a section is needed"]),
        (
            ["journal.dir=/disk"],
            ["journal.dir=/disk does nothing with durability=checkpoint: set durability=journal, or leave it out"],
        ),
        (["journal.max_bytes=1"], ["journal.max_bytes=1 does nothing with durability=checkpoint"]),
        (["trace.steps=10"], ["trace.steps=10: write it as first:end, such as 10:15 for the steps 10 to 14"]),
        (["trace.steps=10:"], ["trace.steps: write it as first:end, such as 10:15"]),
        (["trace.steps=-1:2"], ["trace.steps=-1:2: write it as first:end"]),
        (["trace.steps=10-15"], ["trace.steps=10-15: write it as first:end"]),
        (["trace.steps=[10,15]"], ["trace.steps=[10, 15]: write it as first:end"]),
        (["trace.steps=7:7"], ["trace.steps=7:7: these are no steps", "write 7:8 for step 7"]),
        (["trace.steps=7:3"], ["trace.steps=7:3: these are no steps"]),
        (
            ["trace.steps=9:12", "training.steps=9"],
            ["trace.steps=9:12: the run has the steps 0 to 8 (training.steps=9)"],
        ),
        (["trace.step=1:2"], ["trace.step is not a key; did you mean trace.steps?"]),
        (["zork=1"], ["zork is not a key; did you mean worker? (a job has: run_dir"]),
        (["precision.loss_scale=3"], ["precision.loss_scale=3: a section is needed, with its keys: static, "]),
        (["optimizer.name=adamv"], ["optimizer.name=adamv", "'adamw', 'adam' or 'sgd'; did you mean adamw?"]),
        (["precision.wire=bfloat16"], ["precision.wire=bfloat16", "did you mean bf16?"]),
        (["worker.device=gpu"], ["worker.device=gpu", "did you mean cuda?"]),
        (["precision.wire=fp8"], ["precision.wire=fp8", "'fp16', 'bf16' or 'fp32'"]),
        (
            ["batch.contributions_per_step=9", "batch.micro_batches_per_step=4"],
            ["batch.contributions_per_step=9", "batch.micro_batches_per_step=4"],
        ),
        (["batch.micro_batches_per_step=8193"], ["8193", "8192"]),
        (["precision.accumulate=fp16", "precision.compute=fp32"], ["precision.compute=fp16"]),
        (["optimizer.name=sgd", "optimizer.nesterov=true", "optimizer.momentum=0"], ["nesterov needs momentum"]),
        (
            ["model.hidden_size=100", "model.num_heads=3"],
            ["model.hidden_size=100", "multiple of 6", "model.num_heads=3"],
        ),
        (["data.validation_fraction=0.5"], ["data.validation_fraction=0.5"]),
        (["seed=-1"], ["seed=-1"]),
        # The unknown key first: it may explain the rest.
        (["cluster.shards=0", "cluster.shrads=2"], ["cluster.shrads is not a key"]),
    ],
)
def test_every_mistake_is_one_line_that_names_it(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(None, overrides)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_the_file_then_the_overrides(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("optimizer: {lr: 1e-4, name: sgd}\nseed: 5\n")
    job = load_job(file, ["optimizer.lr=1e-2"], {"seed": 1, "training": {"steps": 7}})
    assert (job.optimizer.lr, job.optimizer.name, job.seed, job.training.steps) == (0.01, "sgd", 5, 7)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- 1\n", "holds a list"),
        (b"a: [", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"just text", "holds a str"),
    ],
)
def test_files_that_are_no_jobs(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        load_mapping(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no job file"):
        load_mapping(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_mapping(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("training: {steps: 9}\nseed: 1\ntraining:\n  stop_at: 3\n", "training is there twice, in lines 1 and 3"),
        ("optimizer:\n  lr: 1\n  eps: 1\n  lr: 2\n", "lr is there twice, in lines 2 and 4"),
        ('{"seed": 1, "seed": 1}', "seed is there twice, in lines 1 and 1"),
        ("seed: 1\nmodel: [\n", "line 3, column 1: expected the node content, but found '<stream end>'"),
        ("seed: 1\nmodel: name: gpt\n", "line 2, column 12: mapping values are not allowed here"),
    ],
)
def test_a_job_file_that_is_not_what_it_seems_is_refused_with_its_lines(
    tmp_path: Path, content: str, words: str
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_mapping(file)
    assert f"{file} cannot be read: {words}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_may_stand_over_one_that_is_laid_under_it(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("optimizer: &base {lr: 1, eps: 2}\nother: &more\n  <<: *base\n  lr: 3\nlast: {<<: *more, eps: 4}\n")
    assert load_mapping(file)["last"] == {"lr": 3, "eps": 4}


def test_a_near_name_is_enough_without_the_rest() -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(None, ["trainig.steps=1"])
    assert caught.value.message == "trainig is not a key; did you mean training?"


def test_an_empty_file_is_a_job(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("# nothing yet\n")
    assert load_mapping(tmp_path / "job.yaml") == {}


def test_a_job_travels_as_json() -> None:
    job = load_job(None, ["run_dir=runs/x", "precision.wire=bf16", "optimizer.betas=[0.8, 0.9]", "training.stop_at=3"])
    assert from_json(JobConfig, job.model_dump_json()) == job
    # The server reads its part, and does not mind the workers'.
    run = from_json(RunConfig, job.model_dump_json())
    assert (run.precision.wire, run.optimizer.betas, run.run_dir) == (WireDtype.BF16, (0.8, 0.9), Path("runs/x"))
    with pytest.raises(ConfigError, match="not JSON"):
        from_json(RunConfig, "{")
    with pytest.raises(ConfigError, match="cluster"):
        from_json(RunConfig, json.dumps({"cluster": {"shards": 0}}))


def test_configurations_are_frozen() -> None:
    config = validate(RunConfig, {})
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 2  # type: ignore[misc]


@pytest.mark.parametrize(("workers", "asked", "contributions"), [(3, None, 3), (9, "auto", 4), (9, 2, 2), (1, 4, 4)])
def test_auto(workers: int, asked: Any, contributions: int) -> None:
    batch = {"micro_batches_per_step": 4, "contributions_per_step": asked}
    config = validate(RunConfig, {"cluster": {"workers": workers}, "batch": batch})
    assert config.contributions == contributions


def test_checkpoints_are_in_the_run_folder_unless_told_otherwise() -> None:
    assert validate(RunConfig, {"run_dir": "a"}).checkpoint_dir == Path("a/checkpoints")
    assert validate(RunConfig, {"run_dir": "a", "checkpoint": {"dir": "/b"}}).checkpoint_dir == Path("/b")


def test_moment_names() -> None:
    names = {
        "adamw": ("exp_avg", "exp_avg_sq"),
        "adam": ("exp_avg", "exp_avg_sq"),
        "sgd": ("momentum_buffer",),
    }
    for name, expected in names.items():
        assert validate(RunConfig, {"optimizer": {"name": name}}).optimizer.moment_names == expected
    assert validate(RunConfig, {"optimizer": {"name": "sgd", "momentum": 0}}).optimizer.moment_names == ()


def test_every_key_of_the_issue_is_one() -> None:
    """These names are fixed."""
    keys = """run_dir seed cluster.shards cluster.workers model.num_layers model.hidden_size model.num_heads data.paths
    data.sequence_length data.vocab_size data.validation_fraction batch.micro_batch_size batch.micro_batches_per_step
    batch.contributions_per_step training.steps training.stop_at training.target_loss evaluation.every_steps
    precision.compute precision.wire optimizer.name optimizer.lr optimizer.clip_norm schedule.name
    checkpoint.every_steps checkpoint.keep checkpoint.dir launch.transport worker.device"""
    assert set(keys.split()) <= set(field_names(JobConfig))


def test_configuration_costs_neither_torch_nor_numba() -> None:
    check = "import sys, workers.config\nassert not {'torch', 'numba', 'grpc'} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


def test_more_shards_than_the_model_has_chunks_is_refused_before_anything_starts() -> None:
    small = ["model.num_layers=2", "model.hidden_size=64", "data.vocab_size=300"]
    assert load_job(None, [*small, "cluster.shards=2"]).model.flat_size(300) == 126_016
    with pytest.raises(ConfigError, match=r"cluster\.shards=3: this model makes only 2 chunks"):
        load_job(None, [*small, "cluster.shards=3"])


@pytest.mark.parametrize(
    ("asked", "steps"), [("10:15", range(10, 15)), ("0:1", range(1)), (None, range(0)), ("", range(0))]
)
def test_steps_are_written_as_a_slice(asked: Any, steps: range) -> None:
    assert validate(RunConfig, {"trace": {"steps": asked}}).traced_steps == steps


@pytest.mark.parametrize(("stop_at", "last"), [(None, 11), (11, 10), (10, None), (3, None)])
def test_there_are_no_steps_behind_the_end(stop_at: int | None, last: int | None) -> None:
    job = validate(RunConfig, {"trace": {"steps": "10:15"}, "training": {"steps": 12, "stop_at": stop_at}})
    assert list(job.traced_steps)[-1:] == ([] if last is None else [last])


def test_steps_in_a_job_file_need_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("trace: {steps: 10:15}\n")
    assert load_job(tmp_path / "job.yaml", []).trace.range == range(10, 15)


def test_more_workers_than_contributions_are_said_to_be_spares() -> None:
    def doubts(**sections: Any) -> list[str]:
        return validate(RunConfig, sections).doubts

    assert doubts(cluster={"workers": 3}) == [], "one contribution each"
    (few,) = doubts(cluster={"workers": 3}, batch={"contributions_per_step": 2})
    assert "cluster.workers=3 is more than the contributions of a step: only 2 of them compute at a time" in few
    (slots,) = doubts(cluster={"workers": 5}, batch={"micro_batches_per_step": 4})
    assert "only 4 of them" in slots
