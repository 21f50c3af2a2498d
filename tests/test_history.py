"""What happened in each epoch."""

import pytest

from transferkit import EpochReport, History


def report(epoch: int, val_loss: float | None = None, val_accuracy: float | None = None) -> EpochReport:
    return EpochReport(epoch, 1.0 / (epoch + 1), 0.5, 1e-3, 2.0, val_loss, val_accuracy)


def history_of(*validation: tuple[float, float]) -> History:
    return History([report(epoch, *figures) for epoch, figures in enumerate(validation)])


def test_best_epoch_has_the_highest_validation_accuracy():
    """Accuracy decides, not loss."""
    assert history_of((1.0, 0.5), (2.0, 0.7), (0.5, 0.6)).best_epoch == 1


def test_lower_loss_decides_between_equal_accuracies():
    """Of epochs with the same accuracy the one with the lowest loss is best."""
    assert history_of((1.0, 0.7), (0.8, 0.7), (0.9, 0.7)).best_epoch == 1


def test_the_earliest_of_equals_is_best():
    """Of epochs with the same figures the first is best."""
    assert history_of((1.0, 0.6), (0.8, 0.7), (0.8, 0.7)).best_epoch == 1


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_epoch_without_a_finite_loss_is_not_best(place):
    """An epoch whose validation loss is not a number never counts as the best, whatever its accuracy."""
    figures = [(1.0, 0.3), (1.1, 0.3), (1.2, 0.3)]
    figures[place] = (float("nan"), 0.4)
    assert history_of(*figures).best_epoch == (1 if place == 0 else 0)


def test_best_epoch_is_a_place_in_this_history():
    """The second call of `fit` counts its own epochs from 0."""
    assert History([report(5, 1.0, 0.5), report(6, 1.0, 0.9)]).best_epoch == 1


@pytest.mark.parametrize("reports", [[], [report(0), report(1)]])
def test_without_validation_there_is_no_best_epoch(reports):
    """No validation data, no best epoch."""
    assert History(reports).best_epoch is None


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


def test_figures_that_were_not_taken_are_left_out():
    """Without validation there is no `val_loss`."""
    assert list(History([report(0)]).history) == ["loss", "accuracy", "lr", "epoch_s"]


def test_empty_history_has_no_figures():
    """A history without reports is empty."""
    assert History().history == {}
    assert History().epoch == []


def test_epoch_gives_the_numbers_in_the_life_of_the_trainer():
    """`epoch` counts on from one call of `fit` to the next."""
    assert History([report(5), report(6)]).epoch == [5, 6]


def test_report_reads_as_one_line():
    """A report prints its figures in one line, the epoch counted from 1."""
    assert str(report(1, 1.5, 0.25)) == (
        "epoch 2  loss 0.5000  accuracy 0.5000  val_loss 1.5000  val_accuracy 0.2500  lr 0.001  2.0 s"
    )


def test_report_without_validation_leaves_it_out():
    """Without validation the line has no validation figures."""
    assert "val_" not in str(report(1))
