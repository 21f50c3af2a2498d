"""Several threads, and the modes of layers: predicting changes nothing, training is undisturbed."""

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import transferkit as tk
from tiny import changed, make_backbone, make_images, make_model, make_trainer, weights_of
from transferkit.base.surroundings import ProcessSetting
from transferkit.errors import CheckpointTypeError, ModelInUseError

HEAD = {"hidden": (64,), "dropout": 0.5}


@pytest.fixture
def data():
    return make_images()


def trainer_with_batch_norm(**arguments):
    return make_trainer(make_model(make_backbone(batch_norm=True), None, **HEAD), **arguments)


@pytest.mark.parametrize("mode", ["as fit left it", "training"])
def test_threads_that_predict_agree_and_change_nothing(data, mode):
    """Twenty predictions in four threads are those of one alone; no weight, statistic or mode changes."""
    trainer = trainer_with_batch_norm()
    trainer.fit(data, epochs=1, batch_size=8, verbose=0)
    if mode == "training":
        trainer.model.train()
    expected, before = trainer.predict_proba(data), weights_of(trainer.model)
    modes = [module.training for module in trainer.model.modules()]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: trainer.predict_proba(data, batch_size=8), range(20)))
    assert all(abs(answer - expected).max() < 1e-6 for answer in answers)
    assert changed(before, trainer.model) == set()
    assert [module.training for module in trainer.model.modules()] == modes


def test_models_that_share_a_backbone_predict_at_once(data):
    """A backbone's modes belong to all of its models: the first that ends does not switch them under another."""
    backbone = make_backbone(batch_norm=True)
    trainers = [make_trainer(make_model(backbone, None, seed=seed).train()) for seed in (1, 2)]
    before = [weights_of(trainer.model) for trainer in trainers]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: trainers[number % 2].predict(data, batch_size=4), range(40)))
    assert [changed(weights, t.model) for weights, t in zip(before, trainers, strict=True)] == [set(), set()]
    assert all(module.training for module in backbone.modules())


@pytest.mark.parametrize("use", ["predict", "evaluate", "fit", "solve", "lr_find", "state_dict", "save"])
def test_another_thread_is_refused_while_fit_runs(data, tmp_path, use):
    """It says what to do, and the run ends with the bits of an undisturbed one; what a callback calls is no other."""
    errors = []
    arguments = {"state_dict": (), "save": (tmp_path / "a.pt",)}.get(use, (data,))

    def disturb(trainer, _report):
        def other():
            try:
                getattr(trainer, use)(*arguments)
            except ModelInUseError as error:
                errors.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        trainer.predict(data)

    alone, disturbed = trainer_with_batch_norm(), trainer_with_batch_norm()
    alone.fit(data, epochs=2, batch_size=8, verbose=0)
    disturbed.fit(data, epochs=2, batch_size=8, verbose=0, callbacks=[disturb])
    assert len(errors) == 2
    assert "another thread trains" in errors[0]
    assert changed(weights_of(alone.model), disturbed.model) == set()


def test_fit_waits_for_predictions_that_run(data):
    """A prediction that began before is finished in eval mode, then the run trains as ever."""
    alone, trainer = trainer_with_batch_norm(), trainer_with_batch_norm()
    alone.fit(data, epochs=3, batch_size=8, verbose=0)
    entered, go_on = threading.Event(), threading.Event()

    def wait(*_):
        entered.set()
        go_on.wait(20)

    handle = trainer.model.head.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as threads:
        predicted = threads.submit(trainer.predict_proba, data)
        assert entered.wait(20)
        fitted = threads.submit(trainer.fit, data, epochs=3, batch_size=8, verbose=0)
        handle.remove()
        assert not fitted.done()
        go_on.set()
        assert predicted.result().shape == (24, 3)
        fitted.result()
    assert changed(weights_of(alone.model), trainer.model) == set()


@pytest.mark.parametrize("use", ["fit", "solve"])
def test_a_callback_cannot_train(data, use):
    """A second run inside of the first is refused."""
    with pytest.raises(ModelInUseError, match=f"{use} was called while fit runs"):
        make_trainer(make_model(make_backbone(), "head")).fit(
            data, epochs=1, verbose=0, callbacks=[lambda trainer, _: getattr(trainer, use)(data) and None]
        )


def test_fits_in_threads_are_those_of_one_after_another(data):
    """Dropout's masks are each run's own, and the global generator ends where it was."""

    def fitted(trainer):
        trainer.fit(data, epochs=4, batch_size=4, verbose=0)
        return weights_of(trainer.model)

    def trainers():
        return [make_trainer(make_model(make_backbone(), "head", **HEAD), seed=seed) for seed in range(3)]

    alone, together = [fitted(trainer) for trainer in trainers()], trainers()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(fitted, together))
    assert [changed(weights, t.model) for weights, t in zip(alone, together, strict=True)] == [set()] * 3
    assert torch.equal(torch.get_rng_state(), state)


