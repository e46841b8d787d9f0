"""Which version a worker holds, and one that is on its way: what streams may write while it is computed with."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial

import pytest

from ps.client.pulled import Model, PulledModel, Pulling
from ps.sharding import make_plan
from tests.support.eventually import eventually
from tests.support.plans import table_of_chunks

#: Shard 0 has chunks 0, 2, 4; shard 1 has 1, 3.
PLAN = make_plan(table_of_chunks(5), 2)
TIMEOUT_S = 10.0


def make_pulling(held: int = 5) -> Pulling:
    return Pulling(PLAN, version=7, held=held, applied=6)


def bring(pulling: Pulling, shard: int, chunk: int, applied: int = 6) -> bool:
    """What `PulledModel` does with a chunk; returns whether it was wanted."""
    if not pulling.wants(shard, chunk, applied):
        return False
    pulling.started = True
    pulling.came(shard, chunk)
    return True


def test_a_pull_is_complete_when_all_chunks_are_there() -> None:
    pulling = make_pulling()
    assert not pulling.torn
    for chunk in PLAN.chunks:
        assert not pulling.complete
        assert bring(pulling, chunk.shard, chunk.index)
        assert pulling.torn == (chunk.index < 4)
    assert pulling.complete


def test_nothing_has_come_until_a_chunk_or_an_answer_has() -> None:
    pulling = make_pulling()
    assert not bring(pulling, 0, 0, 5)
    assert pulling.untouched
    assert bring(pulling, 0, 0)
    assert not pulling.untouched
    skipped = make_pulling()
    assert skipped.same(1, 5)
    assert not skipped.untouched


def test_chunks_of_another_version_and_chunks_that_came_are_not_wanted() -> None:
    pulling = make_pulling()
    assert not bring(pulling, 0, 0, 5)
    assert not bring(pulling, 0, 0, 7)
    assert not bring(pulling, 1, 0), "it is the other shard's"
    assert not pulling.started
    assert pulling.remaining[0] == {0, 2, 4}
    assert bring(pulling, 0, 2)
    assert not bring(pulling, 0, 2)


def test_after_a_skip_every_shard_says_that_nothing_changed() -> None:
    pulling = make_pulling()
    assert pulling.same(0, 5)
    assert not pulling.complete
    assert pulling.same(1, 5)
    assert pulling.complete
    assert not pulling.started


def test_one_shard_cannot_say_same_when_another_sent_new_weights() -> None:
    pulling = make_pulling()
    assert not pulling.same(0, 4)
    assert bring(pulling, 1, 1)
    assert not pulling.same(0, 5)
    assert not pulling.complete


# -- The model under its streams ----------------------------------------------------------------


class Bench:
    """A model whose chunks are versions, and what it tells of."""

    def __init__(self) -> None:
        #: The version whose weights each chunk has.
        self.chunks = [-1] * len(PLAN.chunks)
        self.decided: list[int] = []
        self.progress = 0
        self.pulled = PulledModel(self.decided.append, self._on_progress)

    def _on_progress(self) -> None:
        self.progress += 1

    def bring(
        self,
        version: int,
        *chunks: int,
        applied: int | None = None,
        is_alive: Callable[[], bool] = lambda: True,
        intact: bool = True,
    ) -> None:
        """The streams bring chunks of a version, of which as many steps are committed."""
        for index in chunks:

            def write(index: int = index) -> bool:
                self.chunks[index] = version
                return intact

            shard = PLAN.chunks[index].shard
            self.pulled.take(shard, index, version if applied is None else applied, is_alive, write)

    def hold(self, version: int) -> None:
        """The model is that version."""
        assert self.pulled.ask(PLAN, version, version)
        self.bring(version, *range(5))
        assert self.pulled.model == Model(version, version)

    def ready(self, version: int, early: bool = False) -> bool:
        return self.pulled.use(version, early=early)


class Stream:
    """A thread in which a stream brings chunks; `blocked` says that it waits to write."""

    def __init__(self, bench: Bench, version: int, *chunks: int) -> None:
        self.alive = True
        self.asked = 0
        self._bench = bench
        self._thread = threading.Thread(
            target=bench.bring, args=(version, *chunks), kwargs={"is_alive": self._is_alive}, daemon=True
        )
        self._thread.start()

    def _is_alive(self) -> bool:
        self.asked += 1
        return self.alive

    def await_blocked(self) -> None:
        """It looks whether it is still the present one, again and again, and that is all that it does."""
        asked = self.asked
        eventually(lambda: self.asked > asked + 1, TIMEOUT_S, "the stream to wait")
        assert self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive(), "the stream hangs"


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_what_was_not_asked_for_is_not_written(bench: Bench) -> None:
    bench.bring(6, 0)
    bench.hold(6)
    bench.bring(7, 0)
    assert bench.chunks == [6] * 5
    assert bench.pulled.ask(PLAN, 7, 7)
    bench.bring(9, 0, applied=8)
    assert bench.chunks == [6] * 5
    assert bench.ready(6), "nothing has come"


def test_a_version_is_asked_for_once(bench: Bench) -> None:
    assert bench.pulled.ask(PLAN, 6, 6)
    assert not bench.pulled.ask(PLAN, 6, 6)
    bench.bring(6, *range(5))
    assert not bench.pulled.ask(PLAN, 6, 6)
    assert bench.pulled.ask(PLAN, 7, 7)


def test_a_version_that_is_computed_with_is_not_written_over(bench: Bench) -> None:
    bench.hold(6)
    assert bench.ready(6)
    bench.pulled.ask(PLAN, 7, 7)
    streams = [Stream(bench, 7, 0, 2, 4), Stream(bench, 7, 1, 3)]
    for stream in streams:
        stream.await_blocked()
    assert bench.chunks == [6] * 5
    assert bench.pulled.has(6, None)
    assert not bench.pulled.is_torn
    assert bench.pulled.is_waiting
    assert bench.decided == [6], "nobody may give back what is still needed"
    bench.pulled.done()
    for stream in streams:
        stream.join()
    assert bench.chunks == [7] * 5
    assert bench.pulled.model == Model(7, 7)


def test_what_nobody_wants_keeps_no_stream_waiting(bench: Bench) -> None:
    """Behind it comes what its worker may wait for."""
    bench.hold(6)
    assert bench.ready(6)
    bench.pulled.ask(PLAN, 7, 7)
    bench.bring(6, 0)
    bench.bring(5, 1, 2)
    assert bench.chunks == [6] * 5
    assert bench.decided == [6]


def test_a_stream_that_is_not_the_present_one_any_more_writes_nothing(bench: Bench) -> None:
    bench.hold(6)
    bench.pulled.ask(PLAN, 7, 7)
    bench.bring(7, 0, is_alive=lambda: False)
    assert bench.chunks == [6] * 5
    assert bench.ready(6)
    stale = Stream(bench, 7, 0, 2, 4)
    stale.await_blocked()
    stale.alive = False
    stale.join()
    bench.pulled.done()
    assert bench.chunks == [6] * 5
    bench.bring(7, *range(5))
    assert bench.pulled.model.version == 7


def test_early_use_begins_with_the_first_weights_and_lets_the_rest_come(bench: Bench) -> None:
    bench.hold(6)
    bench.pulled.ask(PLAN, 7, 7)
    assert not bench.ready(7, early=True)
    bench.bring(7, 2)
    assert not bench.ready(7)
    assert not bench.ready(6, early=True), "some of it is not there any more"
    assert bench.ready(7, early=True)
    assert bench.pulled.has(7, [(0, 2)])
    assert not bench.pulled.has(7, [(0, 2), (1, 3)])
    bench.bring(7, 3)
    assert bench.pulled.has(7, [(0, 2), (1, 3)])
    assert not bench.pulled.has(7, None)
    bench.bring(7, 0, 1, 4)
    assert bench.pulled.has(7, None)
    # And now it is a version that is computed with, as any.
    bench.pulled.ask(PLAN, 8, 8)
    stream = Stream(bench, 8, 0)
    stream.await_blocked()
    assert bench.chunks == [7] * 5
    bench.pulled.done()
    stream.join()


def test_whoever_waits_for_chunks_is_woken_by_them(bench: Bench) -> None:
    bench.pulled.ask(PLAN, 7, 7)
    bench.bring(7, 0)
    found: list[bool] = []
    waiting = threading.Thread(target=lambda: found.append(bench.pulled.has(7, [(1, 3)], TIMEOUT_S)), daemon=True)
    waiting.start()
    bench.bring(7, 1, 3)
    waiting.join(TIMEOUT_S)
    assert found == [True]
    assert not bench.pulled.has(7, [(0, 2)], 0.01)


def test_a_torn_model_is_none(bench: Bench) -> None:
    bench.hold(6)
    bench.pulled.ask(PLAN, 7, 7)
    bench.bring(7, 0, 1)
    assert bench.pulled.is_torn
    assert bench.pulled.model.version == -1
    for early in (False, True):
        assert not bench.ready(6, early)
    # The pull is given up: what is there stays a mixture.
    bench.pulled.forget_pull(7)
    assert not bench.pulled.comes(7)
    assert not bench.ready(6, early=True)
    assert not bench.ready(7, early=True)
    assert bench.pulled.ask(PLAN, 8, 8)
    assert bench.pulled.pulling_of(0) == (8, -1), "nothing is held: no shard may say that nothing changed"


def test_only_the_pull_that_is_gone_is_given_up(bench: Bench) -> None:
    """The refusal of the last pull may come when the next version has been asked for."""
    bench.pulled.ask(PLAN, 7, 7)
    bench.pulled.ask(PLAN, 8, 8)
    bench.pulled.forget_pull(7)
    assert bench.pulled.comes(8)
    bench.pulled.forget_pull(8)
    assert not bench.pulled.comes(8)


def test_weights_that_were_written_anew_while_they_were_read_end_the_pull(bench: Bench) -> None:
    bench.hold(6)
    bench.pulled.ask(PLAN, 7, 7)
    bench.bring(7, 0, 1)
    progress = bench.progress
    bench.bring(7, 2, intact=False)
    assert bench.progress == progress + 1, "whoever waits for the pull must hear that it does not come"
    assert not bench.pulled.comes(7)
    assert bench.pulled.model.version == -1
    # What is still on its way to that pull is not wanted.
    bench.bring(7, 3)
    assert bench.chunks[3] == 6
    assert bench.pulled.ask(PLAN, 7, 7), "it can be asked for again"
    bench.bring(7, *range(5))
    assert bench.pulled.model == Model(7, 7)


def test_a_write_that_fails_is_not_a_chunk_that_came(bench: Bench) -> None:
    def fail() -> bool:
        raise ValueError("no room")

    bench.pulled.ask(PLAN, 7, 7)
    with pytest.raises(ValueError, match="no room"):
        bench.pulled.take(0, 0, 7, lambda: True, fail)
    assert not bench.pulled.comes(7)
    assert bench.pulled.ask(PLAN, 8, 8)
    bench.bring(8, *range(5))
    assert bench.pulled.model.version == 8


def test_after_a_skip_the_weights_are_another_version(bench: Bench) -> None:
    bench.hold(6)
    bench.pulled.ask(PLAN, 7, 7)
    bench.pulled.unchanged(0, 6, 6)
    bench.pulled.unchanged(0, 7, 5)
    assert bench.pulled.pulling_of(0) == (7, 6), "these were not answers to it"
    bench.pulled.unchanged(0, 7, 6)
    assert bench.pulled.pulling_of(0) is None
    assert bench.ready(6), "nothing was written"
    bench.pulled.unchanged(1, 7, 6)
    assert bench.pulled.model == Model(7, 6)
    assert bench.ready(7)
    assert bench.decided == [6]


def test_a_new_fence_ends_everything(bench: Bench) -> None:
    bench.hold(6)
    assert bench.ready(6)
    bench.pulled.ask(PLAN, 7, 7)
    stream = Stream(bench, 7, 0)
    stream.await_blocked()
    bench.pulled.reset()
    stream.join()
    assert bench.chunks == [6] * 5, "it was of the fence before"
    assert bench.pulled.model == Model()
    assert not bench.ready(6)
    bench.hold(3)


class Gate:
    """A write that takes as long as a test wants."""

    def __init__(self) -> None:
        self.begun, self.end = threading.Event(), threading.Event()

    def write(self) -> bool:
        self.begun.set()
        return self.end.wait(TIMEOUT_S)


@pytest.mark.parametrize("what", ["reset", "ask"])
def test_nothing_is_asked_for_while_a_chunk_of_the_last_pull_is_written(bench: Bench, what: str) -> None:
    """It would be written into the next one."""
    gate = Gate()
    bench.pulled.ask(PLAN, 7, 7)
    writer = threading.Thread(target=bench.pulled.take, args=(0, 0, 7, lambda: True, gate.write), daemon=True)
    writer.start()
    assert gate.begun.wait(TIMEOUT_S)
    changing: Callable[[], object] = bench.pulled.reset if what == "reset" else lambda: bench.pulled.ask(PLAN, 8, 8)
    owner = threading.Thread(target=changing, daemon=True)
    owner.start()
    owner.join(0.1)
    assert owner.is_alive()
    gate.end.set()
    owner.join(TIMEOUT_S)
    writer.join(TIMEOUT_S)
    assert not owner.is_alive()
    assert bench.pulled.model == Model()
    assert not bench.pulled.comes(7)
    assert bench.pulled.comes(8) is (what == "ask")


def test_two_streams_write_at_once_and_the_last_one_ends_the_pull(bench: Bench) -> None:
    gates = [Gate(), Gate()]
    bench.pulled.ask(PLAN, 7, 7)
    bench.bring(7, 0, 1, 2)
    writers = [
        threading.Thread(target=bench.pulled.take, args=(shard, chunk, 7, lambda: True, gate.write), daemon=True)
        for (shard, chunk), gate in zip([(1, 3), (0, 4)], gates, strict=True)
    ]
    for writer, gate in zip(writers, gates, strict=True):
        writer.start()
        assert gate.begun.wait(TIMEOUT_S)
    gates[1].end.set()
    writers[1].join(TIMEOUT_S)
    assert bench.pulled.has(7, [(0, 4)])
    assert not bench.pulled.has(7, [(1, 3)]), "it is being written"
    assert bench.pulled.model.version == -1
    gates[0].end.set()
    writers[0].join(TIMEOUT_S)
    assert bench.pulled.model == Model(7, 7)
    assert bench.decided == [7], "once for a version"


@pytest.mark.parametrize("eager", [False, True])
def test_the_last_gradient_is_let_go_before_a_version_is_complete(eager: bool) -> None:
    """After it, the next gradient may be there: that one must stay."""
    seen: list[tuple[int, Model]] = []

    def on_decided(version: int) -> None:
        seen.append((version, pulled.model))

    pulled = PulledModel(on_decided, lambda: None)
    pulled.eager = eager
    pulled.ask(PLAN, 7, 7)
    for chunk in PLAN.chunks:
        pulled.take(chunk.shard, chunk.index, 7, lambda: True, lambda: True)
    # The first chunk proves that the step is decided; where steps are eager none does.
    assert seen == ([] if eager else [(7, Model())])
    assert pulled.model == Model(7, 7)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_streams_and_owner_at_once(ahead: bool, early: bool) -> None:
    """Two streams bring versions while the owner computes with them: what it reads is never torn.

    Args:
        ahead: the next version is asked for, and comes, while one is still computed with.
        early: the first weights are enough to begin.
    """
    versions, bench = 30, Bench()
    wanted: list[queue.Queue[int | None]] = [queue.Queue(), queue.Queue()]

    def stream(shard: int) -> None:
        while (version := wanted[shard].get()) is not None:
            bench.bring(version, *(chunk.index for chunk in PLAN.chunks_of(shard)))

    def ask(version: int) -> None:
        if version < versions:
            assert bench.pulled.ask(PLAN, version, version)
        for versions_of_shard in wanted:
            versions_of_shard.put(version if version < versions else None)

    threads = [threading.Thread(target=stream, args=(shard,), daemon=True) for shard in range(2)]
    for thread in threads:
        thread.start()
    ask(0)
    for version in range(versions):
        eventually(partial(bench.ready, version, early), TIMEOUT_S, "the first weights")
        for chunk in PLAN.chunks:
            assert bench.pulled.has(version, [(chunk.shard, chunk.index)], TIMEOUT_S)
            assert bench.chunks[chunk.index] == version
        if ahead:
            ask(version + 1)
        assert bench.chunks == [version] * 5
        bench.pulled.done()
        if not ahead:
            ask(version + 1)
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    assert bench.decided == list(range(versions))
