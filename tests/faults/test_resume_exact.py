"""A run that was stopped anywhere and resumed in another process is the run that never stopped, bit for bit.

This file is also the program of that other process: it resumes every run of a folder and writes what became of them.
"""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import transferkit as tk
from tiny import CLASSES, differences, environment, in_head, make_backbone, make_images, make_model
from transferkit.data.preprocessing import CONVENTIONS
from transferkit.errors import ArgumentError, CheckpointError, DataChangedError, HeadMismatchError, NonFiniteError
from transferkit.saving.archive import read_checkpoint, write_checkpoint

COUNT, BATCH, EPOCHS, STEPS = 20, 8, 2, 6  # batches of 8, 8 and 4


def top_2(probabilities, targets):
    """Fraction of the images whose class is among the two most probable ones."""
    return (probabilities.topk(2).indices == targets[:, None]).any(dim=1).float().mean()


EVERYTHING = {
    "optimizer": "adamw",
    "lr": {"backbone": 1e-2, "head": 3e-2},
    "weight_decay": 0.01,
    "schedule": tk.warmup("cosine", 0.3),
    "clip_grad_norm": 1.0,
    "micro_batch_size": 3,
    "loss": tk.CrossEntropy(label_smoothing=0.1, class_weights=[1.0, 2.0, 0.5]),
    "metrics": {"top2": top_2},
}
PLAIN = {"lr": 1e-2, "schedule": "linear"}

# What a run is made of: arguments of Trainer and of fit, and what the functions below look at.
CASES = {
    "images": {"trainer": EVERYTHING, "fit": {"augment": ["flip", "crop"]}, "batch_norm": True},
    "images-bf16": {"trainer": {**EVERYTHING, "precision": "bf16"}, "fit": {"augment": "flip"}, "batch_norm": True},
    "kept": {"trainer": {**EVERYTHING, "cache": True}, "frozen": "block5", "data": "files"},
    "kept-bf16": {"trainer": {**PLAIN, "cache": True, "precision": "bf16"}, "frozen": "head"},
    "not-kept": {"trainer": {**EVERYTHING, "cache": False}, "frozen": "block5", "batch_norm": True},
    "views": {
        "trainer": {**EVERYTHING, "cache": True},
        "fit": {"augment": "flip", "n_views": 2},
        "frozen": "head",
        "data": "files",
    },
    "folder": {"trainer": {**EVERYTHING, "cache": True}, "frozen": "head", "cache": True, "data": "files"},
    "split": {"trainer": EVERYTHING, "fit": {"validation_split": 0.3}, "validate": False, "batch": 6},
    "no-validation": {"trainer": {**EVERYTHING, "schedule": "constant"}, "validate": False},
    "loader": {"trainer": EVERYTHING, "data": "loader", "batch_norm": True},
    "scaled": {"trainer": PLAIN, "scaler": True},
    "memory": {"trainer": PLAIN, "memory": True},
    "memory-bf16": {"trainer": {**PLAIN, "precision": "bf16", "cache": False}, "memory": True, "frozen": "head"},
    "unfrozen": {"trainer": EVERYTHING, "frozen": "head", "second": "block5"},
    "last-weights": {"trainer": {**PLAIN, "optimizer": "rmsprop"}, "validate": False},
    "workers": {"trainer": EVERYTHING, "data": "random", "workers": (0, 2, 4)},
}
STOPS = [
    *(f"step {number}" for number in range(1, STEPS + 1)),
    *(f"{where} {epoch}" for where in ("validation", "callback", "error") for epoch in range(EPOCHS)),
]
SOME_STOPS = ["step 1", "step 3", "step 5", "validation 0", "callback 1"]
EVERY_STEP = ["kept", "scaled", "unfrozen"]
FILL = ["kept", "views", "folder"]


