"""The forms in which people have images and labels, and which prediction belongs to which image."""

import functools
import io
import re
import subprocess
import sys
import tempfile
from collections import namedtuple
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchvision.datasets import FakeData, ImageFolder

import transferkit as tk
from tiny import CLASSES, Rows, Stream, environment, make_backbone, make_images, make_trainer
from transferkit.data.classes import find_classes
from transferkit.errors import ArgumentError, ImageError, TargetError, WorkerError

Sample = namedtuple("Sample", ["image", "label", "path"])
Swapped = namedtuple("Swapped", ["label", "image"])


@pytest.fixture
def trainer(model):
    return make_trainer(tk.freeze_until(model, "head"))


@pytest.fixture
def paths(data, tmp_path):
    """Image files that hold the pixels of `data`."""
    for index, image in enumerate(data[0]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{index:02}.png")
    return [str(path) for path in sorted(tmp_path.glob("*.png"))]


class Column:
    """A column as pandas has them: no list, and an index of its own."""

    def __init__(self, values):
        self.values = np.asarray(values)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, label):
        raise KeyError(label)  # pandas looks up its index, not places

    def __array__(self, dtype=None, copy=None):
        return self.values

    def to_numpy(self):
        return self.values


class Table:
    def __init__(self, **columns):
        self.columns = list(columns)
        self._columns = {name: Column(values) for name, values in columns.items()}

    def __len__(self):
        return len(next(iter(self._columns.values())))

    def __getitem__(self, name):
        return self._columns[name]


class Hub(Rows):
    """A data set with features by name, as those of Hugging Face."""

    column_names = ("image", "label")
    features = {"image": None, "label": type("ClassLabel", (), {"names": CLASSES})}  # noqa: RUF012


# ---- labelled


def labelled(paths, data):
    images, targets = data
    names = [CLASSES[target] for target in targets]
    numbers = targets.tolist()
    pictures = [Image.open(path).copy() for path in paths]
    return {
        "paths and labels": (paths, numbers),
        "paths and names": (paths, names),
        "path objects": ([Path(path) for path in paths], np.array(numbers)),
        "array of paths": (np.array(paths), np.array(names)),
        "tuples": (tuple(paths), tuple(numbers)),
        "columns": (Column(paths), Column(names)),
        "columns of numbers": (Column(paths), Column(numbers)),
        "images and names": (images, names),
        "pictures": (pictures, numbers),
        "bytes": ([Path(path).read_bytes() for path in paths], numbers),
        "rows": list(zip(paths, numbers, strict=True)),
        "rows of names": list(zip(paths, names, strict=True)),
        "lists as rows": [list(row) for row in zip(paths, names, strict=True)],
        "array of rows": np.array(list(zip(paths, names, strict=True)), dtype=object),
        "list of dicts": [{"path": path, "label": name} for path, name in zip(paths, names, strict=True)],
        "dict of columns": {"image": images, "target": numbers},
        "table": Table(Id=range(len(paths)), Path=paths, Label=names),
        "dicts": Rows([{"img": p, "labels": n} for p, n in zip(pictures, numbers, strict=True)]),
        "undecoded": Rows(
            [{"image": {"bytes": None, "path": p}, "label": n} for p, n in zip(paths, numbers, strict=True)]
        ),
        "hub": Hub([{"image": p, "label": n} for p, n in zip(pictures, numbers, strict=True)]),
        "named tuples": Rows([Sample(*row, "a.png") for row in zip(pictures, numbers, strict=True)]),
        "swapped": Rows([Swapped(n, p) for p, n in zip(pictures, numbers, strict=True)]),
        "data set of paths": Rows(list(zip(paths, numbers, strict=True))),
        "loader of dicts": DataLoader(
            Rows([{"image": i, "label": n} for i, n in zip(images, numbers, strict=True)]), 32
        ),
        "loader of named": DataLoader(Rows([Swapped(n, i) for i, n in zip(images, numbers, strict=True)]), 32),
        "loader of lists": DataLoader(
            Rows(list(zip(pictures, numbers, strict=True))), 32, collate_fn=lambda rows: tuple(zip(*rows, strict=True))
        ),
    }


FORMS = list(labelled([], (torch.zeros(0, 3, 1, 1), torch.zeros(0, dtype=torch.int64))))


