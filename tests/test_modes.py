"""Evaluating and predicting give each module back the mode it had, also one that the user set by hand."""

import contextlib
import inspect

import pytest
import torch
from torch import nn

import transferkit as tk
from tiny import CLASSES, make_trainer
from transferkit.model.modes import modes_kept

CALLS = {
    "evaluate": lambda trainer, data: trainer.evaluate(data),
    "assess": lambda trainer, data: trainer.assess(data),
    "predict": lambda trainer, data: trainer.predict(data[0]),
    "summary": lambda trainer, data: tk.summary(trainer.model),
    "lr_find": lambda trainer, data: trainer.lr_find(data, num_steps=2, lr_max=1e-4, verbose=0),
}


@pytest.fixture
def trainer(make_backbone):
    """A trainer whose head has batch norm and dropout."""
    head = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    return make_trainer(tk.freeze_until(tk.attach_head(make_backbone(batch_norm=True), CLASSES, head=head), "block3"))


def modes_of(model):
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("training", [True, False])
def test_each_module_has_its_mode_back(trainer, data, call, training):
    """A batch norm in eval mode within a model in training mode stays there, and the reverse."""
    trainer.model.train(training)
    trainer.model.head[1].train(not training)
    before = modes_of(trainer.model)
    CALLS[call](trainer, data)
    assert modes_of(trainer.model) == before
    trainer.model.train()
    assert not trainer.model.backbone.features[0].training  # what is frozen still stays in eval mode


@pytest.mark.parametrize("call", CALLS)
def test_statistics_that_are_still_do_not_move(trainer, data, call):
    """No call moves batch norm's statistics."""
    before = trainer.model.head[1].running_mean.clone()
    CALLS[call](trainer, data)
    assert torch.equal(trainer.model.head[1].running_mean, before)


def test_modes_come_back_after_an_error(trainer):
    """An error inside changes nothing of that, and the mode asked of frozen modules comes back as well."""
    trainer.model.train()
    before = modes_of(trainer.model)
    with contextlib.suppress(KeyError), modes_kept(trainer.model):
        trainer.model.eval()
        raise KeyError
    assert modes_of(trainer.model) == before
    tk.freeze_until(trainer.model, None)
    assert trainer.model.backbone.features[0].training


@pytest.mark.parametrize("function", [tk.Trainer, tk.Trainer.fit])
def test_arguments_stay_few(function):
    """Trainer and fit take at most 13 arguments."""
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    assert len(names) <= 13
