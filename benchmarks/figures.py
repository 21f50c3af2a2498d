"""Draw the figures of the documentation: python benchmarks/figures.py.

Most show docs/results/choices_*.json, which benchmarks/choices.py writes. The others show a model and a probe, which
this script makes on the images in examples/assets (two minutes).
"""

import json
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

from job import IMAGES, WEIGHTS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

import transferkit as tk

DOCS = Path(__file__).parent.parent / "docs"
NAMES = {
    "head": "the head",
    "block5": "from block 5",
    "block4": "from block 4",
    "block3": "from block 3",
    None: "everything",
}


def runs(question: str) -> list[dict[str, Any]]:
    return json.loads((DOCS / "results" / f"choices_{question}.json").read_text())["runs"]


def last(run: dict[str, Any]) -> float:
    return run["history"]["val_accuracy"][-1]


def save(figure: Figure, name: str) -> None:
    (DOCS / "figures").mkdir(exist_ok=True)
    figure.savefig(DOCS / "figures" / f"{name}.png", dpi=80)


def axes(width: float = 5.5, height: float = 3.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def draw_depth() -> None:
    """Accuracy over the learning rate, one line per depth."""
    figure, ax = axes()
    for depth, name in NAMES.items():
        own = [run for run in runs("depth") if run["freeze_until"] == depth]
        ax.plot([run["lr"] for run in own], [last(run) for run in own], marker="o", label=name)
    ax.set(xscale="log", xlabel="learning rate", ylabel="test accuracy after 4 epochs")
    ax.legend(title="layers that train", fontsize="small")
    save(figure, "depth")


def draw_epochs() -> None:
    """`History.plot` of two long runs."""
    for run in runs("epochs"):
        names = run["history"]
        reports = [
            tk.EpochReport(epoch=epoch, epoch_s=0.0, **{name: values[epoch] for name, values in names.items()})
            for epoch in range(len(names["loss"]))
        ]
        save(tk.History(reports).plot(), f"epochs_{run['freeze_until']}")


def draw_batch_size() -> None:
    """Accuracy over the batch size, one line per learning rate, one dot per seed."""
    figure, ax = axes()
    every = runs("batch_size")
    for lr in sorted({run["lr"] for run in every}):
        own = [run for run in every if run["lr"] == lr]
        sizes = sorted({run["batch_size"] for run in own})
        means = [mean([last(run) for run in own if run["batch_size"] == size]) for size in sizes]
        line = ax.plot(sizes, means, label=f"{lr:.0e}")[0]
        ax.plot(
            [run["batch_size"] for run in own], [last(run) for run in own], "o", markersize=4, color=line.get_color()
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, sizes)
    ax.set(xlabel="batch size", ylabel="test accuracy after 8 epochs")
    ax.legend(title="learning rate", fontsize="small")
    save(figure, "batch_size")


def draw_groups(question: str, label: Any, name: str) -> None:
    """One row per setting: a dot per seed, and a bar for their mean."""
    groups: dict[str, list[float]] = {}
    for run in runs(question):
        groups.setdefault(label(run), []).append(last(run))
    figure, ax = axes(6.5, 0.6 + 0.34 * len(groups))
    for row, values in enumerate(groups.values()):
        ax.barh(row, mean(values), color="#c6dbef", height=0.7)
        ax.plot(values, [row] * len(values), "o", markersize=4, color="#08519c")
    low = min(min(values) for values in groups.values())
    ax.set_xlim(low - 0.05, max(max(values) for values in groups.values()) + 0.01)
    ax.set_yticks(range(len(groups)), list(groups))
    ax.invert_yaxis()
    ax.set(xlabel="test accuracy after the last epoch")
    save(figure, name)


def label_schedule(run: dict[str, Any]) -> str:
    name = run.get("schedule", "constant") + (" after a warm-up" if "warmup_steps" in run else "")
    return f"{run['lr']:.0e}  {name}"


def label_rates(run: dict[str, Any]) -> str:
    lr = run["lr"]
    return f"{lr['head']:.0e}, times {lr['factor']} per block" if isinstance(lr, dict) else f"{lr:.0e} everywhere"


def label_unfreezing(run: dict[str, Any]) -> str:
    return f"backbone {run['lr']['backbone']:.0e}  " + ("gradually" if "unfreezing" in run else "all at once")


def draw_sweeps() -> None:
    """The sweeps of `lr_find`, for the head alone and with block 5."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for ax, depth in zip(figure.subplots(1, 2), ("head", "block5"), strict=True):
        run = next(run for run in runs("lr_find") if run["freeze_until"] == depth)
        tk.plot_lr_find(tk.LearningRateSweep(run["lrs"], run["losses"]), ax=ax)
        ax.set_title(f"training: {NAMES[depth]}")
    save(figure, "lr_find")


@contextmanager
def images_and_backbone() -> Iterator[tuple[ImageFolder, ImageFolder, tk.Backbone]]:
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(IMAGES).extractall(folder)
        backbone = tk.load_backbone(weights=WEIGHTS, preprocessing="IMAGENET1K_FEATURES", image_size=64)
        yield ImageFolder(Path(folder) / "train"), ImageFolder(Path(folder) / "test"), backbone


def draw_model() -> None:
    """The tutorial's model: some predictions, the worst ones and the confusion matrix."""
    with images_and_backbone() as (train, test, backbone):
        trainer = tk.fine_tune(backbone, train, budget=40)
        assessment, some = trainer.assess(test), Subset(test, range(10, len(test), 42))
        save(tk.plot_confusion_matrix(assessment), "confusion_matrix")
        save(tk.plot_predictions(assessment, test), "predictions_worst")
        save(tk.plot_predictions(trainer.assess(some), some), "predictions")
        print(assessment, assessment.accuracy_interval(), sep="\n")


def draw_probe() -> None:
    """Scores of each block at two image sizes; prints the table of the page on finding layers."""
    with images_and_backbone() as (train, _, backbone):
        probe = tk.probe(backbone, train, image_sizes=[32, 64], verbose=0)
        save(probe.plot(), "probe")
        print(probe)


def main() -> None:
    draw_depth()
    draw_epochs()
    draw_batch_size()
    draw_groups("schedule", label_schedule, "schedule")
    draw_groups("rates_by_block", label_rates, "rates_by_block")
    draw_groups("unfreezing", label_unfreezing, "unfreezing")
    draw_sweeps()
    draw_model()
    draw_probe()


if __name__ == "__main__":
    main()
