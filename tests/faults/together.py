"""What processes that torchrun starts do in `test_processes`: every case once, and what each came to."""

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import transferkit as tk
from tiny import make_backbone, make_images, make_model, make_trainer, summed
from transferkit.features import cache, prefix

RANK = int(os.environ.get("RANK", "0"))
SIZE = int(os.environ.get("WORLD_SIZE", "1"))
WITH_THREE = ("cached", "fewer images than processes", "dropout", "stopped", "predicted", "solved", "searched")
DATA, HELD_OUT = make_images(23), make_images(9, seed=3)


def trained(boundary: str | None, *, data: Any = DATA, settings: Any = None, head: Any = None, **fit: Any) -> Any:
    """Train a network anew; return all weights, and what it makes of other images."""
    trainer = make_trainer(make_model(make_backbone(), boundary, **{"hidden": (16,)} | (head or {})), **settings or {})
    history = trainer.fit(data, **{"validation_data": HELD_OUT, "epochs": 2, "verbose": 0, **fit})
    figures = {name: values for name, values in history.history.items() if name != "epoch_s"}
    return trainer, {**summed(trainer.model), **figures, **trainer.evaluate(make_images(9, seed=5))}


def fresh(boundary: str | None) -> tk.Trainer:
    """Return a trainer of a new network."""
    return make_trainer(make_model(make_backbone(), boundary))


class Broken(Dataset[tuple[Tensor, int]]):
    """Images of which one cannot be read on the second process."""

    targets = DATA[1].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= 12 and RANK == 1:
            raise OSError("the disk broke")
        return DATA[0][index], self.targets[index]


