"""Runs a command that ends when its parent does, however that ends.

    python scripts/gpu_check_guard.py PARENT_PID COMMAND...

Started in a session of its own, whose processes are the command and all that it starts. SIGKILL of
the parent leaves it no time to end them; Linux then sends this process SIGTERM, and this process
ends them all. Its exit code is the command's, or 128 and the number of the signal that ended it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> int:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    # The command gets its own; this process waits for what it does about it.
    signal.signal(signal.SIGINT, lambda *_: None)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # gone before the line above
        return 128 + signal.SIGTERM
    code = subprocess.Popen(command).wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
