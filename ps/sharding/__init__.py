"""Pure: parameter table -> chunks -> shards."""

from ps.sharding.plan import Chunk, Plan, Run, make_plan

__all__ = ["Chunk", "Plan", "Run", "make_plan"]
