"""Fine-tune VGG16 on CIFAR-10 by hand, with the four hyperparameters of fine-tuning as flags.

The head is the classic one: fully connected layers on the flattened features of the last block.

    python examples/finetune_cifar10.py --frozen-until head --epochs 10 --lr 1e-3
    python examples/finetune_cifar10.py --frozen-until block5 --epochs 5 --lr 1e-4 --schedule cosine
    python examples/finetune_cifar10.py --frozen-until none --image-size 64

Torchvision downloads weights and images. Without a network, pass --weights and --data.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10, ImageFolder

import transferkit as tk

OFFLINE = """{error}

Without a network, pass both:
  --weights FILE --preprocessing IMAGENET1K_FEATURES   a state dict of VGG16, such as
                 examples/assets/vgg16_imagenet_features_bf16.pt of this repository
  --data FOLDER  with train/<class>/*.jpg and test/<class>/*.jpg, or with CIFAR-10's own cifar-10-batches-py"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (1e-3)")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training images (10)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step (32)")
    parser.add_argument(
        "--frozen-until", default="head", help='first layer that trains: "head", "block5", "none" (head)'
    )
    parser.add_argument("--hidden", type=int, nargs="*", default=(4096, 4096), help="widths of the head (4096 4096)")
    parser.add_argument("--schedule", default="constant", help="constant, linear, cosine or one_cycle (constant)")
    parser.add_argument("--warmup", type=float, default=0.0, help="fraction of the run that is warm-up (0)")
    parser.add_argument("--augment", nargs="*", help="flip, crop, color, trivial (none)")
    parser.add_argument("--image-size", type=int, default=32, help="pixels (32)")
    parser.add_argument("--weights", default="IMAGENET1K_FEATURES", help="name or path (IMAGENET1K_FEATURES)")
    parser.add_argument("--preprocessing", default="auto", help="input convention of the weights, required with a path")
    parser.add_argument("--data", type=Path, help="folder of the images (downloads to ./data)")
    parser.add_argument("--device", default="auto", help="auto, cuda, cpu (auto)")
    parser.add_argument("--precision", default="auto", help="auto, bf16, fp16, fp32 (auto)")
    parser.add_argument("--cache", type=Path, help="folder in which to cache features for later runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="write a checkpoint of the best epoch here")
    parser.add_argument("--json", type=Path, help="write settings, history and test scores here")
    return parser.parse_args()


def load_images(folder: Path | None, split: str) -> tuple[tuple[np.ndarray, np.ndarray], list[str]]:
    """Return ((uint8 (N, 32, 32, 3), int64 (N,)), class names)."""
    if folder is not None and (folder / split).is_dir():
        images = ImageFolder(folder / split)
        pixels = np.stack([np.asarray(image) for image, _ in images])
        return (pixels, np.array(images.targets)), images.classes
    original = CIFAR10(folder or "data", train=split == "train", download=folder is None)
    return (original.data, np.array(original.targets)), original.classes


def main() -> None:
    options = arguments()
    torch.manual_seed(options.seed)
    try:
        train, classes = load_images(options.data, "train")
        test, _ = load_images(options.data, "test")
        backbone = tk.load_backbone(
            "vgg16", weights=options.weights, preprocessing=options.preprocessing, image_size=options.image_size
        )
    except (OSError, RuntimeError) as error:  # no network, or CIFAR-10 is not where --data says
        sys.exit(OFFLINE.format(error=error))
    model = tk.attach_head(backbone, classes, hidden=options.hidden, pooling="flatten")
    tk.freeze_until(model, None if options.frozen_until == "none" else options.frozen_until)
    trainer = tk.Trainer(
        model,
        lr=options.lr,
        schedule=tk.warmup(options.schedule, options.warmup) if options.warmup else options.schedule,
        clip_grad_norm=None,
        device=options.device,
        precision=options.precision,
        cache=options.cache or "auto",
        seed=options.seed,
    )
    started = time.perf_counter()
    history = trainer.fit(
        train,
        validation_data=test,  # for the record only: the score below is that of the last epoch
        epochs=options.epochs,
        batch_size=options.batch_size,
        augment=options.augment,
    )
    fit_s = time.perf_counter() - started
    last = history.reports[-1]  # not the best epoch, which the test images would have chosen
    scores = {"loss": last.val_loss, "accuracy": last.val_accuracy}
    print(f"test accuracy {scores['accuracy']:.4f}, {fit_s:.0f} s on {trainer.device}")
    if options.save:
        trainer.save(options.save)
    if options.json:
        paths = ("data", "json", "save")
        settings = {name: str(value) for name, value in vars(options).items() if name not in paths}
        machine = {"device": str(trainer.device), "torch": torch.__version__, "cpus": os.cpu_count()}
        record = {"settings": settings, "machine": machine, "history": history.history, "test": scores, "fit_s": fit_s}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