class Images(Dataset):
    """Images that are read one at a time, with a random change if asked; tells `watch` of each."""

    def __init__(self, images, targets, *, noisy):
        self.images, self.targets, self.noisy = images, targets.tolist(), noisy
        self.watch = lambda index: None

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.watch(index)
        image = self.images[index]
        if self.noisy:
            noise = torch.randint(0, 40, image.shape) + random.randrange(20) + int(np.random.randint(20))  # noqa: NPY002
            image = (image // 2 + noise).to(torch.uint8)
        return image, self.targets[index]


def make_data(kind):
    images, targets = make_images(COUNT)
    if kind == "loader":
        return DataLoader(TensorDataset(images, targets), batch_size=BATCH)
    if kind in ("files", "random"):
        return Images(images, targets, noisy=kind == "random")
    return images, targets


def make_trainer(case, *, init, folder=None):
    backbone = make_backbone(batch_norm=case.get("batch_norm", False), seed=init)
    model = make_model(backbone, case.get("frozen"), seed=init, hidden=(16,), dropout=0.5)
    options = {"device": "cpu", "precision": "fp32", "seed": 5, **case["trainer"]}
    if case.get("cache"):
        options["cache"] = folder / "features"
    micro_batch_size = options.pop("micro_batch_size", None)
    trainer = tk.Trainer(model, **options)
    trainer.micro_batch_size = micro_batch_size
    if case.get("scaler"):
        trainer.device.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    if case.get("memory"):
        in_head(trainer, lambda inputs: memory_fault(trainer, inputs))
    return trainer


def memory_fault(trainer, inputs):
    """In the second step there is memory for four images."""
    if trainer.model.training and trainer.global_step == 1 and len(inputs) > 4:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


class Stop:
    """Ends a run at one place: by a signal, or in a callback by an error."""

    def __init__(self, trainer, place, first_epoch=0):
        self.trainer, self.place, self.sent, self.read = trainer, place, False, []
        self.start, self.first_epoch = trainer.global_step, first_epoch
        self.hook = in_head(trainer, self.look)

    def send(self):
        if not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGINT)

    def look(self, _inputs):
        what, number = self.place.split()
        training = torch.is_grad_enabled()  # features are measured before the first step, without gradients
        if what == "step" and training and self.trainer.global_step == self.start + int(number) - 1:
            self.send()
        if what == "validation" and not training and self.trainer.epoch == self.first_epoch + int(number) + 1:
            self.send()

    def watch(self, index):
        self.read.append(index)
        if self.place == "fill 0" and self.read[-3:] == [10, 11, 12]:  # in order: 12 is no image that is probed
            self.send()

    def __call__(self, trainer, report):
        what, number = self.place.split()
        if report.epoch == self.first_epoch + int(number):
            if what == "callback":
                self.send()
            if what == "error":
                raise RuntimeError("of the user's own")


def run(name, folder, *, init=0, stop=None, num_workers=0, resume=True, epochs=EPOCHS, **changes):
    """Do what a user's script does from its first line on; return what can be known of its end."""
    case = {**CASES[name], **changes}
    data = make_data(case.get("data"))
    trainer = make_trainer(case, init=init, folder=folder)
    options = {"epochs": epochs, "verbose": 0, "num_workers": num_workers, **case.get("fit", {})}
    if case.get("data") != "loader":
        options["batch_size"] = case.get("batch", BATCH)
    if case.get("validate", True):
        options["validation_data"] = make_images(9, seed=1)
    histories = []
    for phase in ("first", "second") if "second" in case else ("first",):
        if phase == "second":
            tk.freeze_until(trainer.model, case["second"])
            options["lr"] = 5e-3
        callbacks, own = [], None
        if stop is not None and phase == ("second" if "second" in case else "first"):
            own = Stop(trainer, stop, trainer.epoch)
            callbacks.append(own)
            if isinstance(data, Images):
                data.watch = own.watch
        where = folder / phase
        callbacks.append(tk.Checkpoint(where))
        history = trainer.fit(data, callbacks=callbacks, resume_from=where if resume else None, **options)
        histories.append([{k: v for k, v in figures(report).items() if k != "epoch_s"} for report in history.reports])
    return {**state_of(trainer), "histories": histories}


def figures(report):
    return {name: getattr(report, name) for name in vars(report)}


def state_of(trainer):
    state = trainer.state_dict()
    state["progress"]["micro_batch_size"] = state["progress"]["micro_batch_size"] or 0
    return {part: state[part] for part in ("model", "optimizer", "scaler", "progress")}


def perturb_generators():
    torch.manual_seed(987)
    random.seed(654)
    np.random.seed(321)  # noqa: NPY002


