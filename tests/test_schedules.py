"""Learning-rate schedules."""

import math
import pickle

import pytest
import torch

from transferkit.errors import ArgumentError
from transferkit.training.schedules import SCHEDULES, Schedule, check_schedule, find_schedule, lr_factor, warmup


def factors(schedule: str | Schedule, num_steps: int) -> list[float]:
    return [lr_factor(find_schedule(schedule), step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1.0, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2]),
    ],
)
def test_schedule_runs_over_its_steps(name, expected):
    """Each schedule begins at 1 and has the value of progress = steps made / steps in all."""
    assert factors(name, 4) == pytest.approx(expected)


def test_one_cycle_is_torchs():
    """`"one_cycle"` gives the factors of torch's `OneCycleLR` over the same number of steps."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=101, cycle_momentum=False)
    expected = []
    for _ in range(100):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    # torch's rise ends at step 0.3 * 101 - 1, its fall at step 100: the same points of progress
    own = [
        SCHEDULES["one_cycle"](0.3 * step / 29.3 if step < 29.3 else 0.3 + 0.7 * (step - 29.3) / 70.7)
        for step in range(100)
    ]
    assert own == pytest.approx(expected, abs=1e-6)
    assert max(factors("one_cycle", 100)) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_warm_up_rises_to_one_and_the_schedule_follows(name):
    """The rate rises from 1/25, and the schedule then runs over the steps that remain."""
    rise = [1 / 25 + 24 / 25 * step / 3 for step in range(3)]
    assert factors(warmup(name, 3 / 7), 7) == pytest.approx([*rise, *factors(name, 4)])


def test_a_warm_up_of_a_users_function():
    """What follows a warm-up may be a function, and what comes before it a pickled copy."""
    schedule = pickle.loads(pickle.dumps(warmup(math.sqrt, 0.5)))
    assert factors(schedule, 8)[4:] == pytest.approx([0.0, 0.5, math.sqrt(0.5), math.sqrt(0.75)])


@pytest.mark.parametrize("fraction", [0, 1, 1.5, -0.1, "a", True])
def test_a_warm_up_of_no_fraction_is_refused(fraction):
    """The fraction is above 0 and below 1."""
    with pytest.raises(ArgumentError, match="fraction="):
        warmup("cosine", fraction)


def test_a_function_of_progress_serves():
    """A user's function gets progress from 0 to just under 1, and its value is the factor."""
    seen = []
    for step in range(4):
        assert lr_factor(lambda progress: seen.append(progress) or 0.1, step, 4) == 0.1
    assert seen == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("name", "hint"), [("cosin", "Did you mean 'cosine'"), ("step", "Known: 'auto', 'constant'"), (5, "Known")]
)
def test_unknown_schedule_is_refused(name, hint):
    """An unknown name is refused with the names that come close, and with the other way."""
    with pytest.raises(ArgumentError, match=rf"schedule={name!r} is not known. {hint}.*pass a function of progress"):
        find_schedule(name)


def test_constant_does_without_the_number_of_steps():
    """The constant schedule needs no length."""
    assert [lr_factor(SCHEDULES["constant"], step, None) for step in range(4)] == [1.0, 1.0, 1.0, 1.0]


def test_another_schedule_needs_the_number_of_steps():
    """Where the number of steps is unknown, other schedules are refused with the remedy."""
    with pytest.raises(ArgumentError, match=r'needs the number of steps.*use schedule="constant", or .*__len__'):
        check_schedule(SCHEDULES["cosine"], None)
    check_schedule(SCHEDULES["cosine"], 100)
    check_schedule(SCHEDULES["constant"], None)
