"""Who computed what each shard has counted of a step: what the journal says beside a decision. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ps.types import Prepared

#: Of each group of shards that say the same: [shards, [[contribution, rank, life], ...]].
Accounts = list[list[Any]]


def accounts(reports: Iterable[Prepared]) -> Accounts:
    """Write down what the shards' reports say; nearly always all of them say the same.

    A contribution that two workers computed may have come to one shard from the one, and to another from the other.
    """
    groups: dict[tuple[tuple[int, int, int], ...], list[int]] = {}
    for report in sorted(reports, key=lambda report: report.shard):
        said = tuple((c.contribution, c.rank, c.incarnation) for c in report.contributions)
        groups.setdefault(said, []).append(report.shard)
    return [[shards, [list(one) for one in said]] for said, shards in groups.items()]
