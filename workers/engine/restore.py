"""A model from a checkpoint, for evaluation and sampling, without a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from ps.config import validate
from ps.coordinator.evaluation import Evaluation
from ps.errors import MismatchError
from ps.storage import WEIGHTS, CheckpointReader, Manifest, read_manifest
from ps.types import WireDtype
from workers.config import JobConfig
from workers.data.batches import HeldOut
from workers.data.bpe import END_OF_TEXT
from workers.data.kept import Vocabulary, find, open_text
from workers.launch.folder import from_newest
from workers.models.evaluate import evaluate_windows
from workers.models.generate import decode, generate
from workers.models.gpt import GPT
from workers.models.groups import parameter_table

_PUBLISHED = {WireDtype.FP16: torch.float16, WireDtype.BF16: torch.bfloat16, WireDtype.FP32: torch.float32}


@dataclass(frozen=True)
class Restored:
    """A model as the workers had it, and what goes with it."""

    #: The checkpoint.
    folder: Path
    model: GPT
    vocabulary: Vocabulary
    job: JobConfig
    #: Decided steps.
    version: int


def load_model(path: Path, tokenizer: Path | None = None) -> Restored:
    """Load the newest checkpoint of a run folder, or a checkpoint folder.

    The weights are float32 and have the values that the workers computed with: those of the wire.

    Args:
        path: the run folder, or the checkpoint.
        tokenizer: a tokenizer.json to use instead of the run folder's.

    Raises:
        CheckpointNotFound, CheckpointDamaged, StorageError: there is none, or it cannot be used.
        MismatchError: it holds another model than its job says.
        DataError: there is no tokenizer, and no text to train it on again.
    """
    return from_newest(path, lambda folder: _load(path, folder, tokenizer))


def _load(path: Path, folder: Path, tokenizer: Path | None) -> Restored:
    manifest, _ = read_manifest(folder)
    job = validate(JobConfig, manifest.job)
    vocabulary = find(path, folder, manifest, tokenizer)
    model = GPT(job.model, vocabulary.size, job.data.sequence_length)
    with CheckpointReader(folder, manifest) as reader:
        reader.verify()
        _fill(model, reader, manifest, job)
    model.eval()
    return Restored(folder, model, vocabulary, job, manifest.version)


@torch.no_grad()
def _fill(model: GPT, reader: CheckpointReader, manifest: Manifest, job: JobConfig) -> None:
    expected = parameter_table(model, job.optimizer.decay_all)
    if expected != manifest.table:
        different = next(
            (
                tensor.name
                for tensor, other in zip(expected.tensors, manifest.table.tensors, strict=False)
                if tensor != other
            ),
            "the number of tensors",
        )
        raise MismatchError(
            f"the checkpoint {reader.folder} does not hold the model of its job: they differ in {different}; "
            f"was the text or the tokenizer changed?"
        )
    parameters = dict(model.named_parameters())
    for tensor, offset in zip(manifest.table.tensors, reader.plan.offsets, strict=True):
        values = np.empty(tensor.size, np.dtype("<f4"))
        reader.read(WEIGHTS, offset, values)
        weights = torch.from_numpy(values).view(tensor.shape)
        parameters[tensor.name].copy_(weights.to(_PUBLISHED[job.precision.wire]))


def evaluate(restored: Restored) -> dict[str, Any]:
    """Compute the held-out loss as the cluster does: the fields of an evaluation's line in metrics.jsonl.

    Raises:
        DataError: text and cache are gone.
        MismatchError: the text is another one by now.
    """
    job = restored.job
    data = open_text(job, restored.vocabulary)
    held_out = HeldOut(data, job.data.sequence_length, job.evaluation.max_sequences, parts=1)
    loss_sum, tokens = evaluate_windows(restored.model, held_out.part(0), job.batch.micro_batch_size)
    evaluation = Evaluation(restored.version, parts=1)
    evaluation.add(0, loss_sum, tokens, held_out.bytes_of(0))
    return evaluation.result()


def write(restored: Restored, prompt: str, tokens: int, temperature: float, top_k: int, seed: int) -> str:
    """Let the model continue a prompt; returns the prompt and what it wrote.

    Args:
        restored: from `load_model`.
        prompt: empty: the first token of the held-out text is continued.
        tokens: how many to write at most.
        temperature: 0 takes the likeliest token always.
        top_k: choose among so many of the likeliest; 0: among all.
        seed: the same seed writes the same text.
    """
    tokenizer = Tokenizer.from_file(str(restored.vocabulary.tokenizer_path))
    end = tokenizer.token_to_id(END_OF_TEXT)
    # Of a single document the model has never seen a beginning, only what comes after it.
    first = restored.vocabulary.first_token
    given = tokenizer.encode(prompt).ids or [first]
    prompt = prompt or decode(tokenizer, [first] if first != end else [])
    return prompt + decode(tokenizer, generate(restored.model, given, tokens, temperature, top_k, seed, stop_token=end))