@pytest.mark.parametrize("form", FORMS)
def test_labelled_images_of_every_form_are_the_same_data(trainer, paths, data, form):
    """Each form trains, and is evaluated and predicted as the arrays are."""
    given = labelled(paths, data)[form]
    expected = trainer.evaluate(data), trainer.predict(data[0]).tolist()
    measured = trainer.evaluate(given), trainer.predict(given).tolist()
    assert measured[0] == pytest.approx(expected[0], rel=1e-5)
    assert measured[1] == expected[1]
    trainer.fit(given, epochs=1, verbose=0, **({} if "loader" in form else {"validation_split": 0.25}))
    assert trainer.global_step > 0


@pytest.mark.parametrize("form", [form for form in FORMS if "names" in form and "tuple" not in form] + ["hub"])
def test_names_of_labels_are_the_classes(paths, data, form):
    """Where labels are names nobody need list the classes."""
    given = labelled(paths, data)[form]
    if "loader" not in form:
        assert find_classes(given, None) == CLASSES


def test_a_part_of_the_names_is_looked_up_in_the_model(trainer, paths):
    """Labels that are names need not be all of the classes; one that is none of them is refused."""
    assert trainer.assess((paths[:2], ["owl", "dog"])).targets.tolist() == [2, 1]
    with pytest.raises(TargetError, match=r"label 'fox' at index 1 is not one of the model's classes \(cat, dog, owl"):
        trainer.evaluate((paths[:2], ["owl", "fox"]))


@pytest.mark.parametrize("kinds", [1, 5])
def test_the_advice_about_an_unknown_name_keeps_every_class(kinds):
    """A label of the validation data that training data lacks is corrected or added; no class of training is lost."""
    images, targets = make_images(30)
    names = [f"{CLASSES[target]} {row // 3 % kinds}" for row, target in enumerate(targets)]
    call = functools.partial(tk.fine_tune, make_backbone(), (images, names), device="cpu", verbose=0)
    held_out = images[:3], [names[0], "dot", names[2]]
    with pytest.raises(TargetError, match=r"label 'dot' at index 1 .*Correct the label, or make the model") as caught:
        call(held_out)
    line = re.search(r"with classes=(.*)\.$", str(caught.value))[1]
    classes = eval(line, {"classes": sorted(set(names)), "labels": held_out[1]})
    assert sorted(classes) == sorted({*names, "dot"})
    assert call(held_out, classes=classes, freeze_until="head", augment=None).model.classes == tuple(classes)


@pytest.mark.parametrize("missing", [float("nan"), None])
def test_a_missing_name_is_no_class(trainer, paths, missing):
    """A gap in a column of names is refused with its place, and becomes no class called nan."""
    with pytest.raises(TargetError, match=r"label .* at index 1 is missing"):
        trainer.fit((paths[:3], ["cat", missing, "dog"]), epochs=1)
    with pytest.raises(TargetError, match=r"label .* at index 1 is missing"):
        find_classes((paths[:3], ["cat", missing, "dog"]), None)


def test_a_missing_number_is_no_class_either(trainer, paths):
    """A gap in a column of numbers is NaN, which the advice to convert would turn into a class."""
    with pytest.raises(TargetError, match=r"nan at index 1: .*unlabeled image: leave such images out"):
        trainer.fit((paths[:3], Column([0, float("nan"), 2])), epochs=1)


