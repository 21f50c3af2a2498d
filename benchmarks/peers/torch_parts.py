"""Shared by the contestants on PyTorch: the network, and the images as a data set or as preprocessed tensors."""

from pathlib import Path

import numpy as np
import torch
from job import DEVIATION, HIDDEN, MEAN, NUM_CLASSES, WEIGHTS, Data, Job
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchvision import transforms
from torchvision.models.vgg import cfgs, make_layers
from torchvision.transforms.v2 import functional

VALIDATION_BATCH_SIZE = 128  # in the best configurations: without gradients, larger batches are slightly faster


def build_body(*, weights: str | Path = WEIGHTS) -> nn.Sequential:
    """Return torchvision's VGG16 convolutions with the pretrained weights; its classifier is never built."""
    body = make_layers(cfgs["D"], batch_norm=False)
    state = torch.load(weights, weights_only=True)
    convolutions = {name: value.float() for name, value in state.items() if name.startswith("features.")}
    body.load_state_dict({name.removeprefix("features."): value for name, value in convolutions.items()})
    return body


def build_head(job: Job) -> nn.Sequential:
    first, second = HIDDEN
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(job.feature_size, first),
        nn.ReLU(),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, NUM_CLASSES),
    )


def build_model(job: Job) -> nn.Sequential:
    return nn.Sequential(build_body().requires_grad_(not job.frozen), build_head(job))


def build_fast_model(job: Job) -> nn.Sequential:
    """Return the network for bf16 autocast: channels-last, frozen layers cast to bf16 once instead of in each step."""
    model = build_model(job).to(memory_format=torch.channels_last)
    if job.frozen and job.bf16:
        model[0].to(torch.bfloat16)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class ImageDataset(Dataset):
    """PIL images, resized and normalized at every read."""

    def __init__(self, images: np.ndarray, targets: np.ndarray, image_size: int) -> None:
        self.images = images
        self.targets = targets
        self.transform = transforms.Compose(
            [transforms.Resize(image_size), transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION)]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.targets[index])


def image_datasets(job: Job, data: Data) -> tuple[ImageDataset, ImageDataset]:
    """Return training and validation images as in PyTorch's tutorials."""
    train = ImageDataset(data.train_images, data.train_targets, job.image_size)
    return train, ImageDataset(data.validation_images, data.validation_targets, job.image_size)


def preprocess(images: np.ndarray, image_size: int) -> Tensor:
    """Return all images resized and normalized, float32 `(N, 3, S, S)`."""
    resized = functional.resize(torch.from_numpy(images).permute(0, 3, 1, 2), [image_size, image_size], antialias=True)
    return functional.normalize(functional.to_dtype(resized, torch.float32, scale=True), MEAN, DEVIATION, inplace=True)


def tensor_datasets(job: Job, data: Data) -> tuple[TensorDataset, TensorDataset]:
    """Return training and validation images, preprocessed once."""
    train = TensorDataset(preprocess(data.train_images, job.image_size), torch.from_numpy(data.train_targets))
    validation_images = preprocess(data.validation_images, job.image_size)
    return train, TensorDataset(validation_images, torch.from_numpy(data.validation_targets))
