"""Plain PyTorch: the loop of its tutorials, and the same loop with the settings of its tuning guide."""

import torch
from job import BATCH_SIZE, SEED, Data, Job, Record
from torch import nn
from torch.utils.data import DataLoader

from peers.torch_parts import (
    VALIDATION_BATCH_SIZE,
    build_fast_model,
    build_model,
    image_datasets,
    tensor_datasets,
    trainable,
)


def default(job: Job, data: Data) -> Record:
    torch.manual_seed(SEED)
    model = build_model(job)
    optimizer = torch.optim.Adam(trainable(model), lr=job.lr)
    criterion = nn.CrossEntropyLoss()
    record = Record()
    train_data, validation_data = image_datasets(job, data)
    train_loader = DataLoader(train_data, batch_size=BATCH_SIZE, shuffle=True)
    validation_loader = DataLoader(validation_data, batch_size=BATCH_SIZE)
    for _ in range(job.epochs):
        record.begin_epoch()
        model.train()
        for images, targets in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(images), targets)
            loss.backward()
            optimizer.step()
        model.eval()
        correct = 0
        with torch.no_grad():
            for images, targets in validation_loader:
                correct += (model(images).argmax(dim=1) == targets).sum().item()
        record.end_epoch(correct / len(validation_data))
    return record.end()


def autocast(job: Job, data: Data) -> Record:
    """bf16 autocast and channels-last, the two usual switches, on images preprocessed once."""
    torch.manual_seed(SEED)
    model = build_model(job).to(memory_format=torch.channels_last)
    return _train(job, data, model, torch.optim.Adam(trainable(model), lr=job.lr))


def best(job: Job, data: Data) -> Record:
    """Like `autocast`, with the frozen body cast once, fused Adam, and validation in larger batches."""
    torch.manual_seed(SEED)
    model = build_fast_model(job)
    return _train(job, data, model, torch.optim.Adam(trainable(model), lr=job.lr, fused=True))


def _train(job: Job, data: Data, model: nn.Module, optimizer: torch.optim.Optimizer) -> Record:
    criterion = nn.CrossEntropyLoss()
    record = Record()
    train_data, validation_data = tensor_datasets(job, data)
    train_loader = DataLoader(train_data, batch_size=BATCH_SIZE, shuffle=True)
    validation_loader = DataLoader(validation_data, batch_size=VALIDATION_BATCH_SIZE)
    for _ in range(job.epochs):
        record.begin_epoch()
        model.train()
        for images, targets in train_loader:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=job.bf16):
                loss = criterion(model(images.contiguous(memory_format=torch.channels_last)), targets)
            loss.backward()
            optimizer.step()
        model.eval()
        correct = 0
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=job.bf16):
            for images, targets in validation_loader:
                logits = model(images.contiguous(memory_format=torch.channels_last))
                correct += (logits.argmax(dim=1) == targets).sum().item()
        record.end_epoch(correct / len(validation_data))
    return record.end()
