"""Frames that were damaged on their way, or made by somebody who means harm: 10,000 of them, to one shard.

Each frame is a valid one with its bytes flipped, cut or extended, its header's fields replaced, removed
or added, or its payload swapped. The shard answers with a refusal, or it holds the very same gradient that
the valid frame carried; its state never changes, and the step then ends with the right numbers.

One thing cannot be seen: the hash is of the payload, so a valid frame whose contribution is changed to another
valid one is a valid frame. What such a step adds up to is not checked; all the rest is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ps.shard import metrics
from ps.shard.exchange import Exchange
from ps.types import ParameterTable, TensorSpec
from ps.wire import frame
from ps.wire.messages import Ack, Header, Push, PushPlaced, Refused, Unchanged, Weights, Welcome, parse_to_shard
from ps.wire.proto import to_proto
from tests.support.shards import Rig, drain, encode_frame, make_config, rig

BATCH = 20
#: Two tests of so many batches of so many frames: 10,000.
EXAMPLES = 250
CONTRIBUTIONS = 3
#: Small, so that a flip hits the header often; the chunk has four runs and padding.
TABLE = ParameterTable(
    (
        TensorSpec("a", (40, 5), 0),
        TensorSpec("b", (3,), 1),
        TensorSpec("c", (64,), 1),
        TensorSpec("d", (1,), 0),
    )
)

NASTY: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    2**31,
    2**48,
    2**63 - 1,
    2**63,
    2**64 - 1,
    -(2**63),
    0.0,
    -0.0,
    1.5,
    65536.0,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    "fp32",
    "push",
    "pull",
    "initialize",
    "hello",
    "\0",
    "x" * 5000,
    b"",
    bytes(8),
    b"\x0f",
    b"\xff" * 3,
    [],
    [[]],
    {},
    {"kind": "push"},
    msgpack.Timestamp(1, 2),
    msgpack.ExtType(5, b"x"),
]
FIELDS = [
    "kind",
    "run",
    "term",
    "epoch",
    "rank",
    "incarnation",
    "step",
    "contribution",
    "chunk",
    "slots",
    "loss_scale",
    "dtype",
    "hash",
    "present",
    "loss_sum",
    "tokens",
    "chunks",
    "greeting",
    "plan",
    "version",
    "applied",
    "_",
    "nonsense",
]

FRACTION = st.integers(0, 10_000)
MUTATION = st.one_of(
    # Bytes: half of the flips go to the header.
    st.tuples(st.just("flip"), FRACTION, st.integers(1, 255)),
    st.tuples(st.just("flip head"), FRACTION, st.integers(1, 255)),
    st.tuples(st.just("cut"), FRACTION, st.none()),
    st.tuples(st.just("cut front"), FRACTION, st.none()),
    st.tuples(st.just("extend"), FRACTION, st.binary(min_size=1, max_size=20)),
    st.tuples(st.just("insert"), FRACTION, st.binary(min_size=1, max_size=4)),
    # Meaning.
    st.tuples(st.just("set"), st.sampled_from(FIELDS), st.sampled_from(NASTY)),
    st.tuples(st.just("set"), st.sampled_from(FIELDS), st.integers(-1, 5)),
    st.tuples(st.just("remove"), st.sampled_from(FIELDS), st.none()),
    st.tuples(st.just("swap payload"), FRACTION, st.none()),
    st.tuples(st.just("append frame"), FRACTION, st.none()),
    st.tuples(st.just("only header"), FRACTION, st.none()),
    st.tuples(st.just("other pad"), FRACTION, st.integers(0, 15)),
)
MUTATED = st.tuples(FRACTION, st.lists(MUTATION, min_size=1, max_size=3))


def mutate(data: bytes, mutation: tuple[str, Any, Any], frames: list[bytes]) -> bytes:
    """Apply one mutation; what is no frame any more stays as it is when its meaning is to be changed."""
    how, where, what = mutation
    if how in ("set", "remove", "other pad"):
        return _change_header(data, how, where, what)
    if how in ("swap payload", "append frame"):
        other = frames[where % len(frames)]
        if how == "append frame":
            return data + other
        return data[: len(data) - len(payload_of(data))] + payload_of(other)
    position = where * len(data) // 10_001
    if how == "flip head":
        position = where % min(len(data), 300) if data else 0
    if how.startswith("flip"):
        return data[:position] + bytes([data[position] ^ what]) + data[position + 1 :] if data else data
    if how == "cut":
        return data[:position]
    if how == "cut front":
        return data[position:]
    if how == "only header":
        return data[: len(data) - len(payload_of(data))]
    return data[:position] + what + data[position:] if how == "insert" else data + what


def payload_of(data: bytes) -> bytes:
    try:
        return bytes(frame.decode(data)[1])
    except frame.MalformedFrame:
        return b""


def _change_header(data: bytes, how: str, field: Any, value: Any) -> bytes:
    try:
        header, payload = frame.decode(data)
    except frame.MalformedFrame:
        return data
    if how == "set":
        header[field] = value
    elif how == "remove":
        header.pop(field, None)
    else:
        header["_"] = bytes(value)
    packed = msgpack.packb(header)
    lengths = [
        bytes([len(part) & 0x7F | 0x80, len(part) >> 7 & 0x7F | 0x80, len(part) >> 14]) for part in (packed, payload)
    ]
    return b"\x0a" + lengths[0] + packed + b"\x12" + lengths[1] + bytes(payload)


def placed(push: Push) -> PushPlaced:
    """The same push, of a place in shared memory."""
    fields = push.pack()
    row = [fields.pop("chunk"), 64, fields.pop("hash"), fields.pop("present")]
    fields.pop("kind")
    return PushPlaced(**fields, greeting=1, chunks=[row])


class Target:
    """A shard, a stream to it, and the valid frames of its open step."""

    def __init__(self, shard: Rig) -> None:
        self.shard = shard
        self.stream = Exchange(shard.engine, 7)
        self._relabelled = False

    def frames(self) -> list[bytes]:
        shard, version = self.shard, self.shard.state.version
        others: list[Header] = [shard.hello(), shard.pull(version), shard.pull(version + 1, shard.state.applied)]
        # Nothing is shared on this stream: whatever its places say, they are none.
        others += [placed(push) for push, _ in shard.pushes()]
        return [
            *(encode_frame(*push) for push in shard.pushes()),
            *(encode_frame(*shard.initial(chunk)) for chunk in shard.chunks),
            *(encode_frame(header) for header in others),
        ]

    def attack(self, batch: list[tuple[int, list[tuple[str, Any, Any]]]]) -> list[Header]:
        """Send a batch of mutated frames; returns the answers."""
        frames, answers = self.frames(), []
        for which, mutations in batch:
            data = frames[which % len(frames)]
            for mutation in mutations:
                data = mutate(data, mutation, frames)
            self._relabelled |= self._is_relabelled(data)
            self.stream.receive(data)
            answers += [header for header, _ in drain(self.stream)]
        return answers

    def _is_relabelled(self, data: bytes) -> bool:
        """Whether a frame carries a whole contribution under the number of another one."""
        try:
            fields, payload = frame.decode(data)
            header = parse_to_shard(fields)
        except frame.MalformedFrame:
            return False
        if not isinstance(header, Push):
            return False
        rights = {push.contribution: right for push, right in self.shard.pushes()}
        return payload in rights.values() and payload != rights.get(header.contribution, payload)

    def check_means(self) -> None:
        """Compare the reduced gradients with what numpy makes of the valid frames."""
        if not self._relabelled:
            for chunk in self.shard.chunks:
                np.testing.assert_array_equal(self.shard.engine.store.mean(chunk), self.shard.expected_mean(chunk))
        self._relabelled = False

    def finish_step(self) -> None:
        """Push what is missing, rightly, and see that the step has the right numbers; then skip it."""
        shard = self.shard
        for push in shard.pushes():
            self.stream.receive(encode_frame(*push))
        answers = [header for header, _ in drain(self.stream)]
        assert all(isinstance(answer, Ack | Weights) for answer in answers), answers
        report = shard.told.next_prepared()
        to_proto(report)
        assert [c.contribution for c in report.contributions] == list(range(CONTRIBUTIONS))
        self.check_means()
        to_proto(shard.decision(report))
        shard.skip_step()
        assert shard.told.failures == []


def held_frames() -> float:
    """Pushes whose key was new to a shard, in all tests until now."""
    return metrics.PUSHED_FRAMES.labels("held")._value.get()


def allowed(answer: Header) -> bool:
    """What is changed in what does not matter (a rank, the pad) is a valid frame still."""
    return isinstance(answer, Refused | Ack | Welcome | Weights | Unchanged)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    config = make_config(tmp_path_factory.mktemp("run"), slots=6)
    with rig(config, CONTRIBUTIONS, table=TABLE) as shard:
        shard.run_step()
        yield Target(shard)


SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
BATCHES = st.lists(MUTATED, min_size=BATCH, max_size=BATCH)


@given(batch=BATCHES)
@SETTINGS
def test_while_the_step_is_open(target: Target, batch: list[Any]) -> None:
    shard = target.shard
    state_hash, version = shard.engine.store.state_hash, shard.engine.protocol.step
    answers = target.attack(batch)
    assert all(allowed(answer) for answer in answers), answers
    assert shard.engine.store.state_hash == state_hash
    assert shard.engine.protocol.step == version
    # Whatever is held now is, bit for bit, what the valid frames carry.
    target.finish_step()
    assert shard.engine.store.state_hash == state_hash


@given(batch=BATCHES)
@SETTINGS
def test_while_everything_is_held(target: Target, batch: list[Any]) -> None:
    shard = target.shard
    state_hash = shard.engine.store.state_hash
    report = shard.push_step()
    held = held_frames()
    answers = target.attack(batch)
    assert all(allowed(answer) for answer in answers), answers
    # Initial values came long ago, pushes of this step too: nothing is new.
    assert held_frames() == held
    assert shard.engine.protocol.prepared(shard.engine.store.all_square_sums()) == report
    assert shard.engine.store.state_hash == state_hash
    target.check_means()
    shard.skip_step()
    assert shard.told.failures == []
    assert shard.engine.store.state_hash == state_hash


def test_the_mutations_do_hit(target: Target) -> None:
    """They are neither all harmless nor all so gross that nothing is looked at beyond the first byte."""
    random = Random(1)
    mutations: list[tuple[str, Any, Any]] = [("set", field, value) for field in FIELDS for value in NASTY]
    for _ in range(1000):
        how = random.choice(["flip head", "flip", "cut", "swap payload"])
        mutations.append((how, random.randrange(10_000), random.randrange(1, 256)))
    # The first frame is a push; the others have their turns too.
    answers = target.attack([(0, [mutation]) for mutation in mutations])
    answers += target.attack([(random.randrange(10_000), [mutation]) for mutation in mutations])
    codes = {answer.code for answer in answers if isinstance(answer, Refused)}
    target.finish_step()
    assert {
        "MALFORMED_FRAME",
        "STALE_FENCE",
        "FENCE_NOT_KNOWN",
        "STEP_NOT_OPEN",
        "UNKNOWN_CONTRIBUTION",
        "UNKNOWN_CHUNK",
        "WRONG_LOSS_SCALE",
        "WRONG_LENGTH",
        "WRONG_HASH",
        "WRONG_DTYPE",
        "STALE_PLACE",
    } <= codes


def test_after_all_that_the_shard_trains_on(target: Target, tmp_path: Path) -> None:
    """The next real step gives the state of a shard that was never attacked."""
    attacked = target.shard
    with rig(make_config(tmp_path, slots=6), CONTRIBUTIONS, table=TABLE) as quiet:
        quiet.run_step()
        while quiet.state.version < attacked.state.version:
            quiet.push_step()
            quiet.skip_step()
        assert attacked.run_step().state_hash == quiet.run_step().state_hash
