"""The whole job: what the server acts on (`ps.config.RunConfig`) and what the workers need.

Imports no torch, so that the command line answers at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ps.config import (
    AutoInt,
    Probability,
    RunConfig,
    Section,
    load_mapping,
    merge,
    nest,
    parse_override,
    validate,
)
from ps.types import ALIGNMENT, SEGMENT


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


class ModelConfig(Section):
    """The built-in GPT: pre-norm, rotary positions, SwiGLU, tied embedding; Llama's names and shapes."""

    name: Literal["gpt"] = "gpt"
    """Which model."""
    num_layers: int = Field(3, ge=1)
    """Transformer layers."""
    hidden_size: int = Field(256, ge=2)
    """Width of the residual stream; a multiple of twice num_heads."""
    num_heads: int = Field(4, ge=1)
    """Attention heads."""
    intermediate_size: AutoInt = Field(None, ge=1)
    """Width of the feed-forward layers. auto: 8/3 of hidden_size, rounded up to a multiple of 64."""
    dropout: Probability = 0.0
    """Part of the embedding's and of every layer's results that is dropped while training."""
    rope_theta: float = Field(10_000.0, gt=0)
    """Base of the rotary positions' wavelengths."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the mean square in a norm."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"model.hidden_size={self.hidden_size} must be a multiple of {2 * self.num_heads}, "
                f"twice model.num_heads={self.num_heads}"
            )
        return self

    @property
    def feed_forward_size(self) -> int:
        return self.intermediate_size or -(-self.hidden_size * 8 // 3 // 64) * 64

    def flat_size(self, vocab_size: int) -> int:
        """Elements of the flat space that this model takes, padding included."""
        hidden, wide = self.hidden_size, self.feed_forward_size
        layer = [hidden, hidden, *[hidden * hidden] * 4, *[hidden * wide] * 3]
        sizes = [vocab_size * hidden, *layer * self.num_layers, hidden]
        return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


class DataConfig(Section):
    paths: Annotated[tuple[Path, ...], BeforeValidator(_as_list)] = ()
    """.txt and .jsonl (field `text`) files, and folders of them. Empty: the source of the Python standard library."""
    sequence_length: int = Field(256, ge=2)
    """Tokens of a training sequence."""
    vocab_size: int = Field(4096, ge=260)
    """Entries of the byte-level BPE that is trained on the data."""
    validation_fraction: float = Field(0.02, gt=0, lt=0.5)
    """Part of the text that is held out."""
    cache_dir: Path = Path(".cache/data")
    """Tokenized data, by content; shared by runs."""


class WorkerConfig(Section):
    device: Literal["auto", "cpu", "cuda", "mps", "xla"] = "auto"
    """auto: CUDA when there is one, else the CPU."""
    threads: int = Field(1, ge=1)
    """CPU threads of a worker's forward and backward. Part of the run: sums depend on it in the last bit."""
    overlap: bool = True
    """Push each chunk of the gradient while backward still runs, and begin the next forward with the first weights.
    false: push at the end, and wait for all weights first; the result is the same."""


class LaunchConfig(Section):
    transport: Literal["auto", "grpc", "shm"] = "auto"
    """How tensors travel between a worker and a shard: through shared memory where they share a host and over gRPC
    elsewhere (auto), always over gRPC, or only through shared memory (shm)."""
    host: str = "127.0.0.1"
    """The address that the roles bind."""
    restart_limit: int = Field(10, ge=0)
    """A role that dies more often than this within a minute ends the run."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much the roles log."""
    progress_every_steps: int = Field(10, ge=1)
    """A line of progress every so many steps, when standard output is not a terminal."""


class JobConfig(RunConfig):
    """A whole job."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    worker: WorkerConfig = WorkerConfig()
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _check_shards(self) -> Self:
        # The tokenizer may turn out smaller than asked for; then the coordinator says so.
        segments = -(-self.model.flat_size(self.data.vocab_size) // SEGMENT)
        if self.cluster.shards > segments:
            raise ValueError(
                f"cluster.shards={self.cluster.shards}: this model makes only {segments} chunks of {SEGMENT} "
                f"elements; use at most {segments} shards"
            )
        return self


def load_job(job_file: Path | None, overrides: Sequence[str], base: dict[str, Any] | None = None) -> JobConfig:
    """Build a job from defaults, a previous job, a file and dotted overrides, in rising order of precedence.

    Raises:
        ConfigError: one line that names the key, the value, what is allowed and the nearest right name.
    """
    mapping = dict(base or {})
    if job_file is not None:
        mapping = merge(mapping, load_mapping(job_file))
    mapping = merge(mapping, nest([parse_override(text) for text in overrides]))
    mapping.setdefault("run_dir", f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    return validate(JobConfig, mapping)
