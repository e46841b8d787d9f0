"""The error tree of Windlass.

    PsError
      ConfigError               a key, a value or a combination that cannot be used
      StartupError              a role cannot start: a port in use, a missing file, no write permission
      MismatchError             two processes disagree on the run, the plan, the parameters or the data
      DecisionRejected          a decision does not follow from what the shard holds: the coordinator is in error
      WaitTimeout               a wait passed its deadline; says for what, since when, last seen
      PeerUnavailable           a peer cannot be reached, or its stream broke
        HandshakeFailed         the two ends' certificates do not fit: trying again cannot mend it
      AccessDenied              the caller's certificate is not of a role that may do this
      Refusal                   a shard refused a frame; the state was not touched
        MalformedFrame          not a frame, or a header field of a wrong type or out of range
        StaleFence              the frame's (term, epoch) is older than the shard's
        FenceNotKnown           newer than the shard's: try again, the shard learns it from the coordinator
        StepNotOpen             a push for another step than the one that is open
        UnknownContribution     a contribution outside 0..C-1, or a slot count other than the plan's
        UnknownChunk            a chunk that this shard does not own
        WrongLossScale          not the loss scale of the open step
        WrongDtype              not the wire dtype of the run
        WrongLength             a payload or a presence map of a wrong length
        WrongHash               the payload does not have the hash in its header
        ConflictingContribution the same key with another hash, under determinism=strict
        VersionGone             a pull of a version that is no longer published
        NotServing              the shard holds no state yet, or is loading it
      StorageError              reading or writing durable state failed
        CheckpointDamaged       a checkpoint's content is not what its manifest says
        CheckpointNotFound      there is no checkpoint to read
        CheckpointWriteFailed   a checkpoint could not be written; the previous one is untouched
        JournalDamaged          a journal is not readable before its torn tail, or is held by another process
      DataError                 a text file cannot be used; names file and offset

Every message names the thing, the value, the bound and the way out.
"""

from __future__ import annotations

from typing import ClassVar


class PsError(Exception):
    """Base of every error that Windlass raises on purpose."""

    code: ClassVar[str] = "INTERNAL"

    @property
    def message(self) -> str:
        """The text without the class name, on one line."""
        return " ".join(str(self).split())


class ConfigError(PsError):
    """A key, a value or a combination of values cannot be used."""

    code = "CONFIG"


class StartupError(PsError):
    """A role cannot start."""

    code = "STARTUP"


class MismatchError(PsError):
    """Two processes disagree on the run, the plan, the parameters or the data."""

    code = "MISMATCH"


class DecisionRejected(PsError):
    """A decision does not follow from what the shard holds; the coordinator is in error."""

    code = "DECISION_REJECTED"


class WaitTimeout(PsError):
    """A wait passed its deadline."""

    code = "WAIT_TIMEOUT"


class PeerUnavailable(PsError):
    """A peer cannot be reached, or its stream broke. Reconnecting is the caller's to decide."""

    code = "PEER_UNAVAILABLE"


class HandshakeFailed(PeerUnavailable):
    """The two ends' certificates do not fit. It stays so until somebody changes one of them."""

    code = "HANDSHAKE_FAILED"


class AccessDenied(PsError):
    """The caller's certificate is not of a role that may do this."""

    code = "ACCESS_DENIED"


class Refusal(PsError):
    """A shard refused a frame; its state was not touched."""

    code = "REFUSED"
    #: Whether sending the same frame again, later, can succeed.
    retry: ClassVar[bool] = False


class MalformedFrame(Refusal):
    """Not a frame, or a header field is missing, of a wrong type, or out of range."""

    code = "MALFORMED_FRAME"


class StaleFence(Refusal):
    """The fence is older than the shard's: the sender slept through a change and must catch up."""

    code = "STALE_FENCE"


class FenceNotKnown(Refusal):
    """The fence is newer than the shard's, which learns fences from the coordinator only."""

    code = "FENCE_NOT_KNOWN"
    retry = True


class StepNotOpen(Refusal):
    """The step is decided already (drop the frame) or not open yet (send it again)."""

    code = "STEP_NOT_OPEN"
    retry = True


class UnknownContribution(Refusal):
    """The contribution is outside 0..C-1, or its slot count is not the plan's."""

    code = "UNKNOWN_CONTRIBUTION"


class UnknownChunk(Refusal):
    """The chunk does not exist or belongs to another shard."""

    code = "UNKNOWN_CHUNK"


class WrongLossScale(Refusal):
    """The gradients were scaled with another loss scale than the open step's."""

    code = "WRONG_LOSS_SCALE"


class WrongDtype(Refusal):
    """The payload is not of the run's wire dtype."""

    code = "WRONG_DTYPE"


class WrongLength(Refusal):
    """The payload or the presence map has a wrong length."""

    code = "WRONG_LENGTH"


class WrongHash(Refusal):
    """The payload was damaged on its way."""

    code = "WRONG_HASH"
    retry = True


class ConflictingContribution(Refusal):
    """The same key arrived before with another payload, and the run asks for strict determinism."""

    code = "CONFLICTING_CONTRIBUTION"


class VersionGone(Refusal):
    """The version that was asked for is no longer published; pull a newer one."""

    code = "VERSION_GONE"


class NotServing(Refusal):
    """The shard holds no state yet, or is loading it."""

    code = "NOT_SERVING"
    retry = True


class StorageError(PsError):
    """Reading or writing durable state failed."""

    code = "STORAGE"


class CheckpointDamaged(StorageError):
    """A checkpoint's content is not what its manifest says."""

    code = "CHECKPOINT_DAMAGED"


class CheckpointNotFound(StorageError):
    """There is no checkpoint to read."""

    code = "CHECKPOINT_NOT_FOUND"


class CheckpointWriteFailed(StorageError):
    """A checkpoint could not be written; the previous one is untouched."""

    code = "CHECKPOINT_WRITE_FAILED"


class JournalDamaged(StorageError):
    """A journal cannot be read before its torn tail, or another process holds it."""

    code = "JOURNAL_DAMAGED"


class DataError(PsError):
    """A text file cannot be used."""

    code = "DATA"


def _tree(root: type[PsError]) -> list[type[PsError]]:
    found = [root]
    for child in root.__subclasses__():
        found.extend(_tree(child))
    return found


#: code -> class, for rebuilding an error that crossed the wire.
BY_CODE: dict[str, type[PsError]] = {cls.code: cls for cls in _tree(PsError)}