def test_missing_files_are_all_named_before_a_step(trainer, paths, monkeypatch, tmp_path):
    """Paths of a table that lead nowhere are listed at once, with where relative ones begin."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageError, match=r"image 1: file gone.png .*image 2: away.png.*2 files.*begins at /"):
        trainer.fit((["00.png", "gone.png", "away.png"], [0, 1, 2]), epochs=1)


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ({"img": 0, "fine_label": 1, "coarse_label": 2}, 'return sample["img"], sample["fine_label"]'),
        ({"image": 0, "id": 1}, 'return sample["image"], sample["id"]'),
        ((0, 1, "a.png"), "return sample[0], sample[1]"),
    ],
)
@pytest.mark.parametrize("loader", [False, True])
def test_parts_that_are_not_clear_are_refused_with_lines_that_work(trainer, data, rows, line, loader):
    """More than an image and a label, or other names: the message has a data set that says which is which."""
    parts = lambda row: [data[0][row], int(data[1][row]), "a.png"]  # noqa: E731
    samples = [
        {name: parts(row)[place] for name, place in rows.items()} if isinstance(rows, dict) else tuple(parts(row))
        for row in range(24)
    ]
    given = DataLoader(Rows(samples), batch_size=8) if loader else Rows(samples)
    with pytest.raises(TargetError, match="third" if isinstance(rows, tuple) else "not clear") as caught:
        trainer.fit(given, epochs=1, verbose=0)
    assert line in str(caught.value)
    scope = {"torch": torch, "data": given.dataset if loader else given}
    exec(str(caught.value)[str(caught.value).index("class Pairs") :], scope)
    assert trainer.evaluate(scope["Pairs"]()) == trainer.evaluate(data)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("kind", [list, tuple])
def test_images_and_targets_in_a_list_are_told_apart_from_rows(trainer, data, paths, parts, kind):
    """fit([x, y]) and fit((x, y, weights)) are refused with what to write."""
    if (parts, kind) == (2, tuple):
        pytest.skip("that is the right form")
    for images in (data[0], paths):
        with pytest.raises(ArgumentError, match=r"fit\(\(images, targets\)\)"):
            trainer.fit(kind([images, data[1].tolist(), [1.0] * 24][:parts]), epochs=1)


def test_parts_of_a_data_set_and_other_dicts_are_refused_with_what_to_pass(trainer, paths, data):
    """A dict of train and test, and a dict of labels by path."""
    with pytest.raises(
        ArgumentError, match=r"one of these data sets, data\['train'\], and another one as validation_data"
    ):
        trainer.fit({"train": Hub([]), "test": Hub([])}, epochs=1)
    with pytest.raises(ArgumentError, match=r"pass \(list\(data\), list\(data.values\(\)\)\)"):
        trainer.fit(dict(zip(paths, data[1].tolist(), strict=True)), epochs=1)
    with pytest.raises(ArgumentError, match=r"\(data\['id_code'\], data\['diagnosis'\]\)"):
        trainer.fit(Table(id_code=paths, diagnosis=data[1].tolist()), epochs=1)
    with pytest.raises(ArgumentError, match=r"read once: pass list\(\.\.\.\)"):
        trainer.fit((iter(paths), data[1]), epochs=1)


# ---- loaders


class Sizes(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.zeros(3, 32, 32 + index, dtype=torch.uint8), index % 3


@pytest.mark.parametrize("kind", ["pictures", "sizes"])
@pytest.mark.parametrize("call", ["fit", "evaluate", "predict"])
def test_a_loader_that_cannot_make_a_batch_says_what_to_pass(trainer, tmp_path, kind, call):
    """PIL images and images of several sizes do not fit into torch's batches; the data set inside works."""
    for name in CLASSES:
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 32)).save(tmp_path / name / "0.png")
    loader = DataLoader(ImageFolder(tmp_path) if kind == "pictures" else Sizes(), batch_size=4)
    options = {"verbose": 0, "epochs": 1} if call == "fit" else {}
    with pytest.raises(ImageError, match=r"the DataLoader cannot make a batch \(.*loader.dataset and batch_size=4"):
        getattr(trainer, call)(loader, **options)
    assert trainer.global_step == 0
    getattr(trainer, call)(loader.dataset, batch_size=4, **options)


def test_a_loader_whose_data_set_fails_is_an_error_of_the_library(trainer, paths):
    """A broken file behind a loader is no foreign error."""
    Path(paths[3]).write_bytes(b"")

    class Own(Rows):
        def __getitem__(self, index):
            return torch.from_numpy(np.array(Image.open(self.rows[index]))).permute(2, 0, 1), 0

    with pytest.raises(ImageError, match=r"DataLoader cannot make a batch \(UnidentifiedImageError: .*03.png"):
        trainer.fit(DataLoader(Own(paths), batch_size=4), epochs=1, verbose=0)


class Unsized:
    """A sampler without a length."""

    def __init__(self, order):
        self.order = order

    def __iter__(self):
        return iter(self.order)


def test_samplers_of_the_users_own_are_used_as_they_are(trainer, data):
    """Whatever a sampler or batch sampler draws is what is trained on, with a length or without."""
    dataset = TensorDataset(*data)
    for loader in (
        DataLoader(dataset, sampler=Unsized(range(6)), batch_size=4),
        DataLoader(dataset, batch_sampler=[[0, 1], [2, 3, 4, 5]]),
        DataLoader(dataset, sampler=WeightedRandomSampler([1.0] * 24, 6), batch_size=4),
    ):
        before = trainer.global_step
        trainer.fit(loader, epochs=1, verbose=0)
        assert trainer.global_step == before + 2


# ---- which prediction belongs to which image


