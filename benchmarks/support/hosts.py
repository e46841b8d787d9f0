"""A small network on one machine: hosts joined by a switch, each link limited to a rate.

A host is a network namespace, and so is the switch (a bridge): the machine's own interfaces and firewall
are not touched, and all of it is gone when the namespaces are. Each link is limited at both ends by a token bucket:
what the host sends at the host, what it receives at the switch, where the queue of a real switch would be.

Hosts share processes and memory in all but the network, so that worker and shard on two of them could share
memory: what is measured here has to run with `launch.transport=grpc`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

#: A namespace is called PREFIX, the pid of who made it, and what it is.
_PREFIX = "windlass"
_SWITCH = "switch"
#: What a host calls its link.
INTERFACE = "eth0"
_NETWORK = "10.77.0"
#: The bucket holds so much of the link's time: little enough that a link that was idle is given next to
#: nothing for free, more than the kernel's timers are late by.
_BURST_S = 0.001
#: The bucket takes what TCP hands down in one piece, 64 KiB and a header for each 1448 bytes of it: from a smaller one
#: the kernel cuts every piece into packets, and the cores are busy with packets instead of what is measured.
_LARGEST_PIECE = 70_000
#: What a port of the switch queues before it drops, in time of the link; a few senders at once need that.
_QUEUE_S = 0.05


@dataclass(frozen=True)
class Host:
    """Where a process may run."""

    address: str
    #: None: this machine as it is.
    namespace: str | None = None

    def command(self, command: Sequence[str]) -> list[str]:
        """The command that runs `command` on this host; the process keeps the pid that it is started with."""
        if self.namespace is None:
            return list(command)
        return ["ip", "netns", "exec", self.namespace, *command]


HERE = Host("127.0.0.1")


class Network:
    """Hosts on one switch, while the `with` block lasts.

    Processes on them have to be stopped before it ends: they would keep their host alive.
    """

    def __init__(self, num_hosts: int, bits_per_s: float) -> None:
        """
        Args:
            bits_per_s: of each link in each direction, headers included.
        """
        own = f"{_PREFIX}-{os.getpid()}"
        self.hosts = [Host(f"{_NETWORK}.{index + 1}", f"{own}-{index + 1}") for index in range(num_hosts)]
        self._switch = f"{own}-{_SWITCH}"
        self._bits_per_s = bits_per_s

    def __enter__(self) -> Network:
        """
        Raises:
            subprocess.CalledProcessError: the kernel refuses, for example in a container without the right to.
        """
        _sweep()
        try:
            self._make_switch()
            for index, host in enumerate(self.hosts):
                self._attach(host, f"port{index + 1}")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def _make_switch(self) -> None:
        _run("ip", "netns", "add", self._switch)
        _run("ip", "-n", self._switch, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "switch", "up")

    def _attach(self, host: Host, port: str) -> None:
        assert host.namespace is not None
        _run("ip", "netns", "add", host.namespace)
        peer = ("type", "veth", "peer", "name", INTERFACE, "netns", host.namespace)
        _run("ip", "-n", self._switch, "link", "add", port, *peer)
        _run("ip", "-n", self._switch, "link", "set", port, "master", "switch", "up")
        _run("ip", "-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
        _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
        _run("ip", "-n", host.namespace, "link", "set", INTERFACE, "up")
        # What most machines have, whatever this one has.
        route = (f"{_NETWORK}.0/24", "dev", INTERFACE, "src", host.address, "congctl", "cubic")
        _run("ip", "-n", host.namespace, "route", "replace", *route)
        for namespace, device in ((host.namespace, INTERFACE), (self._switch, port)):
            self._limit(namespace, device)

    def _limit(self, namespace: str, device: str) -> None:
        """Limit what goes out of an interface."""
        bytes_per_s = self._bits_per_s / 8
        burst = max(_LARGEST_PIECE, int(_BURST_S * bytes_per_s))
        limit = burst + int(_QUEUE_S * bytes_per_s)
        bucket = ("rate", f"{self._bits_per_s:.0f}bit", "burst", f"{burst}b", "limit", f"{limit}b")
        _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *bucket)

    def _remove(self) -> None:
        for namespace in (*(host.namespace for host in self.hosts), self._switch):
            if namespace in _namespaces():
                _run("ip", "netns", "delete", namespace)


def missing() -> str | None:
    """What this machine lacks for a network of its own; None: nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"there is no `{tool}` (iproute2)"
    try:
        with Network(1, 1e9):
            return None
    except subprocess.CalledProcessError as error:
        return f"the kernel refuses `{' '.join(error.cmd)}`: {error.stderr.strip()}"


def _sweep() -> None:
    """Remove what a benchmark that was killed has left."""
    for namespace in _namespaces():
        prefix, _, rest = namespace.partition("-")
        pid = rest.partition("-")[0]
        if prefix == _PREFIX and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            _run("ip", "netns", "delete", namespace)


def _namespaces() -> list[str]:
    lines = _run("ip", "netns", "list").splitlines()
    return [line.split()[0] for line in lines if line]


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
