"""How well `audit` finds exchanged labels and copies, beside cleanlab, and how long it takes.

python benchmarks/audit.py --data cifar10=FOLDER flowers=FOLDER [--seeds 5] [--images 2000]
python benchmarks/audit.py --rows 50000

Each folder has one folder of images per class. Of each set, `--images` are drawn by the seed, at 64 px. cleanlab, a
peer of the extra `bench`, gets the same probabilities. With `--rows` each part of an audit is timed instead, on so many
random rows of 3,840 features in ten classes, with 5 % of the labels exchanged and 500 thumbnails copied.
"""

import argparse
import io
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import transferkit as tk
from transferkit.analysis.duplicates import find_copies, thumbnails
from transferkit.analysis.labels import exchange_labels, label_probabilities
from transferkit.base.display import Display
from transferkit.data.open import open_data
from transferkit.data_audit import find_exchanged, held_out, outlyingness
from transferkit.features.cache import FeatureCache
from transferkit.features.dataset import features_of
from transferkit.linear.table import Table

T = TypeVar("T")

SIZE = 64
FLIPPED = 0.05
FIRST = 100
WIDTH = 3840  # features of an image, as the default head pools them


def table_of(data: object, backbone: tk.Backbone) -> tuple[Table, torch.Tensor, int]:
    model = tk.freeze_until(tk.attach_head(backbone, data.dataset.classes), "head")
    source, device = open_data(data, model.classes), tk.Device()
    features = features_of(model, source, device=device, cache=FeatureCache(device, None), display=Display(0))
    return Table.of_features(features, columns=model.columns), features.targets.cpu(), len(model.classes)


def time_parts(count: int) -> None:
    """Print how long each part of an audit takes after the features: on the wall, and of the processor."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(count) % 10
    features = 0.15 * torch.randn(10, WIDTH, generator=generator)[targets]
    features += torch.randn(count, WIDTH, generator=generator)
    table = Table.of_tensor(features, columns=[slice(0, WIDTH)])
    given, exchanged = exchange_labels(targets, 10, fraction=FLIPPED, seed=0)
    small = torch.nn.functional.interpolate(255 * torch.rand(count, 3, 3, 3, generator=generator), (8, 8))
    small[-500:] = small[:500] + torch.randn(500, 3, 8, 8, generator=generator)
    print(f"{count:,} rows, {torch.get_num_threads()} threads")
    solved, probabilities = timed("heads", lambda: held_out(table, given, 10))
    timed("labels exchanged on purpose", lambda: find_exchanged(table, given, 10, l2=solved.l2, seed=0))
    timed("outliers", lambda: outlyingness(table, solved))
    found = timed("copies", lambda: find_copies(small))
    worst = label_probabilities(probabilities, given).argsort()[: int(exchanged.sum())]
    print(f"{len(found)} copies of 500, {exchanged[worst].double().mean():.0%} of the exchanged labels found")


def timed(what: str, part: Callable[[], T]) -> T:
    """Print how long a part takes, on the wall and of all processors."""
    started, before = time.perf_counter(), time.process_time()
    found = part()
    wall, spent = time.perf_counter() - started, time.process_time() - before
    print(f"{what:30} {wall:6.1f} s, {spent:6.1f} s of processors", flush=True)
    return found


def labels(table: Table, targets: torch.Tensor, classes: int, seed: int) -> dict[str, float]:
    """Precision among the first 100, of the library's order and of each of cleanlab's, on the same probabilities."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    given, exchanged = exchange_labels(targets, classes, fraction=FLIPPED, seed=seed)
    _, probabilities = held_out(table, given, classes, seed=seed)
    orders = {"transferkit": label_probabilities(probabilities, given).argsort().numpy()}
    known, plain = given.numpy(), probabilities.double().numpy()
    for method in ("self_confidence", "normalized_margin", "confidence_weighted_entropy"):
        orders[f"cleanlab {method}"] = np.argsort(get_label_quality_scores(known, plain, method=method))
    issues = find_label_issues(known, plain, return_indices_ranked_by="self_confidence")
    orders["cleanlab find_label_issues"] = issues
    return {name: float(exchanged[order[:FIRST]].sum()) / FIRST for name, order in orders.items()}


def encoded(image: Image.Image, form: str, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, form, quality=quality)
    return Image.open(file).convert("RGB")


CHANGES = {
    "the same pixels": lambda image: image,
    "JPEG of quality 75": lambda image: encoded(image, "JPEG", 75),
    "JPEG of quality 40": lambda image: encoded(image, "JPEG", 40),
    "WebP of quality 60": lambda image: encoded(image, "WEBP", 60),
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "mirrored, JPEG of quality 75": lambda image: encoded(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "JPEG", 75),
}


def copies(images: list[Image.Image], seed: int) -> dict[str, float]:
    """The fraction of copies found for each change, and of other images called a copy of one that it is not."""
    picked = random.Random(seed).sample(range(len(images)), 200)
    own = thumbnails([pixels(image) for image in images])
    natural = {(copy.index, copy.of) for copy in find_copies(own)}  # the set's own: looked at by eye
    found = {}
    for name, change in CHANGES.items():
        changed = thumbnails([pixels(change(images[place])) for place in picked])
        of = {copy.index: copy.of for copy in find_copies(changed, own)}
        twins = dict(natural)
        right = [of.get(row) in (place, twins.get(place)) for row, place in enumerate(picked)]
        found[name] = sum(right) / len(picked)
        found.setdefault("false", 0.0)
        found["false"] += sum(row in of and not right[row] for row in range(len(picked))) / len(picked) / len(CHANGES)
    found["the set's own"] = len(natural) / len(images)
    return found


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--rows", type=int, help="time each part on so many rows of random features instead")
    parser.add_argument("--weights", default=None, help="file of VGG16's weights; they are downloaded if left out")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.rows:
        time_parts(arguments.rows)
        return
    given = {"weights": arguments.weights, "preprocessing": "IMAGENET1K_FEATURES"} if arguments.weights else {}
    backbone = tk.load_backbone("vgg16", image_size=SIZE, **given)
    sets = {name: ImageFolder(Path(folder)) for name, _, folder in (each.partition("=") for each in arguments.data)}
    for name, data in sets.items():
        figures: dict[str, list[float]] = {}
        for seed in range(arguments.seeds):
            places = random.Random(seed).sample(range(len(data)), arguments.images)
            for method, value in labels(*table_of(torch.utils.data.Subset(data, places), backbone), seed).items():
                figures.setdefault(method, []).append(value)
        for method, values in figures.items():
            print(
                f"{name:10} labels, precision of {FIRST}: {method:38} {statistics.mean(values):.3f} "
                f"± {statistics.stdev(values) if len(values) > 1 else 0:.3f}",
                flush=True,
            )
        for what, value in copies([data[place][0] for place in places], arguments.seeds).items():
            print(f"{name:10} copies: {what:30} {value:.3f}", flush=True)


if __name__ == "__main__":
    main()
