"""RUN/trace.json as tests want it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Event:
    """A span; times in microseconds."""

    name: str
    category: str
    process: str
    track: str
    start: float
    end: float
    args: dict[str, int]

    @property
    def step(self) -> int:
        return self.args["step"]


@dataclass(frozen=True)
class Trace:
    """What a file holds."""

    events: list[Event]

    @classmethod
    def read(cls, path: Path) -> Trace:
        events = json.loads(path.read_text())["traceEvents"]
        names = {(e["name"], e["pid"], e["tid"]): e["args"].get("name") for e in events if e["ph"] == "M"}
        return cls(
            [
                Event(
                    e["name"],
                    e["cat"],
                    names["process_name", e["pid"], 0],
                    names["thread_name", e["pid"], e["tid"]],
                    e["ts"],
                    e["ts"] + e["dur"],
                    e["args"],
                )
                for e in events
                if e["ph"] == "X"
            ]
        )

    @property
    def processes(self) -> set[str]:
        return {event.process for event in self.events}

    def of(self, process: str, name: str, step: int | None = None) -> list[Event]:
        """The spans of a name, of all processes whose name begins so, in the order of their beginnings."""
        found = [e for e in self.events if e.process.startswith(process) and e.name == name]
        return sorted((e for e in found if step is None or e.step == step), key=lambda event: event.start)

    def tangled(self) -> list[tuple[Event, Event]]:
        """Spans of one track that overlap without one holding the other: no reader can show them."""
        tangled = []
        tracks: dict[tuple[str, str], list[Event]] = {}
        for event in self.events:
            tracks.setdefault((event.process, event.track), []).append(event)
        for events in tracks.values():
            open_events: list[Event] = []
            for event in sorted(events, key=lambda e: (e.start, -e.end)):
                # Nanoseconds have become microseconds in floating point.
                while open_events and open_events[-1].end <= event.start + 0.001:
                    open_events.pop()
                if open_events and event.end > open_events[-1].end + 0.001:
                    tangled.append((open_events[-1], event))
                open_events.append(event)
        return tangled
