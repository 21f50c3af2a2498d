"""How well images of classes that were never seen are told from the others, by several scores.

    python benchmarks/unknown.py --train FOLDER --test FOLDER [--weights FILE] [--images 2000] [--image-size 64]

Each folder has one folder of images per class. Two classes at a time, or one of fewer than eight, are left out of the
training images. Of the test images, those classes are the unknown ones. AUROC is the probability that an unknown image
has a higher score than a known one; the last column is the share of unknown images found where one in twenty known ones
is rejected.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

import transferkit as tk
from transferkit.analysis.outliers import NEIGHBOURS, nearest

REJECTED = 0.05


class Renumbered(Dataset):
    """Some images of a folder, with the class indices of the classes that are known."""

    def __init__(self, data: ImageFolder, places: list[int], known: list[int]) -> None:
        self.data, self.places = data, places
        self.classes = [data.classes[index] for index in known]
        self.numbers = {old: new for new, old in enumerate(known)}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[object, int]:
        image, target = self.data[self.places[index]]
        return image, self.numbers.get(target, 0)


def auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    ranks = np.concatenate([known, unknown]).argsort().argsort() + 1.0
    return float((ranks[len(known) :].sum() - len(unknown) * (len(unknown) + 1) / 2) / (len(known) * len(unknown)))


def scores_of(train: Renumbered, test: Renumbered, backbone: tk.Backbone) -> dict[str, np.ndarray]:
    """Each score of the test images, higher where they look unknown."""
    trainer = tk.Trainer(tk.freeze_until(tk.attach_head(backbone, train.classes), "head"))
    trainer.solve(train, verbose=0)
    trainer.learn_known(train, rejected=REJECTED)
    model = trainer.model
    rows = [tk.cache_features(model, data, device=trainer.device).features.flatten(1).float() for data in (train, test)]
    with torch.inference_mode():
        logits = model.head(rows[1][:, :, None, None].to(trainer.device.torch_device)).cpu()
        standard = [((each - model.head.standardize.mean.cpu()) / model.head.standardize.std.cpu()) for each in rows]
    return {
        "relative Mahalanobis (learn_known)": trainer.novelty(test),
        "maximum softmax probability": -logits.softmax(dim=1).max(dim=1).values.numpy(),
        "energy": -logits.logsumexp(dim=1).numpy(),
        "nearest neighbours": -nearest(*standard, count=NEIGHBOURS)[1][:, -1].numpy(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--weights", default=None, help="file of VGG16's weights; they are downloaded if left out")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--image-size", type=int, default=64)
    arguments = parser.parse_args()
    given = {"weights": arguments.weights, "preprocessing": "IMAGENET1K_FEATURES"} if arguments.weights else {}
    train, test = ImageFolder(Path(arguments.train)), ImageFolder(Path(arguments.test))
    count = len(train.classes)
    together = 2 if count >= 8 else 1
    found: dict[str, list[tuple[float, float]]] = {}
    for first in range(0, count - together + 1, together):
        left_out = set(range(first, first + together))
        known = [index for index in range(count) if index not in left_out]
        drawn = random.Random(first).sample(range(len(train)), min(arguments.images, len(train)))
        places = [place for place in drawn if train.targets[place] not in left_out]
        tested = random.Random(first).sample(range(len(test)), min(arguments.images, len(test)))
        strange = np.array([test.targets[place] in left_out for place in tested])
        backbone = tk.load_backbone("vgg16", image_size=arguments.image_size, **given)
        for name, scores in scores_of(
            Renumbered(train, places, known), Renumbered(test, tested, known), backbone
        ).items():
            limit = np.quantile(scores[~strange], 1 - REJECTED)
            share = float((scores[strange] > limit).mean())
            found.setdefault(name, []).append((auroc(scores[~strange], scores[strange]), share))
            rejected = f", threshold rejects {(scores[~strange] > 0).mean():.3f}" if "learn" in name else ""
            print(
                f"without {', '.join(train.classes[i] for i in sorted(left_out))}: {name} "
                f"{found[name][-1][0]:.3f}{rejected}",
                flush=True,
            )
    print(
        "| score | AUROC, mean (lowest to highest) | unknown images found, 5 % of the known rejected |\n|---|--:|--:|"
    )
    for name, values in found.items():
        rocs, shares = zip(*values, strict=True)
        print(f"| {name} | {np.mean(rocs):.3f} ({min(rocs):.2f} to {max(rocs):.2f}) | {np.mean(shares):.1%} |")


if __name__ == "__main__":
    main()
