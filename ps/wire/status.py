"""Which gRPC status each error becomes, and what the caller does with it: one table, tested complete."""

from __future__ import annotations

import grpc

from ps import errors

_KEY = "windlass-error"

#: Error class -> gRPC status. The caller of FAILED_PRECONDITION changes something first, of
#: UNAVAILABLE and ABORTED tries again later, of anything else gives up and reports.
STATUS: dict[type[errors.PsError], grpc.StatusCode] = {
    errors.PsError: grpc.StatusCode.INTERNAL,
    errors.ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.StartupError: grpc.StatusCode.INTERNAL,
    errors.MismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.DecisionRejected: grpc.StatusCode.FAILED_PRECONDITION,
    errors.WaitTimeout: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.PeerUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.HandshakeFailed: grpc.StatusCode.UNAVAILABLE,
    errors.AccessDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Refusal: grpc.StatusCode.FAILED_PRECONDITION,
    errors.MalformedFrame: grpc.StatusCode.INVALID_ARGUMENT,
    errors.StaleFence: grpc.StatusCode.FAILED_PRECONDITION,
    errors.FenceNotKnown: grpc.StatusCode.ABORTED,
    errors.StepNotOpen: grpc.StatusCode.FAILED_PRECONDITION,
    errors.UnknownContribution: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnknownChunk: grpc.StatusCode.INVALID_ARGUMENT,
    errors.WrongLossScale: grpc.StatusCode.FAILED_PRECONDITION,
    errors.WrongDtype: grpc.StatusCode.INVALID_ARGUMENT,
    errors.WrongLength: grpc.StatusCode.INVALID_ARGUMENT,
    errors.WrongHash: grpc.StatusCode.ABORTED,
    errors.ConflictingContribution: grpc.StatusCode.ALREADY_EXISTS,
    errors.VersionGone: grpc.StatusCode.OUT_OF_RANGE,
    errors.NotServing: grpc.StatusCode.UNAVAILABLE,
    errors.StorageError: grpc.StatusCode.INTERNAL,
    errors.CheckpointDamaged: grpc.StatusCode.DATA_LOSS,
    errors.CheckpointNotFound: grpc.StatusCode.NOT_FOUND,
    errors.CheckpointWriteFailed: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.JournalDamaged: grpc.StatusCode.DATA_LOSS,
    errors.DataError: grpc.StatusCode.INVALID_ARGUMENT,
}

#: What grpc says of a TLS handshake that no repetition mends, and what it means; the first that is found.
_HANDSHAKE = (
    ("certificate has expired", "the certificate there has expired"),
    ("certificate is not yet valid", "the certificate there is not valid yet by this host's clock"),
    ("Hostname Verification", "the certificate there is of another role than the one that was meant"),
    ("WRONG_VERSION_NUMBER", "nobody speaks TLS there: is it started with --certificates too?"),
    ("SSL_ERROR_SSL", "the certificate there is not signed by the CA in ca.pem here: do the certificates differ?"),
)
#: A server that does not like what it is shown just closes the connection, and so does one that is going.
_CLOSED = "Socket closed"


def abort(context: grpc.ServicerContext, error: errors.PsError) -> None:
    """End a call with the status of `error`; its code travels in the trailing metadata."""
    context.set_trailing_metadata(((_KEY, error.code),))
    context.abort(STATUS[type(error)], error.message)


def error_of(failure: grpc.RpcError, what: str) -> errors.PsError:
    """Rebuild the error that a peer raised; a broken connection becomes PeerUnavailable."""
    if not isinstance(failure, grpc.Call):
        return errors.PeerUnavailable(f"{what}: {failure}")
    trailing = dict(failure.trailing_metadata() or ())
    code = trailing.get(_KEY)
    if isinstance(code, str) and code in errors.BY_CODE:
        return errors.BY_CODE[code](f"{what}: {failure.details()}")
    return _unreachable(what, failure.code().name, failure.details() or "")


def _unreachable(what: str, status: str, details: str) -> errors.PeerUnavailable:
    if details.startswith("failed to connect"):
        for said, meaning in _HANDSHAKE:
            if said in details:
                return errors.HandshakeFailed(f"{what}: the TLS handshake failed: {meaning}")
        if _CLOSED in details:
            details = (
                "the connection was closed before anything was said: does one side want certificates of a CA that "
                "the other one does not have (--certificates)?"
            )
    return errors.PeerUnavailable(f"{what}: {status}: {details}")
