"""Asks a role whether it serves: `python -m ps.wire.probe [HOST:PORT]`, for a container's health check.

It imports little, because it is started every few seconds; `windlass health` is the same for people.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ps.errors import ConfigError, HandshakeFailed, PeerUnavailable, PsError, StartupError
from ps.types import Role
from ps.wire.options import open_channel
from ps.wire.security import CLIENT, PLAIN, PROCESSES, Security, load_security
from ps.wire.status import error_of

TIMEOUT_S = 5.0
#: What a role listens on when it is asked on every address, and where it answers then.
_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}


def check(address: str, certificates: Path | None = None, timeout_s: float = TIMEOUT_S) -> None:
    """Return if the role at `address` (host:port) says that it serves.

    Args:
        address: host:port.
        certificates: any role's or a client's folder, or one of `windlass certs init`. None: no TLS.
        timeout_s: how long the answer may take.

    Raises:
        PeerUnavailable: it says that it does not (yet).
        PsError: it does not answer, or the certificates cannot be used.
    """
    security, role = _identity(certificates)
    # Who is asked is not known: most often one's own role, in its own container.
    others = [other for other in Role if other != role]
    *first, last = others if role == CLIENT else [Role(role), *others]
    for asked in first if certificates else ():
        try:
            return _ask(address, security, asked, timeout_s)
        except HandshakeFailed:
            continue
    return _ask(address, security, last, timeout_s)


def _ask(address: str, security: Security, role: Role, timeout_s: float) -> None:
    with open_channel(address, security, role) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as failure:
            raise error_of(failure, f"asking {address} for its health") from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        state = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        raise PeerUnavailable(f"{address} says {state}, not SERVING: see its log for what it waits for")


def _identity(certificates: Path | None) -> tuple[Security, str]:
    """The certificate in a folder, whichever role's it is; a client's where there are several."""
    if certificates is None:
        return PLAIN, CLIENT
    for role in (CLIENT, *PROCESSES):
        try:
            return load_security(certificates, False, role), role
        except StartupError:
            continue
    return load_security(certificates, False, CLIENT), CLIENT


def own_address(environment: Mapping[str, str]) -> str:
    """Where the role of this environment listens, as seen from the same host.

    Raises:
        ConfigError: it does not say.
    """
    listen = environment.get("WINDLASS_LISTEN", "")
    host, colon, port = listen.rpartition(":")
    if not colon or port in ("", "0"):
        raise ConfigError(f"WINDLASS_LISTEN={listen}: no fixed HOST:PORT to ask; name one")
    return f"{_EVERYWHERE.get(host, host)}:{port}"


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Check the address that is given, or this environment's own role; returns the exit code, and says why."""
    try:
        folder = environment.get("WINDLASS_CERTIFICATES")
        check(arguments[0] if arguments else own_address(environment), Path(folder) if folder else None)
    except PsError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
