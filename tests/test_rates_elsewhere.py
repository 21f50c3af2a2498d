"""Learning rates that a scheduler of torch's, a callback or the user writes into the optimizer's groups hold."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import transferkit as tk
from tiny import make_backbone, make_images, make_model, make_trainer
from transferkit.errors import ArgumentError

DATA = make_images()

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.5),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 4]),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: step / 5),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 6),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=2),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.ConstantLR(optimizer, 0.1, total_iters=2), lr_scheduler.ExponentialLR(optimizer, 0.5)],
        [2],
    ),
}


def trainer_of(**settings: object) -> tk.Trainer:
    settings = {"optimizer": "sgd", "lr": 0.1, "schedule": "auto", **settings}
    return make_trainer(make_model(make_backbone(), "head"), **settings)


def fit(trainer: tk.Trainer, epochs: int = 1, **arguments: object) -> list[float]:
    """Return the rates of the epochs' last steps."""
    return trainer.fit(DATA, epochs=epochs, batch_size=8, verbose=0, **arguments).history["lr"]


def alone(name: str, steps: int) -> list[float]:
    """Return the rates of a scheduler over an optimizer that no trainer has seen."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    scheduler, rates = SCHEDULERS[name](optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("built", ["before", "after"])
def test_a_scheduler_that_is_stepped_after_each_step(name: str, built: str) -> None:
    """Rates are those of the scheduler in a plain loop, whether it was built before the trainer or after."""
    model = make_model(make_backbone(), "head")
    if built == "before":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)
        trainer = make_trainer(model, optimizer=optimizer, lr=None, schedule="auto")
    else:
        trainer = trainer_of()
        scheduler = SCHEDULERS[name](trainer.optimizer)
    rates = []
    for step in trainer.steps(DATA, epochs=2, batch_size=8):
        rates.append(step.lr)
        scheduler.step()
    assert rates == pytest.approx(alone(name, 6))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("trained", [False, True], ids=["new", "after a run"])
def test_a_scheduler_that_is_stepped_after_each_call_of_fit(name: str, *, trained: bool) -> None:
    """Each call trains at the scheduler's rate, also where an earlier run had a schedule that fell to 0."""
    trainer = trainer_of()
    if trained:
        fit(trainer)
    scheduler, rates = SCHEDULERS[name](trainer.optimizer), []
    for _ in range(5):
        rates += fit(trainer)
        scheduler.step()
    assert rates == pytest.approx(alone(name, 5))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_that_a_callback_steps(name: str) -> None:
    """Each epoch of one call trains at the scheduler's rate."""
    trainer = trainer_of()
    scheduler = SCHEDULERS[name](trainer.optimizer)
    rates = fit(trainer, epochs=5, callbacks=[lambda trainer, report: scheduler.step()])
    assert rates == pytest.approx(alone(name, 5))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "one_cycle", tk.warmup("constant"), lambda progress: 0.5])
def test_two_schedules_are_refused_before_a_step(schedule: object) -> None:
    """A schedule that the user names and a scheduler of torch's contradict each other."""
    trainer = trainer_of(schedule=schedule)
    SCHEDULERS["StepLR"](trainer.optimizer)
    for call in (lambda: fit(trainer), lambda: trainer.steps(DATA)):
        with pytest.raises(ArgumentError, match=r'would both set the learning rate.*schedule="constant"'):
            call()
    assert trainer.global_step == 0


def test_reduce_on_plateau_holds_within_a_run() -> None:
    """What it lowers stays lowered, epoch by epoch."""
    trainer = trainer_of(schedule="constant")
    scheduler = lr_scheduler.ReduceLROnPlateau(trainer.optimizer, patience=0)
    rates = fit(trainer, epochs=4, callbacks=[lambda trainer, report: scheduler.step(5.0)])
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001])


@pytest.mark.parametrize("schedule", ["auto", "constant", "cosine", "linear"])
def test_a_rate_that_a_callback_writes_holds(schedule: str) -> None:
    """From then on every step of the run has it, to the last bit, and the next run begins from it."""
    trainer, seen = trainer_of(schedule=schedule), []

    def write(trainer: tk.Trainer, report: tk.EpochReport) -> None:
        seen.append([group["lr"] for group in trainer.optimizer.param_groups])
        for group in trainer.optimizer.param_groups:
            group["lr"] = 2e-3

    fit(trainer, epochs=3, callbacks=[write])
    assert seen[1:] == [[2e-3] * 6] * 2
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [2e-3] * 6


@pytest.mark.parametrize("schedule", ["auto", "constant", "cosine"])
def test_a_rate_that_is_written_between_two_runs_is_the_next_base(schedule: str) -> None:
    """`group["lr"] *= 0.1` after a run is a tenth of the rate that the run began from, whatever its schedule did."""
    trainer, other = trainer_of(schedule=schedule), trainer_of(schedule=schedule, lr=0.01)
    fit(trainer)
    for group in trainer.optimizer.param_groups:
        group["lr"] *= 0.1
    rates = [[step.lr for step in one.steps(DATA, batch_size=8)] for one in (trainer, other)]
    assert rates[0] == pytest.approx(rates[1])


def test_lr_find_begins_from_rates_that_were_written() -> None:
    """Blocks keep the proportion that the user gave them."""
    trainer = trainer_of()
    trainer.optimizer.param_groups[0]["lr"] = 0.05
    before = [dict(group) for group in trainer.optimizer.param_groups]
    trainer.lr_find(DATA, num_steps=2, lr_max=1e-3, batch_size=8, verbose=0)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [group["lr"] for group in before]


def test_a_rate_that_holds_is_resumed(tmp_path) -> None:
    """A resumed run knows that a callback took the rate over."""

    def write(trainer: tk.Trainer, report: tk.EpochReport) -> None:
        if report.epoch == 0:
            for group in trainer.optimizer.param_groups:
                group["lr"] = 2e-3

    whole = fit(trainer_of(), epochs=3, callbacks=[write])

    def stop(trainer: tk.Trainer, report: tk.EpochReport) -> None:
        if report.epoch == 1:
            raise KeyboardInterrupt

    callbacks = [write, tk.Checkpoint(tmp_path / "a"), stop]
    stop.order = 3
    with pytest.raises(KeyboardInterrupt):
        fit(trainer_of(), epochs=3, callbacks=callbacks)
    resumed = fit(trainer_of(), epochs=3, callbacks=[write], resume_from=tmp_path / "a")
    assert resumed == whole
    assert whole[1:] == [2e-3, 2e-3]


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf")])
def test_a_rate_that_cannot_be_used_is_refused(rate: float) -> None:
    """What is written into a group is checked before a step."""
    trainer = trainer_of()
    trainer.optimizer.param_groups[0]["lr"] = rate
    with pytest.raises(ArgumentError, match=r"lr of the optimizer=.*expected a finite number of 0 or more"):
        fit(trainer)
