"""`windlass export`: a checkpoint for other programs."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ps.errors import CheckpointNotFound, ConfigError
from ps.storage.layout import checkpoint_folder, checkpoints
from workers.cli.arguments import RunOrCheckpoint, TokenizerFile
from workers.launch.folder import RunFolder, from_newest


class Dtype(StrEnum):
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    # As a job's precision calls them.
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"

    @property
    def full_name(self) -> str:
        """As transformers calls it."""
        return self.value if "float" in self.value else self.value.replace("fp", "float").replace("bf", "bfloat")


def export(
    run: RunOrCheckpoint,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make.")],
    dtype: Annotated[Dtype, typer.Option(help="What the master weights are rounded to.")] = Dtype.FLOAT32,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="step-N", help="Which checkpoint. Default: the newest.")
    ] = None,
    tokenizer: TokenizerFile = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an export that is there already.")] = False,
) -> int:
    """Write the weights as a Hugging Face folder.

    transformers loads it as Llama, with AutoModelForCausalLM and AutoTokenizer.
    """
    from workers.models.export import Exported
    from workers.models.export import export as write

    def export_from(folder: Path) -> Exported:
        return write(run, folder, out, dtype.full_name, tokenizer, force)

    done = export_from(_named(run, checkpoint)) if checkpoint is not None else from_newest(run, export_from)
    print(
        f"{out}: {done.num_parameters:,} parameters of step {done.version} in {dtype.full_name}, "
        f"{done.num_bytes / 1e6:,.1f} MB\n"
        f'load it with: transformers.AutoModelForCausalLM.from_pretrained("{out}")'
    )
    return 0


def _named(run: Path, name: str) -> Path:
    match = re.fullmatch(r"(?:step-)?(\d+)", name)
    if match is None:
        raise ConfigError(f"--checkpoint={name}: not of the form step-N, such as step-400")
    job = RunFolder(run).read_job().model_copy(update={"run_dir": run})
    wanted = checkpoint_folder(job.checkpoint_dir, int(match[1]))
    there = checkpoints(job.checkpoint_dir)
    if wanted not in there:
        names = ", ".join(folder.name for folder in there) or "none"
        raise CheckpointNotFound(f"--checkpoint={name}: {job.checkpoint_dir} holds {names}")
    return wanted
