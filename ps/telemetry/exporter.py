"""The Prometheus port of a role."""

from __future__ import annotations

from prometheus_client import start_http_server

from ps.errors import StartupError


def serve_metrics(listen: str) -> str:
    """Serve metrics on host:port (port 0: any) and return the address that it got.

    Raises:
        StartupError: the address cannot be bound.
    """
    host, _, port = listen.rpartition(":")
    try:
        server, _thread = start_http_server(int(port), addr=host)
    except OSError as error:
        raise StartupError(f"cannot serve metrics on {listen}: {error.strerror}") from None
    return f"{host}:{server.server_port}"