@pytest.mark.parametrize(
    "order",
    [
        {"shuffle": True},
        {"shuffle": True, "generator": torch.Generator()},
        {"sampler": SubsetRandomSampler(range(24))},
        {"sampler": WeightedRandomSampler([1.0] * 24, 24)},
        {"batch_sampler": BatchSampler(RandomSampler(range(24)), 4, False)},
    ],
    ids=["shuffle", "generator", "subset", "weighted", "batches"],
)
def test_predictions_of_a_random_order_are_refused(trainer, data, order):
    """Nobody could tell which prediction belongs to which image; figures over all images do not mind."""
    loader = DataLoader(TensorDataset(*data), **order)
    for call in (trainer.predict, trainer.predict_proba, trainer.predict_classes):
        with pytest.raises(ArgumentError, match=r"draws its images at random \(.*Sampler\).*loader.dataset"):
            call(loader)
    assert trainer.evaluate(loader)["accuracy"] >= 0
    trainer.predict(loader.dataset)


def test_predictions_of_another_order_warn_and_follow_it(trainer, data):
    """A sampler of the user's own is used as it is, and a warning tells of it."""
    backwards = list(range(23, -1, -1))
    for order in ({"sampler": Unsized(backwards)}, {"batch_sampler": [backwards[:10], backwards[10:]]}):
        with pytest.warns(UserWarning, match="a sampler of its own"):
            found = trainer.predict(DataLoader(TensorDataset(*data), **order))
        assert found.tolist() == trainer.predict(data[0]).tolist()[::-1]


def test_predictions_of_a_loader_that_leaves_images_out_are_refused(trainer, data):
    """drop_last with a rest would give fewer predictions than images; without a rest it changes nothing."""
    with pytest.raises(ArgumentError, match=r"drop_last=True, so the last 4 images"):
        trainer.predict(DataLoader(TensorDataset(*data), batch_size=5, drop_last=True))
    for loader in (
        DataLoader(TensorDataset(*data), batch_size=6, drop_last=True),
        DataLoader(Stream(data), batch_size=6),
        DataLoader(TensorDataset(*data), batch_sampler=BatchSampler(SequentialSampler(range(24)), 4, False)),
    ):
        assert len(trainer.predict(loader)) == 24


def test_pictures_of_an_assessment_in_another_order_are_refused(trainer, data):
    """An assessment of a loader that shuffled cannot be shown beside the data in its own order."""
    pytest.importorskip("matplotlib")
    dataset = TensorDataset(*data)
    assessment = trainer.assess(DataLoader(dataset, batch_size=8, sampler=Unsized(range(23, -1, -1))))
    with pytest.raises(ArgumentError, match=r"not the one that was assessed"):
        tk.plot_predictions(assessment, dataset)


# ---- images alone


def unlabelled(paths):
    def raw(path):
        return Path(path).read_bytes()

    return {
        "list of bytes": [raw(path) for path in paths],
        "files in memory": [io.BytesIO(raw(path)) for path in paths],
        "tuple of paths": tuple(paths),
        "array of paths": np.array(paths),
        "array of objects": np.array([Path(path) for path in paths], dtype=object),
        "column": Column(paths),
        "table": Table(path=paths, size=[1] * len(paths)),
        "iterator": iter(paths),
        "generator of pictures": (Image.open(path) for path in paths),
        "rows without labels": [{"image": path} for path in paths],
        "paths and names": (paths, ["unknown"] * len(paths)),
    }


@pytest.mark.parametrize("count", [1, 2, 3, 24])
def test_images_of_every_form_are_predicted_alike(trainer, data, paths, count):
    """However paths, bytes and files are put together, and however many there are, answers come in their order."""
    expected = trainer.predict(data[0][:count]).tolist()
    for form, images in unlabelled(paths[:count]).items():
        assert trainer.predict(images).tolist() == expected, form


def test_one_image_in_forms_of_files(trainer, data, paths):
    """Bytes, an open file, a temporary file, and a sample with its label are one image each, wherever a file stands."""
    expected = trainer.predict(data[0][:1]).tolist()
    content = Path(paths[0]).read_bytes()
    with Path(paths[0]).open("rb") as file, tempfile.SpooledTemporaryFile() as spooled:
        file.read(10)
        spooled.write(content)
        for image in (content, bytearray(content), io.BytesIO(content), file, spooled, (Image.open(paths[0]), 2)):
            assert trainer.predict(image).tolist() == expected


@pytest.mark.parametrize(
    ("images", "match"),
    [
        ("*.png", r"pass sorted\(glob.glob\('\*.png'\)\)"),
        ("https://example.com/cat.jpg", r"does not exist. Download it"),
        (io.StringIO("text"), r"opened with open\(path, 'rb'\)"),
        (b"no image", r"cannot read image 0"),
        ({"a.png", "b.png"}, r"data is of type set"),
        ([], r"empty"),
    ],
    ids=["glob", "url", "text", "bytes", "set", "nothing"],
)
def test_other_forms_are_refused_with_what_to_pass(trainer, images, match):
    """What cannot be predicted is an error of the library that names the form to use."""
    with pytest.raises(tk.TransferKitError, match=match):
        trainer.predict(images)


