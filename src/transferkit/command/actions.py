"""What each command does: the text and the data that it shows."""

import importlib.util
import inspect
import json
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset

from transferkit.base.randomness import seeded
from transferkit.command.images import find_images, open_parts, open_training
from transferkit.command.report import in_words, report
from transferkit.compute.device import Device
from transferkit.data_audit import audit
from transferkit.errors import ArgumentError, MissingPackageError
from transferkit.fine_tuning import fine_tune
from transferkit.model.backbone import Backbone, load_backbone
from transferkit.model.export import WithPreprocessing
from transferkit.model.head import TransferModel
from transferkit.results.assessment import Assessment
from transferkit.saving.model import load_model, save_model
from transferkit.trainer import Trainer

MODEL, SETTINGS, ASSESSMENT, CHECKPOINTS = "model.pt", "settings.json", "assessment.json", "checkpoints"
INDIFFERENT = ("command", "folder", "json", "no_audit", "num_workers", "verbose")  # the model does not depend on them
Options = Mapping[str, Any]  # what was written, by the library's names, and paths by their names in capitals
Shown = tuple[str, Any]  # as text, and as JSON


def given(function: Callable[..., Any], options: Options) -> dict[str, Any]:
    """Return the options that are arguments of a function."""
    return {name: options[name] for name in inspect.signature(function).parameters if name in options}


def to_json(value: Any) -> str:
    """Return plain types as JSON, which has no NaN: null instead."""
    return json.dumps(json.loads(json.dumps(value, default=str), parse_constant=lambda _: None), indent=1)


def read_backbone(options: Options) -> Backbone:
    """Return the backbone asked for; random weights depend on the seed."""
    with seeded(options.get("seed", 0)):
        return load_backbone(**given(load_backbone, options))


def _read_model(path: Path) -> TransferModel:
    return load_model(path / MODEL if path.is_dir() else path)


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
        "versions": versions(),
    }
    _check_folder(folder, json.loads(to_json(settings)))
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(to_json(settings))

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
    (folder / "history.json").write_text(to_json(trainer.history.history if trainer.history else {}))
    (folder / ASSESSMENT).write_text(to_json(figures(assessment)))
    page = report(folder / MODEL, settings=settings, images=images, trainer=trainer, assessment=assessment, audit=found)
    shown = folder / "report.html"
    shown.write_text(page, encoding="utf-8")
    shutil.rmtree(folder / CHECKPOINTS)  # nothing is left to continue
    text = f"{in_words(assessment)}\nmodel   {folder / MODEL}\nreport  {shown}"
    return text, {"folder": str(folder), **figures(assessment)}


