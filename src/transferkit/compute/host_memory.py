"""The host's memory: how much is free, and keeping the large blocks that a training step frees for the next one."""

import ctypes
import sys
from pathlib import Path

_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_LARGEST_BLOCK_BYTES = 2**31 - 1  # mallopt takes an int
_TOP_PAD_BYTES = 64 * 2**20


def keep_freed_blocks() -> bool:
    """Stop glibc from handing freed blocks over 128 KiB straight back to the system, for this process.

    Otherwise every step maps its gradients and activations anew and the kernel clears them page by page: half the
    time of a step that trains a 4096-4096 head on a CPU (`benchmarks/host_memory.py`). The price is that the process
    keeps its peak memory until it ends.

    Returns:
        Whether it was done; elsewhere than on glibc there is nothing to do.

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
    """Return the bytes of host memory `"free"` and `"total"`, now; None elsewhere than on Linux.

    A container that may use less than the machine has counts as a machine of that size.
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
