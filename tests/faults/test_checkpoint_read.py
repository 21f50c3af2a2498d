"""Reading checkpoints that are damaged, foreign or crafted: an error, and nothing changed by one bit."""

import contextlib
import copy
import errno
import random
import re
import resource
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
import transferkit as tk
from tiny import STANDARDIZE
from transferkit.base import torch_files
from transferkit.errors import CheckpointError, HeadMismatchError, TransferKitError, UnknownLayerError, WeightsError
from transferkit.model.weights import read_state_dict
from transferkit.saving import archive

REFUSALS = (CheckpointError, HeadMismatchError, UnknownLayerError)


def make_trainer(backbone, layer="block5", classes=("cat", "dog", "owl"), **options):
    head = options.pop("head", {})
    model = tk.freeze_until(tk.attach_head(backbone, list(classes), **head), layer)
    return tk.Trainer(model, device="cpu", precision=options.pop("precision", "fp32"), lr=1e-2, **options)


def fit(trainer, data, epochs=1, **options):
    """Three steps an epoch."""
    return trainer.fit(data, epochs=epochs, batch_size=8, verbose=0, **options)


def same(left, right):
    """Whether two states are the same to the bit."""
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and left == right


def check_archive(path):
    with path.open("rb") as file:
        torch_files.check_archive(file)


def snapshot(trainer):
    """All that a failed load must leave as it is."""
    modes = [(name, module.training) for name, module in trainer.model.named_modules()]
    return copy.deepcopy([trainer.state_dict(), modes, trainer.epoch, trainer.global_step, trainer.seed])


def refused(trainer, load, error, message):
    """The trainer refuses with this message and stays bit for bit what it was."""
    before = snapshot(trainer)
    with pytest.raises(error, match=message) as raised:
        load()
    assert same(snapshot(trainer), before)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def run_bytes(tmp_path_factory):
    """The checkpoint of a run of two epochs, the second of which is under way."""
    trainer, data = make_trainer(tiny.make_backbone(), seed=3), tiny.make_images()
    path = tmp_path_factory.mktemp("run") / "run.pt"
    fit(trainer, data, epochs=2, callbacks=[lambda trainer, _report: trainer.save(path)], validation_data=data)
    return path.read_bytes()


@pytest.fixture
def run_file(run_bytes, tmp_path):
    """A copy of that checkpoint."""
    path = tmp_path / "run.pt"
    path.write_bytes(run_bytes)
    return path


@pytest.fixture
def trainer(make_backbone, data):
    """Another trainer that has trained, too."""
    trainer = make_trainer(make_backbone(seed=9), seed=5)
    fit(trainer, data)
    return trainer


# --- damage


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_thousand_flipped_bits_make_no_silent_difference(run_file, tmp_path, count):
    """Each checkpoint with one random bit flipped is refused or gives the same state to the bit."""
    content, good, flipped = run_file.read_bytes(), archive.read_checkpoint(run_file), tmp_path / "flipped.pt"
    generator, refusals = random.Random(0), 0
    for _ in range(count):
        place, bit = generator.randrange(len(content)), generator.randrange(8)
        flipped.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        try:
            state = archive.read_checkpoint(flipped)
        except CheckpointError:
            refusals += 1
        else:
            assert same(state, good), (place, bit)
    assert refusals > 0.3 * count  # the others are in padding


def test_a_part_marked_as_a_folder_is_refused(run_file, trainer, tmp_path):
    """torch reads nothing of a part marked as a folder, and its tensor is what lay in memory: each such is refused."""
    content = run_file.read_bytes()
    entries = [match.start() for match in re.finditer(rb"PK\x01\x02", content)]
    assert len(entries) > 10
    for entry in entries:
        marked = bytearray(content)
        marked[entry + 38] |= 0x10  # external attributes in the archive's directory
        path = tmp_path / "marked.pt"
        path.write_bytes(marked)
        with pytest.raises(CheckpointError, match="a folder among its parts"):
            trainer.load(path)


