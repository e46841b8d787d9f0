"""The standard health and reflection services, on every role."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection


class Health:
    """NOT_SERVING until the role says otherwise: kernels compiled, state loaded."""

    def __init__(self, server: grpc.Server, service: str) -> None:
        self._service = service
        self._servicer = health.HealthServicer()
        self._state: int | None = None
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        self.not_serving()

    def serving(self) -> None:
        self._set(health_pb2.HealthCheckResponse.SERVING)

    def not_serving(self) -> None:
        self._set(health_pb2.HealthCheckResponse.NOT_SERVING)

    def _set(self, state: int) -> None:
        if state != self._state:
            self._state = state
            for name in ("", self._service):
                self._servicer.set(name, state)


def enable_reflection(server: grpc.Server, services: Sequence[str]) -> None:
    """Let tools such as grpcurl list what a role serves."""
    names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
