"""Time a training step of a 4096-4096 head on the CPU, with and without keeping freed memory blocks.

    python benchmarks/host_memory.py

Each of the two runs has its own process, because the setting applies to a whole process.
"""

import json
import platform
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

from transferkit.compute.host_memory import keep_freed_blocks

STEPS, WARMUP_STEPS = 30, 5


def step_times_ms() -> list[float]:
    """Time steps of Flatten-Dense(4096)-Dense(4096)-Dense(10) on 512 features, bf16 autocast, fused Adam, batch 32."""
    torch.manual_seed(0)
    layers = (nn.Linear(512, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))
    head = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(head.parameters(), fused=True)
    features, targets = torch.randn(32, 512), torch.arange(32) % 10
    times = []
    for _ in range(WARMUP_STEPS + STEPS):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(head(features), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(1000 * (time.perf_counter() - started))
    return times[WARMUP_STEPS:]


def main() -> None:
    if len(sys.argv) > 1:
        if sys.argv[1] == "kept":
            keep_freed_blocks()
        print(json.dumps(step_times_ms()))
        return
    runs = {}
    for name in ("default", "kept"):
        output = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True).stdout
        runs[name] = json.loads(output)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    for name, times in runs.items():
        low, middle, high = (times_ms for times_ms in statistics.quantiles(times, n=4))
        print(f"{name:8} {middle:6.1f} ms a step (quartiles {low:.1f} to {high:.1f}, {STEPS} steps)")
    print(f"ratio {statistics.median(runs['default']) / statistics.median(runs['kept']):.2f}")


if __name__ == "__main__":
    main()