def resume_all(root):
    """What the other process does."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than this machine has cores
    outcomes = {}
    for folder, job in json.loads((root / "jobs.json").read_text()).items():
        perturb_generators()
        try:
            for part, num_workers in enumerate(job["workers"], start=1):
                last = part == len(job["workers"])
                try:
                    outcome = run(
                        job["case"],
                        root / folder,
                        init=part,
                        num_workers=num_workers,
                        stop=None if last else f"step {job['again']}",
                    )
                except KeyboardInterrupt:
                    assert not last
        except Exception as error:  # noqa: BLE001 - told to the test of this run
            outcome = f"{type(error).__name__}: {error}"
        outcomes[folder] = outcome
    torch.save(outcomes, root / "outcomes.pt")


def in_another_process(root):
    subprocess.run([sys.executable, __file__, str(root)], check=True, timeout=300, env=environment())
    return torch.load(root / "outcomes.pt", weights_only=False)


def all_stops():
    for name, case in CASES.items():
        for stop in STOPS:
            what = stop.split()[0]
            if case.get("validate", True) is False and what == "validation" and name != "split":
                continue
            if name == "workers":
                if stop in ("step 1", "step 3", "step 4", "validation 0"):
                    yield name, stop
            elif name == "images" or (what == "step" and name in EVERY_STEP) or stop in SOME_STOPS:
                yield name, stop
        if name in FILL:
            yield name, "fill 0"


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Every case stopped at every place in this process, and resumed in another."""
    root = tmp_path_factory.mktemp("runs")
    jobs, stopped = {}, {}
    for name, stop in all_stops():
        folder = f"{name}-{stop}".replace(" ", "-")
        (root / folder).mkdir()
        try:
            run(name, root / folder, stop=stop)
            stopped[folder] = "it was not stopped"
        except KeyboardInterrupt as error:
            stopped[folder] = str(error)
        except RuntimeError as error:
            stopped[folder] = f"error {error}"
        workers = CASES[name].get("workers", (0, 0))[1:]
        jobs[folder] = {"case": name, "workers": workers, "again": 5}
    (root / "jobs.json").write_text(json.dumps(jobs))
    return stopped, in_another_process(root)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Every case without a stop, without a Checkpoint file to resume from."""
    torch.set_num_threads(1)
    folders = {name: tmp_path_factory.mktemp(name) for name in CASES}
    return {name: run(name, folders[name], resume=False) for name in CASES}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stop"), list(all_stops()))
def test_resumed_is_uninterrupted(resumed, whole, name, stop):
    """Stopped anywhere, resumed in a fresh process with other random numbers: every bit is that of one run."""
    stopped, outcomes = resumed
    folder = f"{name}-{stop}".replace(" ", "-")
    assert stopped[folder].startswith("error of the user" if stop.startswith("error") else "stopped after step")
    assert not isinstance(outcomes[folder], str), outcomes[folder]
    assert differences(outcomes[folder], whole[name]) == []


@pytest.mark.slow
def test_stops_are_where_they_should_be(resumed):
    """A stop at step k saved after that step, one in validation after the epoch, one in the cache before any step."""
    stopped, _ = resumed
    for number in range(1, STEPS + 1):
        assert stopped[f"images-step-{number}"].startswith(f"stopped after step {number};")
    assert stopped["images-validation-0"].startswith("stopped after step 3;")
    assert all(stopped[f"{name}-fill-0"].startswith("stopped after step 0;") for name in FILL)


@pytest.mark.slow
def test_cases_are_what_they_are_called(whole):
    """Dropout, augmentation, scaler, schedule... each have an effect, so that a lost one would be seen."""
    scaled = whole["scaled"]["scaler"]
    assert scaled["scale"] > 2.0**10
    assert whole["memory"]["progress"]["micro_batch_size"] == 4
    assert whole["images"]["histories"] != whole["images-bf16"]["histories"]
    assert all(report["val_loss"] is not None for report in whole["split"]["histories"][0])
    assert len(whole["unfrozen"]["histories"]) == 2
    rates = [report["lr"] for report in whole["images"]["histories"][0]]
    assert rates[0] != rates[1]


# What each entry of a saved state is for


def stop_at(tmp_path, name, place):
    """Stop a run and return the file of its state."""
    (tmp_path / "run").mkdir(exist_ok=True)
    with suppress(KeyboardInterrupt):
        run(name, tmp_path / "run", stop=place)
    return max((tmp_path / "run" / "first").glob("step-*.pt"))


def edit(path, place, change):
    state = read_checkpoint(path)
    state = {name: part for name, part in state.items() if name not in ("format", "versions")}
    *parents, last = place.split("/")
    part = state
    for key in parents:
        part = part[int(key)] if isinstance(part, list) else part[key]
    if change == "drop":
        del part[last]
    else:
        key = int(last) if isinstance(part, list) else last
        part[key] = change(part[key])
    write_checkpoint(path, state)


def a_little(value):
    return value + 0.01


def one_more(value):
    return value + 1


ENTRIES = [
    ("images", "step 4", "model/weights/backbone.features.0.weight", a_little),
    ("images", "step 4", "model/weights/{head}", a_little),
    ("images", "step 4", "model/weights/backbone.features.1.running_mean", a_little),
    ("loader", "step 2", "model/weights/backbone.features.1.num_batches_tracked", one_more),
    ("images", "step 4", "model/in_eval", lambda _: ["head"]),
    ("images", "step 4", "model/frozen", lambda _: ["backbone.features.0.weight"]),
    ("images", "step 4", "optimizer/state/{head}/exp_avg", a_little),
    ("images", "step 4", "optimizer/state/{head}/exp_avg_sq", a_little),
    ("images", "step 4", "optimizer/state/{head}/step", one_more),
    ("images", "step 4", "optimizer/groups/0/base_lr", a_little),
    ("images", "step 4", "optimizer/groups/1/base_lr", a_little),
    ("images", "step 4", "optimizer/groups/1/weight_decay", a_little),
    ("images", "step 4", "optimizer/groups/1/betas", lambda _: (0.8, 0.999)),
    ("images", "step 4", "optimizer/groups/1/eps", a_little),
    ("images", "validation 1", "optimizer/groups/1/lr", a_little),
    ("images", "step 4", "progress/global_step", one_more),
    ("images", "step 4", "progress/seed", one_more),
    ("images", "step 4", "progress/micro_batch_size", one_more),
    ("images", "step 4", "run/first_step", one_more),
    ("images", "step 4", "run/first_epoch", one_more),
    ("images", "step 4", "run/batches", one_more),
    ("images", "step 4", "run/skipped", one_more),
    ("images", "step 4", "run/skipped_before", one_more),
    ("images", "step 4", "run/sums/loss", a_little),
    ("images", "step 4", "run/sums/correct", one_more),
    ("images", "step 4", "run/sums/count", one_more),
    ("images", "step 4", "run/reports", lambda _: []),
    ("images", "step 4", "run/reports/0/loss", a_little),
    ("images", "step 4", "run/reports/0/accuracy", a_little),
    ("images", "step 4", "run/reports/0/lr", a_little),
    ("images", "step 4", "run/reports/0/val_loss", a_little),
    ("images", "step 4", "run/reports/0/val_accuracy", lambda _: 2.0),
    ("images", "step 4", "run/reports/0/skipped", one_more),
    ("best", "step 4", "run/best", lambda _: None),
    ("best", "step 4", "run/best/{head}", a_little),
    ("scaled", "step 3", "scaler/scale", lambda scale: scale * 2),
    ("scaled", "step 3", "scaler/_growth_tracker", lambda count: 1 - count),
    ("memory", "step 3", "progress/micro_batch_size", lambda _: 8),
]


@pytest.fixture(scope="module")
def last_is_best():
    """A case whose first epoch is its best: the learning rate then ruins it."""
    CASES["best"] = {"trainer": {"lr": 1e-3, "schedule": lambda progress: 0.01 if progress < 0.5 else 3000.0}}
    yield
    del CASES["best"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, last_is_best):
    """Runs that were not stopped, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = run(name, tmp_path_factory.mktemp(name), resume=False)
        return made[name]

    return get


