"""A run of training that torchrun starts, in which a process dies, hangs or is told to end; for `test_processes`."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.data import Dataset

import transferkit as tk
from tiny import make_backbone, make_images, make_model, make_trainer
from transferkit.base import processes
from transferkit.features import cache, prefix

RANK, FIRST = int(os.environ.get("RANK", "0")), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
FOLDER, WHERE, SIGNAL = [*sys.argv[1:], "", "", ""][:3]  # none where tests are only collected
FEATURES = Path(FOLDER) / (f"features of host {os.environ['GROUP_RANK']}" if WHERE == "hosts" else "features")
DATA = make_images(23)


def end(where: str) -> None:
    """Send this process a signal, if it is the one and this is the place."""
    if f"{where}{RANK}" == WHERE and FIRST:
        os.kill(os.getpid(), int(SIGNAL))


def end_in_fill() -> None:
    """End this process, if it is the one, when three chunks are written; list them first."""
    if f"fill{RANK}" == WHERE and FIRST:
        while len(found := list(FEATURES.glob("*.features"))) < 3:
            time.sleep(0.01)
        (Path(FOLDER) / "written.json").write_text(json.dumps({path.name: path.stat().st_mtime_ns for path in found}))
        end("fill")


class Images(Dataset[tuple[Tensor, int]]):
    """Images; one of the last chunk that a process reads is where it ends in the fill."""

    targets = DATA[1].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == (17, 21)[RANK % 2] and COMPUTED:
            end_in_fill()
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


COMPUTED: list[int] = []  # how many images went through the frozen layers, batch by batch


def counted(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Note how many images go through a prefix."""

    def run(self: prefix.Prefix, inputs: Tensor, **options: Any) -> Tensor:
        COMPUTED.append(len(inputs))
        return compute(self, inputs, **options)

    return run


def main() -> None:
    """Train, resuming what is there, and write what came of it."""
    torch.set_num_threads(1)
    prefix._PIXELS_ON_CPU = 4 * 32**2  # batches, and chunks, of four images
    cache.CHUNK_IMAGES = 4
    prefix.Prefix.__call__ = counted(prefix.Prefix.__call__)  # type: ignore[method-assign]
    if str(signal.SIGSTOP.value) == SIGNAL:
        processes.TIMEOUT = timedelta(seconds=20)
    if WHERE == "hosts":
        distributed.init_process_group(timeout=timedelta(minutes=5))  # as a user may, and leave it as it is
    trainer = make_trainer(make_model(make_backbone(), "block5", hidden=(16,)), cache=FEATURES)
    callbacks = [Ends(Path(FOLDER) / "run", every_steps=1)]
    history = trainer.fit(
        Images(), epochs=2, batch_size=5, callbacks=callbacks, resume_from=Path(FOLDER) / "run", verbose=2
    )
    weights = {name: value.tolist() for name, value in trainer.model.state_dict().items()}
    Path(FOLDER).mkdir(exist_ok=True, parents=True)
    (Path(FOLDER) / f"came-to-{RANK}.json").write_text(json.dumps([history.history["loss"], weights, sum(COMPUTED)]))


if __name__ == "__main__":
    main()
