"""200 runs with settings drawn at random, each stopped after random steps and resumed: the same to the last bit."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import transferkit as tk

EPOCHS, BATCH = 3, 8
DATA = tiny.make_images(24)
STEPS = EPOCHS * 24 // BATCH


class Stop:
    """Ends a run after so many of its steps, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, trainer: tk.Trainer, report: tk.EpochReport) -> None:
        """Do nothing after an epoch."""

    def after_step(self, trainer: tk.Trainer) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


def settings(dice: random.Random) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], str | None]:
    """Draw the arguments of head, trainer and fit, and the boundary."""
    hidden = dice.choice(((), (16,)))
    head = {"hidden": hidden, "dropout": dice.choice((0.0, 0.5)), "pooling": dice.choice(("avgmax", "avg", "flatten"))}
    trainer = {
        "optimizer": dice.choice(("adam", "adamw", "sgd", "rmsprop")),
        "schedule": dice.choice(("constant", "cosine", "one_cycle")),
        "clip_grad_norm": dice.choice((None, 1.0)),
        "cache": dice.choice(("auto", False)),
        "lr": 1e-3,
        "seed": dice.randrange(10),
        "micro_batch_size": dice.choice((None, 3)),
    }
    views = dice.choice((None, 2))
    fit = {
        "augment": "flip" if views else dice.choice((None, "flip")),
        "n_views": views,
        "validation_split": dice.choice((None, 0.25)),
    }
    return head, trainer, fit, dice.choice(("head", "block5", None))


def run(number: int, folder: Path | None, *callbacks: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    head, trainer, arguments, boundary = settings(random.Random(number))
    backbone = tiny.make_backbone(batch_norm=number % 3 == 0)
    live = tiny.make_trainer(tiny.make_model(backbone, boundary, **head), **trainer)
    saved = [] if folder is None else [tk.Checkpoint(folder, every_steps=1, keep_last=2)]
    history = live.fit(
        DATA,
        epochs=EPOCHS,
        batch_size=BATCH,
        verbose=0,
        callbacks=[*callbacks, *saved],
        resume_from=folder,
        **arguments,
    )
    state = live.state_dict()
    return {name: state[name] for name in ("model", "optimizer", "progress")}, tiny.figures(history)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_run_stopped_anywhere_and_resumed_is_the_whole_run(tmp_path: Path, part: int) -> None:
    """Weights, optimizer, counters and history of twenty runs, each stopped once or twice."""
    torch.set_num_threads(1)
    for number in range(20 * part, 20 * part + 20):
        dice, folder = random.Random(-number - 1), tmp_path / str(number)
        folder.mkdir()
        for step in sorted(dice.sample(range(1, STEPS - 2), dice.choice((1, 2)))):
            with pytest.raises(KeyboardInterrupt):
                run(number, folder, Stop(step))
        resumed, whole = run(number, folder), run(number, None)
        assert tiny.differences(resumed[0], whole[0]) == [], number
        assert resumed[1] == whole[1], number
