"""The Prometheus port of a role."""

from __future__ import annotations

from prometheus_client import start_http_server

from ps.errors import StartupError


def serve_metrics(listen: str) -> int:
    """Serve metrics on host:port (port 0: any) and return the port.

    Raises:
        StartupError: the address cannot be bound.
    """
    host, _, port = listen.rpartition(":")
    try:
        server, _thread = start_http_server(int(port), addr=host)
    except OSError as error:
        raise StartupError(f"cannot serve metrics on {listen}: {error.strerror}") from None
    return int(server.server_port)
