"""Host memory: how much is free, and how to keep freed blocks for the next training step."""

import ctypes
import sys
from pathlib import Path


def keep_freed_blocks() -> bool:
    """Stop glibc from returning freed blocks over 128 KiB at once, and return whether that worked.

    Large steps take half the time (`benchmarks/host_memory.py`); the process keeps its peak memory until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, in bytes as a C int, and M_TOP_PAD
    settings = {-3: 2**31 - 1, -1: 2**31 - 1, -2: 64 * 2**20}
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in settings.items())


def host_bytes() -> dict[str, int] | None:
    """Return `"free"` and `"total"` memory of the host, or of a container with less, in bytes; None but under Linux."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free, total = (int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        allowed = int(limit.read_text())
        free, total = min(free, max(0, allowed - int(used.read_text()))), min(total, allowed)
    return {"free": free, "total": total}
