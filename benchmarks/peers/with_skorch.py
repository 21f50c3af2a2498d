"""skorch: a NeuralNetClassifier as in its documentation, and with bf16 autocast around its steps."""

import torch
from job import BATCH_SIZE, NUM_CLASSES, SEED, Data, Job, Record
from skorch import NeuralNetClassifier
from skorch.helper import predefined_split
from torch import Tensor, nn
from torch.utils.data import Dataset

from peers.torch_parts import (
    VALIDATION_BATCH_SIZE,
    build_fast_model,
    build_model,
    image_datasets,
    tensor_datasets,
)


class FastClassifier(NeuralNetClassifier):
    """Runs the network in bf16 and channels-last; `infer` is skorch's hook for that."""

    def infer(self, x: Tensor, **fit_params: object) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().infer(x.contiguous(memory_format=torch.channels_last), **fit_params).float()


def fit(
    net_class: type[NeuralNetClassifier],
    model: nn.Module,
    job: Job,
    record: Record,
    datasets: tuple[Dataset, Dataset],
    **net_arguments: object,
) -> Record:
    train_data, validation_data = datasets
    net = net_class(
        model,
        criterion=nn.CrossEntropyLoss,
        classes=range(NUM_CLASSES),  # skorch cannot infer them from a Dataset
        optimizer=torch.optim.Adam,
        lr=job.lr,
        max_epochs=job.epochs,
        batch_size=BATCH_SIZE,
        iterator_train__shuffle=True,
        train_split=predefined_split(validation_data),
        verbose=0,
        **net_arguments,
    )
    net.fit(train_data, y=None)
    record.end()
    record.epoch_s = net.history[:, "dur"]
    record.validation_accuracy = [float(accuracy) for accuracy in net.history[:, "valid_acc"]]
    return record


def default(job: Job, data: Data) -> Record:
    torch.manual_seed(SEED)
    model = build_model(job)
    return fit(NeuralNetClassifier, model, job, Record(), image_datasets(job, data))


def best(job: Job, data: Data) -> Record:
    """bf16, channels-last, fused Adam, images preprocessed once, validation in larger batches."""
    torch.manual_seed(SEED)
    model = build_fast_model(job)
    record = Record()
    datasets = tensor_datasets(job, data)
    options = {"optimizer__fused": True, "iterator_valid__batch_size": VALIDATION_BATCH_SIZE}
    return fit(FastClassifier if job.bf16 else NeuralNetClassifier, model, job, record, datasets, **options)