def test_the_way_to_predict_a_folder_works(trainer, paths, data, tmp_path):
    """The expression in the message, followed literally, gives all images of the folder in the order of their names."""
    with pytest.raises(ImageError, match=r"is the folder") as caught:
        trainer.predict(tmp_path)
    expression = str(caught.value).split("pass ")[1].removesuffix(".")
    files = eval(expression, {"pathlib": __import__("pathlib")})
    assert trainer.predict(files).tolist() == trainer.predict(data[0]).tolist()


# ---- bad images


def test_three_broken_files_are_named_at_once_and_the_limit_can_be_set(trainer, paths, data, capsys):
    """All bad images are in the error, with the argument that lets them pass; then each has its line."""
    broken = [paths[index] for index in (5, 11, 17)]
    for path in broken:
        Path(path).write_bytes(b"")
    for call in (trainer.fit, trainer.solve):
        with pytest.raises(ImageError, match=r"3 of the first 24 .*on_bad_image=0.13") as caught:
            call((paths, data[1]), on_bad_image="skip", verbose=0)
        assert all(path in str(caught.value) for path in broken)
    trainer.fit((paths, data[1]), epochs=1, on_bad_image=0.13)
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert [path in line for path, line in zip(broken, lines, strict=True)] == [True] * 3


def test_missing_files_may_be_skipped(trainer, paths, data):
    """A path that leads nowhere is a bad image, too."""
    trainer.fit(([*paths, "gone.png"], [*data[1].tolist(), 0]), epochs=1, on_bad_image="skip", verbose=0)
    assert trainer.global_step == 1


def test_one_bad_file_among_many_does_not_cost_the_other_predictions(trainer, paths, data):
    """predict_proba gives NaN for it in its row, if asked to; by default the error names it."""
    expected = trainer.predict_proba(data[0])
    Path(paths[13]).write_bytes(b"")
    with pytest.raises(ImageError, match=r"image 13 \(.*13.png\).*on_bad_image"):
        trainer.predict(paths)
    found = trainer.predict_proba(paths, on_bad_image="nan")
    assert np.isnan(found).all(axis=1).nonzero()[0].tolist() == [13]
    good = [index for index in range(24) if index != 13]
    np.testing.assert_allclose(found[good], expected[good], rtol=1e-5)
    assert np.isfinite(trainer.predict_proba(paths[:5], on_bad_image="nan")).all()


# ---- worker processes that begin with a new interpreter

SPAWN = """
import torch, transferkit as tk
from tiny import make_backbone, make_trainer
torch.multiprocessing.set_start_method("spawn", force=True)
images, targets = torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.arange(8) % 3
trainer = make_trainer(tk.attach_head(make_backbone(), 3))
"""
TRAIN = "trainer.fit(torch.utils.data.TensorDataset(images, targets), batch_size=4, num_workers=1, verbose=0)\n"
CAUGHT = "try:\n    " + TRAIN + "except RuntimeError as error:\n    raise SystemExit(str(error))\n"


@pytest.mark.slow
@pytest.mark.parametrize("end", [TRAIN, CAUGHT], ids=["plain", "caught"])
def test_a_missing_main_guard_is_one_error_that_asks_for_it(tmp_path, end):
    """Under spawn a worker runs the script anew; the main process says so, and the worker says nothing."""
    (tmp_path / "script.py").write_text(SPAWN + end)
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment())
    assert done.returncode == 1
    assert "__main__" in done.stderr.strip().splitlines()[-1]
    assert done.stderr.count("Traceback") == (1 if end == TRAIN else 0) + done.stderr.count("direct cause")


def test_a_lambda_under_spawn_is_refused_with_the_way_out(trainer, monkeypatch):
    """A transform that cannot be sent to another process is an error of the library."""
    monkeypatch.setattr("multiprocessing.Process", torch.multiprocessing.get_context("spawn").Process)
    data = FakeData(8, (3, 32, 32), 3, transform=lambda image: image)
    try:
        with pytest.raises(WorkerError, match=r"cannot be sent to worker processes.*lambda.*num_workers=0"):
            tk.Trainer(trainer.model, cache=False, device="cpu").fit(data, batch_size=4, num_workers=1, verbose=0)
    finally:
        resource_tracker._resource_tracker._stop()  # the process that spawn starts beside its own
