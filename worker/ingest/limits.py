"""Limits of the process that parses what a user sent."""

import resource
import sys
from pathlib import Path

from core.settings import DataLimits

_CPU_GRACE_S = 5


def apply_process_limits(limits: DataLimits, *, beside_bytes: int = 0) -> None:
    """Bound address space and CPU time of this process and its children; no core dumps.

    `beside_bytes` of address space are granted beside the limit, for what is loaded already.

    For a process of its own: the limits cannot be taken back. Beyond the memory limit allocation
    fails (MemoryError), beyond the CPU limit the system sends SIGXCPU, and SIGKILL 5 s later. A
    limit that is already lower stays. macOS does not enforce RLIMIT_AS and is left alone there.
    """
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_CPU, limits.parser_cpu_s, grace=_CPU_GRACE_S)
    if sys.platform != "darwin":
        _lower(resource.RLIMIT_AS, limits.parser_memory_bytes + beside_bytes)


def mapped_bytes() -> int:
    """Return the address space of this process; 0 where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    except FileNotFoundError:
        return 0
    return int(pages) * resource.getpagesize()


def _lower(which: int, value: int, *, grace: int = 0) -> None:
    """Lower the soft limit to `value` and the hard one to `value + grace`; never raise one."""
    soft, hard = (
        wanted if present == resource.RLIM_INFINITY else min(wanted, present)
        for wanted, present in zip((value, value + grace), resource.getrlimit(which), strict=True)
    )
    resource.setrlimit(which, (min(soft, hard), hard))
