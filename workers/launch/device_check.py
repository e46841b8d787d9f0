"""Whether the device that a job names is there, asked before anything starts."""

from __future__ import annotations

import subprocess
import sys

from ps.errors import ConfigError

_ASK = """
import sys
from ps.errors import PsError
from workers.engine.device import choose
try:
    choose(sys.argv[1])
except PsError as error:
    sys.exit(error.message)
"""


def refuse_missing_device(wanted: str) -> None:
    """See that a worker on this host would find its device.

    A process of its own asks torch, which the launcher does not load; only when the job names an accelerator.

    Raises:
        ConfigError: it would not.
    """
    if wanted in ("auto", "cpu"):
        return
    asked = subprocess.run([sys.executable, "-c", _ASK, wanted], stderr=subprocess.PIPE, text=True, check=False)
    if asked.returncode != 0:
        lines = asked.stderr.strip().splitlines()
        raise ConfigError(
            lines[-1] if lines else f"worker.device={wanted}: asking for it ended with {asked.returncode}"
        )
