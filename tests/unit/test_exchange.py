"""One worker's stream at a shard with real kernels: what is refused, what is acknowledged, what is pulled."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from protos.ps.v1.frame_pb2 import Frame
from ps.errors import PsError, Refusal
from ps.kernels.digest import hash_payload
from ps.shard import metrics
from ps.shard.exchange import Exchange
from ps.types import Fence
from ps.wire.messages import Ack, Header, Push, Refused, Unchanged, Weights, Welcome
from ps.wire.proto import to_proto
from tests.support.plans import table_of_chunks
from tests.support.shards import (
    TIMEOUT_S,
    Reader,
    Rig,
    drain,
    encode_frame,
    in_threads,
    make_config,
    rig,
)

INCARNATION = 4242


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[Rig]:
    """Serving, with one step behind it, so that moments are not zero."""
    with rig(make_config(tmp_path)) as made:
        made.run_step()
        yield made


@pytest.fixture
def stream(shard: Rig) -> Exchange:
    return Exchange(shard.engine, INCARNATION)


def send(stream: Exchange, header: Header, payload: memoryview | bytes = b"") -> Header:
    """Send a frame that has exactly one answer."""
    stream.receive(encode_frame(header, payload))
    ((answer, _),) = drain(stream)
    return answer


def push(stream: Exchange, header: Header, payload: memoryview | bytes = b"") -> list[Header]:
    """Send a chunk of a gradient; it is answered if it is refused, or if its contribution is whole."""
    stream.receive(encode_frame(header, payload))
    return [answer for answer, _ in drain(stream)]


def pushed(outcome: str) -> float:
    """How many chunks were `held`, or were a `duplicate`, in all tests until now."""
    return metrics.PUSHED_FRAMES.labels(outcome)._value.get()


def refusal(answer: Header) -> str:
    assert isinstance(answer, Refused), answer
    return answer.code


def test_hello_is_answered_with_what_is_held(shard: Rig, stream: Exchange) -> None:
    assert push(stream, *shard.push(1, shard.chunks[1])) == []
    answer = send(stream, shard.hello())
    assert answer == Welcome(0, INCARNATION, 1, 1, 1, 1, [[1, b"\x02"]])
    assert refusal(send(stream, shard.hello(plan="of somebody else"))) == "MALFORMED_FRAME"


# -- Refusals -----------------------------------------------------------------------------------


def flipped(payload: memoryview) -> memoryview:
    data = bytearray(payload)
    data[len(data) // 2] ^= 1
    return memoryview(bytes(data))


def hashed(header: Push, payload: bytes) -> tuple[Push, memoryview]:
    return replace(header, hash=hash_payload(payload)), memoryview(payload)


WRONG = {
    "run": ({"run": "run-2"}, "STALE_FENCE"),
    "older term": ({"term": 0, "epoch": 9}, "STALE_FENCE"),
    "older epoch": ({"epoch": 0}, "STALE_FENCE"),
    "newer epoch": ({"epoch": 2}, "FENCE_NOT_KNOWN"),
    "newer term": ({"term": 2, "epoch": 0}, "FENCE_NOT_KNOWN"),
    "a step that is decided": ({"step": 0}, "STEP_NOT_OPEN"),
    "a step that is not open yet": ({"step": 2}, "STEP_NOT_OPEN"),
    "contribution": ({"contribution": 2}, "UNKNOWN_CONTRIBUTION"),
    "negative contribution": ({"contribution": -1}, "UNKNOWN_CONTRIBUTION"),
    "fewer slots": ({"slots": 1}, "UNKNOWN_CONTRIBUTION"),
    "more slots": ({"slots": 3}, "UNKNOWN_CONTRIBUTION"),
    "chunk": ({"chunk": 2}, "UNKNOWN_CHUNK"),
    "negative chunk": ({"chunk": -1}, "UNKNOWN_CHUNK"),
    "another chunk's payload": ({"chunk": 0}, "WRONG_LENGTH"),
    "loss scale": ({"loss_scale": 1.0}, "WRONG_LOSS_SCALE"),
    "NaN loss scale": ({"loss_scale": float("nan")}, "MALFORMED_FRAME"),
    "infinite loss scale": ({"loss_scale": float("inf")}, "MALFORMED_FRAME"),
    "negative loss scale": ({"loss_scale": -65536.0}, "MALFORMED_FRAME"),
    "dtype": ({"dtype": "bf16"}, "WRONG_DTYPE"),
    "no dtype": ({"dtype": ""}, "WRONG_DTYPE"),
    "long presence map": ({"present": bytes(2)}, "WRONG_LENGTH"),
    "no presence map": ({"present": b""}, "WRONG_LENGTH"),
    "stray bits": ({"present": b"\xff"}, "WRONG_LENGTH"),
    "hash": ({"hash": bytes(8)}, "WRONG_HASH"),
    "short hash": ({"hash": bytes(7)}, "MALFORMED_FRAME"),
    "negative tokens": ({"tokens": -1}, "MALFORMED_FRAME"),
    "tokens beyond any step": ({"tokens": 2**63 - 1}, "MALFORMED_FRAME"),
    "negative incarnation": ({"incarnation": -1}, "MALFORMED_FRAME"),
    "rank beyond 63 bits": ({"rank": 2**63}, "MALFORMED_FRAME"),
    "step of another type": ({"step": 1.0}, "MALFORMED_FRAME"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_push_is_refused_by_name_and_changes_nothing(shard: Rig, stream: Exchange, what: str) -> None:
    changes, code = WRONG[what]
    before, chunk = shard.engine.store.state_hash, shard.chunks[1]
    header, payload = shard.push(1, chunk)
    assert refusal(send(stream, replace(header, **changes), payload)) == code
    assert_untouched(shard, before)


def test_a_push_of_a_wrong_length_is_refused(shard: Rig, stream: Exchange) -> None:
    before, chunk = shard.engine.store.state_hash, shard.chunks[1]
    header, payload = shard.push(0, chunk)
    for data in (b"", payload[:-2], bytes(payload) + b"\0\0", payload[:-1], bytes(payload) * 2):
        assert refusal(send(stream, *hashed(header, bytes(data)))) == "WRONG_LENGTH"
    assert_untouched(shard, before)


def test_a_damaged_payload_is_refused(shard: Rig, stream: Exchange) -> None:
    before = shard.engine.store.state_hash
    header, payload = shard.push(0, shard.chunks[0])
    answer = send(stream, header, flipped(payload))
    assert refusal(answer) == "WRONG_HASH"
    assert isinstance(answer, Refused)
    assert (answer.step, answer.contribution, answer.chunk) == (1, 0, 0)
    assert answer.error().retry
    assert_untouched(shard, before)


def assert_untouched(shard: Rig, state_hash: int) -> None:
    """Nothing is held, and the step then goes on with the right numbers."""
    assert shard.engine.store.state_hash == state_hash
    assert shard.engine.protocol.held() == []
    assert shard.engine.protocol.missing() == [0, 1]
    report = shard.push_step()
    assert [(c.tokens, c.rank, c.incarnation) for c in report.contributions] == [(10, 0, 77), (11, 0, 77)]
    for chunk in shard.chunks:
        np.testing.assert_array_equal(shard.engine.store.mean(chunk), shard.expected_mean(chunk))
    assert shard.tell(shard.decision(report)).step == 1


def test_before_initial_values_and_while_loading(tmp_path: Path) -> None:
    with rig(make_config(tmp_path), initialize=False) as shard:
        stream = Exchange(shard.engine, INCARNATION)
        chunk = shard.chunks[1]
        # No fence is known at all, then one is, but nothing is served.
        assert refusal(send(stream, *shard.push(0, chunk))) == "FENCE_NOT_KNOWN"
        shard.seat.load(shard.fence, None, "")
        for header, payload in (shard.push(0, chunk), shard.initial(chunk), (shard.pull(0), memoryview(b""))):
            assert refusal(send(stream, header, payload)) == "NOT_SERVING"
        shard.seat.serve(shard.fence, 0, 0, shard.state.scaler.scale)
        assert refusal(send(stream, *shard.push(0, chunk))) == "NOT_SERVING"
        assert not shard.engine.has_state
        header, payload = shard.initial(chunk)
        assert refusal(send(stream, header, payload[:-4])) == "WRONG_LENGTH"
        assert refusal(send(stream, header, flipped(payload))) == "WRONG_HASH"
        assert refusal(send(stream, replace(header, chunk=2), payload)) == "UNKNOWN_CHUNK"
        assert refusal(send(stream, replace(header, run="else"), payload)) == "STALE_FENCE"
        for index in (1, 1, 0, 0):
            assert send(stream, *shard.initial(shard.chunks[index])) == Ack(0, -1, index)
            assert shard.engine.initialize(*shard.initial(shard.chunks[index])), "it is there already"
        assert shard.told.initialized.get(timeout=TIMEOUT_S) == shard.fence
        assert shard.run_step().step == 0


def test_what_is_no_frame_is_refused(shard: Rig, stream: Exchange) -> None:
    valid = encode_frame(*shard.push(0, shard.chunks[1]))
    for data in (b"", b"\0", valid[:-1], valid + b"\x01", b"\x0a\x00", b"\x0a\x01\x80", b"\x12\x00", b"hello"):
        stream.receive(data)
        ((answer, _),) = drain(stream)
        assert refusal(answer) == "MALFORMED_FRAME"
    assert shard.engine.protocol.held() == []


def test_a_payload_at_an_odd_place_is_as_good_as_any(shard: Rig, stream: Exchange) -> None:
    """Alignment is a matter of speed: any protobuf library may have written the frame."""
    for pad in range(4):
        for contribution in range(2):
            for chunk in shard.chunks:
                header, payload = shard.push(contribution, chunk)
                packed = msgpack.packb({**header.pack(), "_": bytes(pad)})
                stream.receive(Frame(header=packed, payload=bytes(payload)).SerializeToString())
            assert [answer for answer, _ in drain(stream)] == [Ack(header.step, contribution, -1)]
        report = shard.told.next_prepared()
        for chunk in shard.chunks:
            np.testing.assert_array_equal(shard.engine.store.mean(chunk), shard.expected_mean(chunk))
        shard.tell(shard.decision(report))


def test_every_report_can_travel(shard: Rig, stream: Exchange) -> None:
    """The largest numbers that a push may carry are ones that the messages to the coordinator can hold."""
    for contribution in range(2):
        for chunk in shard.chunks:
            header, payload = shard.push(contribution, chunk, tokens=2**48, rank=-1, incarnation=2**63 - 1)
            answers = push(stream, replace(header, loss_sum=float("inf")), payload)
            assert all(isinstance(answer, Ack) for answer in answers)
        assert answers == [Ack(1, contribution, -1)]
    report = shard.told.next_prepared()
    to_proto(report)
    to_proto(shard.decision(report))


# -- The same key again -------------------------------------------------------------------------


def test_a_contribution_is_acknowledged_once_all_of_it_is_held(shard: Rig, stream: Exchange) -> None:
    """Whoever brought the rest of it: what the worker has to know is that nothing is missing."""
    first, second = shard.chunks
    assert push(stream, *shard.push(1, second)) == []
    assert push(stream, *shard.push(0, second)) == []
    other = Exchange(shard.engine, INCARNATION)
    assert push(other, *shard.push(1, first, rank=5, incarnation=6)) == [Ack(1, 1, -1)]
    assert drain(stream) == [], "the other worker has its own stream"
    assert push(stream, *shard.push(0, first)) == [Ack(1, 0, -1)]


def test_the_same_key_again_is_ignored_and_acknowledged_when_all_is_there(shard: Rig, stream: Exchange) -> None:
    """A worker that sends again what is there must hear that it is, or it would wait for ever."""
    first, second = shard.chunks
    held, again = pushed("held"), pushed("duplicate")
    assert push(stream, *shard.push(1, second)) == []
    assert push(stream, *shard.push(1, second)) == []
    assert (pushed("held"), pushed("duplicate")) == (held + 1, again + 1)
    other = Exchange(shard.engine, INCARNATION)
    assert push(other, *shard.push(1, second, rank=5, incarnation=6)) == []
    assert push(other, *shard.push(1, first, rank=5, incarnation=6)) == [Ack(1, 1, -1)]
    for chunk in shard.chunks:
        assert push(stream, *shard.push(1, chunk)) == [Ack(1, 1, -1)]
    assert (pushed("held"), pushed("duplicate")) == (held + 2, again + 4)
    assert shard.engine.protocol.held() == [(1, [0, 1])]


@pytest.mark.parametrize("strict", [False, True])
def test_the_same_key_with_other_bits(tmp_path: Path, strict: bool) -> None:
    config = make_config(tmp_path, determinism="strict" if strict else "alarm")
    with rig(config) as shard:
        stream = Exchange(shard.engine, INCARNATION)
        chunk = shard.chunks[0]
        first, other = shard.push(0, chunk), shard.push(0, chunk, shard.gradient(9, 9, chunk))
        assert push(stream, *first) == []
        conflicts, again = conflict_count(), pushed("duplicate")
        if strict:
            assert refusal(send(stream, *other)) == "CONFLICTING_CONTRIBUTION"
            assert push(stream, *first) == []
        else:
            assert push(stream, *other) == []
        assert pushed("duplicate") == again + 1
        assert conflict_count() == conflicts + 1
        shard.push_step()
        np.testing.assert_array_equal(shard.engine.store.mean(chunk), shard.expected_mean(chunk))


def conflict_count() -> float:
    return metrics.CONFLICTS._value.get()


def test_after_the_decision_a_late_push_is_not_open(shard: Rig, stream: Exchange) -> None:
    late = shard.push(0, shard.chunks[0])
    shard.run_step()
    assert refusal(send(stream, *late)) == "STEP_NOT_OPEN"


# -- Pulls --------------------------------------------------------------------------------------


def values_of(answers: list[tuple[Any, memoryview]]) -> np.ndarray:
    return np.concatenate([np.frombuffer(payload, np.float16) for _, payload in answers])


def test_a_pull_gives_the_published_weights(shard: Rig, stream: Exchange) -> None:
    stream.receive(encode_frame(shard.pull(1)))
    answers = drain(stream)
    assert [header for header, _ in answers] == [Weights(1, 0, "fp16"), Weights(1, 1, "fp16")]
    np.testing.assert_array_equal(values_of(answers), shard.weights().astype(np.float16))


def test_a_pull_waits_for_its_version(shard: Rig, stream: Exchange) -> None:
    reader = Reader(stream)
    stream.receive(encode_frame(shard.pull(2, 1)))
    send_marker = shard.hello(run="no answer but a refusal")
    stream.receive(encode_frame(send_marker))
    # The refusal comes, so the reader has been there; the pull is still waiting.
    assert refusal(reader.next()[0]) == "STALE_FENCE"
    stream.receive(encode_frame(shard.pull(2, 1)))
    shard.run_step()
    answers = [reader.next() for _ in shard.chunks]
    assert [header for header, _ in answers] == [Weights(2, 0, "fp16"), Weights(2, 1, "fp16")]
    np.testing.assert_array_equal(values_of(answers), shard.weights().astype(np.float16))
    reader.close()


def test_a_version_that_is_gone(shard: Rig, stream: Exchange) -> None:
    stream.receive(encode_frame(shard.pull(0)))
    ((answer, _),) = drain(stream)
    assert refusal(answer) == "VERSION_GONE"
    stream.receive(encode_frame(shard.pull(1)))
    assert len(drain(stream)) == 2


def test_after_a_skip_nothing_has_changed(shard: Rig, stream: Exchange) -> None:
    stream.receive(encode_frame(shard.pull(2, 1)))
    assert drain(stream) == []
    before = shard.engine.store.state_hash
    shard.push_step()
    applied = shard.skip_step()
    assert applied.state_hash == shard.engine.store.state_hash == before
    assert drain(stream) == [(Unchanged(2, 1), memoryview(b""))]
    # A worker that holds nothing gets the weights, which are those of version 1.
    stream.receive(encode_frame(shard.pull(2, -1)))
    assert [header for header, _ in drain(stream)] == [Weights(1, 0, "fp16"), Weights(1, 1, "fp16")]
    stream.receive(encode_frame(shard.pull(1, -1)))
    assert [refusal(header) for header, _ in drain(stream)] == ["VERSION_GONE"]


def test_a_new_fence_ends_a_pull(shard: Rig, stream: Exchange) -> None:
    reader = Reader(stream)
    stream.receive(encode_frame(shard.pull(2, 1)))
    shard.seat.adopt(Fence(1, 2))
    assert refusal(reader.next()[0]) == "STALE_FENCE"
    reader.close()


def test_hello_ends_a_pull_of_before(shard: Rig, stream: Exchange) -> None:
    stream.receive(encode_frame(shard.pull(2, 1)))
    assert isinstance(send(stream, shard.hello()), Welcome)
    shard.run_step()
    assert drain(stream) == []


def test_a_closed_stream_ends_its_replies_and_keeps_what_came(shard: Rig, stream: Exchange) -> None:
    reader = Reader(stream)
    for chunk in shard.chunks:
        stream.receive(encode_frame(*shard.push(0, chunk)))
    stream.receive(encode_frame(*shard.push(1, shard.chunks[0])))
    assert reader.next()[0] == Ack(1, 0, -1)
    reader.close()
    assert shard.engine.protocol.held() == [(0, [0, 1]), (1, [0])]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_pull_is_never_torn(tmp_path: Path, threads: int) -> None:
    """Versions are pulled while decisions are applied: a pull is whole and of one version, or it is refused."""
    steps, chunks = 30, 6
    config = make_config(tmp_path, threads=threads, wire="fp32", optimizer="sgd", batch={"micro_batches_per_step": 1})
    with rig(config, 1, table=table_of_chunks(chunks)) as shard:
        published: dict[int, bytes] = {0: shard.weights().tobytes()}
        over = threading.Event()
        whole = refused = 0

        def decide() -> None:
            try:
                for _ in range(steps):
                    shard.run_step()
                    published[shard.state.version] = shard.weights().tobytes()
            finally:
                over.set()

        def pull() -> None:
            nonlocal whole, refused
            stream = Exchange(shard.engine, INCARNATION)
            reader = Reader(stream)
            while not over.is_set():
                version = shard.engine.protocol.step
                stream.receive(encode_frame(shard.pull(version)))
                got: list[tuple[Header, memoryview]] = []
                while len(got) < chunks and not (got and isinstance(got[-1][0], Refused)):
                    got.append(reader.next())
                if isinstance(got[-1][0], Refused):
                    assert got[-1][0].code == "VERSION_GONE"
                    refused += 1
                    continue
                assert [header for header, _ in got] == [Weights(version, c, "fp32") for c in range(chunks)]
                weights = b"".join(payload for _, payload in got)
                if version in published:
                    assert weights == published[version]
                    whole += 1
            reader.close()

        in_threads(decide, pull, pull)
        assert whole > 0, f"{refused} pulls were refused and none was compared"


def test_an_error_of_every_refusal_is_rebuilt() -> None:
    def subclasses(cls: type[PsError]) -> Iterator[type[PsError]]:
        for child in cls.__subclasses__():
            yield child
            yield from subclasses(child)

    for cls in subclasses(Refusal):
        rebuilt = Refused(cls.code, "why", 1, 2, 3).error()
        assert type(rebuilt) is cls
        assert rebuilt.message == "why"
    assert type(Refused("STORAGE", "why", 1, 2, 3).error()) is Refusal
    assert type(Refused("NO_SUCH", "why", 1, 2, 3).error()) is Refusal
