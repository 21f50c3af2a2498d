"""From a folder of JPEG photographs to features: what each stage takes, and how busy the convolutions are.

    python benchmarks/photographs.py --data photos/ [--images 60] [--megapixels 1 3 12] [--peers]
    python benchmarks/photographs.py --data photos/ --accuracy

The photographs are the JPEG files in and below the folder, enlarged, or shapes if no folder is given; both with the
grain of a camera, at quality 90. The stages of 40 of them are timed one after the other: each takes one core, but the
convolutions ("prefix") all. Shared out among the cores without a gap they take the time "at best", and no call can keep
the convolutions busier than it does. One call of `cache_features` reads in threads, or in two workers, those 200 images
at most. Of a VGG16 with random weights, at 224 px. 1,000 images of each size take five minutes on two cores.

`--peers` adds the way from before images were resized where they are read, and a plain PyTorch loop over torchvision's
transforms and a `DataLoader`, whose convolutions are the library's own.

`--accuracy` solves a head on half of the photographs of each class, of 1 megapixel at 64 px, with and without scaled
decoding, and says how far the pixels are apart.

`--processor-time`, with OMP_NUM_THREADS=1, takes the process's time on all cores, not the clock's, which a busy machine
changes little.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.models import VGG16_Weights
from torchvision.transforms.v2 import functional as transforms

import transferkit as tk
from transferkit.data.images import as_image, open_image
from transferkit.features.cache import FeatureCache
from transferkit.features.chunks import image_digests
from transferkit.features.prefix import Prefix

STAGED, IN_WORKERS = 40, 200  # images
CLOCK = time.process_time if "--processor-time" in sys.argv else time.perf_counter
WEIGHTS = Path(__file__).parent.parent / "examples/assets/vgg16_imagenet_features_bf16.pt"


def photograph(number: int, megapixels: float, file: Path | None) -> Image.Image:
    """Return a photograph of 4:3: a file enlarged, or shapes; with grain."""
    draw = np.random.default_rng(number)
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5 / 24) * 24  # the sides of cameras are multiples of 8
    width = height * 4 // 3
    small = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)) if file is None else Image.open(file)
    large = small.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    tile = draw.normal(128, 8, (256, 256, 3)).astype(np.uint8)  # drawing 36 million numbers takes seconds
    grain = np.tile(tile, (height // 256 + 1, width // 256 + 1, 1))[:height, :width]
    return ImageChops.add(large, Image.fromarray(grain), offset=-128)


def make_folder(root: Path, megapixels: float, files: list[Path | None]) -> ImageFolder:
    """Write the photographs into a folder for each class."""

    def write(number: int, file: Path | None) -> None:
        path = root / ("ab"[number % 2] if file is None else file.parent.name) / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(number, megapixels, file).save(path, quality=90)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(write, range(len(files)), files))
    return ImageFolder(root)


class Stages:
    """Seconds that each stage takes in all."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = CLOCK()
        yield
        self.seconds[name] += CLOCK() - started


def one_by_one(model: tk.TransferModel, paths: list[str], prefix: Prefix, *, before: bool = False) -> dict[str, float]:
    """Do what the library does, one stage after the other; or what it did before."""
    preprocess, stages, images = model.backbone.preprocess, Stages(), []
    for start in range(0, len(paths), prefix.batch_size):
        for path in paths[start : start + prefix.batch_size]:
            with stages.timed("decode"):
                decoded = open_image(path, 0, prepare=None if before else preprocess.request_size)
            with stages.timed("copy"):
                pixels = transforms.pil_to_tensor(decoded.convert("RGB")) if before else as_image(decoded, 0)
            with stages.timed("resize"):
                images.append(pixels if before else preprocess.shrink(pixels))
        with stages.timed("copy"):
            batch = torch.stack(images)
        with stages.timed("hash"):
            image_digests(batch)
        if before:
            with stages.timed("resize"):
                batch = preprocess.resize(batch)
        with stages.timed("normalize"):
            inputs = preprocess.normalize(prefix.device.move(batch))
        with stages.timed("prefix"):
            prefix(inputs)
            prefix.device.synchronize()
        images.clear()
    return stages.seconds


def with_loader(data: ImageFolder, prefix: Prefix, workers: int) -> None:
    """Compute features as a plain PyTorch program does: torchvision's transforms in a `DataLoader`."""
    folder = ImageFolder(data.root, transform=VGG16_Weights.IMAGENET1K_V1.transforms())
    for images, _ in DataLoader(folder, batch_size=prefix.batch_size, num_workers=workers):
        prefix(prefix.device.move(images))
    prefix.device.synchronize()


