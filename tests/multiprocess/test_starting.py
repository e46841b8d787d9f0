"""A shard that still compiles its kernels is there, and nothing is asked of it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from protos.ps.v1 import coordinator_pb2 as pb
from protos.ps.v1.common_pb2 import Member
from ps.client.status import StatusClient
from ps.coordinator.app import CoordinatorApp
from ps.wire.security import PLAIN
from ps.wire.session import Session
from tests.support.eventually import eventually
from tests.support.fake_run import make_config

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(60)]


def test_a_starting_shard_is_shown_and_becomes_live_when_it_has_started(tmp_path: Path) -> None:
    app = CoordinatorApp(make_config(tmp_path / "run", shards=1), "{}", "127.0.0.1:0")
    thread = threading.Thread(target=app.run, daemon=True)
    thread.start()
    address = app._self.address
    member = Member(role="shard", rank=0, incarnation=7, address="127.0.0.1:1")
    session = Session(address, member, lambda _: None, lambda: None)
    try:
        with StatusClient(address, PLAIN) as client:

            def shard() -> pb.MemberStatus:
                return client.ask(5.0).members[0]

            session.register(10.0)
            assert (shard().state, shard().live) == ("starting", False)
            session.doing("compiling kernels")
            session.start(starting=True)
            # At once, not with the heartbeat of a quarter of a lease later.
            eventually(lambda: shard().doing == "compiling kernels", 2.0, "what the shard does")
            assert (shard().state, shard().live) == ("starting", False)
            assert "shard 0 (to start; it says: compiling kernels)" in client.ask(5.0).waiting_for
            session.started()
            eventually(lambda: shard().live, 2.0, "the shard to be live")
    finally:
        session.close()
        app.stop("asked to stop")
        thread.join(20.0)
    assert not thread.is_alive()
