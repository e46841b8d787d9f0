"""Certificates as a role uses them: loading, who may call what, and what is said when they do not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import grpc
import pytest

from protos.ps.v1 import coordinator_pb2, shard_pb2
from ps.errors import AccessDenied, HandshakeFailed, PeerUnavailable, StartupError, WaitTimeout
from ps.types import Role
from ps.wire.access import MAY_CALL
from ps.wire.health import Health, enable_reflection
from ps.wire.options import bind, make_server, open_channel
from ps.wire.security import PLAIN, ROLES, Security, load_security, refuse_exposure, role_of, uri_of
from ps.wire.session import Session
from ps.wire.status import error_of
from tests.support.certificates import let_expire, make, shown_by
from tests.support.far import far
from workers.cli.main import main


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("ours") / "certs")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("theirs") / "certs")


# -- Loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_a_role_finds_its_certificate_in_a_folder_of_all_and_in_its_own(ours: Path, role: str) -> None:
    loaded = load_security(ours, False, role)
    assert loaded == shown_by(ours, role)
    assert load_security(ours / role, False, role) == loaded
    assert loaded.certificates is not None
    assert loaded.certificates.key.decode() not in repr(loaded)
    assert b"PRIVATE KEY" in loaded.certificates.key
    assert "PRIVATE KEY" not in repr(loaded)


def test_without_certificates_there_are_none() -> None:
    assert load_security(None, False, "shard") == PLAIN
    assert load_security(None, True, "shard") == Security(None, insecure=True)


def _take(name: str) -> Callable[[Path, Path], None]:
    return lambda mine, theirs: (mine / "shard" / name).write_bytes((theirs / "shard" / name).read_bytes()) and None


def _give_the_workers(mine: Path, _theirs: Path) -> None:
    for name in ("cert.pem", "key.pem"):
        (mine / "shard" / name).write_bytes((mine / "worker" / name).read_bytes())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda mine, _: (mine / "shard" / "key.pem").unlink(), ["shard/key.pem cannot be read: No such file"]),
        (lambda mine, _: (mine / "shard" / "cert.pem").unlink(), ["shard/cert.pem cannot be read: No such file"]),
        (lambda mine, _: (mine / "shard" / "ca.pem").unlink(), ["shard/ca.pem cannot be read: No such file"]),
        (lambda mine, _: (mine / "shard" / "cert.pem").write_text("x"), ["cert.pem", "belong together"]),
        (lambda mine, _: (mine / "shard" / "key.pem").write_text("x"), ["key.pem", "belong together"]),
        (lambda mine, _: (mine / "shard" / "ca.pem").write_text("x"), ["ca.pem", "belong together"]),
        (_take("key.pem"), ["belong together", "KEY_VALUES_MISMATCH"]),
        (_take("ca.pem"), ["shard/cert.pem cannot be used", "windlass certs issue DIR shard"]),
        (lambda mine, _: let_expire(mine, "shard"), ["shard/cert.pem cannot be used", "certificate has expired"]),
        (_give_the_workers, ["cert.pem is a worker's certificate, not a shard's", "windlass certs issue DIR shard"]),
    ],
)
def test_certificates_that_cannot_be_used_are_one_line_at_the_start(
    tmp_path: Path, theirs: Path, spoil: Callable[[Path, Path], None], words: list[str]
) -> None:
    mine = make(tmp_path / "certs")
    spoil(mine, theirs)
    with pytest.raises(StartupError) as caught:
        load_security(mine, False, Role.SHARD)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_certificate_that_expires_soon_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(tmp_path)
    with caplog.at_level(logging.WARNING):
        load_security(folder, False, "worker")
        assert caplog.messages == []
        assert main(["certs", "issue", str(folder), "worker", "--days", "9"]) == 0
        load_security(folder, False, "worker")
    assert "worker/cert.pem expires in 9 days" in caplog.text


def test_a_role_is_one_uri() -> None:
    assert role_of(["x.windlass", uri_of("shard")]) == "shard"
    assert role_of(["shard.windlass", "spiffe://role/shard"]) is None
    assert role_of([uri_of("shard"), uri_of("worker")]) is None


# -- Where a role may listen --------------------------------------------------------------------


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.8.9.1:7000", "localhost:1", "[::1]:1", "::1:0"])
def test_this_host_is_served_without_certificates(listen: str) -> None:
    refuse_exposure(listen, PLAIN)


@pytest.mark.parametrize("listen", ["0.0.0.0:7000", "[::]:0", "10.0.0.1:1", "somewhere:1", "127.0.0.1.example:1"])
def test_other_hosts_are_not(ours: Path, listen: str) -> None:
    with pytest.raises(StartupError) as caught:
        refuse_exposure(listen, PLAIN)
    for word in (listen, "--certificates", "windlass certs init", "--insecure", "security.insecure=true"):
        assert word in caught.value.message
    refuse_exposure(listen, Security(insecure=True))
    refuse_exposure(listen, shown_by(ours, "worker"))


def test_a_server_does_not_bind_where_it_may_not() -> None:
    server = make_server(1)
    with pytest.raises(StartupError, match=r"refused to listen on 0\.0\.0\.0:0"):
        bind(server, "0.0.0.0:0")
    assert bind(server, "0.0.0.0:0", Security(insecure=True)) > 0
    server.stop(None)


@pytest.mark.parametrize("command", ["train", "coordinator"])
def test_a_refused_run_leaves_no_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    monkeypatch.setattr("workers.launch.environment.enter", lambda _role: None)
    monkeypatch.setattr("ps.telemetry.logs.configure", lambda *_: None)
    run = tmp_path / "run"
    host = ["--listen", "0.0.0.0:0"] if command == "coordinator" else ["launch.host=0.0.0.0"]
    for arguments, word in ((host, "0.0.0.0:0"), ([f"security.certificates={tmp_path / 'none'}"], "none")):
        assert main([command, f"run_dir={run}", *arguments]) == 1
        assert word in capsys.readouterr().err
        assert not run.exists()


# -- Who may call what --------------------------------------------------------------------------


def test_the_table_knows_every_method() -> None:
    """One that is not in it can be called by nobody."""
    methods = {
        f"/{service.full_name}/{method.name}"
        for file in (coordinator_pb2.DESCRIPTOR, shard_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
        for method in service.methods
    }
    assert {name for name in MAY_CALL if name.startswith("/windlass.")} == methods


def test_tools_change_nothing() -> None:
    allowed = {method.rpartition("/")[2] for method, roles in MAY_CALL.items() if "client" in roles}
    assert allowed == {"Status", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


Serve = Callable[[Security], AbstractContextManager[str]]


@pytest.fixture
def serve() -> Serve:
    """A server with methods that answer with what they get, one of each kind, in the Shard's place."""
    kinds = {
        "Configure": grpc.unary_unary_rpc_method_handler(lambda request, _: request),
        "Snapshot": grpc.unary_stream_rpc_method_handler(lambda request, _: iter([request])),
        "Exchange": grpc.stream_stream_rpc_method_handler(lambda requests, _: requests),
        "Unheard": grpc.unary_unary_rpc_method_handler(lambda request, _: request),
    }

    @contextmanager
    def served(security: Security) -> Iterator[str]:
        server = make_server(4)
        Health(server, "windlass.ps.v1.Shard")
        enable_reflection(server, [])
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("windlass.ps.v1.Shard", kinds),))
        address = f"127.0.0.1:{bind(server, '127.0.0.1:0', security)}"
        server.start()
        try:
            yield address
        finally:
            server.stop(0).wait(5.0)

    return served