def test_a_setting_of_the_process_is_back_when_the_last_thread_is_done():
    """The first to leave does not set it back under another one."""
    values = ["highest"]
    setting = ProcessSetting(lambda: values[-1], values.append)
    first, second = setting.at("high"), setting.at("high")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert values[-1] == "high"
    second.__exit__(None, None, None)
    assert values[-1] == "highest"


# ---- modes


@pytest.mark.parametrize("train", ["fit", "steps", "solve"])
def test_the_model_is_in_eval_mode_after_training(data, train):
    """A model that was trained predicts the same each time it is called."""
    model = make_model(make_backbone(batch_norm=True), "head", dropout=0.5)
    result = getattr(make_trainer(model), train)(data)
    if train == "steps":
        list(result)
    inputs = model.backbone.preprocess(data[0])
    assert torch.equal(model(inputs), model(inputs))
    assert not any(module.training for module in model.modules())


def test_a_layer_set_to_eval_by_hand_stays_there(data):
    """Its statistics stay in two runs and in an evaluation; those of another layer move, and a new head's do too."""
    layers = [nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)]
    backbone = make_backbone()
    model = tk.freeze_until(tk.attach_head(backbone, 3, head=nn.Sequential(*layers)), "head")
    layers[1].eval()
    kept, moving = (copy.deepcopy(layers[place].running_mean) for place in (1, 3))
    for _ in range(2):
        trainer = make_trainer(model)
        trainer.evaluate(data)
        trainer.fit(data, epochs=1, verbose=0)
        assert torch.equal(layers[1].running_mean, kept)
        assert not torch.equal(layers[3].running_mean, moving)
        moving = layers[3].running_mean.clone()
    other = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 3))
    make_trainer(tk.freeze_until(tk.attach_head(backbone, 3, head=other), "head")).fit(data, epochs=1, verbose=0)
    assert other[1].running_mean.any()


def test_a_backbone_set_to_eval_by_hand_keeps_its_statistics(data):
    """Freezing by hand, requires_grad and eval mode, is freezing."""
    model = make_model(make_backbone(batch_norm=True))
    model.backbone.requires_grad_(requires_grad=False).eval()
    before = weights_of(model.backbone)
    make_trainer(model).fit(data, epochs=1, verbose=0)
    assert changed(before, model.backbone) == set()


class TwoModes(torch.optim.SGD):
    """Moves the weights in eval mode, as schedule-free optimizers do, and refuses a step there."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls, self.trains = [], False

    def train(self):
        self.calls.append("train")
        self.trains = True

    def eval(self):
        self.calls.append("eval")
        self.trains = False

    def step(self, closure=None):
        assert self.trains
        return super().step(closure)


def test_an_optimizer_with_two_modes_is_told(data, tmp_path):
    """train() comes before steps, eval() before validation, saving, lr_find's restoring and the end."""
    trainer = make_trainer(make_model(make_backbone(), "head"), optimizer=TwoModes)
    calls = trainer.optimizer.calls
    trainer.fit(data, validation_data=data, epochs=2, verbose=0)
    assert calls == ["train", "eval"] * 2
    trainer.lr_find(data, num_steps=3, verbose=0)
    assert calls == ["train", "eval"] * 3
    steps = trainer.steps(data, batch_size=8)
    next(steps)
    trainer.save(tmp_path / "a.pt")
    assert calls == ["train", "eval"] * 4
    next(steps)
    trainer.predict(data)
    assert calls == ["train", "eval"] * 5


# ---- pickle


def test_a_trainer_is_pickled(data):
    """After a run and within one; what comes back trains on as the original does."""
    kept = []
    trainer = make_trainer(make_model(make_backbone(), "head"), optimizer="adam", schedule="auto")
    trainer.fit(data, epochs=1, verbose=0, callbacks=[lambda t, _: kept.append(pickle.dumps(t)) and None])
    twin = pickle.loads(pickle.dumps(trainer))
    for one in (trainer, twin):
        one.fit(data, epochs=1, verbose=0)
    assert changed(weights_of(trainer.model), twin.model) == set()
    assert pickle.loads(kept[0]).predict(data).shape == (24,)


@pytest.mark.parametrize("name", ["schedule", "loss", "metrics"])
def test_what_cannot_be_pickled_is_named(name):
    """A lambda of the user's own; a copy in memory needs no pickle."""
    value = {
        "schedule": lambda progress: 1 - progress,
        "loss": lambda logits, targets: 2 * nn.functional.cross_entropy(logits, targets),
        "metrics": {"one": lambda probabilities, targets: 1.0},
    }[name]
    trainer = make_trainer(make_model(make_backbone(), "head"), **{name: value})
    with pytest.raises(CheckpointTypeError, match=f"because of its {name}"):
        pickle.dump(trainer, io.BytesIO())
    assert copy.deepcopy(trainer).seed == trainer.seed