def _check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a run folder that holds anything but an unfinished run with the same settings."""
    free = next(name for name in (f"{folder}-{number}" for number in range(2, 10**6)) if not Path(name).exists())
    advice = f"expected a new folder, such as --folder {shlex.quote(free)}"
    kept = folder / CHECKPOINTS
    if folder.exists() and not kept.is_dir() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArgumentError(f"{folder} exists already and holds no unfinished run: {advice}.")
    if any(kept.rglob("*.pt")):
        before = json.loads((folder / SETTINGS).read_text())
        old, new = ({**each["options"], "backbone": each["backbone"]} for each in (before, settings))
        if different := [name for name in {**new, **old} if old.get(name) != new.get(name)]:
            raise ArgumentError(
                f"{folder} holds an unfinished run with other settings ({', '.join(different)}): {advice}, or the "
                f"command that continues it: {before['command']}"
            )
    else:
        shutil.rmtree(kept, ignore_errors=True)  # there is nothing to continue


def run_predict(options: Options) -> Shown:
    """Return path, class and probability of each image, and the probabilities of all classes."""
    trainer = Trainer(_read_model(options["MODEL"]), **given(Trainer, options))
    paths, classes, threshold = find_images(options["IMAGES"]), trainer.model.classes, trainer.model.threshold
    rows = trainer.predict_proba(paths, **given(Trainer.predict_proba, options))
    read, far = [not np.isnan(row).any() for row in rows], np.zeros(len(rows), dtype=bool)
    if "unknown" in options and any(read):
        far[read] = trainer.novelty(list(compress(paths, read)), **given(Trainer.novelty, options)) > 0
    lines, found = [], []
    for path, row, is_read, is_far in zip(paths, rows, read, far, strict=True):
        indices = [row.argmax()] if threshold is None else (row >= threshold).nonzero()[0]
        named = [(options["unknown"] if is_far else classes[i], row[i]) for i in indices] if is_read else []
        lines += [f"{path}\t{name}\t{share:.4f}" for name, share in (named if is_read else [("", np.nan)])]
        ranked = {classes[i]: float(row[i]) for i in (-row).argsort(kind="stable")}
        found.append({"path": str(path), "classes": [name for name, _ in named], "probabilities": ranked})
    return "\n".join(lines), found


def run_evaluate(options: Options) -> Shown:
    """Return what the model makes of the images of test/, else of val/, else of all."""
    parts = open_parts(options["DATA"])
    images = parts.get("test") or parts.get("val") or parts["train"]
    sys.stderr.write(f"{len(images):,} images of {images.root}\n")
    trainer = Trainer(_read_model(options["MODEL"]), **given(Trainer, options))
    assessment = trainer.assess(images, **given(Trainer.assess, options))
    return f"{assessment}\n{in_words(assessment)}", figures(assessment)


def figures(assessment: Assessment) -> dict[str, Any]:
    """Return the figures of an assessment as plain types."""
    return {
        "accuracy": assessment.accuracy,
        "accuracy_interval": assessment.accuracy_interval(),
        "loss": assessment.loss,
        "calibration_error": assessment.calibration_error(),
        "num_images": len(assessment.targets),
        "classes": [row._asdict() for row in assessment.per_class()],
        "confusion_matrix": assessment.confusion_matrix().tolist(),
    }


def run_audit(options: Options) -> Shown:
    """Return what the audit finds in train/, beside val/ and test/."""
    parts = open_parts(options["DATA"])
    train = parts.pop("train", None) or parts.pop(next(iter(parts)))
    others: Any = ConcatDataset(parts.values()) if parts else None
    found = audit(read_backbone(options), train, others, **given(audit, options))
    if "to_csv" in options:
        found.to_csv(options["to_csv"])
    findings = [asdict(finding) for finding in found.findings]
    return str(found), {"findings": findings, "precision": found.precision, "accuracy": found.assessment.accuracy}


def run_export(options: Options) -> Shown:
    """Write the program, with the class names in its metadata."""
    path: Path = options["FILE"]
    if path.suffix not in (".pt2", ".onnx"):
        raise ArgumentError(f"cannot export to {path}: expected FILE.pt2 (torch.export) or FILE.onnx.")
    if path.suffix == ".onnx" and importlib.util.find_spec("onnxscript") is None:
        raise MissingPackageError("ONNX needs packages that are not installed. From a clone: pip install '.[onnx]'.")
    module = WithPreprocessing(_read_model(options["MODEL"]), unknown="unknown" in options)
    outputs = ["probabilities", "novelty"][: 2 if "unknown" in options else 1]
    classes = json.dumps(module.classes)
    images = torch.zeros(2, 3, 48, 60, dtype=torch.uint8)  # of no size of their own
    if path.suffix == ".pt2":
        free = torch.export.Dim.DYNAMIC
        program = torch.export.export(module, (images,), dynamic_shapes={"images": {0: free, 2: free, 3: free}})
        torch.export.save(program, path, extra_files={"classes.json": classes})
    else:
        how: Any = {"input_names": ["images"], "output_names": outputs, "dynamo": True, "verbose": False}
        shapes = {"images": {0: "batch", 2: "height", 3: "width"}}
        onnx: Any = torch.onnx.export(module, (images,), dynamic_shapes=shapes, **how)
        onnx.model.metadata_props["classes"] = classes
        onnx.save(str(path))
    taken, given_back = "raw images, uint8 (N, 3, height, width)", " and ".join(outputs)
    text = f"{path}: {taken}, to {given_back} of {len(module.classes)} classes"
    return text, {"path": str(path), "classes": list(module.classes), "outputs": outputs}


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    names = ("transferkit", "torch", "torchvision", "numpy", "pillow")
    return {**{name: version(name) for name in names}, "python": platform.python_version(), "on": platform.platform()}


def run_info(options: Options) -> Shown:
    """Describe a model or, without one, versions and device."""
    path: Path | None = options["MODEL"]
    if path is None:
        data: dict[str, Any] = {**versions(), "device": str(Device("auto"))}
    else:
        model = _read_model(path)
        preprocess = model.backbone.preprocess
        data = {"classes": list(model.classes), "backbone": model.backbone.name, "layers": list(model.layers)}
        data |= {"preprocessing": preprocess.name, "geometry": preprocess.geometry, "image_size": preprocess.image_size}
        data |= {"temperature": model.temperature, "threshold": model.threshold, "unknown": model.novelty is not None}
        for name, key in ((ASSESSMENT, "accuracy"), (SETTINGS, "command"), (SETTINGS, "versions")):
            if (path / name).is_file():
                data[key] = json.loads((path / name).read_text())[key]
    width = max(map(len, data))
    return "\n".join(f"{name:{width}}  {_in_a_line(value)}" for name, value in data.items()), data


def _in_a_line(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [f"{name} {part}" for name, part in value.items()]
    return ", ".join(value) if isinstance(value, list) else f"{value:.4g}" if isinstance(value, float) else str(value)
