"""transferkit in `quality.py`: the one call, the solved head, and the recipe of the first version."""

import torch
from quality_task import BATCH_SIZE, TEST_BATCH_SIZE, Curve, Task
from torch.utils.data import Subset

import transferkit as tk


def load(task: Task, geometry: str | None = None) -> tk.Backbone:
    kind = {"preprocessing": "IMAGENET1K_FEATURES", "geometry": geometry}
    return tk.load_backbone(weights=task.weights, image_size=task.image_size, **kind)


def end(curve: Curve, trainer: tk.Trainer, test: Subset) -> Curve:
    return curve.measure(lambda: trainer.evaluate(test, batch_size=TEST_BATCH_SIZE)["accuracy"])


def fine_tune(task: Task, train: Subset, test: Subset) -> Curve:
    backbone = load(task)
    budget = float(task.method.partition(":")[2] or 0) or None
    curve = Curve()
    trainer = tk.fine_tune(backbone, train, budget=budget, epochs=task.epochs, seed=task.seed, verbose=0)
    return end(curve, trainer, test)


def solve(task: Task, train: Subset, test: Subset) -> Curve:
    backbone = load(task, geometry=task.method.partition(":")[2] or None)
    curve = Curve()
    model = tk.freeze_until(tk.attach_head(backbone, train.dataset.classes), "head")
    trainer = tk.Trainer(model, seed=task.seed)
    trainer.solve(train, verbose=0)
    return end(curve, trainer, test)


def old(task: Task, train: Subset, test: Subset) -> Curve:
    backbone = load(task)
    torch.manual_seed(task.seed)  # of the head's initial weights
    curve = Curve()
    model = tk.attach_head(backbone, train.dataset.classes, hidden=(4096, 4096), pooling="flatten")
    trainer = tk.Trainer(tk.freeze_until(model, "head"), optimizer="adam", lr=1e-3, schedule="constant", seed=task.seed)
    trainer.fit(train, epochs=task.epochs or 10, batch_size=BATCH_SIZE, verbose=0)
    return end(curve, trainer, test)
