"""What torch has taken of a device: of a GPU what it has allocated, of the CPU what this process has resident."""

from __future__ import annotations

from pathlib import Path

import torch


def now(device: torch.device) -> int:
    """Bytes."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident("self", "VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes at once since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("self", "VmHWM")


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def resident(pid: int | str, key: str) -> int:
    """Resident memory of a process in bytes: VmRSS now, VmHWM at its peak.

    Raises:
        OSError: there is no such process.
        KeyError: it has ended.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
