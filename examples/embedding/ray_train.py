"""The same calls in each worker of Ray Train: they find its process group and share the work.

Run from a clone, after pip install "ray[train]": python examples/embedding/ray_train.py
"""

import tempfile
from pathlib import Path

import ray
import torch
from ray.train import Checkpoint, RunConfig, ScalingConfig, get_context, report
from ray.train.torch import TorchTrainer, get_device
from subset import WEIGHTS, read_images

import transferkit as tk


def train() -> None:
    images, targets, classes = read_images("train", per_class=25)
    test = read_images("test", per_class=10)[:2]
    backbone = tk.load_backbone("vgg16", weights=WEIGHTS, preprocessing="IMAGENET1K_FEATURES", image_size=32)
    model = tk.freeze_until(tk.attach_head(backbone, classes), "head")
    before = [value.clone() for value in model.split()[0].state_dict().values()]

    trainer = tk.Trainer(model, device=str(get_device()))
    trainer.solve((images, targets))  # each worker computes the features of its part of the images
    frozen = model.split()[0].state_dict().values()
    unchanged = all(map(torch.equal, before, (value.cpu() for value in frozen)))
    tk.freeze_until(model, "block5")
    trainer.fit((images, targets), epochs=2, batch_size=32, lr=1e-4)  # each trains on its part of each batch
    figures = {"accuracy": trainer.evaluate(test)["accuracy"], "unchanged": unchanged}  # the same in each worker
    with tempfile.TemporaryDirectory() as folder:
        trainer.save(Path(folder) / "model.pt")  # which the first worker writes
        report(figures, checkpoint=None if get_context().get_world_rank() else Checkpoint.from_directory(folder))


def main() -> None:
    ray.init(num_cpus=2, include_dashboard=False)
    with tempfile.TemporaryDirectory() as folder:
        workers = ScalingConfig(num_workers=2, use_gpu=torch.cuda.device_count() > 1)
        result = TorchTrainer(train, scaling_config=workers, run_config=RunConfig(storage_path=folder)).fit()
    ray.shutdown()
    print(f"frozen layers unchanged: {result.metrics['unchanged']}")
    print(f"accuracy {result.metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
