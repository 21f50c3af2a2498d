"""`transferkit train`: a run folder with the model, what became of it, and what repeats it."""

import argparse
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset

from transferkit.base.files import atomic_write
from transferkit.command.actions import (
    ASSESSMENT,
    MODEL,
    SETTINGS,
    Shown,
    arguments_of,
    figures,
    in_words,
    read_backbone,
    to_json,
    versions,
)
from transferkit.command.images import open_training
from transferkit.command.report import report
from transferkit.data_audit import audit
from transferkit.errors import ArgumentError
from transferkit.fine_tune import fine_tune
from transferkit.saving.model import save_model

REPORT = "report.html"
CHECKPOINTS = "checkpoints"

INDIFFERENT = ("action", "audit", "command", "folder", "json", "num_workers", "verbose")
"""Options that the model does not depend on."""


def train(options: argparse.Namespace) -> Shown:
    """Train on a folder with a folder of images for each class, or one with train/ and val/, test/ or both.

    First, a linear head is solved on the frozen network. Then the last layers are trained from there, if the budget
    allows, and kept if that is better on the held-out images: those of val/, else a tenth of the training images.
    The run folder gets model.pt, report.html (open it in a browser), settings.json, history.json, assessment.json
    and audit.csv. Ctrl-C ends training early and keeps the best model so far. If a run is killed, the same command
    continues it.

    Examples:
      transferkit train photos --budget 60 --image-size 64    a minute, on a CPU
      transferkit train photos --freeze-until head            only the head: seconds once the images have been read
      transferkit train photos --weights vgg16.pth --preprocessing IMAGENET1K_V1    without a network connection
    """
    folder = options.folder or Path("runs", options.data.resolve().name)
    images = open_training(options)
    if Path(images["train"].root) == options.data and options.data.resolve() in folder.resolve().parents:
        raise ArgumentError(f"{folder} lies in {options.data}, where it would be a class: expected --folder elsewhere.")
    backbone = read_backbone(options)
    chosen = {name: value for name, value in vars(options).items() if name not in INDIFFERENT}
    settings = {
        "command": options.command,
        "options": {**chosen, "data": str(options.data), "backbone": backbone.fingerprint},
        "versions": versions(),
    }
    _check_folder(folder, settings)
    if not any((folder / CHECKPOINTS).rglob("*.pt")):  # nothing to continue
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / SETTINGS, to_json(settings))

    arguments = {**arguments_of(fine_tune, options), "folder": folder / CHECKPOINTS, "on_bad_image": "raise"}
    trainer = fine_tune(backbone, images["train"], images["val"], **arguments)
    save_model(trainer.model, folder / MODEL)
    assessment = trainer.assess(images.get("test", images["val"]), num_workers=options.num_workers)
    _write(folder / "history.json", to_json({} if trainer.history is None else trainer.history.history))
    _write(folder / ASSESSMENT, to_json(figures(assessment)))
    found = None
    if options.audit:
        others: ConcatDataset[Any] = ConcatDataset([images[part] for part in ("val", "test") if part in images])
        arguments = arguments_of(audit, options) | {"cache": None if options.cache == "auto" else options.cache}
        found = audit(read_backbone(options), images["train"], others, **arguments)
        found.to_csv(folder / "audit.csv")
    page = report(folder, settings=settings, images=images, trainer=trainer, assessment=assessment, audit=found)
    _write(folder / REPORT, page)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # nothing is left to continue
    text = f"{in_words(assessment)}\nmodel   {folder / MODEL}\nreport  {folder / REPORT}"
    return text, {"folder": str(folder), **figures(assessment)}


def _check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a run folder that holds anything but an unfinished run with the same settings."""
    free = next(name for name in (f"{folder}-{number}" for number in range(2, 10**6)) if not Path(name).exists())
    advice = f"expected a new folder, such as --folder {shlex.quote(free)}"
    if (folder / REPORT).exists():
        raise ArgumentError(f"{folder} holds a finished run: {advice}.")
    if any((folder / CHECKPOINTS).rglob("*.pt")):
        before, now = json.loads((folder / SETTINGS).read_text()), json.loads(to_json(settings))
        if different := [name for name, value in now["options"].items() if before["options"].get(name) != value]:
            raise ArgumentError(
                f"{folder} holds an unfinished run with other settings ({', '.join(different)}): {advice}, or the "
                f"command that continues it: {before['command']}"
            )
    elif folder.exists() and not (folder / SETTINGS).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArgumentError(f"{folder} is there already, and is no run: {advice}.")


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
