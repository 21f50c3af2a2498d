"""The best epoch's weights come back bit for bit, whatever a callback froze or unfroze since."""

import pytest
import torch
from torch import nn

import transferkit as tk
from tiny import changed, make_backbone, make_images, make_model, make_trainer, weights_of
from transferkit.errors import ArgumentError, CheckpointError
from transferkit.training.progress import BestWeights


def overwrite(model):
    """Change everything that training would change."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
        for module in model.modules():
            for buffer in module.buffers(recurse=False):
                if module.training:
                    buffer.add_(1)


# ---- take, restore, before_training


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("boundary", [None, "block3", "head"])
def test_what_trains_comes_back(make_backbone, boundary, batch_norm):
    """Everything that training changed, batch norm's statistics included, is put back bit for bit."""
    model = make_model(make_backbone(batch_norm=batch_norm), boundary, hidden=(16,)).train()
    best, before = BestWeights(model), weights_of(model)
    best.take()
    overwrite(model)
    assert changed(before, model)
    best.restore()
    assert changed(before, model) == set()


def test_nothing_taken_nothing_restored(model):
    """Without a `take`, `restore` and `before_training` change nothing."""
    best = BestWeights(model)
    best.before_training()
    overwrite(model)
    after = weights_of(model)
    best.restore()
    assert changed(after, model) == set()


def test_the_last_take_counts(model):
    """A second `take` replaces the first."""
    best = BestWeights(model.train())
    best.take()
    overwrite(model)
    second = weights_of(model)
    best.take()
    overwrite(model)
    best.restore()
    assert changed(second, model) == set()


def test_copies_do_not_follow_the_model(model):
    """What was taken is a copy: training on does not change it, and it can be restored twice."""
    best, before = BestWeights(model.train()), weights_of(model)
    best.take()
    for _ in range(2):
        overwrite(model)
        best.restore()
        assert changed(before, model) == set()


def test_restoring_keeps_the_parameters(model):
    """The parameters stay the same objects in the same memory, so that the optimizer still has them."""
    best = BestWeights(model.train())
    best.take()
    before = [(id(parameter), parameter.data_ptr()) for parameter in model.parameters()]
    best.restore()
    assert [(id(parameter), parameter.data_ptr()) for parameter in model.parameters()] == before


def test_the_memory_is_taken_once(make_backbone):
    """A second `take` and a `before_training` take no new memory."""
    model = make_model(make_backbone(batch_norm=True), "block3", hidden=(16,)).train()
    best = BestWeights(model)
    best.take()
    before = {name: copy.data_ptr() for name, copy in best.copies.items()}
    overwrite(model)
    best.before_training()
    best.take()
    assert {name: copy.data_ptr() for name, copy in best.copies.items()} == before


def test_what_is_frozen_is_not_copied(make_backbone):
    """Frozen weights and statistics take no memory."""
    model = make_model(make_backbone(batch_norm=True), "head", hidden=(16,)).train()
    best = BestWeights(model)
    best.take()
    assert set(best.copies) == {name for name in model.state_dict() if name.startswith("head.")}


@pytest.mark.parametrize("boundary", ["block5", "block3", None])
def test_what_is_unfrozen_later_comes_back(make_backbone, boundary):
    """Layers unfrozen after the `take` are put back as they were then, batch norm's statistics included."""
    model = make_model(make_backbone(batch_norm=True), "head", hidden=(16,)).train()
    best, before = BestWeights(model), weights_of(model)
    best.take()
    tk.freeze_until(model, boundary).train()
    best.before_training()
    overwrite(model)
    assert any(name.startswith("backbone.") for name in changed(before, model))
    best.before_training()  # as before each epoch: what was copied first counts
    overwrite(model)
    best.restore()
    assert changed(before, model) == set()


def test_statistics_come_back_where_the_model_was_left_in_eval_mode(make_backbone):
    """So it is where the model is in eval mode when it is unfrozen, and goes into training mode afterwards."""
    model = make_model(make_backbone(batch_norm=True), "head", hidden=(16,)).train()
    best, before = BestWeights(model), weights_of(model)
    best.take()
    tk.freeze_until(model.eval(), "block5")
    best.before_training()
    overwrite(model.train())
    best.restore()
    assert changed(before, model) == set()


