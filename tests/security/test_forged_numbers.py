"""Checkpoints with numbers that no run writes: refused by name, before anything of the trainer changes."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import transferkit as tk
from transferkit.errors import CheckpointError
from transferkit.saving.archive import write_checkpoint

State = dict[str, Any]


def make_trainer(**arguments: Any) -> tk.Trainer:
    return tiny.make_trainer(tiny.make_model(tiny.make_backbone(), "head", hidden=(16,)), **arguments)


def trained(**arguments: Any) -> tk.Trainer:
    trainer = make_trainer(**arguments)
    trainer.fit(tiny.make_images(), epochs=1, batch_size=8, verbose=0)
    return trainer


def in_group(name: str, value: object) -> Callable[[State], None]:
    return lambda state: state["optimizer"]["groups"][-1].update({name: value})


def in_progress(name: str, value: object) -> Callable[[State], None]:
    return lambda state: state["progress"].update({name: value})


def in_moments(name: str, value: float) -> Callable[[State], None]:
    def change(state: State) -> None:
        moments = next(values for values in state["optimizer"]["state"].values() if name in values)
        moments[name] = torch.full_like(moments[name], value)

    return change


def in_preprocessing(name: str, value: object) -> Callable[[State], None]:
    return lambda state: state["model"]["preprocessing"].update({name: value})


FORGED: dict[str, tuple[Callable[[State], None], str]] = {
    "lr below 0": (in_group("lr", -1.0), "has lr -1.0: expected 0"),
    "lr NaN": (in_group("lr", math.nan), "has lr nan: expected 0"),
    "lr infinite": (in_group("lr", math.inf), "has lr inf: expected 0"),
    "base lr below 0": (in_group("base_lr", -1.0), "has base_lr -1.0"),
    "betas": (in_group("betas", (2.0, 5.0)), "Invalid beta parameter"),
    "second beta": (in_group("betas", (0.9, 1.0)), "Invalid beta parameter"),
    "beta NaN": (in_group("betas", (math.nan, 0.9)), "infinite or NaN"),
    "epsilon": (in_group("eps", -1e-8), "Invalid epsilon"),
    "epsilon infinite": (in_group("eps", math.inf), "infinite or NaN"),
    "weight decay": (in_group("weight_decay", -1), "Invalid weight_decay"),
    "weight decay NaN": (in_group("weight_decay", math.nan), "infinite or NaN"),
    "first moment NaN": (in_moments("exp_avg", math.nan), "as exp_avg of head"),
    "first moment infinite": (in_moments("exp_avg", -math.inf), "as exp_avg of head"),
    "second moment infinite": (in_moments("exp_avg_sq", math.inf), "as exp_avg_sq of head"),
    "second moment below 0": (in_moments("exp_avg_sq", -1e-3), "of 0 or more"),
    "step below 0": (in_moments("step", -1.0), "as step of head"),
    "step infinite": (in_moments("step", math.inf), "as step of head"),
    "micro-batch of nothing": (in_progress("micro_batch_size", 0), "has micro_batch_size 0: expected 1"),
    "micro-batch below 0": (in_progress("micro_batch_size", -3), "has micro_batch_size -3"),
    "epoch below 0": (in_progress("epoch", -1), "has epoch -1: expected 0"),
    "step count below 0": (in_progress("global_step", -1), "has global_step -1"),
    "seed below 0": (in_progress("seed", -1), "has seed -1"),
    "seed too large": (in_progress("seed", 2**63), "has seed 9223372036854775808"),
    "temperature": (lambda state: state["model"].update(temperature=math.nan), "the temperature nan"),
    "scale": (lambda state: state["scaler"].update(scale=0.0), "has scale 0.0"),
    "scale NaN": (lambda state: state["scaler"].update(scale=math.nan), "has scale nan"),
    "growth": (lambda state: state["scaler"].update(growth_factor=0.5), "has growth_factor 0.5"),
    "backoff": (lambda state: state["scaler"].update(backoff_factor=-1.0), "has backoff_factor -1.0"),
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_number_is_refused_by_name(tmp_path: Path, half_device: tk.Device, forged: str) -> None:
    """Load, load_state_dict and resume refuse it; nothing of the trainer changes."""
    change, message = FORGED[forged]
    settings = {"device": half_device, "precision": "auto"} if "scaler" in change.__code__.co_consts else {}
    state = copy.deepcopy(trained(**settings).state_dict())
    if "scaler" in change.__code__.co_consts:
        assert state["scaler"]
    change(state)
    write_checkpoint(tmp_path / "forged.pt", state)
    trainer = make_trainer(**settings)
    before = copy.deepcopy(trainer.state_dict())

    for load in (lambda: trainer.load_state_dict(state), lambda: trainer.load(tmp_path / "forged.pt")):
        with pytest.raises(CheckpointError, match=message):
            load()
    assert tiny.differences(trainer.state_dict(), before) == []


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adamw", torch.optim.Adagrad, torch.optim.NAdam])
def test_what_each_optimizer_writes_is_read(optimizer: Any) -> None:
    """The settings and moments of a run lie in the ranges, whatever the optimizer."""
    state = trained(optimizer=optimizer).state_dict()
    trainer = make_trainer(optimizer=optimizer)
    trainer.load_state_dict(copy.deepcopy(state))
    assert tiny.differences(trainer.state_dict()["optimizer"], state["optimizer"]) == []


@pytest.mark.parametrize("name", ["first_step", "first_epoch", "batches", "skipped", "skipped_before", "count"])
def test_a_forged_count_of_a_run_is_refused_when_it_is_resumed(tmp_path: Path, name: str) -> None:
    """Where a run stands is a count: below 0 it is refused before the first step."""
    trainer = make_trainer()
    trainer.fit(tiny.make_images(), epochs=1, verbose=0, callbacks=[tk.Checkpoint(tmp_path / "run")])
    path = next((tmp_path / "run").glob("step-*.pt"))
    state = torch.load(path, weights_only=True)
    (state["run"]["sums"] if name == "count" else state["run"])[name] = -1
    torch.save(state, path)

    with pytest.raises(CheckpointError, match=f"has {name} -1: expected 0"):
        make_trainer().fit(tiny.make_images(), epochs=2, verbose=0, resume_from=tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mean", (math.nan, 0.0, 0.0)),
        ("mean", (1.0, 2.0)),
        ("std", (1.0, 0.0, 1.0)),
        ("std", (1.0, -1.0, 1.0)),
        ("std", (1.0, math.inf, 1.0)),
        ("std", ("1", "1", "1")),
        ("channels", (0, 1, 7)),
        ("channels", (0, 0, 1)),
        ("channels", "012"),
    ],
)
def test_a_forged_preprocessing_is_refused(tmp_path: Path, name: str, value: object) -> None:
    """Means, standard deviations and the order of channels must be ones that can preprocess an image."""
    state = copy.deepcopy(make_trainer().state_dict())
    in_preprocessing(name, value)(state)
    write_checkpoint(tmp_path / "forged.pt", state)

    for load in (tk.load_model, make_trainer().load):
        with pytest.raises(CheckpointError, match=r"has the preprocessing .*expected three finite means"):
            load(tmp_path / "forged.pt")


# ---- texts


EVIL = "\x1b[2J\x1b]0;owned\x07\u202e\r\nepoch 9  loss 0.0"


def test_names_and_texts_out_of_files_are_shown_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """File names, class names and texts of a checkpoint reach no message with their control characters."""
    classes = [f"{EVIL}cat", "dog", "owl"]
    model = tk.attach_head(tiny.make_backbone(), classes)
    trainer = tiny.make_trainer(model)
    trainer.save(tmp_path / "evil.pt")
    forged = copy.deepcopy(trainer.state_dict())
    forged["versions"] = {"transferkit": EVIL}
    torch.save({**forged, "format": 99}, tmp_path / "newer.pt")
    other = tiny.make_trainer(tiny.make_model(tiny.make_backbone()))
    (tmp_path / f"a{EVIL.replace('/', '')}.jpg").write_bytes(b"no image")
    messages = []
    for action in (
        lambda: tk.load_model(tmp_path / EVIL),
        lambda: other.load(tmp_path / "evil.pt"),
        lambda: other.load(tmp_path / "newer.pt"),
        lambda: other.predict(tmp_path / EVIL),
        lambda: other.predict(tmp_path / f"a{EVIL}.jpg"),
        lambda: tk.load_backbone("vgg11", weights=f"{EVIL}.pt", preprocessing="KERAS"),
        lambda: other.fit(tiny.make_images(), resume_from=tmp_path / EVIL),
    ):
        with pytest.raises(tk.TransferKitError) as error:
            action()
        messages.append(str(error.value))
    messages.append(str(trainer.assess(tiny.make_images())).splitlines()[2])
    for message in messages:
        assert message.isprintable(), message
    assert "\\x1b[2J" in messages[-1]
    assert capsys.readouterr().out == ""
