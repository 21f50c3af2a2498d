"""Measure the peak resident memory of training on the CPU against what must be in memory.

    python benchmarks/peak_memory.py [--image-size 64] [--json peak_memory.json]

Each row is a process of its own, under Linux. The peak is above that of a process that has imported torch and the
library. What must be in memory: parameters, gradients, Adam's two moments, the copy of the best weights, cached
features, and the activations of one batch. These are the ones needed for the backward pass, or the two largest that
exist at once while features are computed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

import transferkit as tk

ROWS: dict[str, dict[str, object]] = {
    "head": {"frozen_until": "head"},
    "block5": {"frozen_until": "block5"},
    "everything": {"frozen_until": None},
    "everything, micro-batches of 8": {"frozen_until": None, "micro_batch_size": 8},
}
BATCH_SIZE = 32
IMAGES = 64


def resident_bytes(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[field].split()[0])


def output_bytes(model: tk.TransferModel, batch_size: int) -> list[int]:
    """Return the bytes of each layer's output, except those computed in place."""
    shape = (1, 3, model.backbone.image_size, model.backbone.image_size)
    outputs, images = [], torch.zeros(shape, device="meta")
    for layer in model.backbone.features:
        if not isinstance(layer, torch.nn.ReLU):
            images = layer.to("meta")(images)
            outputs.append(2 * batch_size * images.numel())  # bf16
    return outputs


def measure(image_size: int, frozen_until: str | None, micro_batch_size: int | None = None) -> dict[str, float]:
    images = torch.randint(0, 256, (IMAGES, 3, image_size, image_size), dtype=torch.uint8)
    data = (images, torch.arange(IMAGES) % 10)
    before = resident_bytes("VmRSS")
    model = tk.attach_head(
        tk.load_backbone(weights=None, image_size=image_size), 10, hidden=(4096, 4096), pooling="flatten"
    )
    trainer = tk.Trainer(tk.freeze_until(model, frozen_until), lr=1e-4, device="cpu")
    trainer.micro_batch_size = micro_batch_size
    trainer.fit(data, validation_data=data, epochs=2, batch_size=BATCH_SIZE, verbose=0)
    peak = resident_bytes("VmHWM") - before
    frozen = len(model.split()[0])
    total = 4 * sum(parameter.numel() for parameter in model.parameters())
    trainable = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    pixels = 2**19 // image_size**2  # images that the prefix computes at once
    prefix = sorted(output_bytes(model, pixels)[:frozen])[-2:] if frozen else [0]
    layers = model.backbone.features
    first = sum(not isinstance(layer, torch.nn.ReLU) for layer in layers[:frozen])
    kept = sum(output_bytes(model, BATCH_SIZE)[first:])
    features = output_bytes(model, IMAGES)[first - 1] if frozen else 0
    held = total + 4 * trainable + features + max(sum(prefix), kept)
    return {"peak_mb": peak / 1e6, "held_mb": held / 1e6, "activations_mb": kept / 1e6, "ratio": peak / held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options.image_size, **ROWS[options.row])))
        return
    results = {}
    print(f"{'trains':36} peak MB{'required MB':>15}{'activations MB':>23}{'ratio':>20}")
    for row in ROWS:
        command = [sys.executable, __file__, "--image-size", str(options.image_size), "--row", row]
        results[row] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found = results[row]
        print(f"{row:36} {found['peak_mb']:7.0f} {found['held_mb']:14.0f} {found['activations_mb']:22.0f}", end="")
        print(f" {found['ratio']:19.2f}")
    if options.json:
        about = {"torch": torch.__version__, "image_size": options.image_size, "batch_size": BATCH_SIZE}
        options.json.write_text(json.dumps({**about, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
