"""Whether the process that wrote something still runs: process ids alone are given out again."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

_START_FIELD = 22  # of /proc/PID/stat, in clock ticks since the boot (man proc_pid_stat)


@cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def identity(pid: int) -> str | None:
    """Of a running process: its id, its start and this boot, unlike any other's. None where no such
    process runs."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in brackets, which may hold blanks and brackets.
    fields = stat[stat.rindex(")") + 2 :].split()
    state, start = fields[0], fields[_START_FIELD - 3]
    if state in "ZX":
        return None
    return f"{pid} {start} {_boot()}"


def own_identity() -> str:
    """Of this process; anew in a child of fork."""
    found = identity(os.getpid())
    assert found is not None
    return found


def is_running(known: str) -> bool:
    """known: what `identity` said of a process; other text is of none."""
    pid, _, _ = known.partition(" ")
    return pid.isdecimal() and identity(int(pid)) == known
