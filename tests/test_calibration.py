"""Temperature and calibration error."""

import math

import numpy as np
import pytest
import torch

from transferkit.errors import EmptyDataError, NonFiniteError
from transferkit.linear.temperature import HIGHEST, LOWEST, fit_temperature
from transferkit.results.assessment import expected_calibration_error
from transferkit.training.loss import BinaryCrossEntropy, CrossEntropy

LOGITS = 6 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.multinomial((LOGITS / 3).softmax(dim=1), 1, generator=torch.Generator().manual_seed(1)).squeeze(1)


@pytest.mark.parametrize(
    ("loss", "targets"), [(CrossEntropy(), TARGETS), (BinaryCrossEntropy(), (LOGITS / 3).sigmoid().round(decimals=1))]
)
def test_the_temperature_has_the_least_loss(loss, targets):
    """No temperature of a fine grid has less loss over many images, for classes and for several labels."""
    found = fit_temperature(LOGITS.repeat(20, 1), targets.repeat(20, *[1] * (targets.ndim - 1)), loss)
    grid = [math.exp(step / 200) for step in range(-400, 400)]
    losses = [
        float(loss.each(LOGITS.double() / temperature, targets.double() if targets.ndim == 2 else targets).mean())
        for temperature in grid
    ]
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=0.006)
    assert 2 < found < 4


@pytest.mark.parametrize("count", [2, 10, 100, 1000])
def test_images_that_are_all_right_make_no_surer_than_their_number_allows(count):
    """A model that is right on every held-out image is as sure as if one more had a random label: never certain."""
    targets = torch.arange(count) % 2
    logits = 3 * torch.nn.functional.one_hot(targets, 2).float()
    found = fit_temperature(logits, targets, CrossEntropy())
    sure = (logits / found).softmax(dim=1)[0, 0]
    assert float(sure) == pytest.approx((count + 0.5) / (count + 1), abs=2e-3)


def test_the_temperature_is_bounded():
    """Logits that are nearly equal, all wrong or all the same have a temperature, too."""
    sure = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    assert fit_temperature(1e-6 * sure, torch.tensor([0, 1]), CrossEntropy()) == pytest.approx(LOWEST, rel=1e-4)
    assert fit_temperature(sure, torch.tensor([1, 0]), CrossEntropy()) == pytest.approx(HIGHEST, rel=1e-4)
    assert fit_temperature(torch.zeros(2, 2), torch.tensor([1, 0]), CrossEntropy()) == pytest.approx(1)
    assert math.isfinite(fit_temperature(1e30 * sure, torch.tensor([0, 0]), CrossEntropy()))


@pytest.mark.parametrize("factor", [1e-2, 1.0, 100.0])
def test_the_temperature_follows_the_scale_of_the_logits(factor):
    """Logits a hundred times as large have a temperature a hundred times as high, far beyond what training gives."""
    found = fit_temperature(factor * LOGITS, TARGETS, CrossEntropy())
    assert found == pytest.approx(factor * fit_temperature(LOGITS, TARGETS, CrossEntropy()), rel=1e-4)


def test_logits_that_have_no_temperature_are_errors():
    """Empty and non-finite logits are reported, with the row."""
    with pytest.raises(EmptyDataError, match="0 images"):
        fit_temperature(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), CrossEntropy())
    with pytest.raises(NonFiniteError, match="row 1"):
        fit_temperature(torch.tensor([[1.0, 2], [math.nan, 1]]), torch.tensor([0, 1]), CrossEntropy())


def plainly(confidence: np.ndarray, right: np.ndarray, bins: int) -> float:
    error = 0.0
    for number in range(bins):
        inside = (confidence > number / bins) & (confidence <= (number + 1) / bins)
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    return error


def test_calibration_error_is_that_of_the_definition():
    """The error is the mean distance of confidence and accuracy over bins of equal width."""
    probabilities = LOGITS.softmax(dim=1).numpy()
    expected = plainly(probabilities.max(axis=1), probabilities.argmax(axis=1) == TARGETS.numpy(), 15)
    assert expected_calibration_error(probabilities, TARGETS.numpy()) == pytest.approx(expected, abs=1e-6)
    assert expected > 0.1
    labels = np.random.default_rng(0).random((50, 3)) < 0.3
    each = np.random.default_rng(1).random((50, 3))
    assert expected_calibration_error(each, labels, bins=7) == pytest.approx(plainly(each.ravel(), labels.ravel(), 7))


def test_calibration_error_of_known_cases():
    """Certain and right is 0, certain and wrong is 1, and 0.8 that is right in four of five is 0."""
    edge = np.array([[0.5, 0.5], [0.6, 0.4]])  # a bin has its upper edge
    assert expected_calibration_error(edge, np.array([0, 1]), bins=2) == pytest.approx((0.5 + 0.6) / 2)
    certain = np.eye(2)
    assert expected_calibration_error(certain, np.array([0, 1])) == 0
    assert expected_calibration_error(certain, np.array([1, 0])) == 1
    assert expected_calibration_error(np.tile([0.8, 0.2], (5, 1)), np.array([0, 0, 0, 0, 1])) == pytest.approx(0)


def test_the_temperature_lowers_the_calibration_error():
    """Logits of a model that was too sure of itself are better calibrated at their temperature."""
    temperature = fit_temperature(LOGITS, TARGETS, CrossEntropy())
    before, after = (
        expected_calibration_error((LOGITS / by).softmax(dim=1).numpy(), TARGETS.numpy()) for by in (1, temperature)
    )
    assert after < 0.5 * before
