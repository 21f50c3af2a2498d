"""Pictures: what is on them, where they are drawn, and what they need."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import transferkit as tk
from transferkit.errors import ArgumentError, MissingPackageError


def history(epochs: int, *, validated: bool = True) -> tk.History:
    reports = [
        tk.EpochReport(
            epoch,
            loss=1.0 / (epoch + 1),
            accuracy=0.5,
            lr=10.0**-epoch,
            epoch_s=1.0,
            val_loss=1.0 if validated else None,
            val_accuracy=0.1 * epoch if validated else None,
        )
        for epoch in range(epochs)
    ]
    return tk.History(reports)


def assessment(count: int = 6, num_classes: int = 3) -> tk.Assessment:
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(num_classes), count).astype(np.float32)
    targets = generator.integers(0, num_classes, count)
    losses = -np.log(probabilities[np.arange(count), targets])
    return tk.Assessment(probabilities, losses, targets, tuple(f"class {i}" for i in range(num_classes)))


SWEEP = tk.LearningRateSweep([1e-4, 1e-3, 1e-2], [2.0, 0.5, 3.0])
IMAGES = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)

DRAWN = [
    lambda ax: history(3).plot(ax),
    SWEEP.plot,
    lambda ax: tk.plot_lr_find(SWEEP, ax=ax),
    lambda ax: tk.plot_confusion_matrix(assessment(), ax=ax),
    lambda ax: tk.plot_predictions(assessment(), (IMAGES, assessment().targets), ax=ax),
]


@pytest.mark.parametrize("draw", DRAWN)
def test_each_returns_a_figure_that_can_be_saved(draw):
    """Without axes each makes a figure, which a notebook can show and which is a PNG of some size."""
    figure = draw(None)
    assert isinstance(figure, Figure)
    picture = Image.open(io.BytesIO(figure._repr_png_()))
    assert picture.format == "PNG"
    assert min(picture.size) > 50


@pytest.mark.parametrize("draw", DRAWN)
def test_each_draws_on_axes_it_is_given(draw):
    """With axes it draws there, touches no other axes, and returns their figure."""
    figure = Figure()
    mine, other = figure.subplots(1, 2)
    assert draw(mine) is figure
    assert mine.has_data() or mine.child_axes
    assert not other.has_data()
    assert not other.child_axes


@pytest.mark.slow
def test_pyplot_is_not_imported():
    """Neither the library nor a picture imports pyplot, and the library alone no matplotlib."""
    program = (
        "import sys, transferkit as tk\n"
        "assert 'matplotlib' not in sys.modules\n"
        "tk.LearningRateSweep([1e-4, 1e-3], [2.0, 1.0]).plot()\n"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("epochs", [1, 5])
def test_history_has_its_lines_and_its_best_epoch(epochs, validated):
    """Training and validation are lines over the epochs, counted from 1; the best one is marked, if there is one."""
    parts = history(epochs, validated=validated).plot().axes[0].child_axes
    assert [part.get_title() for part in parts] == ["loss", "accuracy", "learning rate"]
    assert [len(part.lines) for part in parts] == ([3, 3, 2] if validated else [1, 1, 1])
    assert list(parts[0].lines[0].get_xdata()) == list(range(1, epochs + 1))
    if validated:
        assert list(parts[1].lines[-1].get_xdata()) == [epochs, epochs]  # the last is the best here


def test_history_without_epochs_is_refused():
    """There is nothing to draw."""
    with pytest.raises(ArgumentError, match="history has no epochs"):
        tk.History().plot()


def test_a_loss_that_is_no_number_is_drawn_around():
    """NaN in a history is a gap in its line, whose other epochs are there and within the axes."""
    losses = [2.0, float("nan"), 1.0]
    figure = tk.History([tk.EpochReport(epoch, loss, 0.5, 1e-3, 1.0) for epoch, loss in enumerate(losses)]).plot()
    figure.savefig(io.BytesIO())
    part = figure.axes[0].child_axes[0]
    assert np.array_equal(part.lines[0].get_ydata(), losses, equal_nan=True)
    low, high = part.get_ylim()
    assert 0.5 < low < 1.0 < 2.0 < high < 2.5


def test_confusion_matrix_writes_counts_or_shares():
    """Rows are true classes; the counts are written, or each true class's shares."""
    figure = tk.plot_confusion_matrix(assessment(count=40))
    counts = assessment(count=40).confusion_matrix()
    assert [text.get_text() for text in figure.axes[0].texts] == [str(count) for count in counts.ravel()]
    assert figure.axes[0].get_ylabel() == "true class"
    shares = [
        float(text.get_text()) for text in tk.plot_confusion_matrix(assessment(count=40), normalize=True).axes[0].texts
    ]
    assert np.reshape(shares, (3, 3)).sum(axis=1) == pytest.approx(1.0, abs=0.02)


def test_many_classes_have_no_numbers():
    """A hundred classes are drawn as colors alone."""
    figure = tk.plot_confusion_matrix(assessment(count=500, num_classes=100))
    assert len(figure.axes[0].texts) == 0


def test_predictions_show_the_worst_first_with_both_classes():
    """Images come by loss; a wrong one names the true class, the predicted one and its probability."""
    given = assessment()
    parts = tk.plot_predictions(given, (IMAGES, given.targets), num_images=4).axes[0].child_axes
    worst = given.worst(4)
    for part, place in zip(parts, worst, strict=True):
        true, predicted = given.classes[given.targets[place]], given.classes[given.predicted[place]]
        told = f"{predicted} {given.probabilities[place].max():.2f}"
        assert part.get_title() == (told if true == predicted else f"{told} ({true})")
        assert np.array_equal(part.images[0].get_array(), IMAGES[place].permute(1, 2, 0))


def test_predictions_of_images_of_different_sizes():
    """A data set's images may differ in size; preprocessed ones are stretched to what can be shown."""
    given = assessment(count=2)
    sizes = [torch.zeros(3, 8, 9, dtype=torch.uint8), torch.zeros(3, 20, 5, dtype=torch.uint8)]
    figure = tk.plot_predictions(given, list(zip(sizes, given.targets.tolist(), strict=True)))
    figure.savefig(io.BytesIO())
    shapes = [part.images[0].get_array().shape for part in figure.axes[0].child_axes]
    assert shapes == [(*sizes[place].shape[1:], 3) for place in given.worst(2)]
    floats = tk.plot_predictions(given, (torch.randn(2, 3, 8, 8) / 10, given.targets))
    for part in floats.axes[0].child_axes:
        shown = part.images[0].get_array()
        assert (shown.min(), shown.max()) == (0.0, 1.0)


def test_predictions_of_other_data_are_refused():
    """The data must have as many images as the assessment."""
    with pytest.raises(ArgumentError, match="data has 5 images, the assessment 6: expected the same data"):
        tk.plot_predictions(assessment(), (IMAGES[:5], assessment().targets[:5]))


def test_without_matplotlib_the_command_is_named(monkeypatch):
    """The message says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match=r"matplotlib.*pip install '\.\[notebook\]'"):
        tk.plot_lr_find(SWEEP)
