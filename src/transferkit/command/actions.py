"""What each command but `train` does: the text and the data that it shows."""

import argparse
import importlib.util
import inspect
import json
import math
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset

from transferkit.base.randomness import seeded
from transferkit.command.images import find_images, open_parts
from transferkit.compute.device import Device
from transferkit.data_audit import audit
from transferkit.errors import ArgumentError, MissingPackageError
from transferkit.model.backbone import Backbone, load_backbone
from transferkit.model.export import WithPreprocessing
from transferkit.model.head import TransferModel
from transferkit.results.assessment import Assessment
from transferkit.saving.model import load_model
from transferkit.trainer import Trainer

MODEL = "model.pt"
SETTINGS = "settings.json"
ASSESSMENT = "assessment.json"

Shown = tuple[str, Any]
"""What a command shows as text, and as JSON."""


def arguments_of(function: Callable[..., Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that are arguments of a function."""
    names = [name for name in inspect.signature(function).parameters if name in options and name != "data"]
    return {name: getattr(options, name) for name in names}


def to_json(value: Any) -> str:
    """Return plain types as JSON, which has no NaN: null instead."""
    return json.dumps(_without_nan(value), indent=1, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_backbone(options: argparse.Namespace) -> Backbone:
    """Return the backbone asked for; random weights depend on the seed."""
    with seeded(options.seed):
        return load_backbone(**arguments_of(load_backbone, options))


def _read_model(path: Path) -> TransferModel:
    return load_model(path / MODEL if path.is_dir() else path)


def _read_trainer(options: argparse.Namespace) -> Trainer:
    return Trainer(_read_model(options.model), device=options.device, precision=options.precision)


def predict(options: argparse.Namespace) -> Shown:
    """Predict the classes of images: a line of path, class and probability for each."""
    trainer, paths = _read_trainer(options), find_images(options.images)
    classes, threshold = trainer.model.classes, trainer.model.threshold
    lines, found = [], []
    for path, row in zip(paths, trainer.predict_proba(paths, num_workers=options.num_workers), strict=True):
        predicted = [row.argmax()] if threshold is None else (row >= threshold).nonzero()[0]
        lines += [f"{path}\t{classes[index]}\t{row[index]:.4f}" for index in predicted]
        probabilities = dict(zip(classes, map(float, row), strict=True))
        found.append({"path": str(path), "classes": [classes[i] for i in predicted], "probabilities": probabilities})
    return "\n".join(lines), found


def evaluate(options: argparse.Namespace) -> Shown:
    """Compare predictions with labels: those of test/, else of val/, else of all images."""
    parts = open_parts(options.data)
    images = next(parts[part] for part in ("test", "val", "train") if part in parts)
    sys.stderr.write(f"{len(images):,} images of {images.root}\n")
    assessment = _read_trainer(options).assess(images, num_workers=options.num_workers)
    return f"{assessment}\n{in_words(assessment)}", figures(assessment)


def in_words(assessment: Assessment) -> str:
    """Return the accuracy and its interval in a line."""
    (low, high), count = assessment.accuracy_interval(), len(assessment.targets)
    return f"accuracy {assessment.accuracy:.3f} (95 % interval {low:.3f} to {high:.3f}) on {count:,} images"


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


def find(options: argparse.Namespace) -> Shown:
    """Look for wrong labels, copies, images unlike the rest, and images of train/ that are also in val/ or test/.

    Nothing is trained and no image is changed. The text shows the first findings of each kind; --to-csv and --json
    have all of them.

    Example:
      transferkit audit photos --image-size 64 --to-csv findings.csv
    """
    parts = open_parts(options.data)
    train = parts.pop("train", None) or parts.pop(next(iter(parts)))
    others: Any = ConcatDataset(parts.values()) if parts else None
    found = audit(read_backbone(options), train, others, **arguments_of(audit, options))
    if options.to_csv is not None:
        found.to_csv(options.to_csv)
    findings = [asdict(finding) for finding in found.findings]
    return str(found), {"findings": findings, "precision": found.precision, "accuracy": found.assessment.accuracy}


def export(options: argparse.Namespace) -> Shown:
    """Write model and preprocessing as one program, which torch or ONNX runs without transferkit."""
    path: Path = options.path
    if path.suffix not in (".pt2", ".onnx"):
        raise ArgumentError(f"cannot export to {path}: expected FILE.pt2 (torch.export) or FILE.onnx.")
    if path.suffix == ".onnx" and importlib.util.find_spec("onnxscript") is None:
        raise MissingPackageError("ONNX needs packages that are not installed. From a clone: pip install '.[onnx]'.")
    module = WithPreprocessing(_read_model(options.model))
    images, classes = (
        torch.zeros(2, 3, 48, 60, dtype=torch.uint8),
        json.dumps(module.classes),
    )  # of no size of their own
    if path.suffix == ".pt2":
        free = torch.export.Dim.DYNAMIC
        program = torch.export.export(module, (images,), dynamic_shapes={"images": {0: free, 2: free, 3: free}})
        torch.export.save(program, path, extra_files={"classes.json": classes})
    else:
        shapes = {"images": {0: "batch", 2: "height", 3: "width"}}
        names: Any = {"input_names": ["images"], "output_names": ["probabilities"]}
        onnx: Any = torch.onnx.export(module, (images,), dynamic_shapes=shapes, dynamo=True, verbose=False, **names)
        onnx.model.metadata_props["classes"] = classes
        onnx.save(str(path))
    text = f"{path}: raw images, uint8 (N, 3, height, width), to the probabilities of {len(module.classes)} classes"
    return text, {"path": str(path), "classes": list(module.classes)}


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    names = ("transferkit", "torch", "torchvision", "numpy", "pillow")
    own = {"python": platform.python_version(), "system": platform.platform()}
    return {name: version(name) for name in names} | own


def info(options: argparse.Namespace) -> Shown:
    """Describe a model or, without one, versions and device."""
    data: dict[str, Any] = {}
    if options.model is None:
        data = {**versions(), "device": str(Device("auto"))}
    else:
        model = _read_model(options.model)
        data |= {"classes": list(model.classes), "backbone": model.backbone.name, "layers": list(model.layers)}
        data |= {"preprocessing": model.backbone.preprocess.name, "image_size": model.backbone.image_size}
        data |= {"temperature": model.temperature, "threshold": model.threshold}
        for name, key in ((ASSESSMENT, "accuracy"), (SETTINGS, "command"), (SETTINGS, "versions")):
            if (options.model / name).is_file():
                data[key] = json.loads((options.model / name).read_text())[key]
    width = max(map(len, data))
    return "\n".join(f"{name:{width}}  {_in_a_line(value)}" for name, value in data.items()), data


def _in_a_line(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [f"{name} {part}" for name, part in value.items()]
    return ", ".join(value) if isinstance(value, list) else f"{value:.4g}" if isinstance(value, float) else str(value)