def test_parts_that_torch_does_not_write_are_refused(run_file, tmp_path):
    """An archive with a compressed part, or with a folder by its name, is refused, even a harmless one."""
    with zipfile.ZipFile(run_file) as file, zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for name in file.namelist():
            small.writestr(name, file.read(name))
    with pytest.raises(ValueError, match="compressed parts"):
        check_archive(tmp_path / "small.pt")

    with zipfile.ZipFile(run_file, "a") as file:
        file.writestr(zipfile.ZipInfo("run/folder/"), b"")
    with pytest.raises(ValueError, match="a folder among its parts"):
        check_archive(run_file)


def test_parts_that_share_their_bytes_are_refused(run_file):
    """An archive whose directory lists each part twice declares more bytes than it has, and is refused for that."""
    with zipfile.ZipFile(run_file, "a") as file:
        file.filelist *= 2
        file._didModify = True  # writes the directory anew
    with pytest.raises(ValueError, match="its parts declare"):
        check_archive(run_file)


@pytest.mark.parametrize("limit", ["MAX_MEMBERS", "MAX_PICKLE_BYTES"])
def test_a_file_as_large_as_allowed_is_read(run_file, monkeypatch, limit):
    """A file with exactly as many parts, or bytes that are no tensors, as allowed is read; with one more it is not."""
    with zipfile.ZipFile(run_file) as file:
        pickled = sum(member.file_size for member in file.infolist() if member.filename.endswith(".pkl"))
        size = {"MAX_MEMBERS": len(file.infolist()), "MAX_PICKLE_BYTES": pickled}[limit]
    monkeypatch.setattr(torch_files, limit, size)
    check_archive(run_file)
    monkeypatch.setattr(torch_files, limit, size - 1)
    with pytest.raises(ValueError, match=f"{size:,} .*expected at most {size - 1:,}"):
        check_archive(run_file)


def test_flipped_bits_in_the_frozen_file_make_no_silent_difference(make_backbone, data, tmp_path):
    """The file of frozen weights is held to the same: refused, or the weights are the same."""
    trainer = make_trainer(make_backbone())
    fit(trainer, data, callbacks=[tk.Checkpoint(tmp_path)])
    frozen = next(tmp_path.glob("frozen-*.pt"))
    content, generator, refusals = frozen.read_bytes(), random.Random(1), 0
    other = make_trainer(make_backbone(seed=9))
    start = copy.deepcopy(dict(other.model.state_dict()))
    for _ in range(30):
        place = generator.randrange(len(content))
        frozen.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        other.model.load_state_dict(start)
        try:
            other.load(tmp_path / "step-00000003.pt")
        except CheckpointError:
            refusals += 1
            assert same(dict(other.model.state_dict()), start)
        else:
            assert same(dict(other.model.state_dict()), dict(trainer.model.state_dict()))
    assert refusals > 5


def test_a_checkpoint_cut_short_at_any_place_is_refused(run_file, trainer):
    """Cut at each 512 bytes, and by one byte, the file is refused by name and size; the trainer is unchanged."""
    content = run_file.read_bytes()
    before = snapshot(trainer)
    for size in [*range(0, len(content), 512), len(content) - 1]:
        run_file.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=rf"^[^\n]*run\.pt \({size} bytes\) as a ch[^\n]*: delete it"):
            trainer.load(run_file)
    assert same(snapshot(trainer), before)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 5000, b"<!DOCTYPE html><html>404</html>", b"PK\x05\x06" + b"\0" * 18, b"\x89PNG\r\n\x1a\n" * 9],
    ids=["nothing", "zeros", "web page", "empty archive", "image"],
)
def test_a_file_of_something_else_is_refused(trainer, tmp_path, content):
    """Nothing, zeros, a web page, an empty archive and an image are refused by name, size and remedy."""
    (tmp_path / "x.pt").write_bytes(content)

    message = rf"x\.pt \({len(content)} bytes\) as a checkpoint: .+ Expected a complete file of Trainer\.save"
    refused(trainer, lambda: trainer.load(tmp_path / "x.pt"), CheckpointError, message)


def test_a_folder_and_a_missing_file_are_refused(trainer, tmp_path, data):
    """Where no file is, load and fit name the path; an empty folder is the beginning of a run for fit alone."""
    missing = tmp_path / "none.pt"
    for load in (lambda: trainer.load(missing), lambda: fit(trainer, data, resume_from=missing)):
        refused(trainer, load, CheckpointError, r"no checkpoint at .*none\.pt: got nothing, expected a file that")
    refused(trainer, lambda: trainer.load(tmp_path), CheckpointError, r"no checkpoint at .*: got a folder")
    fit(trainer, data, resume_from=tmp_path)


