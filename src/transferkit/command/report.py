"""A run as one page of HTML, without scripts and without anything from elsewhere."""

import base64
import io
import shlex
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from transferkit.command.chart import chart
from transferkit.data.images import open_image
from transferkit.data.samples import innermost, path_of
from transferkit.data_audit import KINDS, Audit
from transferkit.model.freezing import describe_frozen, first_trainable
from transferkit.results.assessment import Assessment
from transferkit.trainer import Trainer

MOST_CLASSES = 25  # a wider confusion matrix cannot be read
NUM_SHOWN = 24  # images, and pairs of classes
FEW = 6  # findings of a kind
THUMBNAIL, BINS = 192, 10  # pixels; of probabilities


def report(
    model: Path,
    *,
    settings: Mapping[str, Any],
    images: Mapping[str, Any],
    trainer: Trainer,
    assessment: Assessment,
    audit: Audit | None,
) -> str:
    """Return the page of a saved model: `images` are data sets of files by part, the rest is what was made of them."""
    seen = "it had not seen" if "test" in images else "it was not trained on, but chosen by, which flatters it a little"
    backbone, weights = trainer.model.backbone, settings["options"].get("weights", "DEFAULT") or "random"
    facts = {
        **{f"{part} images": f"{len(data):,} of {innermost(data, 0)[0].root}" for part, data in images.items()},
        "network": f"{backbone.name}, weights {weights}, {backbone.preprocess.name}, {backbone.image_size} pixels",
        "the head sees": ", ".join(trainer.model.layers) or "the last block",
        "at the end": f"{describe_frozen(trainer.model)}; on {trainer.device}",
    }
    page = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return page.substitute(
        title=f"{escape(model.parent.name)}: {assessment.accuracy:.1%} right",
        summary=f"{len(assessment.classes)} classes. {in_words(assessment).capitalize()} that {seen}.",
        facts=_table(facts.items()),
        command="".join(f"<span>{escape(word)} </span>" for word in settings["command"].split(" ")),
        curves=_curves(trainer),
        classes=assessment._repr_html_(),
        confusion=_confusion(assessment),
        worst=_worst(images.get("test", images["val"]), assessment),
        calibration=_calibration(assessment),
        audit=_audit(audit) if audit else "<p>There was none.</p>",
        predict=escape(shlex.join(["transferkit", "predict", str(model.parent), "photo.jpg"])),
        model=escape(repr(str(model))),
        versions=_table(settings["versions"].items()),
    )


def in_words(assessment: Assessment) -> str:
    """Return the accuracy and its interval in a line."""
    (low, high), count = assessment.accuracy_interval(), len(assessment.targets)
    return f"accuracy {assessment.accuracy:.3f} (95 % interval {low:.3f} to {high:.3f}) on {count:,} images"


def _curves(trainer: Trainer) -> str:
    history = trainer.history
    if history is None or not history.reports:
        return "<p>The head was solved to its optimum on frozen features: there were no epochs.</p>"
    epochs, drawn = [number + 1 for number in history.epoch], ""
    for name in ("loss", "accuracy"):
        keys = {"training": name, "held-out": f"val_{name}"}
        series = {label: list(zip(epochs, history.history[key], strict=True)) for label, key in keys.items()}
        drawn += f"<figure>{chart(series, x='epoch', y=name)}</figure>"
    if (first_trainable(trainer.model) or "").startswith("head"):
        drawn += "<p>It was no better than the solved head on the held-out images: the solved head stays.</p>"
    return f'<div class="charts">{drawn}</div>'


def _confusion(assessment: Assessment) -> str:
    counts, names = assessment.confusion_matrix(), assessment.classes
    if len(names) > MOST_CLASSES:
        return _table([("true class", "predicted class", "images"), *assessment.most_confused(NUM_SHOWN)])
    shares = 55 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # % of a color
    rows = f"<tr><th></th>{''.join(f'<th><span>{escape(name)}</span></th>' for name in names)}</tr>"
    for name, row, colors in zip(names, counts.tolist(), shares, strict=True):
        cells = [
            f'<td style="--share:{color:.0f}%">{number or ""}</td>' for number, color in zip(row, colors, strict=True)
        ]
        rows += f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>'
    return f'<div class="wide"><table class="matrix">{rows}</table></div>'


def _worst(images: Any, assessment: Assessment) -> str:
    predicted, targets, names = assessment.predicted, assessment.targets, assessment.classes
    wrong = [index for index in assessment.worst(len(targets)) if predicted[index] != targets[index]]
    shown = []
    for index in wrong[:NUM_SHOWN]:
        guess, probability = escape(names[predicted[index]]), assessment.probabilities[index, predicted[index]]
        said = f'{escape(names[targets[index]])}<br><span class="bad">predicted {guess} {probability:.2f}</span>'
        shown.append((path_of(images, int(index)), said))
    return f"<p>{len(wrong):,} of {len(targets):,} are wrong.</p>{_gallery(shown)}"


def _gallery(images: Iterable[tuple[str | None, str]]) -> str:
    """Return small copies of image files, each with a caption in HTML and its name."""
    figures = []
    for path, caption in images:
        image, written = open_image(path, 0), io.BytesIO()
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.save(written, format="JPEG", quality=80)
        figures.append(
            f'<figure><img alt="" src="data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}">'
            f'<figcaption>{caption}<br><span class="soft">{escape(Path(path or "").name)}</span></figcaption></figure>'
        )
    return f'<div class="images">{"".join(figures)}</div>'


def _calibration(assessment: Assessment) -> str:
    said, right = assessment.probabilities.max(axis=1), assessment.predicted == assessment.targets
    bins = np.ceil(said * BINS)
    points = [(said[bins == each].mean(), right[bins == each].mean()) for each in np.unique(bins)]
    drawn = chart({"this model": points, "honest": [(0, 0), (1, 1)]}, x="probability", y="fraction right")
    return f'<div class="charts"><figure>{drawn}</figure></div>'


def _audit(audit: Audit) -> str:
    found = f"<pre>{escape(str(audit))}</pre>"
    for kind, what in KINDS.items():
        shown = [(each.path, f"{escape(each.label)}<br>{escape(each.detail)}") for each in audit.of(kind)]
        found += f"<h3>{what.capitalize()}: {len(shown):,}</h3>{_gallery(shown[:FEW])}" if shown else ""
    return found


def _table(rows: Iterable[tuple[object, ...]]) -> str:
    lines = ("".join(f"<td>{escape(str(value))}</td>" for value in row) for row in rows)
    return f'<div class="wide"><table class="facts">{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'
