"""Measure the peak memory of training on the CPU against what must be in memory, and what keeping freed blocks saves.

    python benchmarks/memory.py [--image-size 64]

Each row is a process of its own, under Linux. The peak is above that of a process that has imported torch and the
library. What must be in memory: parameters, gradients, Adam's two moments, the copy of the best weights, cached
features, and the activations of one batch. These are the ones needed for the backward pass, or the two largest that
exist at once while features are computed. The last rows time a step of a 4096-4096 head with and without keeping freed
memory blocks, a setting of a whole process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from limits import BATCH_SIZE, make_model
from torch import nn

import transferkit as tk
from transferkit.compute.host_memory import keep_freed_blocks

TRAINED: dict[str, dict[str, object]] = {
    "head": {"frozen_until": "head"},
    "block5": {"frozen_until": "block5"},
    "everything": {"frozen_until": None},
    "everything, micro-batches of 8": {"frozen_until": None, "micro_batch_size": 8},
}
BLOCKS = ("returned", "kept")
IMAGES, STEPS, WARMUP_STEPS = 64, 30, 5


def resident_bytes(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[field].split()[0])


def output_bytes(model: tk.TransferModel, batch_size: int) -> list[int]:
    """Return the bytes of each layer's output, except those computed in place."""
    shape = (1, 3, model.backbone.image_size, model.backbone.image_size)
    outputs, images = [], torch.zeros(shape, device="meta")
    for layer in model.backbone.features:
        if not isinstance(layer, nn.ReLU):
            images = layer.to("meta")(images)
            outputs.append(2 * batch_size * images.numel())  # bf16
    return outputs


def peak_of(image_size: int, frozen_until: str | None, micro_batch_size: int | None = None) -> str:
    images = torch.randint(0, 256, (IMAGES, 3, image_size, image_size), dtype=torch.uint8)
    data = (images, torch.arange(IMAGES) % 10)
    before = resident_bytes("VmRSS")
    model = make_model(image_size, frozen_until)
    trainer = tk.Trainer(model, lr=1e-4, device="cpu")
    trainer.micro_batch_size = micro_batch_size
    trainer.fit(data, validation_data=data, epochs=2, batch_size=BATCH_SIZE, verbose=0)
    peak = resident_bytes("VmHWM") - before
    frozen = len(model.split()[0])
    total = 4 * sum(parameter.numel() for parameter in model.parameters())
    trainable = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    pixels = 2**19 // image_size**2  # images that the prefix computes at once
    prefix = sorted(output_bytes(model, pixels)[:frozen])[-2:] if frozen else [0]
    first = sum(not isinstance(layer, nn.ReLU) for layer in model.backbone.features[:frozen])
    kept = sum(output_bytes(model, BATCH_SIZE)[first:])
    features = output_bytes(model, IMAGES)[first - 1] if frozen else 0
    held = total + 4 * trainable + features + max(sum(prefix), kept)
    return f"{peak / 1e6:7.0f} {held / 1e6:14.0f} {kept / 1e6:22.0f} {peak / held:19.2f}"


def step_times_ms(blocks: str) -> list[float]:
    """Time steps of Dense(4096)-Dense(4096)-Dense(10) on 512 features, bf16 autocast, fused Adam, batch size 32."""
    if blocks == "kept":
        keep_freed_blocks()
    layers = (nn.Linear(512, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))
    head = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(head.parameters(), fused=True)
    features, targets = torch.randn(BATCH_SIZE, 512), torch.arange(BATCH_SIZE) % 10
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--row", choices=[*TRAINED, *BLOCKS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row in TRAINED:
        print(peak_of(options.image_size, **TRAINED[options.row]))
        return
    if options.row:
        print(json.dumps(step_times_ms(options.row)))
        return

    def run(row: str) -> str:
        command = [sys.executable, __file__, "--image-size", str(options.image_size), "--row", row]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip("\n")

    print(f"{'trains':36} peak MB{'required MB':>15}{'activations MB':>23}{'ratio':>20}")
    for row in TRAINED:
        print(f"{row:36} {run(row)}", flush=True)
    for row in BLOCKS:
        low, middle, high = statistics.quantiles(json.loads(run(row)), n=4)
        print(f"freed blocks {row:8}: {middle:.1f} ms a step (quartiles {low:.1f} to {high:.1f}, {STEPS} steps)")


if __name__ == "__main__":
    main()
