"""Windlass's own worker, which also says what it takes of its device.

    python -m benchmarks.support.device_worker DEVICE worker --coordinator HOST:PORT

Each line of standard input is answered by a line: the peak in bytes since the last one. The rest of the command
line is `windlass`'s.
"""

from __future__ import annotations

import sys
import threading

from workers.cli.main import main


def _answer(device_name: str) -> None:
    for _ in sys.stdin:
        # By now the worker has imported it.
        import torch

        from benchmarks.support import device_memory

        device = torch.device(device_name)
        print(device_memory.peak(device), flush=True)
        device_memory.reset_peak(device)


if __name__ == "__main__":
    threading.Thread(target=_answer, args=[sys.argv.pop(1)], daemon=True).start()
    sys.exit(main())
