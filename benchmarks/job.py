"""The jobs of `compare.py` and their images, the same for every contestant.

Nothing here imports a training library, so that a contestant's memory is its own.
"""

import dataclasses
import io
import time
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

ASSETS = Path(__file__).resolve().parent.parent / "examples" / "assets"
IMAGES = ASSETS / "cifar10_subset.zip"
WEIGHTS = ASSETS / "vgg16_imagenet_features_bf16.pt"
MEAN, DEVIATION = (0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255)  # RGB, 0..1: what WEIGHTS expects
HIDDEN, NUM_CLASSES = (4096, 4096), 10
BATCH_SIZE = 32
SEED = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """Fine-tune VGG16 with a head of 4096-4096-10, Adam, cross-entropy, batch size 32; shuffle, validate each epoch.

    Attributes:
        name: One of `JOBS`.
        image_size: Size to which the 32 px images are resized, bilinear and antialiased.
        frozen: True: every convolution is frozen. False: everything trains.
        lr: Adam's learning rate.
        num_training: Training images, the same number per class.
        num_validation: Validation images, the same number per class.
        epochs: Number of epochs.
        precision: "auto", what the machine computes fastest, or "fp32".
    """

    name: str
    image_size: int
    frozen: bool
    lr: float
    num_training: int
    num_validation: int
    epochs: int
    precision: str = "auto"

    @property
    def feature_size(self) -> int:
        """Length of the flattened output of the convolutions."""
        return 512 * (self.image_size // 32) ** 2

    @property
    def bf16(self) -> bool:
        """Whether the other libraries may use bf16 in their best configurations."""
        return self.precision != "fp32"


JOBS = {
    job.name: job
    for job in (
        Job("head64", image_size=64, frozen=True, lr=1e-3, num_training=2000, num_validation=500, epochs=10),
        Job("head224", image_size=224, frozen=True, lr=1e-3, num_training=1000, num_validation=200, epochs=10),
        Job("full64", image_size=64, frozen=False, lr=1e-4, num_training=320, num_validation=64, epochs=2),
    )
}


@dataclasses.dataclass(frozen=True)
class Data:
    """Decoded images, uint8 `(N, 32, 32, 3)`, and class indices, int64 `(N,)`."""

    train_images: npt.NDArray[np.uint8]
    train_targets: npt.NDArray[np.int64]
    validation_images: npt.NDArray[np.uint8]
    validation_targets: npt.NDArray[np.int64]


def read_images(folder: str, count: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read the first images of each class of a folder of the archive, the classes in turn."""
    with zipfile.ZipFile(IMAGES) as archive:
        names = [name for name in archive.namelist() if name.startswith(f"{folder}/") and name.endswith(".jpg")]
        classes = sorted({name.split("/")[1] for name in names})
        names.sort(key=lambda name: (name.split("/")[2], name.split("/")[1]))  # by number, then by class
        if not 0 < count <= len(names):
            raise ValueError(f"{count} images of {folder}/: there are {len(names)}")
        images = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names[:count]]
    return np.stack(images), np.array([classes.index(name.split("/")[1]) for name in names[:count]])


def read_data(job: Job) -> Data:
    return Data(*read_images("train", job.num_training), *read_images("test", job.num_validation))


class Record:
    """The times and accuracies of a run. Create it once images and model are ready: its clock starts then."""

    def __init__(self) -> None:
        self.epoch_s: list[float] = []
        self.validation_accuracy: list[float] = []
        self.total_s = 0.0
        self.started = self.epoch_started = time.perf_counter()

    def begin_epoch(self) -> None:
        self.epoch_started = time.perf_counter()

    def end_epoch(self, validation_accuracy: float) -> None:
        self.epoch_s.append(time.perf_counter() - self.epoch_started)
        self.validation_accuracy.append(float(validation_accuracy))

    def end(self) -> "Record":
        self.total_s = time.perf_counter() - self.started
        return self
