"""Named places in the code at which a process can be told to die, to wait or to fail, so that tests can.

    WINDLASS_FAILPOINT=shard-1/apply.before:kill@3,rename.before~*/manifest.json:error=ENOSPC

A list, separated by commas, of [WHO/]NAME[~DETAIL]:ACTION[=VALUE][@N][#LIFE]:

    WHO     a role (shard) or one process of it (shard-1), which has the point; without it, every role. A process
            that stands by for shard 1 is standby-1 meanwhile; the one coordinator has no number
    NAME    one of `POINTS`, and a side of it: .before or .after
    DETAIL  a pattern for what the point is about: a file as FOLDER/NAME, a checkpoint, a kind of record
    ACTION  kill: SIGKILL, after VALUE seconds (0); so long, other threads go on: what was queued is sent
            delay: wait for VALUE seconds (0.5)
            error: an OSError with VALUE as its errno (EIO)
    N       at the N-th hit only; N+ from that one on; without it, at every hit
    LIFE    in the LIFE-th process only that a launcher starts in this place (1): what it starts again is whole
            unless something else is said

Only roles have failpoints.
In production the variable is not set. That is looked at once, when this module is imported: each point
is then a call of a function that does nothing.
"""

from __future__ import annotations

import errno
import fnmatch
import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from ps.errors import ConfigError

log = logging.getLogger(__name__)

VARIABLE = "WINDLASS_FAILPOINT"
#: Set by a launcher: how many processes it has started in this one's place, this one included.
LIFE_VARIABLE = "WINDLASS_LIFE"

#: Who has each point, and what happens between its two sides.
POINTS = {
    "journal.append": "coordinator: a record is written into the journal; about its type",
    "record": "coordinator: a line is written into metrics.jsonl; about its kind",
    "decision": "coordinator: one shard is told a decision; shard, standby: it takes one in",
    "manifest": "coordinator: a checkpoint is completed; about its folder's name",
    "remove": "coordinator: a checkpoint ceases to exist, and its files follow; about its folder's name",
    "acknowledge": "shard: a worker is told that its contribution is held",
    "prepare": "shard: the coordinator is told that all chunks are reduced; about `covered` if its standby holds them",
    "apply": "shard, standby: a chunk is updated",
    "publish": "shard, standby: an updated chunk is published",
    "applied": "shard, standby: the coordinator is told that a decision is carried out",
    "load": "shard: a checkpoint is loaded, or the state is emptied",
    "log.append": "shard: a record is written into its journal; about its kind",
    "log.begin": "shard: a new file of its journal is opened; about the file's name",
    "log.remove": "shard: an old file of its journal is removed; about the file's name",
    "log.read": "shard: a file of its journal is read and carried out; about the file's name",
    "mirror": "shard: all of a step is reduced and sent, and waits for the standby",
    "follow": "standby: it begins to stand by",
    "state": "standby: one array of a chunk's state comes; about the array",
    "reduced": "standby: what is reduced of a chunk comes",
    "cover": "standby: its shard is told that a step is held",
    "promote": "standby: it becomes the shard",
    "push": "worker: a chunk's gradient goes to its shard",
    "contributed": "worker: the coordinator is told that every shard holds a contribution",
    "write": "any: bytes go into a file that will be renamed; about its name to be",
    "fsync": "any: such a file, or the journal, is put on disk; about its name",
    "rename": "any: such a file gets its name",
}
NAMES = frozenset(f"{point}.{side}" for point in POINTS for side in ("before", "after"))
_ROLES = ("coordinator", "shard", "standby", "worker")
#: Nobody waits for longer than a day, in seconds.
_LONGEST_S = 86_400.0

_FORM = re.compile(
    r"(?:(?P<who>[a-z]+(?:-\d+)?)/)?(?P<name>[a-z.]+)(?:~(?P<detail>[^:]+))?"
    r":(?P<action>kill|delay|error)(?:=(?P<value>[\w.]+))?(?:@(?P<nth>[1-9]\d*)(?P<on>\+?))?(?:#(?P<life>[1-9]\d*))?"
)


@dataclass
class Failpoint:
    """One thing that shall happen."""

    who: str
    name: str
    detail: str
    act: Callable[[], None]
    #: The hits at which it happens.
    first: int
    last: float
    #: The process of its place in which it happens.
    life: int = 1
    hits: int = 0

    def is_for(self, member: str) -> bool:
        """Whether a process, such as `shard-1`, is meant."""
        return bool(member) and self.who in ("", member, member.partition("-")[0])