@pytest.mark.parametrize("read", [archive.read_checkpoint, read_state_dict], ids=["checkpoint", "weights"])
def test_a_good_file_is_not_called_damaged_for_want_of_memory(tmp_path, read):
    """A file that does not fit into memory is refused with that reason, and nobody is told to delete it."""
    archive.write_checkpoint(tmp_path / "large.pt", {"model": torch.zeros(2**24)})
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, hard))
    try:
        ballast = []
        with contextlib.suppress(RuntimeError):
            while True:
                ballast.append(torch.empty(2**22))
        ballast.pop()  # 16 MB are left, and the tensor takes 64
        with pytest.raises((CheckpointError, WeightsError), match=r"large\.pt: there is not enough memory") as error:
            read(tmp_path / "large.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert "delete" not in str(error.value)


def test_a_good_file_is_not_called_damaged_when_the_disk_fails(run_file, trainer, monkeypatch):
    """An error of the disk while a file is read is named as such, and nobody is told to delete the file."""

    def failing(archive):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(zipfile.ZipFile, "testzip", failing)
    refused(
        trainer, lambda: trainer.load(run_file), CheckpointError, r"run\.pt: .*Input/output error\. The file may be"
    )


# --- edited files


def edited(path, change):
    """Change the state in a checkpoint and write it back, whole."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def renamed(state, new):
    state["model"]["weights"] = {new(name): weight for name, weight in state["model"]["weights"].items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: renamed(s, "module.{}".format), r"missing backbone\.\S+(, \S+){4} and \d+ more; .*wrapper.*remove"),
        (lambda s: renamed(s, "_orig_mod.{}".format), r"unexpected _orig_mod\.backbone.*wrapper put a prefix"),
        (lambda s: s["model"]["weights"].pop("head.logits.bias"), r"do not fit the model: missing head\.logits\.bias"),
        (lambda s: s["model"]["weights"].update(more=torch.ones(1)), r"do not fit the model: unexpected more"),
        (lambda s: s["model"]["weights"].update({"head.logits.bias": torch.zeros(3, dtype=torch.int64)}), r"\.bias"),
        (lambda s: s["model"]["weights"].update({"head.logits.bias": torch.zeros(3).double()}), r"\.bias"),
        (lambda s: s["model"]["weights"].update({"head.logits.bias": torch.zeros(3).cfloat()}), r"\.bias"),
        (lambda s: s["model"].update(backbone="vgg19"), r"has backbone vgg19, the model tiny"),
        (lambda s: s["model"]["preprocessing"].update(image_size=64), r"has preprocessing .*64.*the model .*32"),
        (
            lambda s: s["model"].update(in_eval=["backbone.features.99"]),
            r"freezes backbone\.features\.99, which the mod",
        ),
        (
            lambda s: s["model"].update(frozen=["head.fc9.weight"]),
            r"freezes head\.fc9\.weight, which the model does not",
        ),
        (
            lambda s: s["model"].update(layers=["block9"]),
            r"has layers \['block9'\], the model \['block3_pool', 'block4_p",
        ),
        (
            lambda s: s["model"]["layers"].reverse(),
            r"has layers \['block5_pool', .*, the model \['block3_pool', .*same",
        ),
        (lambda s: s["model"].update(layers="block5_pool"), r"has a str as model/layers: expected list"),
        (lambda s: s["model"]["head"].update(pooling="max"), r"has pooling max, the model halves: expected the same"),
        (lambda s: s["model"]["head"].pop("pooling"), r"has pooling None, the model halves: expected the same"),
        (lambda s: s["model"].update(temperature=0.0), r"has the temperature 0\.0: expected one above 0"),
        (lambda s: s["model"].update(temperature=-1.5), r"has the temperature -1\.5: expected one above 0"),
        (lambda s: s["model"].update(temperature=float("inf")), r"has the temperature inf: expected one above 0"),
        (lambda s: s["model"].update(temperature=float("nan")), r"has the temperature nan: expected one above 0"),
        (lambda s: s["model"].update(temperature=1), r"has a int as model/temperature: expected float"),
        (lambda s: s["model"].pop("classes"), r"lacks model/classes: expected a file that Trainer\.save wrote"),
        (lambda s: s["model"].update(classes=["cat", 5, "owl"]), r"has a int as model/classes/1: expected str"),
        (lambda s: s["model"].update(frozen={"x": 1}), r"has a dict as model/frozen: expected list"),
        (lambda s: s.pop("optimizer"), r"lacks optimizer: expected"),
        (lambda s: s["progress"].pop("epoch"), r"lacks progress/epoch: expected"),
        (lambda s: s["progress"].update(epoch=True), r"has a bool as progress/epoch: expected int"),
    ],
    ids=[
        *["module.", "_orig_mod.", "missing", "extra", "int64", "float64", "complex", "backbone", "preprocessing"],
        *[
            "boundary",
            "frozen weight",
            "layers",
            "order",
            "layers as text",
            "pooling",
            "no pooling",
            "cold",
            "below 0",
            "hot",
            "nan",
            "int",
        ],
        *["no classes", "class 5", "frozen", "no optimizer", "no epoch", "epoch True"],
    ],
)
def test_weights_that_do_not_fit_are_refused(run_file, trainer, change, message):
    """Wrong prefix, missing and extra parts, other dtypes and types: named with their place, the trainer unchanged."""
    edited(run_file, change)

    refused(trainer, lambda: trainer.load(run_file), REFUSALS, message)


def adam(state):
    return state["optimizer"]["state"]["head.logits.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: adam(s).update(exp_avg=torch.zeros(3, 49)),
            r"\(3, 49\) .* as exp_avg of head\.logits\.weight: .*\(3, 72",
        ),
        (lambda s: adam(s).update(exp_avg=torch.tensor(1.0)), r"exp_avg of head\.logits\.weight"),
        (lambda s: adam(s).update(exp_avg=1.0), r"has a number as exp_avg of head\.logits\.weight: expected a tensor"),
        (lambda s: adam(s).update(exp_avg=torch.zeros(3, 72, dtype=torch.int64)), r"int64 as exp_avg .*float32"),
        (lambda s: adam(s).pop("exp_avg"), r"has exp_avg_sq, step for .*, the live one exp_avg, exp_avg_sq, step"),
        (lambda s: adam(s).update(step="3"), r"has a str as step of"),
        (lambda s: adam(s).update(step=torch.zeros(3, 72)), r"\(3, 72\) .* as step of"),
        (lambda s: s["optimizer"]["groups"][0].update(lr="fast"), r"has a str as lr of group 0: expected a number"),
        (lambda s: s["optimizer"]["groups"][0].update(betas=None), r"as betas of group 0: expected \[a number, a num"),
        (lambda s: s["optimizer"]["groups"][0].pop("eps"), r"for group 0, the live one .*eps.*: expected the same"),
        (lambda s: s["optimizer"]["state"].update(other={}), r"state for 'other', not in the model"),
        (lambda s: s["optimizer"].update(state=[]), r"has a list as optimizer/state: expected dict"),
        (lambda s: s["optimizer"].update(groups=[5] * 6), r"has a int as optimizer/groups/0: expected dict"),
    ],
    ids=[
        *["shape", "scalar", "number", "int64", "missing", "text", "step's shape", "lr", "betas", "eps", "other"],
        *["no state", "no groups"],
    ],
)
def test_optimizer_state_that_does_not_fit_is_refused_at_load(run_file, trainer, change, message):
    """What Adam could not step with is refused when it is loaded, not at the next step."""
    edited(run_file, change)

    refused(trainer, lambda: trainer.load(run_file), CheckpointError, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(layers=["block9"]), r"output of layer 'block9': tiny has no such layer"),
        (lambda m: m.update(layers=["block5", "block5_pool"]), r"cannot be built: .*name block5_pool twice"),
        (
            lambda m: m.update(layers=["block4", "block5"]),
            r"do not fit the head that it describes: .*\(3, 72\) instead of",
        ),
        (lambda m: m.update(layers=[]), r"has layers \[\], the model \['block3_pool', .*: expected the same"),
        (lambda m: m["head"].update(pooling="flatten"), r"describes a model that cannot be built: .*layers=.*halves"),
        (
            lambda m: m["head"].update(pooling="avg"),
            r"do not fit the head that it describes: .*\(3, 72\) instead of \(3, 24",
        ),
        (lambda m: m["head"].update(pooling="sum"), r"describes a model that cannot be built"),
        (lambda m: m["head"].pop("pooling"), r"describes a model that cannot be built"),
        (lambda m: m.update(temperature=0.0), r"has the temperature 0\.0: expected one above 0"),
    ],
    ids=["unknown", "twice", "fewer", "none", "flatten", "average", "sum", "no pooling", "cold"],
)
def test_a_file_that_describes_another_head_is_refused(run_file, make_backbone, change, message):
    """Layers, a pooling or a temperature that do not fit the file's weights, or cannot be, are refused."""
    edited(run_file, lambda state: change(state["model"]))

    with pytest.raises(REFUSALS, match=message):
        tk.load_model(run_file, backbone=make_backbone())


@pytest.mark.parametrize(
    "change",
    [lambda s: s.pop("scale"), lambda s: s.update(scale="large"), lambda s: s.update(more=1.0)],
    ids=["missing", "text", "extra"],
)
def test_a_gradient_scaler_that_does_not_fit_is_refused(trainer, tmp_path, change):
    """A scaler's state is compared by names and types; a trainer without a scaler ignores it."""
    path, plain = tmp_path / "scaled.pt", trainer.device.scaler
    trainer.device.scaler = torch.amp.GradScaler("cpu")
    trainer.save(path)
    trainer.load(path)
    edited(path, lambda state: change(state["scaler"]))
    refused(trainer, lambda: trainer.load(path), CheckpointError, "gradient scaler .*: expected numbers for scale")

    trainer.device.scaler = plain
    trainer.load(path)
    trainer.save(path)
    trainer.device.scaler = torch.amp.GradScaler("cpu")
    trainer.load(path)


FORM = "holds reports or sums of another form"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run["best"].update(more=torch.ones(1)), "best weights that do not fit the model: unexpected more"),
        (
            lambda run: run["best"].update({"head.logits.bias": torch.zeros(3).double()}),
            r"not fit .*logits\.bias",
        ),
        (lambda run: run["reports"][0].update(f1="high"), FORM),
        (lambda run: run["reports"][0].pop("loss"), FORM),
        (lambda run: run["sums"].update(loss=torch.zeros(2)), FORM),
        (lambda run: run["sums"].update(outputs=[5]), FORM),
        (lambda run: run["sums"].update(outputs=[[torch.zeros(2, 3)]]), FORM),
        (
            lambda run: run["sums"].update(outputs=[[torch.zeros(2, 3), [0, 1]]]),
            FORM,
        ),
        (lambda run: run["sums"].update(count="many"), r"has a str as run/sums/count: expected int"),
    ],
    ids=["best extra", "best float64", "text", "no loss", "two losses", "5", "no targets", "list", "count"],
)
def test_figures_and_best_weights_that_do_not_fit_are_refused(run_file, make_backbone, data, change, message):
    """A run is resumed with its figures and best weights; with others than it can have it is refused, unchanged."""
    resumed, other = make_trainer(make_backbone(), seed=3), make_trainer(make_backbone(), seed=3)
    fit(resumed, data, epochs=2, validation_data=data, resume_from=run_file)
    edited(run_file, lambda state: change(state["run"]))

    resume = lambda: fit(other, data, epochs=2, validation_data=data, resume_from=run_file)  # noqa: E731
    refused(other, resume, CheckpointError, message)