def call(address: str, security: Security, method: str, role: Role = Role.SHARD) -> bytes:
    """Call a method of any kind with b"x", and return what it answers."""
    with open_channel(address, security, role) as channel:
        path = f"/windlass.ps.v1.Shard/{method}"
        try:
            if method == "Exchange":
                return b"".join(channel.stream_stream(path)(iter([b"x"]), timeout=10.0))
            if method == "Snapshot":
                return b"".join(channel.unary_stream(path)(b"x", timeout=10.0))
            return bytes(channel.unary_unary(path)(b"x", timeout=10.0))
        except grpc.RpcError as failure:
            raise error_of(failure, f"calling {address}") from None


@pytest.mark.parametrize(
    ("method", "allowed"),
    [("Configure", ["coordinator"]), ("Snapshot", ["coordinator"]), ("Exchange", ["worker"]), ("Unheard", [])],
)
def test_each_kind_of_method_is_for_its_roles_only(
    serve: Serve, ours: Path, method: str, allowed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with serve(shown_by(ours, "shard")) as address, caplog.at_level(logging.WARNING):
        for role in ROLES:
            if role in allowed:
                assert call(address, shown_by(ours, role), method) == b"x"
                continue
            with pytest.raises(AccessDenied, match=f"role {role} may not call windlass.ps.v1.Shard/{method}"):
                call(address, shown_by(ours, role), method)
            assert caplog.messages[-1].startswith("ipv4:127.0.0.1:")
    # Without TLS there are no roles.
    with serve(PLAIN) as address:
        assert call(address, PLAIN, method) == b"x"


@pytest.mark.parametrize("secure", [True, False], ids=["tls", "plain"])
def test_a_host_that_is_far_away_can_be_reached(serve: Serve, ours: Path, secure: bool) -> None:
    """A connection takes several round trips, of 0.2 s each: none of them may be taken for a host that is not there."""
    shard, coordinator = (shown_by(ours, role) if secure else PLAIN for role in ("shard", "coordinator"))
    with serve(shard) as address, far(int(address.rpartition(":")[2]), one_way_s=0.1) as port:
        assert call(f"127.0.0.1:{port}", coordinator, "Configure") == b"x"


# -- What does not fit --------------------------------------------------------------------------


def test_a_server_of_another_role_is_not_the_one_that_was_meant(serve: Serve, ours: Path) -> None:
    with (
        serve(shown_by(ours, "worker")) as address,
        pytest.raises(HandshakeFailed, match="the TLS handshake failed: the certificate there is of another role"),
    ):
        call(address, shown_by(ours, "coordinator"), "Configure")


def test_a_server_of_another_ca_is_not_believed(serve: Serve, ours: Path, theirs: Path) -> None:
    with (
        serve(shown_by(theirs, "shard")) as address,
        pytest.raises(HandshakeFailed, match="the certificate there is not signed by the CA"),
    ):
        call(address, shown_by(ours, "coordinator"), "Configure")


def test_a_server_without_tls_is_not_spoken_to(serve: Serve, ours: Path) -> None:
    with serve(PLAIN) as address, pytest.raises(HandshakeFailed, match="nobody speaks TLS there"):
        call(address, shown_by(ours, "coordinator"), "Configure")


def test_an_expired_server_is_named(serve: Serve, tmp_path: Path) -> None:
    folder = make(tmp_path)
    let_expire(folder, "shard")
    with (
        serve(shown_by(folder, "shard")) as address,
        pytest.raises(HandshakeFailed, match="the certificate there has expired"),
    ):
        call(address, shown_by(folder, "coordinator"), "Configure")


@pytest.mark.parametrize("what", ["no certificate", "another CA's", "an expired one"])
def test_a_client_that_is_not_believed_hears_what_to_look_at(
    serve: Serve, ours: Path, theirs: Path, tmp_path: Path, what: str
) -> None:
    shown = PLAIN
    if what == "another CA's":
        (tmp_path / "coordinator").mkdir()
        for name, folder in (("ca.pem", ours), ("cert.pem", theirs), ("key.pem", theirs)):
            (tmp_path / "coordinator" / name).write_bytes((folder / "coordinator" / name).read_bytes())
        shown = shown_by(tmp_path, "coordinator")
    served_by = ours
    if what == "an expired one":
        served_by = make(tmp_path)
        let_expire(served_by, "coordinator")
        shown = shown_by(served_by, "coordinator")
    with serve(shown_by(served_by, "shard")) as address, pytest.raises(PeerUnavailable) as caught:
        call(address, shown, "Configure")
    assert "the connection was closed before anything was said" in caught.value.message
    assert "--certificates" in caught.value.message


def test_registering_does_not_wait_for_certificates_to_change(serve: Serve, ours: Path, theirs: Path) -> None:
    member = coordinator_pb2.RegisterRequest().member
    with serve(shown_by(theirs, "coordinator")) as address:
        session = Session(address, member, lambda _: None, lambda: None, shown_by(ours, "worker"))
        try:
            with pytest.raises(HandshakeFailed, match=f"registering at {address}"):
                session.register(timeout_s=60.0)
        finally:
            session.close()


def test_a_wait_says_that_certificates_may_be_missing(
    serve: Serve, ours: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ps.wire.session.SAY_AFTER_S", 0.0)
    member = coordinator_pb2.RegisterRequest().member
    with serve(shown_by(ours, "coordinator")) as address, caplog.at_level(logging.INFO):
        session = Session(address, member, lambda _: None, lambda: None)
        try:
            with pytest.raises(WaitTimeout, match=r"is it running\? .*--certificates"):
                session.register(timeout_s=0.3)
        finally:
            session.close()
    assert "--certificates" in caplog.text
