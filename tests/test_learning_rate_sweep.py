"""What a sweep suggests."""

import math

import pytest

import transferkit as tk


def sweep(losses: list[float]) -> tk.LearningRateSweep:
    return tk.LearningRateSweep([1e-6 * 1.2**step for step in range(len(losses))], losses)


def valley(steps: int = 80, lowest: int = 50) -> list[float]:
    """A loss that falls to its lowest and then rises."""
    return [1.0 + 0.02 * abs(step - lowest) for step in range(steps)]


def test_the_suggestion_is_a_tenth_of_the_rate_with_the_lowest_smoothed_loss():
    """The lowest of the smoothed loss counts, a single low batch does not."""
    found = sweep(valley())
    lowest = found.smoothed.index(min(found.smoothed))
    assert found.suggestion == found.lrs[lowest] / 10
    spiked = valley()
    spiked[30] = 0.9
    assert sweep(spiked).suggestion == pytest.approx(found.suggestion, rel=0.3)


@pytest.mark.parametrize(
    "losses",
    [
        [],
        [math.nan],
        [math.nan] * 20,
        [1.0] * 50,
        [0.1] * 10 + [1.0, 2.0, math.inf],
        [1.0, math.nan],
        [0.3 + 0.01 * step for step in range(50)],  # a model that is trained already
    ],
)
def test_nothing_is_suggested_where_the_loss_fell_nowhere(losses):
    """No loss, none that is finite, none that falls by a fifth: there is nothing to suggest, and no error."""
    assert sweep(losses).suggestion is None


@pytest.mark.parametrize(
    "losses",
    [
        [1.5 if step < 30 else 1.5 / (1 + 0.1 * (step - 30)) for step in range(90)],  # it falls to the end
        [1.5] * 30 + [1.5 - 0.03 * step for step in range(40)] + [0.33] * 20,  # it stays low
        [1.5] * 30 + [0.02, 0.03, 0.01, 0.04] * 15,  # learned by heart: noise near 0 is no rise
    ],
    ids=["falls", "stays", "noise"],
)
def test_nothing_is_suggested_where_the_loss_never_rose(losses):
    """Without a rate that was too high, a tenth of the largest one tried would be a guess; the reason names it."""
    found = sweep(losses)
    assert found.suggestion is None
    assert not found.diverged
    assert f"did not rise again up to the rate {found.lrs[-1]:g}" in found.why_none


@pytest.mark.parametrize("end", [[5.0] * 8, [math.inf], [math.nan], [1.2] * 20], ids=str)
def test_a_loss_that_rose_in_any_way_gives_a_suggestion(end):
    """It may rise a little or much, or end in infinity."""
    found = sweep([1.5] * 30 + [1.5 - 0.04 * step for step in range(30)] + end)
    assert found.suggestion is not None
    assert found.why_none == ""


def test_smoothing_is_an_average_that_forgets():
    """Each smoothed loss is the mean of all so far, a tenth less weight for each step into the past, written out."""
    losses = [2.0 - 1.5 * math.exp(-(((step - 40) / 10) ** 2)) for step in range(60)]
    weights = [0.9**age for age in range(60)]
    expected = [
        sum(weights[last - i] * losses[i] for i in range(last + 1)) / sum(weights[: last + 1]) for last in range(60)
    ]
    assert sweep(losses).smoothed == pytest.approx(expected, rel=1e-12)


def test_divergence_is_four_times_the_lowest():
    """A smoothed loss over four times the lowest, or none that is a number, ends a sweep."""
    assert not sweep([1.0, 1.0, 3.0]).diverged
    assert sweep([1.0, 1.0, *[40.0] * 3]).diverged
    assert sweep([1.0, math.nan]).diverged


@pytest.mark.parametrize("losses", [valley(), [1.0] * 20, [math.nan] * 5])
def test_it_shows_itself_in_a_notebook(losses):
    """The line has the number of steps and the suggestion or that there is none."""
    found = sweep(losses)
    text = found._repr_html_()
    assert f"{len(losses)} steps" in text
    assert ("none" in text) == (found.suggestion is None)
