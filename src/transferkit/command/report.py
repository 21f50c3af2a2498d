"""A run as one page of HTML, without scripts and without anything from elsewhere."""

import base64
import html
import io
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder

from transferkit.command.actions import MODEL
from transferkit.command.chart import chart
from transferkit.data.images import upright_rgb
from transferkit.model.freezing import describe_frozen, first_trainable
from transferkit.results.assessment import Assessment
from transferkit.results.auditing import KINDS, Audit
from transferkit.trainer import Trainer

MOST_CLASSES = 25
"""Classes up to which the confusion matrix is shown whole: a wider one cannot be read."""

NUM_SHOWN = 24
"""Images, and pairs of classes, shown at most."""

FEW = 6
"""Findings of a kind shown at most."""

THUMBNAIL = 192  # pixels
BINS = 10  # of probabilities


def report(
    folder: Path,
    *,
    settings: Mapping[str, Any],
    images: Mapping[str, ImageFolder],
    trainer: Trainer,
    assessment: Assessment,
    audit: Audit | None,
) -> str:
    """Return the page.

    Args:
        folder: The run folder, as the page names it.
        settings: What repeats the run.
        images: By part: `"train"`, `"val"`, and `"test"` if there is one.
        trainer: After the run.
        assessment: Of the images of `"test"`, else of `"val"`.
        audit: Of the images of `"train"`, if there was one.
    """
    low, high = assessment.accuracy_interval()
    unseen = images.get("test", images["val"])
    if "test" in images:
        kind, note = "test", "The model has not seen them before."
    else:
        kind, note = "held-out", "The model was not trained on them, but chosen by them, which flatters it a little."
    page = Template(resources.files("transferkit.command").joinpath("report.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=f"{_text(folder.name)}: {assessment.accuracy:.1%} right",
        summary=f"{len(unseen.classes)} classes. Accuracy {assessment.accuracy:.3f} on {len(unseen):,} {kind} images, "
        f"between {low:.3f} and {high:.3f} with 95 % confidence. {note}",
        facts=_table((), _facts(settings, images, trainer), kind="facts"),
        command=_command(settings["command"]),
        curves=_curves(trainer),
        classes=_classes(images["train"], assessment),
        confusion=_confusion(assessment),
        worst=_worst(unseen, assessment),
        calibration=_calibration(assessment),
        audit=_audit(audit),
        predict=_command(shlex.join(["transferkit", "predict", str(folder), "photo.jpg"])),
        model=_text(repr(str(folder / MODEL))),
        versions=_table((), settings["versions"].items(), kind="facts"),
    )


def _facts(
    settings: Mapping[str, Any], images: Mapping[str, ImageFolder], trainer: Trainer
) -> Iterable[tuple[str, str]]:
    names = {"train": "training images", "val": "held-out images", "test": "test images"}
    for part, name in names.items():
        if part in images:
            yield name, f"{len(images[part]):,} of {images[part].root}"
    backbone = trainer.model.backbone
    yield "network", f"{backbone.name}, weights {settings['options']['weights'] or 'random'}"
    yield "preprocessing", f"{backbone.preprocess.name}, {backbone.image_size} x {backbone.image_size} pixels"
    yield "the head sees", ", ".join(trainer.model.layers) or "the last block"
    yield "at the end", describe_frozen(trainer.model)
    yield "computed on", f"{trainer.device.torch_device} in {trainer.device.precision}"


def _curves(trainer: Trainer) -> str:
    history = trainer.history
    if history is None or not history.reports:
        return "<p>The head was solved to its optimum on frozen features: there were no epochs.</p>"
    epochs, drawn = [number + 1 for number in history.epoch], ""
    for name in ("loss", "accuracy"):
        keys = {"training": name, "held-out": f"val_{name}"}
        series = {label: list(zip(epochs, history.history[key], strict=True)) for label, key in keys.items()}
        drawn += f"<figure>{chart(series, x='epoch', y=name)}</figure>"
    solved = (first_trainable(trainer.model) or "").startswith("head")
    why = "It was no better than the solved head on the held-out images: the solved head stays." if solved else ""
    return f'<div class="charts">{drawn}</div><p>{why}</p>'


def _classes(trained: ImageFolder, assessment: Assessment) -> str:
    counts = np.bincount(trained.targets, minlength=len(assessment.classes)).tolist()
    rows = [
        (row.name, count, row.support, row.precision, row.recall, row.f1)
        for row, count in zip(assessment.per_class(), counts, strict=True)
    ]
    return _table(("class", "training images", "images assessed", "precision", "recall", "F1"), rows, kind="figures")


def _confusion(assessment: Assessment) -> str:
    counts, names = assessment.confusion_matrix(), assessment.classes
    if len(names) > MOST_CLASSES:
        return _table(("true class", "predicted class", "images"), assessment.most_confused(NUM_SHOWN))
    shares = 55 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # % of a colour
    head = "".join(f'<th scope="col"><span>{_text(name)}</span></th>' for name in names)
    rows = ""
    for name, row, colours in zip(names, counts.tolist(), shares, strict=True):
        cells = [
            f'<td style="background:color-mix(in srgb,var(--one) {colour:.0f}%,transparent)">{number or ""}</td>'
            for number, colour in zip(row, colours, strict=True)
        ]
        rows += f'<tr><th scope="row">{_text(name)}</th>{"".join(cells)}</tr>'
    return (
        '<p class="soft">Rows are true classes, columns predicted ones.</p><div class="wide"><table class="matrix">'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _worst(images: ImageFolder, assessment: Assessment) -> str:
    predicted, targets, names = assessment.predicted, assessment.targets, assessment.classes
    wrong = [index for index in assessment.worst(len(targets)) if predicted[index] != targets[index]]
    if not wrong:
        return "<p>No prediction was wrong.</p>"
    shown = [
        (
            Path(images.samples[index][0]),
            f'{_text(names[targets[index]])}<br><span class="bad">predicted {_text(names[predicted[index]])} '
            f"{assessment.probabilities[index, predicted[index]]:.2f}</span>",
        )
        for index in wrong[:NUM_SHOWN]
    ]
    return (
        f"<p>{len(wrong):,} of {len(targets):,} predictions are wrong. The first gave their true class the least "
        f"probability. Each image has its true class, the predicted one with its probability, and its file.</p>"
        f"{_gallery(shown)}"
    )


def _gallery(images: Iterable[tuple[Path, str]]) -> str:
    """Return small copies of image files, each with a caption in HTML and its name."""
    figures = [
        f'<figure><img alt="" src="data:image/jpeg;base64,{_thumbnail(path)}"><figcaption>{caption}<br>'
        f'<span class="soft">{_text(path.name)}</span></figcaption></figure>'
        for path, caption in images
    ]
    return f'<div class="images">{"".join(figures)}</div>'


def _thumbnail(path: Path) -> str:
    with Image.open(path) as file:
        image = upright_rgb(file, 0)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    written = io.BytesIO()
    image.save(written, format="JPEG", quality=80)
    return base64.b64encode(written.getvalue()).decode()


def _calibration(assessment: Assessment) -> str:
    said, right = assessment.probabilities.max(axis=1), assessment.predicted == assessment.targets
    bins = np.clip(np.ceil(said * BINS).astype(int) - 1, 0, BINS - 1)
    points = [(said[bins == each].mean(), right[bins == each].mean()) for each in np.unique(bins)]
    drawn = chart({"this model": points, "honest": [(0, 0), (1, 1)]}, x="probability", y="fraction right")
    error, before = assessment.calibration_error(), assessment.calibration_error(calibrated=False)
    return (
        f"<p>Expected calibration error {error:.3f}, {before:.3f} without the temperature of "
        f'{assessment.temperature:.2f}.</p><div class="charts"><figure>{drawn}</figure></div>'
    )


def _audit(audit: Audit | None) -> str:
    if audit is None:
        return "<p>There was none.</p>"
    found = ""
    for kind, what in KINDS.items():
        findings = audit.of(kind)
        shown = [(Path(each.path or ""), f"{_text(each.label)}<br>{_text(each.detail)}") for each in findings]
        found += f"<h3>{_text(what.capitalize())}: {len(findings):,}</h3>{_gallery(shown[:FEW])}" if findings else ""
    check = ""
    if audit.precision is not None:
        check = (
            f"When 5 % of the labels were exchanged on purpose, {audit.precision:.0%} of as many that looked worst "
            "were those. The others were hard images, from which a model learns most: look before you delete."
        )
    return f"<p>{'The first of each kind; audit.csv has all.' if found else 'Nothing was found.'} {check}</p>{found}"


def _command(command: str) -> str:
    """Return a command in which no word is broken at the end of a line."""
    return " ".join(f"<span>{_text(shlex.quote(word))}</span>" for word in shlex.split(command))


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], *, kind: str = "") -> str:
    body = "".join(
        f'<tr><th scope="row">{_text(first)}</th>{"".join(map(_cell, others))}</tr>' for first, *others in rows
    )
    top = "".join(f'<th scope="col">{_text(name)}</th>' for name in head)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: object) -> str:
    return f'<td class="number">{_text(value)}</td>' if isinstance(value, int | float) else f"<td>{_text(value)}</td>"


def _text(value: object) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.3f}"
    return html.escape(f"{value:,}" if isinstance(value, int) else str(value))
