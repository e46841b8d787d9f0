"""A stream that breaks is worth a line, unless everything ends."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import grpc
import pytest

from ps.shard import stream


class _Exchange:
    closed = False

    def receive(self, _data: bytes) -> None:
        raise AssertionError("nothing comes")

    def close(self) -> None:
        self.closed = True


def broken() -> Iterator[bytes]:
    raise grpc.RpcError
    yield b""


@pytest.mark.parametrize("ending", [True, False])
def test_a_broken_stream_is_said_only_while_the_run_goes_on(
    ending: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(stream, "END_S", 0.05)
    event, exchange = threading.Event(), _Exchange()
    if ending:
        event.set()
    stream.read(broken(), exchange, event)
    assert exchange.closed
    assert ("a stream broke" in caplog.text) is not ending