def test_the_order_of_parameters_does_not_matter(run_file, make_backbone):
    """Optimizer state goes by name: in whatever order a file has it, each parameter gets its own."""
    expected, trainer = archive.read_checkpoint(run_file), make_trainer(make_backbone(seed=9))

    def turn(state):
        state["optimizer"]["state"] = dict(reversed(state["optimizer"]["state"].items()))
        state["model"]["weights"] = dict(reversed(state["model"]["weights"].items()))

    edited(run_file, turn)
    trainer.load(run_file)

    assert same(trainer.state_dict()["optimizer"]["state"], expected["optimizer"]["state"])
    assert same(dict(trainer.model.state_dict()), expected["model"]["weights"])


# --- formats


@pytest.mark.parametrize("number", [99, 1])
def test_another_format_is_refused_in_one_line(run_file, trainer, number):
    """A file of another format says what wrote it, what this is, and what to do, in one line."""
    edited(run_file, lambda s: s.update(format=number, versions={"transferkit": "9.9"}))

    wrote = rf"run\.pt has checkpoint format {number}, written by transferkit 9\.9"
    message = rf"{wrote}: this is .* format {archive.FORMAT}\. Expected a file .* install its"
    refused(trainer, lambda: trainer.load(run_file), CheckpointError, message)


