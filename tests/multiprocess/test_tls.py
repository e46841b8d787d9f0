"""A real cluster with certificates: it trains, and who is not who they should be is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.ps.v1 import coordinator_pb2, coordinator_pb2_grpc, shard_pb2, shard_pb2_grpc
from protos.ps.v1.common_pb2 import Member
from ps.client.grpc_transport import GrpcTransport
from ps.errors import AccessDenied, HandshakeFailed, PeerUnavailable
from ps.types import Role
from ps.wire.options import open_channel
from ps.wire.security import PLAIN, PROCESSES, Security
from ps.wire.session import Session
from ps.wire.status import error_of
from tests.support.certificates import make, shown_by
from tests.support.eventually import eventually
from tests.support.launched import LaunchedRun, launched, tiny_job, windlass

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]

TIMEOUT_S = 10.0


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("ours") / "certs")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("theirs") / "certs")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ours: Path) -> Iterator[LaunchedRun]:
    folder = tmp_path_factory.mktemp("tls")
    job = tiny_job(folder, "run", "training.steps=1000000", f"security.certificates={ours}")
    with launched("train", folder / "run", job) as under_way:
        under_way.wait_for_step(3)
        yield under_way
        under_way.process.terminate()
        under_way.finish()


def address(run: LaunchedRun, role: str) -> str:
    return str(next(member["address"] for member in run.members() if member["role"] == role))


def on_channel(where: str, security: Security, role: Role, call: Callable[[grpc.Channel], object]) -> object:
    """Call something; what grpc raises becomes an error of ours."""
    with open_channel(where, security, role) as channel:
        try:
            return call(channel)
        except grpc.RpcError as failure:
            raise error_of(failure, f"calling {where}") from None


def check_health(channel: grpc.Channel) -> object:
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)


def configure(channel: grpc.Channel) -> object:
    return shard_pb2_grpc.ShardStub(channel).Configure(shard_pb2.ConfigureRequest(), timeout=TIMEOUT_S)


def exchange(channel: grpc.Channel) -> object:
    return list(channel.stream_stream("/windlass.ps.v1.Shard/Exchange")(iter([b"x"]), timeout=TIMEOUT_S))


def snapshot(channel: grpc.Channel) -> object:
    return list(channel.unary_stream("/windlass.ps.v1.Shard/Snapshot")(b"", timeout=TIMEOUT_S))


@pytest.mark.parametrize("role", list(PROCESSES))
def test_who_shows_no_certificate_or_another_cas_is_refused_everywhere(
    run: LaunchedRun, theirs: Path, role: Role
) -> None:
    with pytest.raises(PeerUnavailable, match="--certificates"):
        on_channel(address(run, role), PLAIN, role, check_health)
    with pytest.raises(HandshakeFailed, match="the CA in"):
        on_channel(address(run, role), shown_by(theirs, "coordinator"), role, check_health)


@pytest.mark.parametrize("role", list(PROCESSES))
def test_tools_may_ask(run: LaunchedRun, ours: Path, role: Role) -> None:
    client = shown_by(ours, "client")

    def reflect(channel: grpc.Channel) -> object:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        return next(iter(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))))

    def status(channel: grpc.Channel) -> object:
        if role is Role.SHARD:
            return shard_pb2_grpc.ShardStub(channel).Status(shard_pb2.ShardStatusRequest(), timeout=TIMEOUT_S)
        return coordinator_pb2_grpc.CoordinatorStub(channel).Status(coordinator_pb2.StatusRequest(), timeout=TIMEOUT_S)

    for call in (check_health, reflect, *([] if role is Role.WORKER else [status])):
        assert on_channel(address(run, role), client, role, call) is not None


@pytest.mark.parametrize(
    ("role", "call", "method"),
    [
        ("worker", configure, "Shard/Configure"),
        ("worker", snapshot, "Shard/Snapshot"),
        ("shard", configure, "Shard/Configure"),
        ("shard", exchange, "Shard/Exchange"),
        ("client", configure, "Shard/Configure"),
        ("client", exchange, "Shard/Exchange"),
    ],
)
def test_a_shard_listens_to_the_right_role_only(
    run: LaunchedRun, ours: Path, role: str, call: Callable[[grpc.Channel], object], method: str
) -> None:
    with pytest.raises(AccessDenied, match=f"a certificate of role {role} may not call windlass.ps.v1.{method}"):
        on_channel(address(run, "shard"), shown_by(ours, role), Role.SHARD, call)


@pytest.mark.parametrize(("shown", "claimed"), [("worker", "shard"), ("shard", "worker"), ("client", "worker")])
def test_nobody_joins_as_somebody_else(run: LaunchedRun, ours: Path, shown: str, claimed: str) -> None:
    member = Member(role=claimed, rank=0, incarnation=1)
    where = address(run, "coordinator")
    session = Session(where, member, lambda _: None, lambda: None, shown_by(ours, shown))
    try:
        with pytest.raises(AccessDenied, match=f"role {shown} "):
            session.register(timeout_s=60.0)
    finally:
        session.close()

    def hello(channel: grpc.Channel) -> object:
        request = coordinator_pb2.SessionRequest(hello=coordinator_pb2.Hello(member=member))
        return list(coordinator_pb2_grpc.CoordinatorStub(channel).Session(iter([request]), timeout=TIMEOUT_S))

    with pytest.raises(AccessDenied, match=f"role {shown} "):
        on_channel(where, shown_by(ours, shown), Role.COORDINATOR, hello)


def test_a_stream_that_is_refused_says_why(run: LaunchedRun, ours: Path) -> None:
    heard: list[str] = []
    connection = GrpcTransport(shown_by(ours, "shard")).connect(address(run, "shard"), lambda _: None, heard.append)
    eventually(lambda: heard, TIMEOUT_S, "the refusal")
    assert "a certificate of role shard may not call windlass.ps.v1.Shard/Exchange" in heard[0]
    connection.close()


def test_a_process_with_other_certificates_ends_with_one_line(run: LaunchedRun, theirs: Path) -> None:
    ended = windlass("worker", "--coordinator", address(run, "coordinator"), "--certificates", str(theirs))
    assert ended.returncode == 1
    assert "windlass: error: registering at" in ended.stderr
    assert "the certificate there is not signed by the CA in ca.pem here" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_certificates_are_changed_by_restarting_a_role(run: LaunchedRun, ours: Path) -> None:
    """The old and the new one are of one CA: the others go on with theirs."""
    before = {member["pid"] for member in run.members()}
    assert windlass("certs", "issue", str(ours), "worker").returncode == 0
    run.kill("worker", 1)

    def is_back() -> bool:
        return any(member["role"] == "worker" and member["pid"] not in before for member in run.members())

    eventually(is_back, 90.0, "worker 1 with its new certificate")
    run.wait_for_step(run.steps() + 3)
