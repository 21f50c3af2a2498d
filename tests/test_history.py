"""What happened in each epoch."""

import pytest

from transferkit import EpochReport, History


def report(epoch: int, val_loss: float | None = None, val_accuracy: float | None = None) -> EpochReport:
    return EpochReport(epoch, 1.0 / (epoch + 1), 0.5, 1e-3, 2.0, val_loss, val_accuracy)


def history_of(*validation: tuple[float, float]) -> History:
    return History([report(epoch, *figures) for epoch, figures in enumerate(validation)])


@pytest.mark.parametrize(
    "validation",
    [
        [(1.0, 0.5), (2.0, 0.7), (0.5, 0.6)],  # accuracy decides, not loss
        [(1.0, 0.7), (0.8, 0.7), (0.9, 0.7)],  # of equal accuracies the lowest loss
        [(1.0, 0.6), (0.8, 0.7), (0.8, 0.7)],  # of equal figures the first
    ],
)
def test_best_epoch_has_the_highest_accuracy_then_the_lowest_loss_then_comes_first(validation):
    """Accuracy decides, then loss, then the order."""
    assert history_of(*validation).best_epoch == 1


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_epoch_without_a_finite_loss_is_not_best(place):
    """An epoch whose validation loss is not a number never counts as the best, whatever its accuracy."""
    figures = [(1.0, 0.3), (1.1, 0.3), (1.2, 0.3)]
    figures[place] = (float("nan"), 0.4)
    assert history_of(*figures).best_epoch == (1 if place == 0 else 0)


def test_a_second_call_of_fit_has_a_history_of_its_own():
    """The best epoch is a place in this history, and `epoch` counts on in the life of the trainer."""
    second = History([report(5, 1.0, 0.5), report(6, 1.0, 0.9)])
    assert (second.best_epoch, second.epoch) == (1, [5, 6])


@pytest.mark.parametrize("reports", [[], [report(0), report(1)]])
def test_without_validation_there_is_no_best_epoch(reports):
    """No validation data, no best epoch, and no figure of it."""
    history = History(reports)
    assert history.best_epoch is None
    assert list(history.history) == (["loss", "accuracy", "lr", "epoch_s"] if reports else [])


def test_history_has_one_list_for_each_figure():
    """`history` maps each figure, under the names Keras uses, to its values in order."""
    figures = history_of((1.5, 0.25), (1.25, 0.5)).history
    assert figures == {
        "loss": [1.0, 0.5],
        "accuracy": [0.5, 0.5],
        "lr": [1e-3, 1e-3],
        "epoch_s": [2.0, 2.0],
        "val_loss": [1.5, 1.25],
        "val_accuracy": [0.25, 0.5],
    }


def test_report_reads_as_one_line():
    """A report prints its figures in one line, the epoch counted from 1, without validation where there was none."""
    assert str(report(1, 1.5, 0.25)) == (
        "epoch 2  loss 0.5000  accuracy 0.5000  val_loss 1.5000  val_accuracy 0.2500  lr 0.001  2.0 s"
    )
    assert str(report(1)) == "epoch 2  loss 0.5000  accuracy 0.5000  lr 0.001  2.0 s"