def milliseconds(call: Callable[[], object], data: Sized) -> float:
    """Return how long a call takes for each image."""
    started = CLOCK()
    call()
    return 1000 * (CLOCK() - started) / len(data)


def measure(root: Path, megapixels: float, files: list[Path | None], device: tk.Device, *, peers: bool) -> None:
    """Print what one size takes."""
    data = make_folder(root, megapixels, files)
    paths = [path for path, _ in data.samples]
    model = tk.freeze_until(tk.attach_head(tk.load_backbone("vgg16", weights=None), data.classes), "head")
    prefix, _, _ = FeatureCache(device).split(device.prepare(model))
    assert prefix is not None
    staged = paths[:STAGED]
    one_by_one(model, staged[: prefix.batch_size], prefix)  # warm up
    stages = {name: 1000 * each / len(staged) for name, each in one_by_one(model, staged, prefix).items()}
    cores = torch.get_num_threads() if device.torch_device.type == "cpu" else 1
    work = {name: each * (cores if name == "prefix" else 1) for name, each in stages.items()}
    size = sum(Path(path).stat().st_size for path in paths) / len(paths) / 1e6
    print(f"\n{megapixels:g} megapixels, {len(paths)} files of {size:.1f} MB\n")
    print("| stage | ms an image | of the cores' time |\n|---|--:|--:|")
    for name, each in work.items():
        print(f"| {name} | {stages[name]:.1f} | {each / sum(work.values()):.0%} |")
    print("\n| call | ms an image | busy with the prefix |\n|---|--:|--:|")

    def show(name: str, each: float) -> None:
        print(f"| {name} | {each:.1f} | {stages['prefix'] / each:.0%} |", flush=True)

    show("at best", sum(work.values()) / cores)
    some = Subset(data, range(min(len(data), IN_WORKERS)))
    show("threads", milliseconds(lambda: tk.cache_features(model, data, device=device), data))
    if CLOCK is not time.process_time:  # which does not see other processes
        show("2 workers", milliseconds(lambda: tk.cache_features(model, some, device=device, num_workers=2), some))
    if peers:
        before = one_by_one(model, paths, prefix, before=True)
        show("before, one after the other", 1000 * sum(before.values()) / len(data))
        for workers in (0,) if CLOCK is time.process_time else (0, 2):
            show(f"PyTorch, {workers} workers", milliseconds(lambda n=workers: with_loader(data, prefix, n), data))


def accuracy(root: Path, files: list[Path | None]) -> None:
    """Print what scaled decoding changes: pixels, and the accuracy of a solved head."""
    data, found = make_folder(root, 1, files), []
    halves = [Subset(data, range(start, len(data), 2)) for start in (0, 1)]
    for scaled in (False, True):
        backbone = tk.load_backbone("vgg16", weights=WEIGHTS, preprocessing="IMAGENET1K_FEATURES", image_size=64)
        backbone.preprocess = preprocess = replace(backbone.preprocess, scaled_decoding=scaled)
        trainer = tk.Trainer(tk.freeze_until(tk.attach_head(backbone, data.classes), "head"))
        trainer.solve(halves[0], verbose=0)
        print(f"scaled_decoding={scaled}: accuracy {trainer.evaluate(halves[1])['accuracy']:.4f}", flush=True)
        opened = (open_image(path, 0, prepare=preprocess.request_size) for path, _ in data.samples[::10])
        found.append(torch.stack([preprocess.shrink(as_image(image, 0)) for image in opened]).int())
    apart = (found[0] - found[1]).abs()
    print(f"grey levels apart: {apart.max()} at most, {apart.float().mean():.2f} on average")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--megapixels", type=float, nargs="+", default=[1, 3, 12])
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--processor-time", action="store_true")
    options = parser.parse_args()
    files: list[Path | None] = [None] * options.images
    if options.data is not None:
        every = sorted(options.data.rglob("*.jpg"))
        files = [every[number * len(every) // options.images] for number in range(options.images)]
    for megapixels in [1] if options.accuracy else options.megapixels:
        with tempfile.TemporaryDirectory() as root:  # 3 GB for 1,000 of 12 megapixels
            if options.accuracy:
                accuracy(Path(root), files)
            else:
                measure(Path(root), megapixels, files, tk.Device(), peers=options.peers)


if __name__ == "__main__":
    main()
