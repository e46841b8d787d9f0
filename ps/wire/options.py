"""gRPC channel and server options; each one that matters was measured (docs/architecture.md)."""

from __future__ import annotations

import socket
from concurrent import futures
from typing import Any

import grpc

from ps.errors import StartupError
from ps.types import MAX_CHUNK, Role
from ps.wire.access import RoleCheck
from ps.wire.security import PLAIN, Security, name_of, refuse_exposure

#: The largest frame: a chunk in FP32 and its header.
MAX_MESSAGE_BYTES = 4 * MAX_CHUNK + (1 << 17)

_STREAM = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_frame_size", 16_777_215),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 2 << 20),
    ("grpc.experimental.tcp_read_chunk_size", 1 << 20),
    ("grpc.experimental.tcp_min_read_chunk_size", 1 << 20),
    ("grpc.experimental.tcp_max_read_chunk_size", 1 << 20),
]

#: A host that vanishes without a word (power, cable) is noticed after the sum of both, in milliseconds.
KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS = 10_000, 10_000

_KEEPALIVE = [
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]

SERVER: list[tuple[str, Any]] = [
    *_STREAM,
    *_KEEPALIVE,
    # Otherwise a peer that keeps its silent connection alive is taken for an attacker and cut off.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    # Without it a second server on a taken port binds silently and gets half of the calls.
    ("grpc.so_reuseport", 0),
]

#: To gRPC "the least time between two attempts" is how long one of them may take. One that is refused ends at once.
_ATTEMPT = "grpc.min_reconnect_backoff_ms"
#: Several round trips to a host that is far away, and what its cores take to answer.
CONNECT_S = 2.0

CHANNEL: list[tuple[str, Any]] = [
    *_STREAM,
    *_KEEPALIVE,
    # A cluster's own addresses never go through a proxy that the environment names.
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
]


def open_channel(
    address: str, security: Security = PLAIN, role: Role = Role.COORDINATOR, connect_s: float = CONNECT_S
) -> grpc.Channel:
    """Open a channel of its own.

    Args:
        address: host:port.
        security: what to show, and whom to believe.
        role: who is meant to be there; with certificates nobody else will do.
        connect_s: for so long somebody who listens may be silent, in one attempt to connect.
    """
    options = [*CHANNEL, (_ATTEMPT, int(1000 * connect_s))]
    shown = security.certificates
    if shown is None:
        return grpc.insecure_channel(address, options=options)
    credentials = grpc.ssl_channel_credentials(shown.ca, shown.key, shown.certificate)
    return grpc.secure_channel(address, credentials, [*options, ("grpc.ssl_target_name_override", name_of(role))])


def make_server(threads: int) -> grpc.Server:
    """Make a server whose pool is sized for `threads` waiting streams."""
    pool = futures.ThreadPoolExecutor(max_workers=threads, thread_name_prefix="rpc")
    return grpc.server(pool, options=SERVER, interceptors=[RoleCheck()])


def bind(server: grpc.Server, listen: str, security: Security = PLAIN) -> int:
    """Bind a server to host:port (port 0: any) and return the port.

    Raises:
        StartupError: the address cannot be bound, for example because it is in use; or it is not
            loopback, and there are neither certificates nor leave to go without.
    """
    refuse_exposure(listen, security)
    shown = security.certificates
    try:
        if shown is None:
            port = int(server.add_insecure_port(listen))
        else:
            pair = [(shown.key, shown.certificate)]
            credentials = grpc.ssl_server_credentials(pair, shown.ca, require_client_auth=True)
            port = int(server.add_secure_port(listen, credentials))
    except RuntimeError:
        port = 0
    if port == 0:
        raise StartupError(f"cannot listen on {listen}: the port is in use or the address is not this host's")
    return port


def reachable(listen: str, advertise: str | None = None) -> str:
    """The name under which others reach this host: `advertise`, or its own when it listens on every address."""
    if advertise:
        return advertise
    host = listen.rpartition(":")[0]
    return socket.gethostname() if host in ("", "0.0.0.0", "[::]") else host
