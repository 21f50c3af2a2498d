"""fastai: a DataBlock and a Learner as in its documentation, and with bf16, channels-last and a fused Adam."""

from functools import partial

import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import IndexSplitter, Normalize
from fastai.learner import Callback, Learner
from fastai.metrics import accuracy
from fastai.optimizer import Adam, OptimWrapper
from fastai.vision.augment import Resize
from fastai.vision.data import CategoryBlock, DataBlock, ImageBlock
from job import BATCH_SIZE, DEVIATION, MEAN, SEED, Data, Job, Record
from torch import nn

from peers.torch_parts import VALIDATION_BATCH_SIZE, build_fast_model, build_model, tensor_datasets


class Clock(Callback):
    """Records each epoch, validation included."""

    order = 60  # after the Recorder, which computes the accuracy

    def __init__(self, record: Record) -> None:
        self.record = record

    def before_epoch(self) -> None:
        self.record.begin_epoch()

    def after_epoch(self) -> None:
        self.record.end_epoch(self.recorder.values[-1][-1])


class Autocast(Callback):
    """Runs the network in bf16 on a CPU: fastai's own MixedPrecision supports only CUDA."""

    order = 10

    def before_batch(self) -> None:
        self.learn.xb = tuple(images.contiguous(memory_format=torch.channels_last) for images in self.xb)
        self.bf16 = torch.autocast("cpu", torch.bfloat16)
        self.bf16.__enter__()

    def after_pred(self) -> None:
        self.bf16.__exit__(None, None, None)
        self.learn.pred = self.pred.float()


def body_and_head(model: nn.Sequential) -> list[list[nn.Parameter]]:
    return [list(part.parameters()) for part in model]


def fit(learner: Learner, job: Job, record: Record) -> Record:
    if job.frozen:
        learner.freeze()
    with learner.no_bar(), learner.no_logging():
        learner.fit(job.epochs)
    return record.end()


def default(job: Job, data: Data) -> Record:
    torch.manual_seed(SEED)
    model = build_model(job)
    images = [*data.train_images, *data.validation_images]
    targets = [*data.train_targets, *data.validation_targets]
    record = Record()
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock),
        get_x=lambda index: images[index],
        get_y=lambda index: targets[index],
        splitter=IndexSplitter(range(job.num_training, len(images))),
        item_tfms=Resize(job.image_size),
        batch_tfms=Normalize.from_stats(MEAN, DEVIATION),
    )
    loaders = block.dataloaders(range(len(images)), bs=BATCH_SIZE, drop_last=False)
    loss = nn.CrossEntropyLoss()
    # weight decay, 0.01 in fastai, is not part of the job
    options = {"lr": job.lr, "opt_func": Adam, "wd": 0.0, "metrics": accuracy, "splitter": body_and_head}
    return fit(Learner(loaders, model, loss, cbs=Clock(record), **options), job, record)


def best(job: Job, data: Data) -> Record:
    """bf16, channels-last, torch's fused Adam, images preprocessed once, validation in larger batches."""
    torch.manual_seed(SEED)
    model = build_fast_model(job)
    record = Record()
    train_data, validation_data = tensor_datasets(job, data)
    loaders = DataLoaders(
        DataLoader(train_data, bs=BATCH_SIZE, shuffle=True, num_workers=0),
        DataLoader(validation_data, bs=VALIDATION_BATCH_SIZE, num_workers=0),
    )
    loss = nn.CrossEntropyLoss()
    fused_adam = partial(OptimWrapper, opt=torch.optim.Adam, fused=True)
    options = {"lr": job.lr, "opt_func": fused_adam, "wd": 0.0, "metrics": accuracy, "splitter": body_and_head}
    callbacks = [Clock(record), ChannelsLast(), *([Autocast()] if job.bf16 else [])]
    return fit(Learner(loaders, model, loss, cbs=callbacks, **options), job, record)
