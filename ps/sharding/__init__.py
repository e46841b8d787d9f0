"""Pure: parameter table -> chunks -> shards."""

from ps.sharding.plan import Chunk, Plan, Run, make_plan, presence_map

__all__ = ["Chunk", "Plan", "Run", "make_plan", "presence_map"]
