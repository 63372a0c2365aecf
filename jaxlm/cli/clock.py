"""When a command began: for `jaxlm`, the moment the process did, imports included."""

import os
import time

_began = time.perf_counter()


def start(own: bool) -> None:
    """A command begins now; where the process is its `own`, it began with that."""
    global _began
    _began = min(_began, time.perf_counter() - process_age()) if own else time.perf_counter()


def began() -> float:
    """The moment the command began, on time.perf_counter's scale."""
    return _began


def process_age() -> float:
    """Seconds since the system started this process; 0 where it does not tell."""
    try:
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # the name may hold spaces
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):  # not Linux, or one that hides it
        return 0.0
    return max(age, 0.0) if ticks else 0.0
