"""What the journal says of the run: its model, its epochs, its decisions. Replayed at a start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ps.coordinator.decision import same_content
from ps.coordinator.step_set import StepSet
from ps.errors import MismatchError
from ps.types import Decision, ParameterTable
from ps.wire.proto import from_record, to_record

#: Decisions that are kept in memory; older ones stay in the journal.
KEEP = 4096


class History:
    """The run's facts that outlive the coordinator."""

    def __init__(self, run: str, contributions: int, records: Sequence[dict[str, Any]]) -> None:
        self.run = run
        self.contributions = contributions
        self.table: ParameterTable | None = None
        self.data_digest = ""
        self.evaluation_parts = 0
        self.epoch = 0
        #: The epoch of the last rollback; 0: none. What shards wrote down before it is not the run's any more.
        self.lineage = 0
        self.decisions: dict[int, Decision] = {}
        #: Decisions that a rollback took back; made again, they must be the same.
        self.superseded: dict[int, Decision] = {}
        self.evaluations: dict[int, dict[str, Any]] = {}
        #: The last step that overflowed after chunks of it were updated; -1: none did.
        self.last_overflow = -1
        #: The life of each shard in the last epoch, and of the standbys that held the same as their shards.
        self.primaries: dict[int, int] = {}
        self.standbys: dict[int, int] = {}
        #: The lives that were part of the run when the coordinator ended, and some that had ended before unseen.
        self.there: set[int] = set()
        #: Steps that metrics.jsonl has a line of.
        self.recorded = StepSet()
        for record in records:
            self._replay(record)
        last = self.last_decision
        self.recorded.drop_from(last.version if last is not None else 0)

    @property
    def last_decision(self) -> Decision | None:
        return self.decisions[max(self.decisions)] if self.decisions else None

    def next_epoch(self) -> int:
        self.epoch += 1
        return self.epoch

    def note(self, decision: Decision) -> None:
        """A decision was made."""
        self.decisions[decision.step] = decision
        if len(self.decisions) > 2 * KEEP:
            for step in sorted(self.decisions)[:KEEP]:
                del self.decisions[step]

    def note_standby(self, shard: int, life: int) -> dict[str, Any]:
        """A standby holds the same as its shard (0: none does any more); returns the record to journal."""
        if life:
            self.standbys[shard] = life
        else:
            self.standbys.pop(shard, None)
        return {"type": "standby", "shard": shard, "life": life}

    def adopt(self, decision: Decision) -> bool:
        """Take over a decision that a shard heard; False: it contradicts the journal."""
        known = self.decisions.get(decision.step)
        if known is not None:
            return same_content(known, decision)
        last = self.last_decision
        if last is None or decision.step >= last.version:
            self.note(decision)
        return True

    def rollback(self, version: int, epoch: int) -> None:
        """Everything from this version on will be decided again, from this epoch on."""
        self.lineage = epoch
        # Whoever was in sync with a shard was so with a past that is gone.
        self.standbys.clear()
        for step in [step for step in self.decisions if step >= version]:
            self.superseded[step] = self.decisions.pop(step)
        self.evaluations = {v: result for v, result in self.evaluations.items() if v <= version}
        self.recorded.drop_from(version)

    def set_model(
        self, who: str, table: ParameterTable, data_digest: str, evaluation_parts: int
    ) -> dict[str, Any] | None:
        """Take the first worker's model as the run's; returns the record to journal.

        Raises:
            MismatchError: a later worker has another one.
        """
        if self.table is None:
            self.table, self.data_digest, self.evaluation_parts = table, data_digest, evaluation_parts
            return {
                "type": "model",
                "table": table.packed(),
                "data_digest": data_digest,
                "evaluation_parts": evaluation_parts,
            }
        if table.digest != self.table.digest:
            raise MismatchError(
                f"{who} has other parameters than this run: {len(table.tensors)} tensors with "
                f"{table.num_parameters} elements, digest {table.digest[:12]}, where the run has "
                f"{len(self.table.tensors)} with {self.table.num_parameters}, digest {self.table.digest[:12]}"
            )
        if data_digest != self.data_digest:
            raise MismatchError(
                f"{who} has other data than this run: digest {data_digest[:12]} where the run has "
                f"{self.data_digest[:12]}; give every worker the same files"
            )
        return None

    def packed(self) -> dict[str, Any]:
        """All of it, as one record has it; `_unpack` is the reverse."""
        return {
            "run": self.run,
            "contributions": self.contributions,
            "table": self.table.packed() if self.table is not None else None,
            "data_digest": self.data_digest,
            "evaluation_parts": self.evaluation_parts,
            "epoch": self.epoch,
            "lineage": self.lineage,
            "decisions": [to_record(decision) for decision in self.decisions.values()],
            "superseded": [to_record(decision) for decision in self.superseded.values()],
            "evaluations": list(self.evaluations.values()),
            "last_overflow": self.last_overflow,
            "primaries": self.primaries,
            "standbys": self.standbys,
            "there": sorted(self.there),
            "recorded": self.recorded.runs(),
        }

    def _unpack(self, packed: dict[str, Any]) -> None:
        self.run, self.contributions = packed["run"], packed["contributions"]
        self.table = ParameterTable.unpack(packed["table"]) if packed["table"] is not None else None
        self.data_digest, self.evaluation_parts = packed["data_digest"], packed["evaluation_parts"]
        self.epoch, self.lineage = packed["epoch"], packed["lineage"]
        self.decisions = _by_step(packed["decisions"])
        self.superseded = _by_step(packed["superseded"])
        self.evaluations = {result["version"]: result for result in packed["evaluations"]}
        self.last_overflow = packed["last_overflow"]
        self.primaries, self.standbys = dict(packed["primaries"]), dict(packed["standbys"])
        self.there = set(packed["there"])
        self.recorded = StepSet(packed["recorded"])

    def _replay(self, record: dict[str, Any]) -> None:
        kind = record["type"]
        if kind == "summary":
            self._unpack(record["of"])
        elif kind == "run":
            self.run, self.contributions = record["run"], record["contributions"]
        elif kind == "model":
            self.table = ParameterTable.unpack(record["table"])
            self.data_digest = record["data_digest"]
            self.evaluation_parts = record["evaluation_parts"]
        elif kind == "epoch":
            self.epoch = max(self.epoch, record["epoch"])
            self.primaries = dict(enumerate(record["shards"]))
        elif kind == "decision":
            self.note(from_record(Decision, record))
        elif kind == "applied":
            self.recorded.add(record["step"])
        elif kind == "live":
            self.there.add(record["life"])
        elif kind == "gone":
            self.there.discard(record["life"])
        elif kind == "promotion":
            self.primaries[record["shard"]] = record["life"]
        elif kind == "standby":
            self.note_standby(record["shard"], record["life"])
        elif kind == "overflow":
            self.last_overflow = record["step"]
        elif kind == "rollback":
            self.rollback(record["version"], record["epoch"])
        elif kind == "evaluation":
            result = {key: value for key, value in record.items() if key not in ("type", "at")}
            self.evaluations[result["version"]] = result


def fold(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What records amount to, for a journal's summary."""
    return History("", 0, records).packed()


def _by_step(records: Sequence[dict[str, Any]]) -> dict[int, Decision]:
    return {record["step"]: from_record(Decision, record) for record in records}