def head_weight(path):
    return next(name for name in read_checkpoint(path)["model"]["weights"] if name.startswith("head.fc"))


@pytest.mark.filterwarnings("ignore:the checkpoint is from")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "stop", "entry", "change"), ENTRIES, ids=[f"{e[0]}-{e[2]}" for e in ENTRIES])
def test_every_entry_of_a_state_matters(tmp_path, uninterrupted, name, stop, entry, change):
    """With one entry of the saved state changed, the resumed run is refused or not the uninterrupted one."""
    path = stop_at(tmp_path, name, stop)
    entry = entry.format(head=head_weight(path))
    edit(path, entry, change)
    try:
        outcome = run(name, tmp_path / "run", init=1)
    except CheckpointError:
        return
    assert differences(outcome, uninterrupted(name))


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["step 4", "validation 1"])
def test_an_untouched_state_is_the_control(tmp_path, uninterrupted, stop):
    """The comparison that the entries must fail holds when a state is only written anew."""
    path = stop_at(tmp_path, "images", stop)
    edit(path, "run/batches", lambda value: value)
    assert differences(run("images", tmp_path / "run", init=1), uninterrupted("images")) == []


@pytest.mark.slow
def test_the_best_weights_are_the_first_epochs(tmp_path, uninterrupted):
    """Where the first epoch was the best, a run resumed after it ends with that epoch's weights."""
    assert uninterrupted("best")["histories"][0][0]["val_loss"] < uninterrupted("best")["histories"][0][1]["val_loss"]
    stop_at(tmp_path, "best", "step 4")
    assert differences(run("best", tmp_path / "run", init=1), uninterrupted("best")) == []


