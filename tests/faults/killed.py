"""A run of training that torchrun starts, in which the second process dies or is told to end; for `test_processes`."""

import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

import transferkit as tk
from tiny import make_backbone, make_images, make_model, make_trainer

RANK, FIRST = int(os.environ.get("RANK", "0")), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
FOLDER, WHERE, SIGNAL = [*sys.argv[1:], "", "", ""][:3]  # none where tests are only collected
DATA = make_images(23)


def end(where: str) -> None:
    """Send this process a signal, if it is the one and this is the place."""
    if int(WHERE[-1]) == RANK and FIRST and where == WHERE[:-1]:
        os.kill(os.getpid(), int(SIGNAL))


class Images(Dataset[tuple[Tensor, int]]):
    """Images; the last but one is where a process ends in the fill."""

    targets = DATA[1].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 21 and MADE:
            end("fill")
        return DATA[0][index], self.targets[index]


class Ends(tk.Checkpoint):
    """Saves after every step; a process ends after three steps or in the middle of a save."""

    def after_step(self, trainer: tk.Trainer) -> None:
        if trainer.global_step == 3:
            end("step")
        super().after_step(trainer)

    def save(self, trainer: tk.Trainer) -> Path:
        path = super().save(trainer)
        if trainer.global_step == 3:
            end("save")
        return path


MADE: list[bool] = []


def main() -> None:
    """Train, resuming what is there, and write what came of it."""
    torch.set_num_threads(1)
    trainer = make_trainer(make_model(make_backbone(), "block5", hidden=(16,)), cache=Path(FOLDER) / "features")
    MADE.append(True)
    callbacks = [Ends(Path(FOLDER) / "run", every_steps=1)]
    history = trainer.fit(
        Images(), epochs=2, batch_size=5, callbacks=callbacks, resume_from=Path(FOLDER) / "run", verbose=2
    )
    weights = {name: value.tolist() for name, value in trainer.model.state_dict().items()}
    Path(FOLDER).mkdir(exist_ok=True, parents=True)
    (Path(FOLDER) / f"came-to-{RANK}.json").write_text(json.dumps([history.history["loss"], weights]))


if __name__ == "__main__":
    main()
