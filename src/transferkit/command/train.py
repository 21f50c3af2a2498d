"""`transferkit train`: a run folder with the model, what became of it, and what repeats it."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset

from transferkit.command import actions
from transferkit.command.actions import MODEL, Options, Shown, figures, given, in_words, read_backbone, to_json
from transferkit.command.images import open_training
from transferkit.command.report import report
from transferkit.data_audit import audit
from transferkit.errors import ArgumentError
from transferkit.fine_tuning import fine_tune
from transferkit.saving.model import save_model
from transferkit.trainer import Trainer

REPORT = "report.html"
CHECKPOINTS = "checkpoints"

INDIFFERENT = ("command", "folder", "json", "no_audit", "num_workers", "verbose")  # the model does not depend on them


def run_train(options: Options) -> Shown:
    """Train, and write the run folder; a run that was ended before continues."""
    data: Path = options["DATA"]
    folder = options.get("folder", Path("runs", data.resolve().name))
    if data.resolve() in folder.resolve().parents:
        raise ArgumentError(f"{folder} lies in {data}, where it would be a class: expected --folder elsewhere.")
    images, backbone = open_training(options), read_backbone(options)
    settings: dict[str, Any] = {
        "command": options["command"],
        "options": {name: value for name, value in options.items() if name not in INDIFFERENT},
        "backbone": backbone.fingerprint,
        "versions": actions.versions(),
    }
    _check_folder(folder, json.loads(to_json(settings)))
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    (folder / actions.SETTINGS).write_text(to_json(settings))

    how = {**given(fine_tune, options), "folder": folder / CHECKPOINTS, "on_bad_image": "raise"}
    trainer = fine_tune(backbone, images["train"], images["val"], **how)
    if "rejected" in options:
        trainer.learn_known(images["train"], images["val"], **given(Trainer.learn_known, options))
    save_model(trainer.model, folder / MODEL)
    assessment = trainer.assess(images.get("test", images["val"]), **given(Trainer.assess, options))
    found = None
    if "no_audit" not in options:
        others: ConcatDataset[Any] = ConcatDataset([images[part] for part in ("val", "test") if part in images])
        how = {**given(audit, options), "device": trainer.device, "cache": trainer}
        found = audit(read_backbone(options), images["train"], others, **how)
        found.to_csv(folder / "audit.csv")
    history = {} if trainer.history is None else trainer.history.history
    (folder / "history.json").write_text(to_json(history))
    (folder / actions.ASSESSMENT).write_text(to_json(figures(assessment)))
    page = report(folder, settings=settings, images=images, trainer=trainer, assessment=assessment, audit=found)
    (folder / REPORT).write_text(page, encoding="utf-8")
    shutil.rmtree(folder / CHECKPOINTS)  # nothing is left to continue
    text = f"{in_words(assessment)}\nmodel   {folder / MODEL}\nreport  {folder / REPORT}"
    return text, {"folder": str(folder), **figures(assessment)}


def _check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a run folder that holds anything but an unfinished run with the same settings."""
    free = next(name for name in (f"{folder}-{number}" for number in range(2, 10**6)) if not Path(name).exists())
    advice = f"expected a new folder, such as --folder {shlex.quote(free)}"
    kept = folder / CHECKPOINTS
    if folder.exists() and not kept.is_dir() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArgumentError(f"{folder} exists already and holds no unfinished run: {advice}.")
    if any(kept.rglob("*.pt")):
        before = json.loads((folder / actions.SETTINGS).read_text())
        old, new = ({**each["options"], "backbone": each["backbone"]} for each in (before, settings))
        if different := [name for name in {**new, **old} if old.get(name) != new.get(name)]:
            raise ArgumentError(
                f"{folder} holds an unfinished run with other settings ({', '.join(different)}): {advice}, or the "
                f"command that continues it: {before['command']}"
            )
    else:
        shutil.rmtree(kept, ignore_errors=True)  # there is nothing to continue