class Failpoints:
    """All that shall happen in this process. Thread-safe."""

    def __init__(self, text: str, life: int = 1) -> None:
        self._text = text
        self._life = life
        self._lock = threading.Lock()
        self._member = ""

    @cached_property
    def _points(self) -> list[Failpoint]:
        points = [_parse(item.strip()) for item in self._text.split(",") if item.strip()]
        return [point for point in points if point.life == self._life]

    def enter(self, member: str) -> None:
        """Say what this process is from now on: what is meant for that happens, and before nothing does.

        Raises:
            ConfigError: the text is not of the form above, or names what there is not.
        """
        self._member = member
        if any(point.is_for(member) for point in self._points):
            log.warning("failpoints are on (%s=%s): this process will fail on purpose", VARIABLE, self._text)

    def hit(self, name: str, detail: str = "") -> None:
        """Do what shall happen here.

        Args:
            name: one of `NAMES`.
            detail: what it is about, if several things pass here.

        Raises:
            OSError: an `error` was asked for.
        """
        with self._lock:
            due = [point for point in self._points if self._is_due(point, name, detail)]
        for point in due:
            log.warning("failpoint %s %s, hit %d", name, detail, point.hits)
            point.act()

    def _is_due(self, point: Failpoint, name: str, detail: str) -> bool:
        if point.name != name or not point.is_for(self._member) or not fnmatch.fnmatchcase(detail, point.detail):
            return False
        point.hits += 1
        return point.first <= point.hits <= point.last


def _parse(text: str) -> Failpoint:
    found = _FORM.fullmatch(text)
    if found is None:
        raise ConfigError(f"{VARIABLE}: {text!r} is not [WHO/]NAME[~DETAIL]:kill|delay|error[=VALUE][@N][#LIFE]")
    if found["name"] not in NAMES:
        raise ConfigError(f"{VARIABLE}: no point is called {found['name']!r}; there are {', '.join(sorted(NAMES))}")
    first = int(found["nth"] or 1)
    last = first if found["nth"] and not found["on"] else float("inf")
    _check_who(text, found["who"] or "", found["name"])
    act = _action(text, found["action"], found["value"])
    life = int(found["life"] or 1)
    return Failpoint(found["who"] or "", found["name"], found["detail"] or "*", act, first, last, life)


def _check_who(text: str, who: str, name: str) -> None:
    role, _, number = who.partition("-")
    if who and role not in _ROLES:
        raise ConfigError(f"{VARIABLE}: {text!r}: there is no role {role!r}; there are {', '.join(_ROLES)}")
    if role == "coordinator" and number:
        raise ConfigError(f"{VARIABLE}: {text!r}: the coordinator has no number; write coordinator/{name}")
    having = roles_of(name.rpartition(".")[0])
    if who and role not in having:
        raise ConfigError(f"{VARIABLE}: {text!r}: a {role} never comes to {name}; {', '.join(having)} does")


def roles_of(point: str) -> list[str]:
    """The roles that have a point."""
    named = [role for part in POINTS[point].split("; ") for role in part.partition(":")[0].split(", ")]
    return [role for role in _ROLES if role in named or "any" in named]


def _action(text: str, action: str, value: str | None) -> Callable[[], None]:
    if action == "error":
        number = getattr(errno, value or "EIO", None)
        if not isinstance(number, int):
            raise ConfigError(f"{VARIABLE}: {text!r}: {value} is not the name of an errno, such as ENOSPC")
        return lambda: _fail(number)
    try:
        seconds = float(value) if value is not None else {"kill": 0.0, "delay": 0.5}[action]
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= _LONGEST_S:
        raise ConfigError(f"{VARIABLE}: {text!r}: {value} is not a number of seconds from 0 to {_LONGEST_S:.0f}")
    return (lambda: _die(seconds)) if action == "kill" else (lambda: time.sleep(seconds))


def _die(after_s: float) -> None:
    time.sleep(after_s)
    os.kill(os.getpid(), signal.SIGKILL)


def _fail(number: int) -> None:
    raise OSError(number, os.strerror(number))


def _off(name: str, detail: str = "") -> None:
    """No failpoint is on."""


def _off_for(member: str) -> None:
    """No failpoint is on."""


_asked = os.environ.get(VARIABLE, "")
_on = Failpoints(_asked, int(os.environ.get(LIFE_VARIABLE, "1"))) if _asked else None

#: Called as `failpoints.hit(name, detail)` where something can be made to fail.
hit: Callable[..., None] = _off if _on is None else _on.hit
#: Called by a role with its name, and by a shard again when it stands by or takes over.
enter: Callable[[str], None] = _off_for if _on is None else _on.enter