def test_what_is_frozen_later_comes_back(make_backbone):
    """Layers that trained until the `take` and are frozen afterwards are put back too."""
    model = make_model(make_backbone(), "block5", hidden=(16,)).train()
    best, before = BestWeights(model), weights_of(model)
    best.take()
    overwrite(model)
    tk.freeze_until(model, "head")
    best.before_training()
    overwrite(model)
    best.restore()
    assert changed(before, model) == set()


def test_frozen_taken_unfrozen_comes_back(make_backbone):
    """Layers that trained at one `take`, were frozen at the next and train again come back as at the second."""
    model = make_model(make_backbone(), "block5", hidden=(16,)).train()
    best = BestWeights(model)
    best.take()
    overwrite(model)
    tk.freeze_until(model, "head")
    best.before_training()
    overwrite(model)
    second = weights_of(model)
    best.take()
    tk.freeze_until(model, "block5")
    best.before_training()
    overwrite(model)
    best.restore()
    assert changed(second, model) == set()


def test_a_batch_norm_frozen_by_hand_comes_back(make_backbone):
    """Where only `requires_grad` was turned off statistics still change in training, and come back."""
    model = make_model(make_backbone(batch_norm=True), None, hidden=(16,)).train()
    model.backbone.requires_grad_(False)
    best, before = BestWeights(model), weights_of(model)
    best.take()
    model.backbone(torch.randn(4, 3, 32, 32))
    assert "backbone.features.1.running_mean" in changed(before, model)
    best.restore()
    assert changed(before, model) == set()


