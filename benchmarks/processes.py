"""What several processes cost and bring: bytes sent in a step, and the fill of the cache.

    torchrun --standalone --nproc-per-node=2 benchmarks/processes.py    and    python benchmarks/processes.py

Both with OMP_NUM_THREADS=1. Each prints one line of JSON: seconds of the fill, and of each process's CPU time in it,
which other programs on the machine change less; microseconds of an exchange; bytes of a step by what trains.
"""

import argparse
import json
import time
from typing import Any

import torch
from torch import Tensor, distributed

import transferkit as tk
from transferkit.base.processes import exchange, rank, total, world_size

EXCHANGES = 1000


def bytes_of_a_step(boundary: str | None, images: tuple[Tensor, Tensor]) -> dict[str, int]:
    """Return the bytes that one training step puts into all-reduces, and those of the gradients of what trains."""
    torch.manual_seed(0)
    backbone = tk.load_backbone("vgg16", weights=None, image_size=32)
    model = tk.freeze_until(tk.attach_head(backbone, 10), boundary)
    trainer, sent = tk.Trainer(model, device="cpu", precision="fp32"), []
    steps = trainer.steps(images, batch_size=8, epochs=2)
    next(steps)  # the features, too
    all_reduce = distributed.all_reduce

    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *arguments, **options)

    distributed.all_reduce = counted
    try:
        next(steps)
    finally:
        distributed.all_reduce = all_reduce
    gradients = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    return {"gradients": gradients, "largest exchange": max(sent, default=0), "all exchanges": sum(sent)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=64)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    size = options.image_size
    images = torch.randint(0, 256, (options.images, 3, size, size), dtype=torch.uint8, generator=generator)
    targets = torch.arange(options.images) % 10
    torch.manual_seed(0)  # the same weights in each process
    backbone = tk.load_backbone("vgg16", weights=None, image_size=size)
    model = tk.freeze_until(tk.attach_head(backbone, 10), "head")
    tk.cache_features(model, (images[:8], targets[:8]), device="cpu", precision="fp32")  # warms up
    started, computed = time.perf_counter(), time.process_time()
    tk.cache_features(model, (images, targets), device="cpu", precision="fp32")
    computed = time.process_time() - computed
    found: dict[str, Any] = {"processes": world_size(), "threads": torch.get_num_threads()}
    found["fill s"] = round(time.perf_counter() - started, 2)
    found["fill CPU s"] = [round(seconds, 2) for seconds in exchange(computed, "CPU time")]
    started = time.perf_counter()
    for _ in range(EXCHANGES):
        total(1, "nothing")
    found["exchange us"] = round(1e6 * (time.perf_counter() - started) / EXCHANGES)
    for boundary in ("head", "block5"):
        found[boundary] = bytes_of_a_step(boundary, (images[:16, :, :32, :32], targets[:16]))
    if rank() == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
