"""Measure how the time of `fit` scales with images, image size, epochs and frozen depth, cached and uncached.

    python benchmarks/scaling.py [--precision fp32] [--plot scaling.png]   # the plot needs matplotlib

VGG16 with a head of 4096-4096-10, Adam, batch size 32, on random images: time does not depend on what they show. One
setting varies at a time, around 250 images of 64 px, 4 epochs and every convolution frozen. "kept" trains on cached
features, "recomputed" without the cache; the two run in turns.
"""

import argparse
import time
from pathlib import Path

import torch
from limits import make_model

import transferkit as tk

BASE: dict[str, object] = {"images": 250, "image_size": 64, "epochs": 4, "frozen_until": "head"}
VALUES: dict[str, list[object]] = {
    "images": [125, 250, 500],
    "image_size": [32, 64, 96],
    "epochs": [1, 2, 4, 8],
    "frozen_until": ["head", "block5", "block4", "block3", None],
}
MODES: dict[str, str | bool] = {"kept": "auto", "recomputed": False}


def fit_seconds(
    *, images: int, image_size: int, epochs: int, frozen_until: str | None, cache: str | bool, precision: str
) -> float:
    torch.manual_seed(0)
    trainer = tk.Trainer(make_model(image_size, frozen_until), lr=1e-4, cache=cache, precision=precision)
    data = (torch.randint(0, 256, (images, 3, image_size, image_size), dtype=torch.uint8), torch.arange(images) % 10)
    started = time.perf_counter()
    trainer.fit(data, epochs=epochs, batch_size=32, verbose=0)
    trainer.device.synchronize()
    return time.perf_counter() - started


def draw(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), layout="constrained")
    for axes, (name, modes) in zip(figure.subplots(1, len(results)), results.items(), strict=True):
        for mode, times in modes.items():
            axes.plot([str(value) for value in VALUES[name]], times, marker="o", label=mode)
        axes.set_xlabel(name.replace("_", " "))
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("seconds of fit")
    figure.axes[0].legend(title="features", frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    base = {**BASE, "precision": options.precision}
    fit_seconds(**{**base, "images": 32, "image_size": 32, "epochs": 1}, cache=False)  # warms up
    print(f"torch {torch.__version__}, {tk.Device(precision=options.precision)!r}, {torch.get_num_threads()} threads")
    results: dict[str, dict[str, list[float]]] = {name: {mode: [] for mode in MODES} for name in VALUES}
    for name, values in VALUES.items():
        for value in values:
            kept, recomputed = (fit_seconds(**{**base, name: value}, cache=cache) for cache in MODES.values())
            results[name]["kept"].append(kept)
            results[name]["recomputed"].append(recomputed)
            print(f"{name} {value}: kept {kept:.1f} s, recomputed {recomputed:.1f} s, ratio {recomputed / kept:.2f}")
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
