"""What a shard says it does, for people: short enough for a column of the view."""

from __future__ import annotations

from ps.shard.protocol import StepProtocol

#: Contributions that are named, at most.
NAMED = 4


def describe(protocol: StepProtocol, num_chunks: int) -> str:
    """Say what a shard waits for or does; whoever reads it strips the step where that is known.

    Concurrency: under the engine's lock.
    """
    if protocol.awaiting_initial_values:
        return "waiting for initial values"
    if not protocol.serving:
        return "loading its state"
    return f"step {protocol.step}: {describe_step(protocol.missing(), protocol.chunks_reduced, num_chunks)}"


def describe_step(missing: list[int], reduced: int, num_chunks: int) -> str:
    """The same of the open step: what is `missing` are the contributions that have not wholly come."""
    if missing:
        named = ", ".join(map(str, missing[:NAMED])) + (f" and {len(missing) - NAMED} more" if missing[NAMED:] else "")
        return f"waiting for contribution{'s' if missing[1:] else ''} {named}"
    if reduced < num_chunks:
        return f"reducing {reduced}/{num_chunks}"
    return "waiting for the decision"