@pytest.mark.parametrize("number", [None, "2", 2.5, [2], {}, True, -1, torch.zeros(2, 3)], ids=repr)
def test_a_format_that_is_no_number_is_refused(run_file, trainer, number):
    """Whatever stands in the place of the format's number gives a CheckpointError."""
    edited(run_file, lambda state: state.update(format=number))

    refused(trainer, lambda: trainer.load(run_file), CheckpointError, "has checkpoint format")


# --- failed loads change nothing


def test_a_failed_load_changes_nothing_of_a_run(run_file, trainer, data):
    """After refusals of every kind a run goes on to the same bits as one that never tried to load."""
    content, twin = run_file.read_bytes(), copy.deepcopy(trainer)
    for change in (
        lambda s: s["model"]["weights"].pop("head.logits.bias"),
        lambda s: s["optimizer"].update({"class": "SGD"}),
        lambda s: s["progress"].pop("seed"),
        lambda s: s["model"].update(in_eval=["block9"]),
        lambda s: s["model"].update(classes=["a", "b", "c"]),
    ):
        run_file.write_bytes(content)
        edited(run_file, change)
        for load in (lambda: trainer.load(run_file), lambda: fit(trainer, data, resume_from=run_file)):
            with pytest.raises(REFUSALS):
                load()
    fit(trainer, data)
    fit(twin, data)

    assert same(snapshot(trainer), snapshot(twin))