ALL_PARTS = [
    *(f"model/{part}" for part in ("backbone", "preprocessing", "classes", "head", "structure", "in_eval", "frozen")),
    *(f"model/{part}" for part in ("weights", "left_out", "sha256")),
    *(f"optimizer/{part}" for part in ("class", "groups", "state")),
    *(f"progress/{part}" for part in ("epoch", "global_step", "seed", "micro_batch_size", "precision", "device")),
    *(f"run/{part}" for part in ("facts", "first_step", "first_epoch", "batches", "skipped", "skipped_before")),
    *(f"run/{part}" for part in ("sums", "reports", "best")),
    *(f"run/sums/{part}" for part in ("loss", "correct", "count")),
    *("model", "optimizer", "scaler", "progress", "run"),
]


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """The file of a run stopped in its fourth step."""
    return stop_at(tmp_path_factory.mktemp("stopped"), "images", "step 4")


@pytest.mark.slow
@pytest.mark.parametrize("entry", ALL_PARTS)
def test_a_state_that_lacks_an_entry_is_refused(tmp_path, stopped_run, entry):
    """A state without one of its entries is refused before anything is changed."""
    path = tmp_path / stopped_run.name
    path.write_bytes(stopped_run.read_bytes())
    edit(path, entry, "drop")
    trainer = make_trainer(CASES["images"], init=1)
    before = copy.deepcopy(state_of(trainer))
    with pytest.raises(CheckpointError):
        fit_images(trainer, resume_from=path)
    assert differences(state_of(trainer), before) == []


def fit_images(trainer, data=None, **changes):
    options = {"epochs": EPOCHS, "batch_size": BATCH, "verbose": 0, "augment": ["flip", "crop"]}
    options |= {"validation_data": make_images(9, seed=1), **changes}
    return trainer.fit(make_images(COUNT) if data is None else data, **options)


def test_what_a_checkpoint_counts_for_fits_to_come(tmp_path):
    """Epochs and steps of a checkpoint that is loaded, not resumed, decide the order of images in the next fit."""
    first = make_trainer(CASES["no-validation"], init=0)
    fit_images(first, augment=None, validation_data=None, epochs=1)
    first.save(tmp_path / "a.pt")
    fit_images(first, augment=None, validation_data=None, epochs=1)
    again = {}
    for entry in (None, "progress/epoch", "progress/global_step"):
        path = tmp_path / "a.pt"
        if entry:
            path = tmp_path / "b.pt"
            path.write_bytes((tmp_path / "a.pt").read_bytes())
            edit(path, entry, one_more)
        trainer = make_trainer(CASES["no-validation"], init=1)
        trainer.load(path)
        fit_images(trainer, augment=None, validation_data=None, epochs=1)
        again[entry] = differences(state_of(trainer)["model"], state_of(first)["model"])
    assert again[None] == []
    assert again["progress/epoch"]
    assert again["progress/global_step"]


# Another precision, other data, other arguments


