"""transferkit: at its defaults, without the feature cache, and with features that an earlier run cached in a folder."""

import torch
from job import BATCH_SIZE, HIDDEN, NUM_CLASSES, SEED, WEIGHTS, Data, Job, Record

import transferkit as tk


def train(job: Job, data: Data, **trainer_arguments: object) -> Record:
    torch.manual_seed(SEED)
    backbone = tk.load_backbone(
        "vgg16", weights=WEIGHTS, preprocessing="IMAGENET1K_FEATURES", image_size=job.image_size
    )
    model = tk.attach_head(backbone, NUM_CLASSES, hidden=HIDDEN, pooling="flatten")
    tk.freeze_until(model, "head" if job.frozen else None)
    trainer = tk.Trainer(
        model, lr=job.lr, schedule="constant", clip_grad_norm=None, precision=job.precision, **trainer_arguments
    )
    record = Record()
    history = trainer.fit(
        (data.train_images, data.train_targets),
        validation_data=(data.validation_images, data.validation_targets),
        epochs=job.epochs,
        batch_size=BATCH_SIZE,
        verbose=0,
    )
    record.end()
    record.epoch_s = history.history["epoch_s"]
    record.validation_accuracy = history.history["val_accuracy"]
    return record


def default(job: Job, data: Data) -> Record:
    return train(job, data)


def uncached(job: Job, data: Data) -> Record:
    return train(job, data, cache=False)


def kept(job: Job, data: Data, cache_folder: str) -> Record:
    """Use the features of an earlier run, which `compare.py` makes first, in its own process."""
    return train(job, data, cache=cache_folder)