# --- crafted files


def places(state, path=()):
    """Each place in a nested state, those that hold others included."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    for key, value in list(items):
        yield (*path, key)
        yield from places(value, (*path, key))


def put(state, path, value):
    """The state with something else in one place."""
    if not path:
        return value
    if isinstance(state, dict):
        return {**state, path[0]: put(state[path[0]], path[1:], value)}
    return type(state)(put(part, path[1:], value) if i == path[0] else part for i, part in enumerate(state))


WRONG = [None, 5, -1, 2.5, "x", [], {}, [5], ["x"], {"x": 5}, torch.zeros(2, 3), torch.tensor(1, dtype=torch.int8)]


def outcome(trainer, load, go_on):
    """Nothing if a state was refused and nothing changed, or taken and can be worked with; else what went wrong."""
    before = snapshot(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it comes from another device
        try:
            load()
        except TransferKitError:
            return None if same(snapshot(trainer), before) else "refused, and changed"
        except Exception as error:  # noqa: BLE001 - any other is the fault looked for
            changed = "" if same(snapshot(trainer), before) else ", and changed"
            return f"{type(error).__name__} at load{changed}: {error}"
        if strange := strange_moments(trainer):  # a step with these writes beyond them, and could end the process
            return f"taken, with {strange}"
        try:
            go_on()
        except Exception as error:  # noqa: BLE001 - any other is the fault looked for
            return f"taken, then {type(error).__name__}: {error}"
    return None


def strange_moments(trainer):
    """What Adam holds that it does not make itself."""
    for parameter, values in trainer.optimizer.state.items():
        for key, value in values.items():
            shape = () if key == "step" else parameter.shape
            if not isinstance(value, torch.Tensor) or value.shape != shape or value.dtype != torch.float32:
                return f"{key} = {value!r} for a weight of shape {tuple(parameter.shape)}"
    return ""


def crafted(state, part, keep=lambda path: True):
    seen = set()
    for path in places(state[part], (part,)):
        kind = tuple("*" if "features" in str(key) or isinstance(key, int) else key for key in path)
        if kind in seen or not keep(path):
            continue
        seen.add(kind)  # one of many places that are alike
        for wrong in WRONG[len(seen) % 3 :: 3]:  # each place gets a third of them, neighbours another third
            yield path, wrong


@pytest.mark.slow
@pytest.mark.parametrize("part", ["model", "optimizer", "scaler", "progress"])
def test_a_wrong_type_anywhere_in_a_state_is_a_checkpoint_error(run_file, make_backbone, data, part):
    """With anything else in any place a state is refused as a TransferKitError, unchanged, or can be trained with."""
    state, wrong = archive.read_checkpoint(run_file), []
    few = data[0][:4], data[1][:4]
    start = make_trainer(make_backbone(seed=9), seed=5)
    trainer = copy.deepcopy(start)
    for path, value in [((part,), value) for value in WRONG] + list(crafted(state, part)):
        before = trainer.global_step, trainer.epoch
        bad = put(state, path, value)
        found = outcome(
            trainer,
            lambda bad=bad, trainer=trainer: trainer.load_state_dict(bad),
            lambda trainer=trainer: next(trainer.steps(few)),
        )
        if found is not None:
            wrong.append(f"{'/'.join(map(str, path))} = {value!r}: {found[:150]}")
        if found is not None or before != (trainer.global_step, trainer.epoch):
            trainer = copy.deepcopy(start)
    assert wrong == [], "\n".join(wrong)


@pytest.mark.slow
def test_a_wrong_type_anywhere_in_a_run_is_a_checkpoint_error(run_file, make_backbone, data):
    """With anything else in any place of its part "run" a checkpoint is refused, or the run goes on from it."""
    state, wrong = archive.read_checkpoint(run_file), []
    start = make_trainer(make_backbone(seed=9), seed=3)
    for path, value in [(("run",), value) for value in WRONG] + list(crafted(state, "run")):
        bad, trainer = put(state, path, value), copy.deepcopy(start)
        archive.write_checkpoint(run_file, bad)
        found = outcome(
            trainer,
            lambda trainer=trainer: fit(trainer, data, epochs=2, validation_data=data, resume_from=run_file),
            lambda: None,
        )
        if found is not None:
            wrong.append(f"{'/'.join(map(str, path))} = {value!r}: {found[:150]}")
    assert wrong == [], "\n".join(wrong)


@pytest.mark.slow
def test_a_wrong_type_anywhere_in_a_model_is_a_checkpoint_error_of_load_model(run_file, make_backbone, tmp_path):
    """load_model, given any crafted state of a model, refuses it as a TransferKitError or gives a model that works."""
    state, wrong = archive.read_checkpoint(run_file), []
    path = tmp_path / "crafted.pt"
    for frozen in (True, False):
        if not frozen:
            trainer = make_trainer(make_backbone())
            trainer.save(path, frozen=False)
            state = archive.read_checkpoint(path)
        for place, value in [(("model",), value) for value in WRONG] + list(crafted(state, "model")):
            archive.write_checkpoint(path, put({"model": state["model"]}, place, value))
            try:
                tk.load_model(path, backbone=make_backbone())(torch.zeros(1, 3, 32, 32))
            except TransferKitError:
                pass
            except Exception as error:  # noqa: BLE001 - any other is the fault looked for
                wrong.append(f"{'/'.join(map(str, place))} = {value!r}: {type(error).__name__}: {str(error)[:100]}")
    assert wrong == [], "\n".join(wrong)


@pytest.mark.parametrize(
    "content",
    [5, None, [], ["x"], {"a": 5}, {"backbone.features.0.weight": "x"}, {"a": [torch.ones(1)]}, {"a": torch.ones(1)}],
    ids=["5", "None", "list", "list of text", "5 by name", "text by name", "list by name", "other weights"],
)
def test_a_frozen_file_of_something_else_is_refused(make_backbone, data, tmp_path, content):
    """Whatever a file in the place of the frozen weights holds, it is a CheckpointError that names it."""
    fit(make_trainer(make_backbone()), data, callbacks=[tk.Checkpoint(tmp_path)])
    archive.write_checkpoint(next(tmp_path.glob("frozen-*.pt")), {"frozen": content})
    trainer = make_trainer(make_backbone(seed=9))

    load = lambda: trainer.load(tmp_path / "step-00000003.pt")  # noqa: E731
    refused(trainer, load, CheckpointError, r"frozen-\w{16}\.pt (has a|does not hold the)")


# --- without the frozen weights


@pytest.fixture
def vgg():
    torch.manual_seed(0)
    return tk.load_backbone("vgg16", weights=None, image_size=32, preprocessing="KERAS")


@pytest.mark.slow
def test_a_head_alone_is_small_and_finds_its_backbone(vgg, tmp_path, data):
    """Saved without VGG16's frozen weights a linear head takes under 90 kB, and predicts the same on that backbone."""
    model = tk.freeze_until(tk.attach_head(vgg, ["cat", "dog", "owl"]), "head")
    tk.save_model(model, tmp_path / "head.pt", frozen=False)
    assert (tmp_path / "head.pt").stat().st_size < 90_000  # (3 + 2) * 3,840 numbers are 77 kB

    loaded = tk.load_model(tmp_path / "head.pt", backbone=copy.deepcopy(vgg))

    inputs = model.backbone.preprocess(data[0][:2])
    with torch.no_grad():
        assert torch.equal(loaded(inputs), model.eval()(inputs))
    assert (loaded.classes, loaded.head_arguments) == (model.classes, model.head_arguments)
    assert not any(parameter.requires_grad for parameter in loaded.backbone.parameters())
    assert not any(module.training for module in loaded.modules())


