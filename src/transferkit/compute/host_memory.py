"""Host memory: how much is free, and how to keep freed blocks for the next training step."""

import ctypes
import sys
from pathlib import Path

_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_LARGEST_BLOCK_BYTES = 2**31 - 1  # mallopt takes an int
_TOP_PAD_BYTES = 64 * 2**20


def keep_freed_blocks() -> bool:
    """Stop glibc, in this process, from returning freed blocks over 128 KiB to the system at once.

    Otherwise every step maps memory for its gradients and activations again and the kernel clears it page by page:
    half the time of a step that trains a 4096-4096 head on a CPU (`benchmarks/host_memory.py`). The price: the process
    keeps its peak memory until it ends.

    Returns:
        Whether it was done; false where the C library is not glibc.

    Example:
        >>> keep_freed_blocks() in (True, False)
        True
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    settings = {
        _M_MMAP_THRESHOLD: _LARGEST_BLOCK_BYTES,
        _M_TRIM_THRESHOLD: _LARGEST_BLOCK_BYTES,
        _M_TOP_PAD: _TOP_PAD_BYTES,
    }
    return all(mallopt(name, value) == 1 for name, value in settings.items())


def host_bytes() -> dict[str, int] | None:
    """Return the current `"free"` and `"total"` host memory, in bytes; None on any system but Linux.

    A container's limit counts as the total if it is lower.
    """
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
