"""Images read once into memory train as the data itself does, or are left where they are."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.datasets import ImageFolder

import transferkit as tk
from tiny import CLASSES
from transferkit.data import resized as resized_images
from transferkit.data.inputs import Inputs
from transferkit.data.open import open_data
from transferkit.data.preprocessing import CONVENTIONS
from transferkit.data.resized import resized
from transferkit.errors import HeadMismatchError, ImageError, TargetError, TransferKitError

PREPROCESS = CONVENTIONS["IMAGENET1K_V1"].with_image_size(32)


def keep(data, *, preprocess=PREPROCESS, **arguments):
    return resized(data, CLASSES, preprocess, device=tk.Device("cpu", "fp32"), **arguments)


class Pictures(Dataset):
    """PIL images of different sizes and modes."""

    def __init__(self, sizes, targets, *, modes=("RGB",)):
        self.sizes, self.given, self.modes, self.reads = sizes, targets, modes, []

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        self.reads.append(index)
        pixels = np.random.default_rng(index).integers(0, 256, (*self.sizes[index], 3), dtype=np.uint8)
        return Image.fromarray(pixels).convert(self.modes[index % len(self.modes)]), self.given[index]


SIZES = [(32, 32), (40, 50), (31, 70), (100, 33), (8, 9), (32, 64), (200, 201)]
TARGETS = [0, 1, 2, 0, 1, 2, 0]


def model_inputs(data, *, augment=None, epoch=0):
    inputs = Inputs(open_data(data, CLASSES), PREPROCESS, tk.Device("cpu", "fp32"), augment, seed=7)
    batches = list(inputs.batches(3, order=torch.tensor([4, 1, 6, 0, 2, 5, 3]), view=epoch))
    return torch.cat([images for images, _ in batches]), torch.cat([targets for _, targets in batches])


@pytest.mark.parametrize("modes", [("RGB",), ("L", "RGB", "RGBA", "P")])
@pytest.mark.parametrize("augmented", [False, True])
def test_every_pixel_is_the_same(modes, augmented):
    """What the model is given of them, in any order and batch, augmented too, is that of the data itself."""
    data = Pictures(SIZES, TARGETS, modes=modes)
    kept = keep(data)
    assert kept[0].shape == (7, 3, 32, 32)
    assert kept[0].dtype == torch.uint8
    assert kept[1].tolist() == TARGETS
    augment = (lambda image: (image // 2) + torch.randint(0, 99, (1,), dtype=torch.uint8)) if augmented else None
    for one, other in zip(model_inputs(data, augment=augment), model_inputs(kept, augment=augment), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [16, 33, 224])
def test_other_sizes(size):
    """Images become as large as the model wants them, each as it would alone."""
    preprocess = PREPROCESS.with_image_size(size)
    data = Pictures(SIZES, TARGETS)
    images, _ = keep(data, preprocess=preprocess)
    for index in range(len(data)):
        alone = preprocess.resize(torch.from_numpy(np.array(data[index][0])).permute(2, 0, 1)[None])
        assert torch.equal(images[index], alone[0])


def test_soft_targets_stay():
    """Rows of shares come back as float32 rows."""
    rows = np.eye(3, dtype=np.float32)[TARGETS] * 0.7 + 0.1
    _, targets = keep(Pictures(SIZES, rows))
    assert targets.dtype == torch.float32
    assert targets.numpy() == pytest.approx(rows)


def test_more_images_than_one_batch():
    """Batches of 32 are put together in order."""
    data = Pictures([(33 + index, 32) for index in range(70)], [index % 3 for index in range(70)])
    images, targets = keep(data)
    assert len(images) == 70
    assert targets.tolist() == [index % 3 for index in range(70)]
    alone = PREPROCESS.resize(torch.from_numpy(np.array(data[65][0])).permute(2, 0, 1)[None])
    assert torch.equal(images[65], alone[0])


def test_workers_read_the_same():
    """Processes that read give the same images."""
    data = Pictures(SIZES, TARGETS)
    assert torch.equal(keep(data)[0], keep(data, num_workers=1)[0])


def test_a_folder(tmp_path):
    """An ImageFolder is read upright, whatever its files say of their orientation."""
    for name in CLASSES:
        (tmp_path / name).mkdir()
        pixels = np.zeros((40, 60, 3), dtype=np.uint8)
        pixels[:, 30:] = 255
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter
        Image.fromarray(pixels).save(tmp_path / name / "one.png", exif=exif)
    images, targets = keep(ImageFolder(tmp_path))
    assert targets.tolist() == [0, 1, 2]
    assert images[0, 0, 2:10].float().std() == 0  # halves lie above each other
    assert images[0, 0, 0, 0] != images[0, 0, -1, 0]


# ---- data that is left where it is


class Randomly(Pictures):
    """Random in each reading."""

    def __getitem__(self, index):
        return torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8), self.given[index]


class Floats(Pictures):
    """Preprocessed images."""

    def __getitem__(self, index):
        return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index)), self.given[index]


@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.zeros(3, 3, 40, 40, dtype=torch.uint8), [0, 1, 2]),
        lambda: (np.zeros((3, 40, 40, 3), dtype=np.uint8), [0, 1, 2]),
        lambda: DataLoader(TensorDataset(torch.zeros(3, 3, 40, 40, dtype=torch.uint8), torch.arange(3))),
        lambda: Randomly(SIZES, TARGETS),
        lambda: Floats(SIZES, TARGETS),
    ],
    ids=["tensor", "array", "loader", "random", "preprocessed"],
)
def test_other_data_is_used_as_it_is(make):
    """Images in memory, loaders, random data and preprocessed images are not copied."""
    assert keep(make()) is None


@pytest.mark.parametrize(("free", "kept"), [(4 * 7 * 3 * 32**2, True), (4 * 7 * 3 * 32**2 - 4, False), (None, False)])
def test_they_take_a_quarter_of_what_is_free(monkeypatch, free, kept):
    """Exactly a quarter of the free memory is enough room; less, or memory that is not known, is none."""
    memory = None if free is None else {"free": free, "total": free}
    monkeypatch.setattr(resized_images, "host_bytes", lambda: memory)
    assert (keep(Pictures(SIZES, TARGETS)) is not None) == kept


def test_without_room_nothing_more_is_read(monkeypatch):
    """Where there is no room only the few samples are read that tell whether the data is random."""
    monkeypatch.setattr(resized_images, "host_bytes", lambda: {"free": 0, "total": 0})
    data = Pictures([(32, 32)] * 100, [0] * 100)
    assert keep(data) is None
    assert len(set(data.reads)) <= 16


# ---- data that cannot be used


class Broken(Pictures):
    def __getitem__(self, index):
        if index == 5:
            raise OSError("broken file")
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Broken([(32, 32)] * 40, [0] * 40), ImageError, "cannot read image 5"),
        (lambda: Pictures(SIZES, [0, 1, 2, 0, 1, 2, 3]), TargetError, "target 3 at index 6 is out of range"),
        (lambda: Pictures([], []), TransferKitError, "empty Pictures"),
    ],
)
def test_data_that_cannot_be_used_is_refused(make, error, message):
    """As fit does, with the image's place."""
    with pytest.raises(error, match=message):
        keep(make())


def test_folders_of_other_classes_are_refused(tmp_path):
    """The folders' names are compared with the model's classes, which the kept images no longer have."""
    for name in ("ant", "bee", "cow"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / name / "one.png")
    with pytest.raises(HeadMismatchError, match="ant, bee, cow"):
        keep(ImageFolder(tmp_path))


@pytest.mark.gpu
def test_every_pixel_is_the_same_on_a_gpu():
    """A GPU may round some pixels of a resized image differently: they are resized there, where training does it."""
    device = tk.Device("cuda", "fp32")
    data = Pictures(SIZES, TARGETS)
    images, _ = resized(data, CLASSES, PREPROCESS, device=device)
    assert images.device.type == "cpu"
    for kept, (image, _) in zip(images, map(data.__getitem__, range(len(data))), strict=True):
        raw = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].cuda()
        assert torch.equal(kept, PREPROCESS.resize(raw)[0].cpu())
