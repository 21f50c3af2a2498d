"""Learning-rate schedules."""

import pytest
import torch

from transferkit.errors import ArgumentError
from transferkit.training.schedules import SCHEDULES, check_schedule, find_schedule, lr_factor


def factors(name: str, num_steps: int, warmup_steps: int = 0) -> list[float]:
    return [lr_factor(find_schedule(name), step, num_steps, warmup_steps) for step in range(num_steps)]


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
    """The last warm-up step has the full rate, and the schedule then runs over the steps that remain."""
    assert factors(name, 7, warmup_steps=3) == pytest.approx([1 / 3, 2 / 3, 1.0, *factors(name, 4)])


@pytest.mark.parametrize("warmup_steps", [4, 10])
def test_warm_up_may_be_the_whole_run_or_more(warmup_steps):
    """A run no longer than its warm-up only rises."""
    assert factors("cosine", 4, warmup_steps) == pytest.approx([(step + 1) / warmup_steps for step in range(4)])


def test_a_function_of_progress_serves():
    """A user's function gets progress from 0 to just under 1, and its value is the factor."""
    seen = []
    for step in range(4):
        assert lr_factor(lambda progress: seen.append(progress) or 0.1, step, 4, 0) == 0.1
    assert seen == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("name", "hint"), [("cosin", "Did you mean 'cosine'"), ("step", "Known: 'constant'"), (5, "Known")]
)
def test_unknown_schedule_is_refused(name, hint):
    """An unknown name is refused with the names that come close, and with the other way."""
    with pytest.raises(ArgumentError, match=rf"schedule={name!r} is not known. {hint}.*A function of progress"):
        find_schedule(name)


def test_constant_does_without_the_number_of_steps():
    """The constant schedule, with or without warm-up, needs no length."""
    constant = SCHEDULES["constant"]
    assert [lr_factor(constant, step, None, 2) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_another_schedule_needs_the_number_of_steps():
    """Where the number of steps is unknown, other schedules are refused with the remedy."""
    with pytest.raises(ArgumentError, match=r'needs the number of steps.*use schedule="constant", or .*__len__'):
        check_schedule(SCHEDULES["cosine"], None)
    check_schedule(SCHEDULES["cosine"], 100)
    check_schedule(SCHEDULES["constant"], None)
