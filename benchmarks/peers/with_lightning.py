"""Lightning: a module and a trainer as in its documentation, and with its bf16 precision."""

import lightning
import torch
from job import BATCH_SIZE, SEED, Data, Job, Record
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from peers.torch_parts import (
    VALIDATION_BATCH_SIZE,
    build_fast_model,
    build_model,
    image_datasets,
    tensor_datasets,
    trainable,
)


class Classifier(lightning.LightningModule):
    """The network with its loss, its optimizer and its accuracy."""

    def __init__(self, model: nn.Module, lr: float, *, channels_last: bool = False, fused: bool | None = None) -> None:
        super().__init__()
        self.model = model
        self.lr = lr
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.fused = fused

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(memory_format=self.memory_format))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        loss = nn.functional.cross_entropy(self(images), targets)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, targets = batch
        accuracy = (self(images).argmax(dim=1) == targets).float().mean()
        self.log("val_accuracy", accuracy, batch_size=len(targets))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(trainable(self.model), lr=self.lr, fused=self.fused)


class Clock(lightning.Callback):
    """Records each epoch; Lightning validates before `on_train_epoch_end`."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.record.begin_epoch()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.record.end_epoch(trainer.callback_metrics["val_accuracy"])


def fit(
    module: Classifier,
    job: Job,
    record: Record,
    datasets: tuple[Dataset, Dataset],
    validation_batch_size: int,
    **trainer_arguments: object,
) -> Record:
    trainer = lightning.Trainer(
        max_epochs=job.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Clock(record)],
        **trainer_arguments,
    )
    train_data, validation_data = datasets
    train_loader = DataLoader(train_data, batch_size=BATCH_SIZE, shuffle=True)
    trainer.fit(module, train_loader, DataLoader(validation_data, batch_size=validation_batch_size))
    return record.end()


def default(job: Job, data: Data) -> Record:
    torch.manual_seed(SEED)
    module = Classifier(build_model(job), job.lr)
    return fit(module, job, Record(), image_datasets(job, data), BATCH_SIZE)


def best(job: Job, data: Data) -> Record:
    """bf16, channels-last, fused Adam, images preprocessed once, validation in larger batches."""
    torch.manual_seed(SEED)
    module = Classifier(build_fast_model(job), job.lr, channels_last=True, fused=True)
    record, precision = Record(), "bf16-mixed" if job.bf16 else "32-true"
    return fit(module, job, record, tensor_datasets(job, data), VALIDATION_BATCH_SIZE, precision=precision)
