"""The plan: where tensors, segments and chunks are, and who has them."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from ps.errors import ConfigError
from ps.sharding import make_plan
from ps.types import MAX_CHUNK, SEGMENT, ParameterTable, TensorSpec
from tests.support.plans import bound, check, embedding_table, gpt_table, load_ratio, small_table, table_of

TABLES = {
    "GPT": [gpt_table(256, layers, 4096) for layers in (3, 4, 6, 10)] + [gpt_table(768, 6, 32_000)],
    "embedding": [embedding_table(size) for size in (3_000_000, 5_300_000, 11_000_000, 60_000_000)],
    "small": [small_table(size) for size in (3_000_000, 12_000_000)],
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("num_shards", range(1, 9))
def test_a_plan_is_whole_and_even(kind: str, num_shards: int) -> None:
    for table in TABLES[kind]:
        plan = make_plan(table, num_shards)
        check(plan)
        assert load_ratio(plan) <= bound(plan.size, num_shards)


@pytest.mark.parametrize("num_shards", range(1, 9))
def test_the_fullest_shard_has_at_most_5_percent_more_from_1_3_million_parameters_per_shard(num_shards: int) -> None:
    for size in range(max(3_000_000, 1_320_000 * (num_shards - 1)), 14_000_000, 61_111):
        assert load_ratio(make_plan(table_of([size]), num_shards)) <= 1.05


def test_a_plan_has_about_20_chunks_per_shard() -> None:
    for num_shards, size in ((1, 3_000_000), (2, 5_000_000), (4, 12_000_000)):
        plan = make_plan(table_of([size]), num_shards)
        # Rounded down to whole segments, so at most twice as many.
        assert 20 * num_shards <= len(plan.chunks) <= 40 * num_shards
    # Of a big model chunks are as big as they get.
    plan = make_plan(table_of([40 * MAX_CHUNK + 5]), 2)
    assert {chunk.size for chunk in plan.chunks[:-1]} == {MAX_CHUNK}


def test_neighbours_alternate() -> None:
    plan = make_plan(table_of([MAX_CHUNK] * 8), 3)
    assert [chunk.shard for chunk in plan.chunks[:9]] == [0, 1, 2] * 3


def test_chunks_between() -> None:
    plan = make_plan(table_of([5 * SEGMENT + 10]), 1)
    assert len(plan.chunks) == 6
    for start, stop, expected in (
        (0, 1, [0]),
        (0, SEGMENT, [0]),
        (0, SEGMENT + 1, [0, 1]),
        (SEGMENT, 3 * SEGMENT, [1, 2]),
        (SEGMENT - 1, 3 * SEGMENT + 1, [0, 1, 2, 3]),
        (5 * SEGMENT, plan.size, [5]),
        (plan.size, plan.size + 5, []),
    ):
        assert [chunk.index for chunk in plan.chunks_between(start, stop) if chunk.start < plan.size] in (
            [expected, [5]] if not expected else [expected]
        )


def test_the_digest_is_the_same_everywhere_and_always() -> None:
    """Fixed: another value means that processes of two versions cannot work together."""
    table = gpt_table(256, 4, 4096)
    assert make_plan(table, 2).digest == make_plan(table, 2).digest
    script = (
        "from tests.support.plans import gpt_table\nfrom ps.sharding import make_plan\n"
        "print(make_plan(gpt_table(256, 4, 4096), 2).digest)"
    )
    command, environment = [sys.executable, "-c", script], {"PYTHONHASHSEED": "7"}
    there = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, env=environment)
    assert there.stdout.strip() == make_plan(table, 2).digest
    assert make_plan(table_of([100, 70]), 1).digest == DIGEST


DIGEST = "eb21e578616afde23715eb700cc801676a7159a0464d40800bc5ff983441d3c0"


def test_the_digest_tells_plans_apart() -> None:
    table = gpt_table(64, 2, 4096)
    first, *rest = table.tensors
    others = [
        ParameterTable((TensorSpec("other", first.shape, first.group), *rest)),
        ParameterTable((TensorSpec(first.name, first.shape[::-1], first.group), *rest)),
        ParameterTable((TensorSpec(first.name, first.shape, 0), *rest)),
        ParameterTable((*rest, first)),
        ParameterTable(tuple(rest)),
    ]
    digests = {make_plan(other, 2).digest for other in others}
    digests |= {make_plan(table, 1).digest, make_plan(table, 2).digest, make_plan(table, 3).digest}
    assert len(digests) == len(others) + 3


@pytest.mark.parametrize(
    ("table", "num_shards", "words"),
    [
        (ParameterTable(()), 1, "empty"),
        (ParameterTable((TensorSpec("a", (2,)), TensorSpec("a", (2,)))), 1, "'a' twice"),
        (ParameterTable((TensorSpec("a", (2, 0)),)), 1, "'a' of shape .* no elements"),
        (table_of([SEGMENT * 2]), 3, "cluster.shards=3.*at most 2 shards"),
        (table_of([5]), 0, "at least one shard"),
    ],
)
def test_what_cannot_be_planned_is_said(table: ParameterTable, num_shards: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_plan(table, num_shards)


def test_a_scalar_is_a_tensor() -> None:
    plan = make_plan(ParameterTable((TensorSpec("a", ()), TensorSpec("b", (3,)))), 1)
    check(plan)
    assert plan.offsets == (0, 64)


def test_planning_is_quick() -> None:
    table = small_table(50_000_000)
    best = float("inf")
    for _ in range(3):
        started = time.process_time()
        plan = make_plan(table, 8)
        assert plan.digest
        best = min(best, time.process_time() - started)
    assert best < 1.0
