"""`windlass evaluate`, `sample` and `digest`: what a run has come to."""

from __future__ import annotations

from typing import Annotated

import typer

from workers.cli.arguments import RunOrCheckpoint, TokenizerFile, require_worker_extra
from workers.launch.folder import find_checkpoint, from_newest
from workers.launch.metrics import evaluation_line


def evaluate(run: RunOrCheckpoint) -> int:
    """Evaluate the newest checkpoint."""
    find_checkpoint(run)
    require_worker_extra("evaluating")

    from workers.engine import restore

    restored = restore.load_model(run)
    print(f"{restored.folder} (step {restored.version}): {evaluation_line(restore.evaluate(restored))}")
    return 0


def sample(
    run: RunOrCheckpoint,
    prompt: Annotated[str, typer.Option(help="What to continue; empty: begin a new text.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write, at most.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token always.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among so many of the likeliest; 0: among all.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="The same seed writes the same text.")] = 1,
    tokenizer: TokenizerFile = None,
) -> int:
    """Let the newest checkpoint write."""
    find_checkpoint(run)
    require_worker_extra("sampling")

    from workers.engine import restore

    print(restore.write(restore.load_model(run, tokenizer), prompt, tokens, temperature, top_k, seed))
    return 0


def digest(run: RunOrCheckpoint) -> int:
    """Print the SHA-256 of the newest checkpoint.

    It covers the master weights and the optimizer's state, and does not depend on the number of shards.
    """
    from ps.storage.digest import digest as digest_of

    print(from_newest(run, digest_of))
    return 0