def test_shared_parameters_come_back():
    """A parameter that two modules share comes back."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    best, before = BestWeights(model), weights_of(model)
    best.take()
    overwrite(model)
    best.restore()
    assert changed(before, model) == set()


# ---- in fit


def trainer_of(model, **arguments):
    return make_trainer(model, **{"lr": 3e-2, **arguments})


HEAD = {"hidden": (16,), "pooling": "flatten"}
"""A head that learns slowly enough for `liked_best_at_first`."""


def liked_best_at_first(make_model_again, data, epochs=1):
    """The images with what the model says of them after its first epochs: it never agrees as well again."""
    trainer = trainer_of(make_model_again())
    trainer.fit(data, epochs=epochs, batch_size=8, verbose=0)
    return data[0], torch.from_numpy(trainer.predict(data[0]))


class UnfreezeAfter:
    """Unfreezes to `boundary` after one epoch, and remembers the weights of each epoch."""

    def __init__(self, epoch, boundary, *, leave_in_eval=False):
        self.epoch, self.boundary, self.leave_in_eval = epoch, boundary, leave_in_eval
        self.seen = []

    def __call__(self, trainer, report):
        self.seen.append(weights_of(trainer.model))
        if report.epoch == self.epoch:
            if self.leave_in_eval:
                trainer.model.eval()
            tk.freeze_until(trainer.model, self.boundary)


@pytest.mark.parametrize("cache", ["auto", False])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("boundary", ["block5", "block3", None])
def test_unfreezing_in_the_middle_of_a_run(make_backbone, data, boundary, batch_norm, cache):
    """Where a callback unfreezes layers after the best epoch, the whole model comes back as it was in that epoch."""

    def again():
        return make_model(make_backbone(batch_norm=batch_norm), "head", **HEAD)

    model, unfreeze = again(), UnfreezeAfter(1, boundary)
    validation = liked_best_at_first(again, data, epochs=2)
    trainer = trainer_of(model, cache=cache)
    history = trainer.fit(data, validation_data=validation, epochs=4, batch_size=8, callbacks=[unfreeze], verbose=0)
    assert history.best_epoch <= 1
    layers = {name.split(".")[2] for name in changed(unfreeze.seen[1], model) if name.startswith("backbone.")}
    last = unfreeze.seen[-1]
    assert any(not torch.equal(last[name], unfreeze.seen[1][name]) for name in last if name.startswith("backbone."))
    assert layers == set()
    assert changed(unfreeze.seen[history.best_epoch], model) == set()


def test_unfreezing_in_a_callback_that_leaves_eval_mode(make_backbone, data):
    """So it is where the callback leaves the model in eval mode, as one that predicts by hand does."""

    def again():
        return make_model(make_backbone(batch_norm=True), "head", **HEAD)

    model, unfreeze = again(), UnfreezeAfter(1, "block5", leave_in_eval=True)
    validation = liked_best_at_first(again, data, epochs=2)
    history = trainer_of(model).fit(
        data, validation_data=validation, epochs=4, batch_size=8, callbacks=[unfreeze], verbose=0
    )
    assert history.best_epoch <= 1
    assert changed(unfreeze.seen[history.best_epoch], model) == set()


def test_the_best_epoch_after_unfreezing(make_backbone, data):
    """Where the best epoch comes after unfreezing, the unfrozen layers come back as they were in that epoch."""
    model = make_model(make_backbone(), "head", hidden=(16,))
    trainer = trainer_of(model, lr=1e-2)
    unfreeze = UnfreezeAfter(0, "block3")
    history = trainer.fit(data, validation_data=data, epochs=12, batch_size=8, callbacks=[unfreeze], verbose=0)
    assert history.best_epoch > 0
    assert changed(unfreeze.seen[history.best_epoch], model) == set()
    assert "backbone.features.12.weight" in changed(unfreeze.seen[0], model)


def test_a_run_that_fails_after_unfreezing(make_backbone, data):
    """An error in a later epoch leaves the whole model as it was in the best one."""

    def again():
        return make_model(make_backbone(batch_norm=True), "head", **HEAD)

    model, unfreeze = again(), UnfreezeAfter(0, "block5")
    trainer = trainer_of(model)

    def fail(trainer, report):
        if report.epoch == 2:
            raise KeyboardInterrupt

    reports = []
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(
            data,
            validation_data=liked_best_at_first(again, data),
            epochs=5,
            batch_size=8,
            callbacks=[unfreeze, lambda _, report: reports.append(report), fail],
            verbose=0,
        )
    best = max(reports, key=lambda report: (report.val_accuracy, -report.val_loss)).epoch
    assert changed(unfreeze.seen[best], model) == set()


# ---- restore_best=False


def first_is_best(monkeypatch):
    monkeypatch.setattr(tk.History, "best_epoch", property(lambda history: 0 if history.reports else None))


def fit(*callbacks, validated=True, **arguments):
    model = make_model(make_backbone(), "block5", hidden=(16,))
    options = {"validation_data": make_images(9, seed=1) if validated else None, "verbose": 0, **arguments}
    make_trainer(model).fit(make_images(), epochs=3, batch_size=8, callbacks=callbacks, **options)
    return weights_of(model)


@pytest.mark.parametrize("decay", [0, 0.9])
def test_the_last_weights_stay_with_validation_data(monkeypatch, capsys, decay):
    """A run with validation data ends in the weights of one without, or in their average."""
    first_is_best(monkeypatch)
    expected = fit(tk.WeightAverage(decay), validated=False)
    kept = fit(tk.WeightAverage(decay, restore_best=False), verbose=2)
    assert all(torch.equal(kept[name], value) for name, value in expected.items())
    assert "restored" not in capsys.readouterr().out
    best = fit(tk.WeightAverage(decay))
    assert any(not torch.equal(best[name], value) for name, value in expected.items())


def test_a_run_is_resumed_with_the_same_choice(monkeypatch, tmp_path):
    """A run without best weights is not continued by one that would restore them, and continues to the same bits."""
    first_is_best(monkeypatch)
    whole = fit(tk.WeightAverage(0.9, restore_best=False), tk.Checkpoint(tmp_path))
    second = sorted(tmp_path.glob("*.pt"))[-2]
    with pytest.raises(CheckpointError, match=r"callbacks with a state=.*this call.*WeightAverage.0.9"):
        fit(tk.WeightAverage(0.9), resume_from=second)
    resumed = fit(tk.WeightAverage(0.9, restore_best=False), resume_from=second)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.parametrize("value", ["False", "val_loss", None, 0])
def test_what_is_neither_true_nor_false_is_refused(value):
    """A text or None is no answer."""
    with pytest.raises(ArgumentError, match=r"restore_best=.*expected True or False"):
        tk.WeightAverage(restore_best=value)
