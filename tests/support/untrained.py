"""Run folders with a checkpoint that nobody trained: what reads checkpoints needs no cluster."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from ps.sharding import make_plan
from ps.storage import checkpoint_folder, write_manifest
from tests.support.checkpoints import make_manifest, write_shard_file
from workers.config import JobConfig
from workers.data.prepare import prepare
from workers.launch import jobs
from workers.launch.folder import RunFolder
from workers.models.gpt import GPT
from workers.models.groups import parameter_table

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_run(base: Path, text: str, *overrides: str) -> RunFolder:
    """Write a job and its text; the text is at base/text.txt, the cache at base/cache."""
    file = base / "text.txt"
    file.write_text(text, encoding="utf-8")
    job = jobs.resolve(
        None,
        [
            f"run_dir={base / 'run'}",
            f'data.paths=["{file}"]',
            f"data.cache_dir={base / 'cache'}",
            "data.vocab_size=300",
            "data.sequence_length=32",
            "model.num_layers=1",
            "model.hidden_size=64",
            "evaluation.max_sequences=20",
            "training.steps=50",
            *overrides,
        ],
    )
    folder = RunFolder(job.run_dir)
    folder.write_job(job)
    return folder


def fresh_model(job: JobConfig) -> GPT:
    model = GPT(job.model, prepare(job.data).vocab_size, job.data.sequence_length)
    model.initialize(job.seed)
    return model


def write_model(run: RunFolder, job: JobConfig, version: int) -> Path:
    """Write the initial values as a checkpoint of two shards; returns its folder."""
    model = fresh_model(job)
    plan = make_plan(parameter_table(model, job.optimizer.decay_all), 2)
    arrays = {name: np.zeros(plan.size, np.float32) for name in ("weights", *MOMENTS)}
    weights = dict(model.named_parameters())
    for tensor, offset in zip(plan.table.tensors, plan.offsets, strict=True):
        arrays["weights"][offset : offset + tensor.size] = weights[tensor.name].detach().numpy().ravel()
    folder = checkpoint_folder(job.checkpoint_dir, version)
    folder.mkdir(parents=True)
    files = [write_shard_file(folder, plan, shard, arrays) for shard in range(2)]
    manifest = make_manifest(plan, files, version, MOMENTS)
    write_manifest(folder, replace(manifest, job=json.loads(run.config.read_text())))
    return folder
