"""One run of `quality.py`: its images, drawn by seed, and the clock that records accuracy over seconds."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import center_crop, resize

BATCH_SIZE, TEST_BATCH_SIZE = 32, 128


@dataclasses.dataclass(frozen=True)
class Task:
    """One method on one draw of a data set; the arguments of `quality.py` say what the fields are."""

    method: str
    data: str
    folder: str
    image_size: int
    size: str
    seed: int
    num_test: int
    weights: str
    epochs: int | None

    def key(self) -> dict[str, object]:
        """Return what identifies the run in a file of results: no path."""
        return {**dataclasses.asdict(self), "folder": None, "weights": Path(self.weights).name}


def rank_in_class(targets: Sequence[int], seed: int) -> npt.NDArray[np.int64]:
    """Return the place of each image among those of its class, in an order drawn by the seed."""
    ranks, seen = np.empty(len(targets), np.int64), Counter[int]()
    for index in np.random.default_rng(seed).permutation(len(targets)):
        ranks[index] = seen[targets[index]]
        seen[targets[index]] += 1
    return ranks


def split(task: Task) -> tuple[Subset, Subset]:
    """Return training and test images. The classes take turns, so that few images are as many of each.

    A folder without `train/` is split by the seed: a quarter of each class is the test part.
    """
    root = Path(task.folder)
    divided = (root / "train").is_dir()
    train = ImageFolder(root / "train" if divided else root)
    ranks = rank_in_class(train.targets, task.seed)
    if divided:
        test = ImageFolder(root / "test")
        test_order = np.lexsort((test.targets, rank_in_class(test.targets, 0)))
    else:
        test, test_order = train, np.lexsort((train.targets, ranks))
        ranks = ranks - np.bincount(train.targets)[train.targets] // 4  # negative: the test part
        test_order = test_order[ranks[test_order] < 0]
    order = np.lexsort((train.targets, ranks))
    order = order[ranks[order] >= 0]
    number, _, per_class = task.size.partition("/")
    count = len(order) if number == "all" else int(number) * (len(train.classes) if per_class else 1)
    if count > len(order):
        raise ValueError(f"{task.data} has {len(order)} training images: expected a size up to that, got {task.size}")
    return Subset(train, order[:count].tolist()), Subset(test, test_order[: task.num_test].tolist())


def files(part: Subset) -> tuple[list[str], list[int]]:
    """Return the paths of the images and their class indices."""
    paths, targets = zip(*(part.dataset.samples[index] for index in part.indices), strict=True)
    return list(paths), list(targets)


def read_images(paths: list[str], size: int) -> npt.NDArray[np.uint8]:
    """Decode files, uint8 `(N, size, size, 3)`: the shorter side resized, the longer one cropped."""

    def read(path: str) -> npt.NDArray[np.uint8]:
        with Image.open(path) as file:
            return np.asarray(center_crop(resize(file.convert("RGB"), [size]), [size]))

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(read, paths)))


class Curve:
    """Test accuracy over seconds: pairs in `points`, the last of which is the result.

    Create it once the backbone is loaded: its clock starts then, and stops while accuracy is measured.
    """

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []
        self.started = time.perf_counter()

    def pause(self) -> None:
        self.paused = time.perf_counter()

    def add(self, accuracy: float) -> None:
        """Add a point at the time of the pause, and start the clock again."""
        self.points.append((self.paused - self.started, float(accuracy)))
        self.started += time.perf_counter() - self.paused

    def measure(self, accuracy: Callable[[], float]) -> "Curve":
        self.pause()
        self.add(accuracy())
        return self
