"""Asking a coordinator what is going on."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import grpc

from protos.ps.v1 import coordinator_pb2 as pb
from protos.ps.v1 import coordinator_pb2_grpc as pb_grpc
from ps.types import Role
from ps.wire.options import open_channel
from ps.wire.security import Security
from ps.wire.status import error_of

#: A coordinator that is stopped or overloaded takes a connection and says nothing: not who asks gives up first.
CONNECT_S = 5.0


class StatusClient:
    """A channel to one coordinator, kept open between questions. Thread-safe.

    Args:
        address: host:port of the coordinator.
        security: a client's certificate, or nothing.
    """

    def __init__(self, address: str, security: Security) -> None:
        self.address = address
        self._channel = open_channel(address, security, Role.COORDINATOR, CONNECT_S)
        self._stub = pb_grpc.CoordinatorStub(self._channel)

    def ask(self, timeout_s: float) -> pb.StatusResponse:
        """Ask once.

        Raises:
            PeerUnavailable: nobody answers there in time, or it is no coordinator; asking again later is safe.
        """
        try:
            response: pb.StatusResponse = self._stub.Status(pb.StatusRequest(), timeout=timeout_s)
        except grpc.RpcError as failure:
            raise error_of(failure, f"asking the coordinator at {self.address}") from None
        return response

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
