"""Describe the machine and measure its current speed, which shows noisy neighbours around a contestant's run."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

COPY_BYTES = 2**28
PRODUCT_SIZE = 4096


def describe_machine() -> dict[str, object]:
    """Return the processor's name, the cores this process may use and the memory."""
    processor, memory_gb = platform.processor() or platform.machine(), 0.0
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
                break
    if Path("/proc/meminfo").exists():
        memory_gb = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": processor,
        "cores": cores,
        "memory_gb": round(memory_gb, 1),
        "python": platform.python_version(),
    }


def best_time(work: Callable[[], object], repetitions: int) -> float:
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def measure_rates(dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """Return the rates of a memory copy and of a matrix product, each the best of a few runs."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    a = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype)
    copy_s = best_time(lambda: target.copy_(source), 5)
    product_s = best_time(lambda: torch.mm(a, a), 3)
    return {"copy_gb_s": COPY_BYTES / copy_s / 1e9, "product_gflop_s": 2 * PRODUCT_SIZE**3 / product_s / 1e9}
