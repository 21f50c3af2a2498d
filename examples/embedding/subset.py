"""Images and weights shared by the examples in this folder."""

import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import ImageFolder

ASSETS = Path(__file__).parent.parent / "assets"
WEIGHTS = ASSETS / "vgg16_imagenet_features_bf16.pt"


def read_images(part: str, per_class: int) -> tuple[Tensor, Tensor, list[str]]:
    """Return raw images, uint8 `(N, 3, 32, 32)`, targets `(N,)` and class names of "train" or "test"."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(ASSETS / "cifar10_subset.zip") as archive:
        names = [name for name in archive.namelist() if name.startswith(part) and name.endswith(".jpg")]
        archive.extractall(folder, [name for name in names if int(Path(name).stem) < per_class])
        data = ImageFolder(Path(folder) / part)
        images = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image, _ in data])
    return images, torch.tensor(data.targets), data.classes