class Fails:
    """A callback that fails on the last process after some steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, trainer: tk.Trainer, report: object) -> None:
        """Do nothing after an epoch."""

    def after_step(self, trainer: tk.Trainer) -> None:
        if RANK == SIZE - 1 and trainer.global_step == self.steps:
            raise ValueError("a fault of my own")


def right_cases(folder: Path) -> dict[str, Callable[[], Any]]:
    """Return what must be the same in any number of processes."""
    soft = nn.functional.one_hot(DATA[1], 3).float()
    accuracy = lambda probabilities, targets: (probabilities.argmax(1) == targets).double().mean()  # noqa: E731

    def several() -> Any:
        trainer = make_trainer(make_model(make_backbone(), "head"), loss=tk.BinaryCrossEntropy())
        history = trainer.fit((DATA[0], soft), epochs=2, batch_size=2, verbose=0)
        return [history.history["loss"], trainer.predict(HELD_OUT[0]).tolist()]

    def stopped() -> Any:
        """Resume what one process began."""
        own = folder / f"run-{SIZE}"
        if SIZE == 1:
            with suppress(ValueError):
                trained("block5", batch_size=5, callbacks=[tk.Checkpoint(own), Fails(7)])
            shutil.copytree(own, folder / "begun")
        elif RANK == 0:
            shutil.copytree(folder / "begun", own, dirs_exist_ok=True)
        return trained("block5", batch_size=5, callbacks=[tk.Checkpoint(own)], resume_from=own)[1]

    def predicted() -> Any:
        trainer = trained("head")[0]
        one, nine = trainer.predict_proba(HELD_OUT[0][0]), trainer.predict_proba(HELD_OUT[0], batch_size=2)
        trainer.learn_known(DATA)
        return [one.tolist(), nine.tolist(), trainer.novelty(HELD_OUT[0]).tolist(), trainer.calibrate(HELD_OUT)]

    def assessed() -> Any:
        found = trained("head", settings={"metrics": {"right": accuracy}}, batch_size=4)
        assessment = found[0].assess(HELD_OUT)
        return [found[1], assessment.accuracy, assessment.confusion_matrix().tolist(), len(assessment.probabilities)]

    def solved() -> Any:
        trainer = make_trainer(make_model(make_backbone(), "head"), cache=folder / f"features-{SIZE}")
        head = trainer.solve(DATA, verbose=0)
        return [head.l2, trainer.evaluate(HELD_OUT), trainer.model.temperature]

    def looked() -> Any:
        found = tk.audit(make_backbone(), DATA, HELD_OUT, device="cpu", precision="fp32", verbose=0)
        return [[each.kind, each.index] for each in found.findings]

    def probed() -> Any:
        found = tk.probe(make_backbone(), DATA, device="cpu", precision="fp32", verbose=0)
        return [[list(score.layers), score.accuracy] for score in found.scores]

    def tuned() -> Any:
        arguments = {"device": "cpu", "precision": "fp32", "verbose": 0, "freeze_until": "block5", "epochs": 2}
        trainer = tk.fine_tune(make_backbone(), make_images(48), HELD_OUT, batch_size=7, **arguments)
        return [trainer.evaluate(HELD_OUT), trainer.epoch]

    def searched() -> Any:
        found = tk.search(
            lambda: make_model(make_backbone(), "head"),
            {"lr": [1e-3, 1e-2, 1e-1], "epochs": [2]},
            DATA,
            validation_data=HELD_OUT,
            device="cpu",
            precision="fp32",
            verbose=0,
        )
        return [[trial.score for trial in found.trials], found.best_params_, summed(found.best_model_)]

    return {
        "cached": lambda: trained("block5", batch_size=5)[1],
        "images": lambda: trained(None, batch_size=4, lr=1e-3)[1],
        "fewer images than processes": lambda: trained("head", batch_size=2)[1],
        "views": lambda: trained("block4", batch_size=7, augment="flip", n_views=2)[1],
        "weighted": lambda: trained("block5", settings={"loss": tk.CrossEntropy(class_weights=[0.0, 1.0, 3.0])})[1],
        "several labels": several,
        "unfreezing": lambda: trained("head", callbacks=[tk.GradualUnfreezing({1: "block5"})])[1],
        "dropout": lambda: trained("block5", head={"dropout": 0.5}, batch_size=5)[1],
        "standardized": lambda: trained("head", head={"hidden": ()}, batch_size=8)[1],
        "averaged": lambda: trained("block5", callbacks=[tk.WeightAverage(0.9)])[1],
        "own data": lambda: trained("block5", data=TensorDataset(*DATA), num_workers=2)[1],
        "stopped": stopped,
        "predicted": predicted,
        "assessed": assessed,
        "solved": solved,
        "looked": looked,
        "probed": probed,
        "tuned": tuned,
        "searched": searched,
        "rates": lambda: (
            make_trainer(make_model(make_backbone(), "head")).lr_find(DATA, num_steps=4, lr_max=1e-3, verbose=0).losses
        ),
        "by hand": lambda: [
            step.loss.item() for step in make_trainer(make_model(make_backbone(), "block5")).steps(DATA)
        ],
    }


def wrong_cases(folder: Path) -> dict[str, Callable[[], Any]]:
    """Return what must fail on all processes, with a sentence."""
    poisoned = make_backbone().preprocess(DATA[0]).clone()
    poisoned[3] = float("nan")
    other = DATA[0], DATA[1].roll(RANK)
    batch_norm = lambda: make_trainer(make_model(make_backbone(batch_norm=True)))  # noqa: E731

    def in_a_thread() -> None:
        found: list[BaseException] = []

        def run() -> None:
            try:
                make_trainer(make_model(make_backbone(), "head"))
            except tk.TransferKitError as error:
                found.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        raise found[0]

    def parted() -> None:
        trainer = fresh("head")
        trainer.evaluate(DATA) if RANK else trainer.fit(DATA, verbose=0)

    def changed() -> None:
        trainer = fresh("head")
        with torch.no_grad():
            trainer.model.head[-1].bias += RANK
        trainer.fit(DATA, verbose=0)

    saving = tk.Checkpoint(folder / f"fails-{SIZE}")
    return {
        "data": lambda: trained("block5", data=Broken()),
        "callback": lambda: trained("block5", batch_size=4, callbacks=[Fails(3), saving]),
        "not finite": lambda: trained("block5", data=(poisoned, DATA[1])),
        "other data": lambda: trained("block5", data=other),
        "other arguments": lambda: trained("block5", batch_size=4 + RANK),
        "other weights": changed,
        "other calls": parted,
        "loader": lambda: trained("block5", data=DataLoader(TensorDataset(*DATA), batch_size=4)),
        "batch norm": lambda: batch_norm().fit(DATA, verbose=0),
        "thread": in_a_thread,
    }


def main() -> None:
    """Write what each case came to into a file of this process."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    prefix._PIXELS_ON_CPU = 4 * 32**2  # batches of four images, so that each process has some
    cache.CHUNK_IMAGES = 8
    torch.manual_seed(RANK)  # a head whose first weights differ: the first process's count
    found: dict[str, Any] = {"first weights": None}
    backbone = make_backbone()
    torch.manual_seed(RANK)
    found["first weights"] = summed(make_trainer(tk.attach_head(backbone, ["cat", "dog"])).model)
    right = right_cases(folder)
    for name in right if SIZE < 3 else WITH_THREE:
        found[name] = right[name]()
    for name, case in wrong_cases(folder).items() if SIZE == 2 else ():
        found[name] = "nothing was raised"
        with suppress(ValueError, RuntimeError, tk.TransferKitError):
            try:
                case()
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
                raise
    if SIZE == 2:
        arguments = {"device": "cpu", "precision": "fp32", "verbose": 0, "batch_size": 16, "augment": "flip"}
        trainer = tk.fine_tune(make_backbone(), make_images(120), budget=6, **arguments)
        found["hurried"] = [trainer.evaluate(HELD_OUT), trainer.epoch, trainer.history and len(trainer.history.reports)]
    found["after all"] = trained("block5", batch_size=5)[1]
    found["files"] = sorted(path.name for path in (folder / f"features-{SIZE}").iterdir())
    (folder / f"{SIZE}-{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
