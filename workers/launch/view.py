"""Drawing a cluster: a pure function from what is going on to something that rich can print.

Who has little room loses columns, then members that are well, but never a member in trouble.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from workers.launch.metrics import clock
from workers.launch.snapshot import MemberSnapshot, Snapshot, WaitSnapshot

#: Shorter waits are how every step goes; naming them would only flicker.
LONG_WAIT_S = 1.0
#: So many waits are named.
NAMED_WAITS = 3
#: The column that says what a member does gets at least so much, or is left out.
DOING_WIDTH = 18
_GAP = "  "
#: The step is in the head, and what a member says lags behind it by a heartbeat.
_STEP = re.compile(r"step \d+: ")
_STATE_STYLE = {"live": "green", "starting": "yellow", "lost": "bold red"}
_PHASE_STYLE = {"running": "green", "ended": "dim", "unreachable": "bold red"}
#: What a table has, in the order of need; what does not fit, or is empty, is left out.
_NEED = (
    ("member",),
    ("state",),
    ("seen",),
    ("doing",),
    ("restarts",),
    ("compute", "push", "pull", "waiting"),
    ("transport",),
    ("process",),
    ("metrics",),
)
_ROLES = ("coordinator", "shard", "standby", "worker")


def render(snapshot: Snapshot, width: int, height: int | None = None) -> RenderableType:
    """Draw a snapshot.

    Args:
        snapshot: what is going on.
        width: columns that there are.
        height: lines that there are. None: as many as it takes.
    """
    head = [_title(snapshot, width), _bar(snapshot, width), *_flow(_numbers(snapshot), width)]
    head += _flow(_times(snapshot), width)
    waits = _waits(snapshot, width)
    # The table has a heading, and rich's live display wants a line for the cursor.
    room = None if height is None else max(1, height - len(head) - len(waits) - 4)
    shown, hidden = choose_members(snapshot, room)
    lines: list[RenderableType] = [*head, *waits, Text("")]
    if shown:
        lines.append(_members(shown, width))
    if hidden:
        lines.append(Text(f"and {hidden} more, all live", style="dim"))
    return Group(*lines)


def choose_members(snapshot: Snapshot, room: int | None) -> tuple[list[MemberSnapshot], int]:
    """Choose what to show when there is no room for all: those in trouble, then those waited for, in their order.

    Returns:
        The members to show, and how many are left out.
    """
    members = sorted(snapshot.members, key=lambda member: (_ROLES.index(member.role), member.rank))
    if room is None or len(members) <= room:
        return members, 0
    waited = {(wait.role, wait.rank) for wait in snapshot.waits if wait.since_s >= LONG_WAIT_S}
    by_need = sorted(members, key=lambda m: (m.state == "live", (m.role, m.rank) not in waited))
    troubled = sum(member.state != "live" for member in members)
    kept = by_need[: max(troubled, room - 1)]
    return [member for member in members if member in kept], len(members) - len(kept)


def plain_line(snapshot: Snapshot) -> str:
    """A snapshot in one line, for logs."""
    parts = [f"{snapshot.phase}: step {snapshot.version}/{snapshot.steps}"]
    parts += [item.plain for item in _numbers(snapshot)]
    parts += [snapshot.waiting_for] if any(wait.since_s >= LONG_WAIT_S for wait in snapshot.waits) else []
    return "  ".join(parts)


# -- The head -------------------------------------------------------------------------------------


def _title(snapshot: Snapshot, width: int) -> Text:
    style = _PHASE_STYLE.get(snapshot.phase, "yellow")
    title = Text.assemble((snapshot.phase, style), _GAP, (snapshot.run_dir, "bold"))
    if snapshot.term > 1:
        title.append(f"{_GAP}coordinator's life {snapshot.term}", style="dim")
    title.truncate(width, overflow="ellipsis")
    return title


def _bar(snapshot: Snapshot, width: int) -> RenderableType:
    done = f"{snapshot.version:,}/{snapshot.steps:,}"
    left = f"{clock(snapshot.seconds_left)} left" if snapshot.seconds_left is not None else ""
    texts = [Text(text) for text in (done, left) if text]
    bar_width = min(50, width - sum(len(text) + len(_GAP) for text in texts))
    grid = Table.grid(padding=(0, len(_GAP), 0, 0))
    bar = [ProgressBar(snapshot.steps, min(snapshot.version, snapshot.steps), bar_width)] if bar_width >= 8 else []
    grid.add_row(*bar, *texts)
    return grid


def _item(label: str, value: str, style: str = "bold") -> Text:
    return Text.assemble((f"{label} ", "dim"), (value, style))


def _numbers(snapshot: Snapshot) -> list[Text]:
    items = []
    if snapshot.loss is not None:
        items.append(_item("loss", f"{snapshot.loss:.4f}"))
    if snapshot.evaluation_loss is not None:
        at = f" at {snapshot.evaluation_version:,}" if snapshot.evaluation_version is not None else ""
        items.append(_item("held-out", f"{snapshot.evaluation_loss:.4f}{at}"))
    if snapshot.learning_rate is not None:
        items.append(_item("lr", f"{snapshot.learning_rate:.2e}"))
    if snapshot.gradient_norm is not None:
        items.append(_item("gradient norm", f"{snapshot.gradient_norm:.3g}"))
    if snapshot.loss_scale is not None:
        items.append(_item("loss scale", f"{snapshot.loss_scale:,.0f}"))
    if snapshot.skipped:
        items.append(_item("skipped", f"{snapshot.skipped:,}", "yellow"))
    if snapshot.tokens_per_s is not None:
        items.append(_item("tokens/s", f"{snapshot.tokens_per_s:,.0f}"))
    return items


def _times(snapshot: Snapshot) -> list[Text]:
    times = (
        ("step", snapshot.step_s),
        ("compute", snapshot.compute_s),
        ("push", snapshot.push_s),
        ("pull", snapshot.pull_s),
    )
    items = [_item(label, _seconds(value)) for label, value in times if value is not None]
    if items and snapshot.wait_s is not None:
        items[-1].append(f" ({_seconds(snapshot.wait_s)} waiting)", style="dim")
    if snapshot.contributions:
        items.append(_item("C", str(snapshot.contributions)))
        items.append(_item("G", str(snapshot.micro_batches)))
    if snapshot.checkpoint_version is not None:
        age = f", {clock(snapshot.checkpoint_age_s)} ago" if snapshot.checkpoint_age_s is not None else ""
        items.append(_item("checkpoint", f"{snapshot.checkpoint_version:,}{age}"))
    return items


def _flow(items: Sequence[Text], width: int) -> list[Text]:
    """Lay items out in as few lines as they need, never breaking one."""
    lines: list[Text] = []
    for item in items:
        if lines and lines[-1].cell_len + len(_GAP) + item.cell_len <= width:
            lines[-1].append(_GAP).append_text(item)
        else:
            lines.append(item.copy())
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines


# -- Whom it waits for ----------------------------------------------------------------------------


def _waits(snapshot: Snapshot, width: int) -> list[Text]:
    # Who starts, in good health, is not what keeps the others.
    long = sorted(
        (w for w in snapshot.waits if w.since_s >= LONG_WAIT_S),
        key=lambda w: (w.what.startswith("to start"), -w.since_s),
    )
    lines = [Text(_wait(wait), style="yellow") for wait in long[:NAMED_WAITS]]
    if len(long) > NAMED_WAITS:
        lines[-1].append(f", and for {len(long) - NAMED_WAITS} more")
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines


def _wait(wait: WaitSnapshot) -> str:
    who = f"{wait.role} {wait.rank}" if wait.rank is not None else f"any {wait.role}"
    if wait.role == "coordinator":
        who = "the coordinator"
    text = f"waiting for {who} ({wait.what}) since {wait.since_s:.1f} s"
    if wait.last_seen_s is not None:
        return f"{text}, last seen {wait.last_seen_s:.1f} s ago"
    return f"{text}, never seen" if wait.rank is not None else text


# -- The members ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    title: str
    cells: list[Text]
    #: So wide at least, so that the table does not move as numbers grow.
    least: int = 0
    right: bool = False

    @property
    def width(self) -> int:
        return max(self.least, len(self.title), *(cell.cell_len for cell in self.cells))


def _members(members: Sequence[MemberSnapshot], width: int) -> RenderableType:
    columns = _columns(members)
    chosen: set[str] = set()
    free = width + len(_GAP)
    for names in _NEED:
        wanted = sum((DOING_WIDTH if name == "doing" else columns[name].width) + len(_GAP) for name in names)
        if not any(cell.plain for name in names for cell in columns[name].cells):
            continue
        if wanted > free:
            break
        chosen.update(names)
        free -= wanted
    table = Table(box=None, padding=(0, len(_GAP), 0, 0), pad_edge=False, header_style="dim", expand=False)
    for name, column in columns.items():
        if name in chosen:
            wide = DOING_WIDTH + min(max(0, free), max(0, column.width - DOING_WIDTH))
            table.add_column(
                column.title,
                justify="right" if column.right else "left",
                width=wide if name == "doing" else column.width,
                no_wrap=True,
                overflow="ellipsis",
            )
    for row in range(len(members)):
        table.add_row(*(column.cells[row] for name, column in columns.items() if name in chosen))
    return table


def _columns(members: Sequence[MemberSnapshot]) -> dict[str, _Column]:
    """All columns, from left to right."""

    def spent(name: str) -> list[Text]:
        found = [member.last_contribution for member in members]
        return [Text(_seconds(getattr(last, name)) if last is not None else "") for last in found]

    def seen(member: MemberSnapshot) -> str:
        return f"{member.last_seen_s:.1f} s" if member.last_seen_s is not None else ""

    return {
        "member": _Column("", [Text(member.name, style="bold") for member in members]),
        "state": _Column("state", [_state(member) for member in members], least=len("starting 0:00")),
        "seen": _Column("seen", [Text(seen(member)) for member in members], least=7, right=True),
        "compute": _Column("compute", spent("compute_s"), least=7, right=True),
        "push": _Column("push", spent("push_s"), least=7, right=True),
        "pull": _Column("pull", spent("pull_s"), least=7, right=True),
        "waiting": _Column("waiting", spent("wait_s"), least=7, right=True),
        "restarts": _Column(
            "restarts", [Text(str(m.restarts or ""), style="yellow") for m in members], least=8, right=True
        ),
        "transport": _Column("via", [Text(member.transport) for member in members]),
        "process": _Column("process", [Text(_process(member)) for member in members]),
        "metrics": _Column("metrics", [Text(member.metrics_address) for member in members]),
        "doing": _Column("doing", [Text(_STEP.sub("", member.doing)) for member in members]),
    }


def _state(member: MemberSnapshot) -> Text:
    state = Text(member.state, style=_STATE_STYLE.get(member.state, ""))
    if member.since_s is not None:
        state.append(f" {clock(member.since_s)}", style="dim")
    if member.in_sync:
        state.append(" in sync", style="green")
    return state


def _process(member: MemberSnapshot) -> str:
    if member.pid is None:
        return member.host
    return f"{member.host}:{member.pid}" if member.host else str(member.pid)


def _seconds(seconds: float) -> str:
    """A duration with three digits or so: 12.3 s, 1.23 s, 45 ms."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms" if seconds < 0.9995 else "1.00 s"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s" if seconds < 1000 else clock(seconds)