def test_another_backbone_is_refused_by_its_sha256(make_backbone, tmp_path):
    """A backbone that differs by one bit, or none, is refused with the digest asked for, and stays unchanged."""
    model = tk.freeze_until(tk.attach_head(make_backbone(), 3, pooling="avg"), "head")
    tk.save_model(model, tmp_path / "head.pt", frozen=False)
    sha256 = archive.read_checkpoint(tmp_path / "head.pt")["model"]["sha256"]
    other = make_backbone()
    with torch.no_grad():
        other.features[0].bias[0] += 1e-7
    before = other.fingerprint

    for backbone in (other, None, tk.attach_head(make_backbone(seed=3), 2).backbone):
        with pytest.raises(CheckpointError, match=rf"without its 10 frozen weights .*their SHA-256, {sha256[:8]}"):
            tk.load_model(tmp_path / "head.pt", backbone=backbone)
    assert other.fingerprint == before
    tk.load_model(tmp_path / "head.pt", backbone=make_backbone())


def test_a_trainer_saves_without_what_is_frozen(make_backbone, tmp_path, data):
    """Trainer.save(frozen=False) leaves out what is frozen; a trainer that has it loads it, another one refuses."""
    trainer = make_trainer(make_backbone(), seed=3)
    fit(trainer, data)
    trainer.save(tmp_path / "all.pt")
    trainer.save(tmp_path / "part.pt", frozen=False)
    assert (tmp_path / "part.pt").stat().st_size < (tmp_path / "all.pt").stat().st_size
    held = archive.read_checkpoint(tmp_path / "part.pt")["model"]["weights"]
    assert set(held) - STANDARDIZE == {
        *("backbone.features.12.weight", "backbone.features.12.bias", "head.logits.weight", "head.logits.bias")
    }
    assert set(held) > STANDARDIZE

    same_weights = make_trainer(make_backbone())
    same_weights.load(tmp_path / "part.pt")
    assert same(snapshot(same_weights)[2:], snapshot(trainer)[2:])
    assert same(dict(same_weights.model.state_dict()), dict(trainer.model.state_dict()))

    other = make_trainer(make_backbone(seed=9))
    message = r"part\.pt was saved without its 8 frozen weights .*none with their SHA-256, .* are in the model"
    refused(other, lambda: other.load(tmp_path / "part.pt"), CheckpointError, message)


def test_statistics_of_frozen_batch_norm_are_left_out_and_checked(make_backbone, tmp_path):
    """Running statistics are frozen weights, too: a backbone with others is refused."""
    model = tk.freeze_until(tk.attach_head(make_backbone(batch_norm=True), 3, pooling="avg"), "head")
    tk.save_model(model, tmp_path / "head.pt", frozen=False)
    other = make_backbone(batch_norm=True)
    next(module for module in other.features if isinstance(module, nn.BatchNorm2d)).running_mean += 1

    with pytest.raises(CheckpointError, match="SHA-256"):
        tk.load_model(tmp_path / "head.pt", backbone=other)
    assert set(archive.read_checkpoint(tmp_path / "head.pt")["model"]["weights"]) == {
        f"head.{name}" for name in model.head.state_dict()
    }
