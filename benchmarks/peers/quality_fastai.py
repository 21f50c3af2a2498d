"""fastai in `quality.py`: `vision_learner` and `fine_tune` as documented, and as fast and accurate as they get here."""

from functools import partial

import torch
from fastai.vision import all as fastai
from job import DEVIATION, MEAN
from quality_task import TEST_BATCH_SIZE, Curve, Task, files
from torch import nn
from torch.utils.data import Subset, TensorDataset
from torchvision.models import vgg16_bn

from peers.quality_pytorch import decode, flip_and_crop, prepare, tuned_epochs
from peers.torch_parts import build_body
from peers.with_fastai import Autocast

BATCH_SIZE = 64  # fastai's default


class Clock(fastai.Callback):
    """Stops the clock while the test part is evaluated."""

    order = 60  # after the Recorder, which computes the accuracy

    def __init__(self, curve: Curve) -> None:
        self.curve = curve

    def before_validate(self) -> None:
        self.curve.pause()

    def after_epoch(self) -> None:
        self.curve.add(self.recorder.values[-1][-1])


class Prepare(fastai.Callback):
    """Normalizes uint8 images, flipped and cropped in training."""

    order = 5  # before Autocast

    def before_batch(self) -> None:
        images = self.learn.xb[0]
        self.learn.xb = (prepare(flip_and_crop(images) if self.training else images),)


def fit(loaders: fastai.DataLoaders, body: nn.Module, epochs: int, **options: object) -> None:
    network = nn.Sequential(body, nn.AdaptiveAvgPool2d(7))  # cut at the pooling layer, as torchvision's VGG16 is
    learner = fastai.vision_learner(loaders, lambda **_: network, metrics=fastai.accuracy, **options)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(epochs)


def default(task: Task, train: Subset, test: Subset) -> Curve:
    torch.manual_seed(task.seed)
    body = build_body(weights=task.weights)
    curve = Curve()
    block = fastai.DataBlock(
        blocks=(fastai.ImageBlock, fastai.CategoryBlock),
        get_x=fastai.ItemGetter(0),
        get_y=fastai.ItemGetter(1),
        splitter=fastai.IndexSplitter(range(len(train), len(train) + len(test))),
        item_tfms=fastai.Resize(task.image_size),
        batch_tfms=fastai.Normalize.from_stats(MEAN, DEVIATION),
    )
    items = [*zip(*files(train), strict=True), *zip(*files(test), strict=True)]
    fit(block.dataloaders(items, bs=min(BATCH_SIZE, len(train))), body, task.epochs or 4, cbs=Clock(curve))
    return curve


def best(task: Task, train: Subset, test: Subset) -> Curve:
    """bf16, channels-last, fused AdamW, images decoded once, flips and crops, later blocks at a higher rate."""
    torch.manual_seed(task.seed)
    body = build_body(weights=task.weights).to(memory_format=torch.channels_last)
    held_out = TensorDataset(*decode(test, task.image_size))
    curve = Curve()
    images, num_workers = TensorDataset(*decode(train, task.image_size)), 0
    loaders = fastai.DataLoaders(
        fastai.DataLoader(images, bs=min(BATCH_SIZE, len(images)), shuffle=True, num_workers=num_workers),
        fastai.DataLoader(held_out, bs=TEST_BATCH_SIZE, num_workers=num_workers),
    )
    fit(
        loaders,
        body,
        task.epochs or tuned_epochs(len(images)),
        n_out=len(train.dataset.classes),
        loss_func=nn.CrossEntropyLoss(),
        opt_func=partial(fastai.OptimWrapper, opt=torch.optim.AdamW, fused=True),
        splitter=fastai.model_meta[vgg16_bn]["split"],
        cbs=[Clock(curve), Prepare(), Autocast()],
    )
    return curve
