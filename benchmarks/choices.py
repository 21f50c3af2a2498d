"""Measure what each choice of fine-tuning does: depth, learning rate, epochs, batch size, schedule, rates by block, ...

Trains on the 2,000 CIFAR-10 images in examples/assets at 32 px. Tests on the 500 images beside them or, with --data, on
at most 2,000 images of a folder with test/<class>/*.jpg. Each question writes its runs to one JSON file:

    python benchmarks/choices.py depth --json choices_depth.json

These runs measure accuracy, not time. The runs of a question differ only in what the question names.
"""

import argparse
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from job import IMAGES, WEIGHTS
from torchvision.datasets import ImageFolder

import transferkit as tk

DEPTHS = ["head", "block5", "block4", "block3", None]
RATES = [1e-5, 1e-4, 1e-3]
WARM = {"schedule": "cosine", "warmup_steps": 30}
SEEDS = [0, 1]

Data = tuple[torch.Tensor, torch.Tensor]


def questions() -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
    """Return the settings of each question's runs."""
    return {
        "depth": lambda: ({"freeze_until": depth, "lr": lr, "epochs": 4, **WARM} for depth in DEPTHS for lr in RATES),
        "epochs": lambda: (
            {"freeze_until": depth, "lr": lr, "epochs": 16} for depth, lr in [("head", 1e-3), ("block5", 1e-4)]
        ),
        "batch_size": lambda: (
            {"freeze_until": "head", "lr": lr, "batch_size": size, "epochs": 8, "seed": seed}
            for size in (8, 32, 128, 512)
            for lr in (1e-4, 1e-3, 1e-2)
            for seed in SEEDS
        ),
        "head_rate": lambda: (
            {"freeze_until": "head", "lr": lr, "epochs": 4, "seed": seed, **schedule}
            for lr in (3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2)
            for schedule in ({}, WARM)
            for seed in (0, 1, 2)
        ),
        "schedule": lambda: (
            {"freeze_until": "block5", "lr": lr, "epochs": 4, "seed": seed, **schedule}
            for lr in (1e-4, 3e-4, 1e-3)
            for schedule in ({}, {"schedule": "cosine"}, WARM, {"schedule": "one_cycle"})
            for seed in SEEDS
        ),
        "rates_by_block": lambda: (
            {"freeze_until": "block4", "lr": lr, "epochs": 3, "seed": seed, **WARM}
            for lr in (1e-4, 3e-4, {"head": 1e-3, "factor": 0.3}, {"head": 1e-3, "factor": 0.1})
            for seed in SEEDS
        ),
        "unfreezing": lambda: (
            {"freeze_until": depth, "lr": {"head": 1e-3, "backbone": rate}, "epochs": 4, "seed": seed, **gradual}
            for rate in (1e-4, 3e-4)
            for depth, gradual in [("block5", {}), ("head", {"unfreezing": {"1": "block5"}})]
            for seed in SEEDS
        ),
        "lr_find": lambda: (
            {"freeze_until": depth, "lr_find": True, "seed": seed}
            for depth in ("head", "block5", "block3")
            for seed in (0, 1, 2)
        ),
        "solved": lambda: (
            {"freeze_until": "head", "layers": layers, "image_size": size}
            for size, layers in [
                (32, ["block5"]),
                (32, ["block4", "block5"]),
                (32, ["block3", "block4", "block5"]),
                (64, ["block3", "block4", "block5"]),
            ]
        ),
    }


def train_once(train: Data, test: Data, classes: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Make one run, and return its settings and results."""
    seed = settings.get("seed", 0)
    torch.manual_seed(seed)
    backbone = tk.load_backbone(
        weights=WEIGHTS,
        preprocessing="IMAGENET1K_FEATURES",
        image_size=settings.get("image_size", 32),
    )
    if "layers" in settings:
        model = tk.freeze_until(tk.attach_head(backbone, classes, layers=settings["layers"]), "head")
        trainer = tk.Trainer(model, seed=seed)
        found = trainer.solve(train, verbose=0)
        scores = {f"val_{name}": [round(value, 5)] for name, value in trainer.evaluate(test).items()}
        return {**settings, "l2": found.l2, "history": scores}
    model = tk.freeze_until(
        tk.attach_head(backbone, classes, hidden=(256,), pooling="flatten"), settings["freeze_until"]
    )
    if settings.get("lr_find"):
        found = tk.Trainer(model, lr=1e-3, seed=seed, clip_grad_norm=None).lr_find(train, verbose=0)
        return {**settings, "suggestion": found.suggestion, "lrs": found.lrs, "losses": found.losses}
    lr = settings["lr"]
    if isinstance(lr, dict) and "factor" in lr:
        lr = tk.discriminative_lr(model, lr["head"], factor=lr["factor"])
    batch_size = settings.get("batch_size", 32)
    schedule = settings.get("schedule", "constant")
    if "warmup_steps" in settings:
        num_steps = settings["epochs"] * math.ceil(len(train[0]) / batch_size)
        schedule = tk.warmup(schedule, settings["warmup_steps"] / num_steps)
    trainer = tk.Trainer(model, lr=lr, seed=seed, schedule=schedule, clip_grad_norm=None)
    layers = {int(epoch): layer for epoch, layer in settings.get("unfreezing", {}).items()}
    history = trainer.fit(
        train,
        validation_data=test,
        epochs=settings["epochs"],
        batch_size=batch_size,
        callbacks=[tk.GradualUnfreezing(layers)] if layers else [],
        verbose=0,
    )
    figures = {
        name: [round(value, 5) for value in values] for name, values in history.history.items() if name != "epoch_s"
    }
    return {**settings, "history": figures}


def read_images(data: Path | None) -> tuple[Data, Data, list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(IMAGES).extractall(folder)
        train = ImageFolder(Path(folder) / "train")
        test = ImageFolder((data or Path(folder)) / "test")
        places = np.random.default_rng(0).permutation(len(test))[:2000]
        return as_tensors(train, range(len(train))), as_tensors(test, sorted(places.tolist())), train.classes


def as_tensors(images: ImageFolder, places: Any) -> Data:
    pairs = [images[place] for place in places]
    return torch.stack([torch.from_numpy(np.array(image)) for image, _ in pairs]), torch.tensor([t for _, t in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=list(questions()))
    parser.add_argument("--data", type=Path, help="folder with test/<class>/*.jpg")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    train, test, classes = read_images(arguments.data)
    runs = []
    for settings in questions()[arguments.question]():
        runs.append(train_once(train, test, classes, settings))
        outcome = runs[-1].get("suggestion") or runs[-1]["history"]["val_accuracy"]
        print({name: value for name, value in settings.items() if name not in WARM}, outcome, flush=True)
    if arguments.json:
        machine = {"torch": torch.__version__, "cpus": os.cpu_count(), "device": str(tk.Device("auto"))}
        content = {"images": {"train": len(train[0]), "test": len(test[0])}, "machine": machine, "runs": runs}
        arguments.json.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
