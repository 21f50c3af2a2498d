"""Measure each stage of training against the machine's limits.

    python benchmarks/limits.py [--image-size 64] [--repetitions 9] [--precision fp32] [--json limits.json]

The limits are a square matrix product in the device's precision and a memory copy. They are measured in turns with
every stage, so that a busy machine slows both. A stage's floor is its arithmetic at the rate of the product plus, for
training steps, 28 bytes per parameter at the bandwidth of the copy: Adam reads weight, gradient and two moments and
writes weight and two moments, in float32.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import transferkit as tk
from transferkit.features.file import DIGEST_BYTES, write_features
from transferkit.features.prefix import Prefix

BATCH_SIZE = 32
BYTES_PER_PARAMETER = 28
MATRIX = 4096
COPY_BYTES = 2**28


def seconds(run: Callable[[], object], device: tk.Device) -> float:
    device.synchronize()
    started = time.perf_counter()
    run()
    device.synchronize()
    return time.perf_counter() - started


def convolution_flop(model: tk.TransferModel, layers: int, *, first: int = 0) -> float:
    """Return the floating-point operations of the forward pass of layers `first` to `layers`, for one image."""
    side, flop = model.backbone.image_size, 0.0
    for index, layer in enumerate(model.backbone.features[:layers]):
        if isinstance(layer, torch.nn.MaxPool2d):
            side //= 2
        elif isinstance(layer, torch.nn.Conv2d) and index >= first:
            flop += 2 * 9 * layer.in_channels * layer.out_channels * side**2
    return flop


def make_model(image_size: int, frozen_until: str | None) -> tk.TransferModel:
    model = tk.attach_head(
        tk.load_backbone(weights=None, image_size=image_size), 10, hidden=(4096, 4096), pooling="flatten"
    )
    return tk.freeze_until(model, frozen_until)


def training(device: tk.Device, image_size: int, frozen_until: str | None) -> tuple[Callable[[], object], float, float]:
    """Return one training step on cached features, its operations and its bytes."""
    model = make_model(image_size, frozen_until)
    images = torch.randint(0, 256, (4 * BATCH_SIZE, 3, image_size, image_size), dtype=torch.uint8)
    data = (images, torch.arange(len(images)) % 10)
    steps: Iterator[tk.Step] = tk.Trainer(model, lr=1e-4, device=device).steps(
        data, epochs=10**6, batch_size=BATCH_SIZE
    )
    frozen = len(model.split()[0])
    linear = [layer for layer in model.head if isinstance(layer, torch.nn.Linear)]
    flop = 3 * convolution_flop(model, len(model.backbone.features), first=frozen)
    flop += 2 * sum(layer.weight.numel() for layer in linear) * 3
    flop -= 0 if frozen < len(model.backbone.features) else 2 * linear[0].weight.numel()  # features need no gradient
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return lambda: next(steps), BATCH_SIZE * flop, BYTES_PER_PARAMETER * trainable


def prefix(device: tk.Device, image_size: int, frozen_until: str) -> tuple[Callable[[], object], float, float]:
    """Return one batch of features, its operations and no bytes."""
    model = device.prepare(make_model(image_size, frozen_until))
    layers, _ = model.split()
    compute = Prefix(layers, model.backbone.preprocess, device=device)
    images = torch.randn(compute.batch_size, 3, image_size, image_size, device=device.torch_device)
    return lambda: compute(images), compute.batch_size * convolution_flop(model, len(layers)), 0.0


def file_of_features(folder: Path) -> tuple[Callable[[], object], float, float]:
    """Return opening a file of features, digest included; its bytes are read once."""
    features = torch.zeros(1, COPY_BYTES // 2, dtype=torch.bfloat16)
    file = write_features(folder, "0" * 64, [bytes(DIGEST_BYTES)], features)
    return file.read, 0.0, COPY_BYTES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = tk.Device(precision=options.precision)
    place, size = device.torch_device, options.image_size
    matrix = torch.randn(MATRIX, MATRIX, device=place, dtype=device.dtype)
    source, target = (torch.ones(COPY_BYTES // 4, device=place) for _ in range(2))
    rows = []
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, images of {size} px")
    print("stage                           ms   GFLOP/s  product's     copy's GB/s   floor ms   time / floor")
    with tempfile.TemporaryDirectory() as folder:
        stages = {
            "prefix, all blocks": lambda: prefix(device, size, "head"),
            "prefix, blocks 1 to 4": lambda: prefix(device, size, "block5"),
            "step, head": lambda: training(device, size, "head"),
            "step, block5 and head": lambda: training(device, size, "block5"),
            "step, everything": lambda: training(device, size, None),
            "open a file of features": lambda: file_of_features(Path(folder)),
        }
        for name, make in stages.items():
            run, flop, num_bytes = make()
            times: list[tuple[float, float, float]] = []
            for number in range(options.repetitions + 2):
                product = seconds(lambda: torch.mm(matrix, matrix), device)
                copy = seconds(lambda: target.copy_(source), device)
                if number >= 2:  # the first ones allocate
                    times.append((seconds(run, device), product, copy))
                else:
                    run()
            stage, product, copy = (statistics.median(column) for column in zip(*times, strict=True))
            rate, bandwidth = 2 * MATRIX**3 / product, 2 * COPY_BYTES / copy
            floor = flop / rate + num_bytes / bandwidth
            low, _, high = statistics.quantiles([time for time, _, _ in times], n=4)
            row = {"stage": name, "ms": 1e3 * stage, "quartiles_ms": [1e3 * low, 1e3 * high]}
            row |= {"gflops": flop / stage / 1e9, "product_gflops": rate / 1e9, "copy_gb_s": bandwidth / 1e9}
            row |= {"floor_ms": 1e3 * floor, "memory_floor_ms": 1e3 * num_bytes / bandwidth, "ratio": stage / floor}
            rows.append(row)
            print(
                f"{name:27} {row['ms']:7.1f} {row['gflops']:9.0f} {row['product_gflops']:9.0f}"
                f" {row['copy_gb_s']:16.1f} {row['floor_ms']:10.1f} {row['ratio']:14.2f}"
            )
            del run
    if options.json:
        about = {"torch": torch.__version__, "device": repr(device), "threads": torch.get_num_threads()}
        options.json.write_text(json.dumps({**about, "image_size": size, "stages": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
