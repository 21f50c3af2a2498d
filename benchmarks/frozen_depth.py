"""What a training step costs by frozen depth, and against the matrix-product rate of the machine.

    python benchmarks/frozen_depth.py [--image-size 32] [--steps 30]

VGG16 with a head of 4096-4096-10, Adam, batch 32, as in examples/finetune_cifar10.py, on random images: time does not
depend on what they show. Everything is measured in one run, depth by depth in turns, so that a busy machine slows all
alike.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Iterator

import torch

import transferkit as tk

BATCH_SIZE = 32
CIFAR10_STEPS = -(-50_000 // BATCH_SIZE)
GIGA_MACS_224 = 15.35  # of VGG16's convolutions at 224 px, forward
BLOCK5_SHARE = 1.39 / GIGA_MACS_224
FORWARDS = {"head": 1.0, "block5": 1.0 + 2 * BLOCK5_SHARE, "none": 3.0}  # backward is two forwards of what trains


def matrix_product_gflops(device: tk.Device, size: int = 4096) -> float:
    """Return the rate of a square product in the device's number format, the best of ten."""
    a = torch.randn(size, size, device=device.torch_device, dtype=device.dtype)
    times = []
    for _ in range(10):
        device.synchronize()
        started = time.perf_counter()
        torch.mm(a, a)
        device.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times) / 1e9


def endless_steps(depth: str, image_size: int) -> Iterator[tk.Step]:
    backbone = tk.load_backbone("vgg16", weights=None, image_size=image_size)
    model = tk.attach_head(backbone, 10, hidden=(4096, 4096))
    tk.freeze_until(model, None if depth == "none" else depth)
    images = torch.randint(0, 256, (1024, 3, image_size, image_size), dtype=torch.uint8)
    return tk.Trainer(model, lr=1e-4).steps((images, torch.arange(1024) % 10), epochs=1000, batch_size=BATCH_SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    device = tk.Device()
    peak = matrix_product_gflops(device)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"matrix product 4096 x 4096: {peak:.0f} GFLOP/s")
    runs = {depth: endless_steps(depth, options.image_size) for depth in FORWARDS}
    times: dict[str, list[float]] = {depth: [] for depth in runs}
    for number in range(options.steps + 3):
        for depth, steps in runs.items():
            started = time.perf_counter()
            next(steps)
            device.synchronize()
            if number >= 3:  # the first ones allocate
                times[depth].append(1000 * (time.perf_counter() - started))
    print("frozen until   ms a step (quartiles)      floor of the convolutions   CIFAR-10 epoch")
    for depth, depth_times in times.items():
        low, middle, high = statistics.quantiles(depth_times, n=4)
        giga_flop = 2 * GIGA_MACS_224 * (options.image_size / 224) ** 2 * BATCH_SIZE * FORWARDS[depth]
        floor_ms = 1000 * giga_flop / peak
        seconds = CIFAR10_STEPS * middle / 1000
        print(f"{depth:12} {middle:7.1f} ({low:.1f} to {high:.1f}) {floor_ms:20.1f} ms {seconds:20.0f} s")


if __name__ == "__main__":
    main()
