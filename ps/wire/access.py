"""Who may call what: the role in the caller's certificate against one table, before anything else is done."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import grpc

from ps.errors import AccessDenied
from ps.types import Role
from ps.wire.security import CLIENT, PROCESSES, role_of
from ps.wire.status import abort

log = logging.getLogger(__name__)

_ANY = frozenset({*PROCESSES, CLIENT})
_MEMBER = frozenset({Role.SHARD, Role.WORKER})

#: Service or method -> the roles that may call it. What is not here nobody may call.
MAY_CALL: dict[str, frozenset[str]] = {
    # As whom a member may register, connect and report is looked at again, by `check_claim`.
    "/windlass.ps.v1.Coordinator/Register": _MEMBER,
    "/windlass.ps.v1.Coordinator/Session": _MEMBER,
    "/windlass.ps.v1.Coordinator/Clock": _MEMBER,
    "/windlass.ps.v1.Coordinator/Trace": _MEMBER,
    "/windlass.ps.v1.Coordinator/Status": _ANY,
    "/windlass.ps.v1.Shard/Configure": frozenset({Role.COORDINATOR}),
    "/windlass.ps.v1.Shard/Exchange": frozenset({Role.WORKER}),
    "/windlass.ps.v1.Shard/Replicate": frozenset({Role.SHARD}),
    "/windlass.ps.v1.Shard/Snapshot": frozenset({Role.COORDINATOR}),
    "/windlass.ps.v1.Shard/Status": _ANY,
    "/grpc.health.v1.Health": _ANY,
    "/grpc.reflection.v1alpha.ServerReflection": _ANY,
}

_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def check_claim(context: grpc.ServicerContext, role: str) -> None:
    """See that a caller's certificate is of the role that its message claims.

    Raises:
        AccessDenied: it is another role's.
    """
    shown = _caller(context)
    if shown is not None and shown != role:
        raise AccessDenied(f"a certificate of role {shown} cannot be used to join as a {role}")


class RoleCheck(grpc.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls by the table. Always in place: connections without TLS show no role and pass."""

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler = continuation(details)
        if handler is None:
            return None
        kind = next(name for name in _KINDS if getattr(handler, name) is not None)
        work = getattr(handler, kind)

        # Keeps what grpcio's health service says of its `Watch`: that it waits without a thread.
        @functools.wraps(work)
        def checked(request: Any, context: grpc.ServicerContext, *more: Any) -> Any:
            try:
                _check(context, details.method)
            except AccessDenied as error:
                log.warning("%s: %s", context.peer(), error.message)
                abort(context, error)
                raise
            return work(request, context, *more)

        return handler._replace(**{kind: checked})


def _check(context: grpc.ServicerContext, method: str) -> None:
    shown = _caller(context)
    if shown is None:
        return
    service = method.rpartition("/")[0]
    allowed = MAY_CALL.get(method) or MAY_CALL.get(service) or frozenset()
    if shown not in allowed:
        roles = " or ".join(sorted(allowed)) or "nobody"
        raise AccessDenied(f"a certificate of role {shown} may not call {method.lstrip('/')}: that is for {roles}")


def _caller(context: grpc.ServicerContext) -> str | None:
    """The role in the caller's certificate, `none` if it has none; None: the connection has no TLS."""
    shown = context.auth_context()
    if shown.get("transport_security_type") != [b"ssl"]:
        return None
    return role_of([name.decode(errors="replace") for name in shown.get("peer_uri", ())]) or "none"