@pytest.mark.parametrize(("there", "here"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_another_precision_is_said(tmp_path, there, here):
    """A run resumed in another number format goes on, with a warning that names both."""
    trainer = make_trainer({"trainer": {**PLAIN, "precision": there}}, init=0)
    fit_images(trainer, augment=None, callbacks=[tk.Checkpoint(tmp_path / "a", every_steps=2, keep_last=9)])
    trainer = make_trainer({"trainer": {**PLAIN, "precision": here}}, init=1)
    with pytest.warns(UserWarning, match=f"from cpu in {there} and continues on cpu in {here}: numbers will differ"):
        history = fit_images(trainer, augment=None, resume_from=tmp_path / "a" / "step-00000004.pt")
    assert len(history.reports) == EPOCHS


def test_a_gradient_scale_is_not_dropped_without_a_word(tmp_path):
    """A run of fp16 on a GPU that goes on in fp32 on a CPU warns that its gradient scale is dropped."""
    case = CASES["scaled"]
    fit_images(make_trainer(case, init=0), augment=None, callbacks=[tk.Checkpoint(tmp_path / "a", every_steps=4)])
    path = tmp_path / "a" / "step-00000004.pt"
    edit(path, "progress/precision", lambda _: "fp16")
    edit(path, "progress/device", lambda _: "cuda")
    trainer = make_trainer({"trainer": PLAIN}, init=1)
    with pytest.warns(UserWarning, match=r"from cuda in fp16 and continues on cpu in fp32.*gradient scale is dropped"):
        fit_images(trainer, augment=None, resume_from=path)


def test_the_same_precision_warns_of_nothing(tmp_path):
    """A run resumed as it was gives no warning: here warnings are errors."""
    fit_images(make_trainer({"trainer": PLAIN}, init=0), callbacks=[tk.Checkpoint(tmp_path / "a", every_steps=4)])
    trainer = make_trainer({"trainer": PLAIN}, init=1)
    assert len(fit_images(trainer, resume_from=tmp_path / "a" / "step-00000004.pt").reports) == EPOCHS


def other_data(change):
    images, targets = make_images(COUNT)
    if change == "order":
        images, targets = images.flip(0), targets.flip(0)
    elif change == "one image":
        images[0, 0, 0, 0] ^= 1
    elif change == "one target":
        targets[0] = (targets[0] + 1) % 3
    else:
        images, targets = images[:-1], targets[:-1]
    return images, targets


@pytest.mark.parametrize(
    ("kind", "which", "change"),
    [
        *(("arrays", "training", change) for change in ("length", "order", "one image", "one target")),
        *(("dataset", "training", change) for change in ("order", "one image")),
        *(("arrays", "validation", change) for change in ("length", "one image")),
        ("dataset", "validation", "one target"),
    ],
)
def test_other_data_is_refused(tmp_path, change, which, kind):
    """Data of other length, order or content than the run's is refused, and nothing is changed."""
    wrap = (lambda pair: pair) if kind == "arrays" else (lambda pair: Images(*pair, noisy=False))
    trainer = make_trainer({"trainer": PLAIN}, init=0)
    arguments = {"training": make_images(COUNT), "validation": make_images(COUNT)}
    checkpoint = tk.Checkpoint(tmp_path / "a", every_steps=2)
    data, validation = wrap(arguments["training"]), wrap(arguments["validation"])
    fit_images(trainer, data, validation_data=validation, callbacks=[checkpoint], augment=None)
    arguments[which] = other_data(change)
    data, validation = wrap(arguments["training"]), wrap(arguments["validation"])
    trainer = make_trainer({"trainer": PLAIN}, init=1)
    before = copy.deepcopy(state_of(trainer))
    with pytest.raises(DataChangedError, match=f"{which} data: .* began with 20 images .* Expected the same images"):
        fit_images(trainer, data, validation_data=validation, resume_from=tmp_path / "a", augment=None)
    assert differences(state_of(trainer), before) == []


@pytest.mark.parametrize("data", ["training", "validation"])
def test_data_that_is_there_no_more_is_refused(tmp_path, data):
    """Without the validation data that a run had, or with some that it had not, it is refused."""
    validation = {"validation": make_images(9, seed=1), "training": None}[data]
    other = {"validation": None, "training": make_images(9, seed=1)}[data]
    trainer = make_trainer({"trainer": PLAIN}, init=0)
    fit_images(trainer, validation_data=validation, callbacks=[tk.Checkpoint(tmp_path / "a")])
    with pytest.raises(DataChangedError, match="validation data: "):
        fit_images(make_trainer({"trainer": PLAIN}, init=1), validation_data=other, resume_from=tmp_path / "a")


OTHER = [
    ("batch_size", {}, {"batch_size": 4}),
    ("augment", {}, {"augment": None}),
    ("n_views", {}, {"n_views": 2}),
    ("lr", {}, {"lr": 0.5}),
    ("lr", {"lr": 0.5}, {}),
    ("schedule", {"schedule": "linear"}, {}),
    ("schedule", {"schedule": "constant"}, {}),
    ("schedule", {"schedule": lambda progress: 1 - progress}, {}),
    ("epochs", {}, {"epochs": 3}),
    ("schedule", {"schedule": tk.warmup("cosine", 0.2)}, {}),
    ("clip_grad_norm", {"clip_grad_norm": None}, {}),
    ("loss", {"loss": tk.CrossEntropy(label_smoothing=0.2, class_weights=[1.0, 2.0, 0.5])}, {}),
    ("loss", {"loss": tk.CrossEntropy(label_smoothing=0.1, class_weights=[1.0, 2.0, 1.0])}, {}),
    ("loss", {"loss": nn.MultiMarginLoss()}, {}),
    ("metrics", {"metrics": None}, {}),
    ("seed", {"seed": 6}, {}),
    ("weight_decay", {"weight_decay": 0.5}, {}),
    ("micro_batch_size", {"micro_batch_size": 5}, {}),
    ("augment", {}, {"augment": "color"}),
]


@pytest.mark.parametrize(
    ("name", "trainer", "fit"), OTHER, ids=[f"{name}-{number}" for number, (name, *_) in enumerate(OTHER)]
)
def test_other_arguments_are_refused(stopped_run, name, trainer, fit):
    """An argument on which the result depends and which is not the run's is refused by name; nothing is changed."""
    trainer = make_trainer({**CASES["images"], "trainer": {**EVERYTHING, **trainer}}, init=1)
    before = copy.deepcopy(state_of(trainer))
    with pytest.raises(CheckpointError, match=f"{name}=.*expected the same"):
        fit_images(trainer, resume_from=stopped_run, **fit)
    assert differences(state_of(trainer), before) == []


def test_a_refused_call_leaves_a_trainer_that_trains_as_before(stopped_run):
    """After a refusal the trainer does what one does that was never asked to resume."""
    refused, other = (make_trainer(CASES["images"], init=1) for _ in range(2))
    with pytest.raises(CheckpointError):
        fit_images(refused, resume_from=stopped_run, lr=0.5)
    for trainer in (refused, other):
        fit_images(trainer, epochs=1)
    assert differences(state_of(refused), state_of(other)) == []


def test_another_optimizer_or_head_is_refused(stopped_run):
    """Another optimizer or number of classes is refused, and nothing is changed."""
    trainer = make_trainer({**CASES["images"], "trainer": {**EVERYTHING, "optimizer": "sgd"}}, init=1)
    before = copy.deepcopy(state_of(trainer))
    with pytest.raises(CheckpointError, match="optimizer is AdamW"):
        fit_images(trainer, resume_from=stopped_run)
    assert differences(state_of(trainer), before) == []
    four = tk.Trainer(
        tk.attach_head(make_backbone(batch_norm=True), [*CLASSES, "yak"], hidden=(16,), dropout=0.5),
        **{name: value for name, value in EVERYTHING.items() if name not in ("loss", "micro_batch_size")},
        device="cpu",
        precision="fp32",
        seed=5,
    )
    with pytest.raises(HeadMismatchError, match="3 classes"):
        fit_images(four, resume_from=stopped_run)


def test_a_checkpoint_outside_of_a_run_cannot_be_resumed(tmp_path):
    """A file that trainer.save wrote between runs is refused, with the way to begin a new run from it."""
    trainer = make_trainer(CASES["images"], init=0)
    fit_images(trainer, epochs=1)
    trainer.save(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"not saved during a run.*trainer\.load"):
        fit_images(trainer, resume_from=tmp_path / "a.pt")


# After the last epoch, and other ends


def test_a_finished_run_is_resumed_with_no_step(tmp_path):
    """Resumed after its last epoch a run makes no step, returns its history and ends with the same weights."""
    whole = make_trainer(CASES["images"], init=0)
    history = fit_images(whole, callbacks=[tk.Checkpoint(tmp_path / "a")])
    trainer, seen = make_trainer(CASES["images"], init=1), []
    in_head(trainer, lambda inputs: seen.append(len(inputs)))
    again = fit_images(trainer, resume_from=tmp_path / "a", callbacks=[tk.Checkpoint(tmp_path / "a")])
    assert again == history
    assert seen == []
    assert differences(state_of(trainer), state_of(whole)) == []


def test_a_run_of_constant_lr_may_be_lengthened(tmp_path):
    """With the constant schedule one epoch, resumed with epochs=2, is two epochs at once."""
    case = CASES["no-validation"]
    whole = make_trainer(case, init=0)
    fit_images(whole)
    fit_images(make_trainer(case, init=0), epochs=1, callbacks=[tk.Checkpoint(tmp_path / "a")])
    trainer = make_trainer(case, init=1)
    fit_images(trainer, resume_from=tmp_path / "a")
    assert differences(state_of(trainer), state_of(whole)) == []


def test_a_run_that_a_callback_ended_stays_ended(tmp_path):
    """A script whose callback ended the run, run again, makes no further step."""

    def script(init):
        trainer = make_trainer(CASES["no-validation"], init=init)
        callbacks = [tk.Checkpoint(tmp_path / "a"), lambda trainer, report: report.epoch == 1]
        history = fit_images(trainer, epochs=4, resume_from=tmp_path / "a", callbacks=callbacks)
        return [report.loss for report in history.reports], trainer.global_step

    assert script(0) == script(1)


def test_a_file_saved_by_a_callback_can_be_resumed(tmp_path):
    """`trainer.save` in a callback, without a Checkpoint, writes a state that a run can be resumed from."""
    case = CASES["no-validation"]
    whole = make_trainer(case, init=0)
    fit_images(whole, callbacks=[lambda trainer, report: trainer.save(tmp_path / f"{report.epoch}.pt")])
    trainer = make_trainer(case, init=1)
    fit_images(trainer, resume_from=tmp_path / "0.pt")
    assert differences(state_of(trainer), state_of(whole)) == []


def test_an_older_state_can_be_resumed_in_the_same_folder(tmp_path):
    """Going back to an older state of a folder, what is saved from then on stays, and is what is resumed next."""
    case = CASES["no-validation"]
    fit_images(make_trainer(case, init=0), callbacks=[tk.Checkpoint(tmp_path / "a", every_steps=1, keep_last=9)])

    def fail(trainer, report):
        raise RuntimeError("of the user's own")

    trainer = make_trainer(case, init=1)
    older, checkpoint = tmp_path / "a" / "step-00000001.pt", tk.Checkpoint(tmp_path / "a", keep_last=1)
    with pytest.raises(RuntimeError):
        fit_images(trainer, resume_from=older, callbacks=[checkpoint, fail])
    assert (tmp_path / "a" / "step-00000003.pt").exists()


def test_a_schedule_of_numpy_numbers_can_be_saved(tmp_path):
    """A schedule that returns numbers of numpy's is saved and resumed like any other."""
    case = {"trainer": {"lr": 1e-2, "schedule": np.cos}}
    whole = make_trainer(case, init=0)
    fit_images(whole, callbacks=[tk.Checkpoint(tmp_path / "a", every_steps=4, keep_last=9)])
    trainer = make_trainer(case, init=1)
    fit_images(trainer, resume_from=tmp_path / "a" / "step-00000004.pt")
    assert differences(state_of(trainer), state_of(whole)) == []


def test_whole_numbers_of_numpy_can_be_saved(tmp_path):
    """Arguments that are numpy's numbers are saved as plain ones."""
    trainer = make_trainer({"trainer": {**PLAIN, "max_skipped": np.int64(1), "lr": np.float32(1e-2)}}, init=0)
    checkpoint = tk.Checkpoint(tmp_path / "a")
    fit_images(trainer, epochs=np.int64(1), batch_size=np.int64(8), callbacks=[checkpoint])
    assert (tmp_path / "a" / "step-00000003.pt").exists()


def test_a_batch_that_ended_a_run_is_not_passed_over(tmp_path):
    """A run that a batch with NaN ended ends there again when it is resumed: it is not silently left out."""

    def script(init):
        trainer = make_trainer(CASES["no-validation"], init=init)

        def spoil(inputs):
            if trainer.model.training and trainer.global_step == 4:
                inputs[0] = float("nan")

        in_head(trainer, spoil)
        with pytest.raises(NonFiniteError, match=r"in step 4 \(epoch 1, batch 1,"):
            fit_images(trainer, resume_from=tmp_path / "a", callbacks=[tk.Checkpoint(tmp_path / "a")])
        return trainer.global_step

    assert script(0) == script(1) == 4


def test_skipped_steps_are_counted_once(tmp_path):
    """Steps left out for NaN before and after a stop are those of the uninterrupted run."""
    marked = CONVENTIONS["IMAGENET1K_V1"].with_image_size(32)(make_images(COUNT)[0])
    marked[7, :, 0, 0] = marked.max()
    data = (marked, make_images(COUNT)[1])

    def script(init, *, folder=None, stop=None):
        case = {"trainer": {**EVERYTHING, "max_skipped": 10}, "batch_norm": True}
        trainer = make_trainer(case, init=init)

        def spoil(_module, inputs):
            bad = (inputs[0][:, 0, 0, 0] == marked[7, 0, 0, 0]).view(-1, 1, 1, 1)
            return (inputs[0].masked_fill(bad, float("nan")),) if trainer.model.training else None

        trainer.model.backbone.features[0].register_forward_pre_hook(spoil)
        callbacks = [] if folder is None else [tk.Checkpoint(folder)]
        callbacks += [] if stop is None else [Stop(trainer, stop)]
        options = {"augment": None, "validation_data": None, "callbacks": callbacks, "resume_from": folder}
        history = fit_images(trainer, data, **options)
        return {**state_of(trainer), "skipped": [(report.skipped, report.loss) for report in history.reports]}

    whole = script(0)
    assert [skipped for skipped, _ in whole["skipped"]] == [1, 1]
    for number in range(1, 5):
        with pytest.raises(KeyboardInterrupt):
            script(0, folder=tmp_path / str(number), stop=f"step {number}")
        assert differences(script(1, folder=tmp_path / str(number)), whole) == []


def test_the_folder_of_another_run_is_refused(tmp_path):
    """A new run does not write among the checkpoints of a longer one."""
    fit_images(make_trainer(CASES["images"], init=0), callbacks=[tk.Checkpoint(tmp_path / "a")])
    trainer = make_trainer(CASES["images"], init=0)
    before = copy.deepcopy(state_of(trainer))
    with pytest.raises(ArgumentError, match="holds the checkpoints of another run"):
        fit_images(trainer, callbacks=[tk.Checkpoint(tmp_path / "a")])
    assert differences(state_of(trainer), before) == []


if __name__ == "__main__":
    resume_all(Path(sys.argv[1]))
