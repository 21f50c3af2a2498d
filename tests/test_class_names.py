"""Which class an index stands for, in the model and in every data set that meets it."""

import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, random_split
from torchvision.datasets import ImageFolder

import transferkit as tk
from tiny import Rows, make_backbone, make_images, make_trainer
from transferkit.data.classes import class_names, find_classes
from transferkit.data.open import open_data
from transferkit.errors import ArgumentError, HeadMismatchError, TargetError, TransferKitError

CAT, DOG = ["cat", "dog"]


def make_folder(root, names, count=2):
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (32, 32), (20 * number, 60 * index, 99)).save(root / name / f"{index}.png")
    return ImageFolder(root)


def trainer_for(classes):
    torch.manual_seed(0)
    return make_trainer(tk.freeze_until(tk.attach_head(make_backbone(), classes), "head"))


class Wrapper(Dataset):
    """A data set of the user's own around another, under whatever name."""

    def __init__(self, inner, relabel=lambda target: target):
        self.whatever, self.relabel = inner, relabel

    def __len__(self):
        return len(self.whatever)

    def __getitem__(self, index):
        image, target = self.whatever[index]
        return image.rotate(0), self.relabel(target)


WRAPPED = {
    "folder": lambda d: d,
    "subset": lambda d: Subset(d, range(len(d))),
    "random split": lambda d: random_split(d, [len(d) - 1, 1])[0],
    "concatenation": lambda d: ConcatDataset([d, d]),
    "own wrapper": Wrapper,
    "wrapper of a subset": lambda d: Wrapper(Subset(d, range(len(d)))),
    "wrapper of a wrapper": lambda d: Wrapper(Wrapper(d)),
    "loader": lambda d: DataLoader(
        d, batch_size=4, shuffle=True, collate_fn=lambda rows: tuple(zip(*rows, strict=True))
    ),
}

# ---- a head that was given a number


@pytest.mark.parametrize(
    ("train", "wrap"), [*(("fit", wrap) for wrap in WRAPPED), ("solve", "folder"), ("steps", "loader")]
)
def test_a_numbered_head_takes_the_names_of_its_training_data(tmp_path, wrap, train):
    """Folders "0" to "11" sort as text: the model calls index 2 what the folder is called, "10"."""
    folder = make_folder(tmp_path, [str(number) for number in range(12)])
    trainer = trainer_for(12)
    run = getattr(trainer, train)
    if train == "steps":
        list(run(WRAPPED[wrap](folder)))
    else:
        run(WRAPPED[wrap](folder), verbose=0, **({"epochs": 1} if train == "fit" else {}))
    assert list(trainer.model.classes) == folder.classes


@pytest.mark.parametrize("wrap", WRAPPED)
def test_other_folders_are_refused_once_names_are_learnt(tmp_path, wrap):
    """A head made with a number and trained on cat and dog is not evaluated on dog and fox."""
    trainer = trainer_for(2)
    trainer.fit(make_folder(tmp_path / "train", ["cat", "dog"]), epochs=1, verbose=0)
    other = WRAPPED[wrap](make_folder(tmp_path / "test", ["dog", "fox"]))
    for call in (trainer.evaluate, trainer.assess, trainer.calibrate):
        with pytest.raises(HeadMismatchError, match=r"the data has 2 classes \(dog, fox\), the model 2 \(cat, dog\)"):
            call(other)


def test_names_are_not_kept_from_a_run_that_was_refused(tmp_path):
    """A run that fails before its first step leaves the numbers, so that the right data can follow."""
    trainer = trainer_for(2)
    wrong = make_folder(tmp_path / "wrong", ["fox", "owl"])
    with pytest.raises(TransferKitError):
        trainer.fit(wrong, validation_data=(torch.zeros(2, 3, 32, 32), [0, 7]), epochs=1, verbose=0)
    assert trainer.model.classes == ("0", "1")
    trainer.fit(make_folder(tmp_path / "right", ["cat", "dog"]), epochs=1, verbose=0)
    assert trainer.model.classes == ("cat", "dog")


def test_a_model_trained_by_its_numbers_keeps_their_order(tmp_path):
    """Folders that sort "10" before "2" are refused where index 2 has been trained to be "2"."""
    images = make_images(24)[0]
    for trained in ("fit", "solve"):
        trainer = trainer_for(12)
        getattr(trainer, trained)(
            (images, torch.arange(24) % 12), verbose=0, **({"epochs": 1} if trained == "fit" else {})
        )
        folder = make_folder(tmp_path / trained, [str(number) for number in range(12)])
        for call in (trainer.fit, trainer.evaluate):
            with pytest.raises(HeadMismatchError, match=r"the data has 12 classes \(0, 1, 10, 11, 2"):
                call(folder)


def test_names_travel_with_checkpoints_into_a_numbered_head(tmp_path):
    """A new head made with the number takes names and weights of a file, and refuses other folders from then on."""
    train = make_folder(tmp_path / "train", ["cat", "dog"])
    trainer = trainer_for(2)
    trainer.fit(train, epochs=1, verbose=0, callbacks=[tk.Checkpoint(tmp_path / "run")])
    trainer.save(tmp_path / "model.pt")
    again = trainer_for(2)
    again.load(tmp_path / "model.pt")
    assert again.model.classes == ("cat", "dog")
    resumed = trainer_for(2)
    resumed.fit(train, epochs=2, verbose=0, resume_from=tmp_path / "run")
    assert resumed.model.classes == ("cat", "dog")
    with pytest.raises(HeadMismatchError):
        trainer_for(2).fit(
            make_folder(tmp_path / "other", ["dog", "fox"]), epochs=2, verbose=0, resume_from=tmp_path / "run"
        )


def test_one_call_and_search_take_the_names_too(tmp_path):
    """`fine_tune` with a number of classes, and `search` over heads made with a number, end with the folders' names."""
    folder = make_folder(tmp_path, [str(number) for number in range(12)])
    trainer = tk.fine_tune(make_backbone(), folder, classes=12, device="cpu", verbose=0)
    assert list(trainer.model.classes) == folder.classes
    found = tk.search(
        lambda: tk.attach_head(make_backbone(), 12),
        {"freeze_until": ["head"], "epochs": [1]},
        folder,
        validation_data=folder,
        device="cpu",
        verbose=0,
    )
    assert list(found.best_model_.classes) == folder.classes


# ---- where names come from


def test_names_follow_the_indices_and_not_the_order_of_a_list(tmp_path):
    """`class_to_idx` says what an index stands for, wherever the list of classes was sorted otherwise."""
    folder = make_folder(tmp_path, [f"kind {number}" for number in range(12)])
    read = list(folder.classes)
    folder.classes = sorted(folder.classes, key=lambda name: int(name.split()[1]))
    assert list(class_names(folder).values()) == read
    for call in (
        lambda: trainer_for(folder.classes).fit(folder, epochs=1, verbose=0),
        lambda: tk.fine_tune(make_backbone(), folder, classes=folder.classes, verbose=0),
    ):
        with pytest.raises(HeadMismatchError, match=r"with classes=\['kind 0', 'kind 1', 'kind 10'.*\]\."):
            call()
    assert find_classes(folder, None) == read


def test_indices_with_gaps_are_compared_one_by_one():
    """A `class_to_idx` that is not 0 to K-1 names the indices that it has."""
    data = TensorDataset(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([2, 0]))
    data.class_to_idx = {"owl": 2, "cat": 0}
    assert open_data(data, ["cat", "dog", "owl"]).num_images == 2
    with pytest.raises(HeadMismatchError):
        open_data(data, ["cat", "owl", "dog"])


@pytest.mark.parametrize(
    ("transform", "names"),
    [
        (lambda index: 2 - index, {0: "owl", 1: "dog", 2: "cat"}),
        (lambda index: index - 1, {0: "dog", 1: "owl"}),
        (lambda index: min(index, 1), None),
        (lambda index: [0.5, 0.5], None),
        (lambda index: {"cat": 0}[index], None),
    ],
    ids=["reversed", "from 1", "merged", "rows", "of names"],
)
def test_a_target_transform_renumbers_the_names(tmp_path, transform, names):
    """Names follow renumbered targets; where classes are merged nothing is claimed."""
    folder = make_folder(tmp_path, ["cat", "dog", "owl"])
    folder.target_transform = transform
    assert class_names(folder) == names


def test_a_wrapper_that_gives_other_labels_has_no_names(tmp_path):
    """Two kinds made of three folders train a head for two; nothing right is refused."""
    coarse = Wrapper(make_folder(tmp_path, ["cat", "dog", "truck"]), lambda target: int(target == 2))
    trainer = trainer_for(["animal", "vehicle"])
    trainer.fit(coarse, epochs=1, verbose=0)
    assert trainer.global_step == 1


def test_lists_of_something_else_called_classes_are_no_names():
    """A number, a function or an empty list as `.classes` is passed over."""
    data = TensorDataset(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([1, 0]))
    for classes in (2, [], len, None):
        data.classes = classes
        assert open_data(data, ["cat", "dog"]).num_images == 2


@pytest.mark.parametrize("classes", [np.int64(3), torch.tensor(3), {"0": 0, "2": 2, "1": 1}])
def test_classes_of_every_type_title_pictures(classes):
    """`show_batch` takes classes as the other calls do."""
    pytest.importorskip("matplotlib")
    parts = tk.show_batch(make_images(), classes, num_images=24).axes[0].child_axes
    assert {part.get_title() for part in parts} == {"0", "1", "2"}


# ---- folders that are no classes


@pytest.mark.parametrize(
    ("name", "wrap"),
    [(".ipynb_checkpoints", "folder"), (".thumbnails", "subset"), ("__MACOSX", "own wrapper"), (".x", "concatenation")],
)
def test_a_hidden_folder_is_no_class(tmp_path, name, wrap):
    """What a program left beside the class folders is named, with its path, and deleting it helps."""
    data = WRAPPED[wrap](make_folder(tmp_path, ["a", "b", name]))
    with pytest.raises(HeadMismatchError, match=rf"{name}' as a class.*Delete {tmp_path / name}"):
        trainer_for(3).fit(data, epochs=1, verbose=0)
    with pytest.raises(HeadMismatchError, match=name):
        tk.fine_tune(make_backbone(), data, verbose=0)
    shutil.rmtree(tmp_path / name)
    trainer_for(2).fit(ImageFolder(tmp_path), epochs=1, verbose=0)


@pytest.mark.parametrize("parts", [["train", "val"], ["Train", "Test"], ["train", "valid", "test"]])
def test_the_parent_of_train_and_val_is_refused(tmp_path, parts):
    """Folders of the parts of a data set are no classes; the message has the folder to pass, and that trains."""
    for part in parts:
        make_folder(tmp_path / part, ["cat", "dog"])
    data = ImageFolder(tmp_path)
    with pytest.raises(HeadMismatchError, match=rf"parts of a data set.*ImageFolder\('{tmp_path}"):
        trainer_for(data.classes).fit(data, epochs=1, verbose=0)
    trainer_for(["cat", "dog"]).fit(ImageFolder(tmp_path / sorted(parts)[0]), epochs=1, verbose=0)


def test_a_part_among_the_class_folders_is_refused_and_a_train_is_a_class(tmp_path):
    """`val` with the class folders inside is a part; `train` beside `bus` is a vehicle."""
    make_folder(tmp_path / "vehicles", ["bus", "train"])
    trainer_for(2).fit(ImageFolder(tmp_path / "vehicles"), epochs=1, verbose=0)
    make_folder(tmp_path / "pets", ["cat", "dog"])
    make_folder(tmp_path / "pets" / "val", ["cat", "dog"])
    with pytest.raises(HeadMismatchError, match="parts of a data set"):
        trainer_for(3).fit(ImageFolder(tmp_path / "pets"), epochs=1, verbose=0)


def test_the_way_to_evaluate_a_folder_that_lacks_a_class_works(tmp_path):
    """The lines in the message, followed literally, number the folders as the model does."""
    trainer = trainer_for(["cat", "dog", "owl"])
    make_folder(tmp_path, ["owl", "dog"])
    with pytest.raises(HeadMismatchError, match=r"def find_classes(?s:.*)allow_empty") as caught:
        trainer.evaluate(ImageFolder(tmp_path))
    lines = str(caught.value).split("does:\n")[1].split("\nand pass")[0]
    scope = {"model": trainer.model, "torchvision": __import__("torchvision")}
    exec(lines, scope)
    known = scope["Known"](tmp_path, allow_empty=True)
    assert sorted({target for _, target in known}) == [1, 2]
    assert trainer.assess(known).classes == ("cat", "dog", "owl")


# ---- labels that are read


@pytest.mark.parametrize("stale", [[0] * 3, [1] * 24, "none"])
def test_labels_are_those_that_are_read(stale):
    """A list of targets of another length, or of other labels, beside the data set changes nothing."""
    images, targets = make_images()

    class Own(TensorDataset):
        pass

    data = Own(images, targets)
    data.targets = stale
    source = open_data(data, ["cat", "dog", "owl"])
    assert torch.equal(source.all_targets(), targets)


def test_balanced_weights_follow_filtered_samples(tmp_path):
    """An ImageFolder whose `.samples` were filtered is counted by them, without reading a file."""
    data = make_folder(tmp_path, ["a", "b"], count=4)
    data.samples = [sample for sample in data.samples if sample[1] == 1 or sample[0].endswith("0.png")]
    source = open_data(data, ["a", "b"])
    assert torch.bincount(source.all_targets()).tolist() == [1, 4]


def test_targets_of_finer_classes_are_not_used():
    """Fine labels that a base class left in `.targets` are no reason to refuse the coarse ones that are read."""

    class Coarse(Dataset):
        targets = [index % 20 for index in range(40)]  # noqa: RUF012

        def __len__(self):
            return 40

        def __getitem__(self, index):
            return Image.new("RGB", (32, 32), (6 * index, 0, 0)), self.targets[index] // 10

    trainer = trainer_for(["low", "high"])
    trainer.fit(Coarse(), epochs=1, validation_split=0.2, verbose=0)
    assert trainer.global_step == 1


class Named(Wrapper):
    """A data set of samples with names."""

    def __getitem__(self, index):
        image, target = self.whatever[index]
        return {"image": image, "label": target}


@pytest.mark.parametrize("label", [-1, -100, math.nan])
@pytest.mark.parametrize("form", ["tensors", "arrays", "columns", "pictures", "data set", "named samples"])
def test_an_unlabelled_image_is_called_that_and_the_advice_leaves_it_out(label, form):
    """A negative label, or a gap, stands for none, and the message says how to leave such images out of each type."""
    images, targets = make_images()[0], [label if index in (3, 7) else index % 3 for index in range(24)]
    if form in ("tensors", "arrays"):
        images, targets = (images, torch.tensor(targets)) if form == "tensors" else (images.numpy(), np.array(targets))
    elif form == "columns":
        targets = np.array(targets, type(label))[:, None]
    elif form == "pictures":
        images = [Image.new("RGB", (32 + index, 40)) for index in range(24)]
    data = (images, targets)
    if form in ("data set", "named samples"):
        rows = TensorDataset(images, torch.tensor(targets)) if label == -1 else Rows(list(zip(*data, strict=True)))
        data = rows if form == "data set" else Named(rows)
    trainer = trainer_for(["cat", "dog", "owl"])
    with pytest.raises(TargetError, match=rf"{label} at index 3\b.*unlabeled image: leave such images out") as caught:
        trainer.evaluate(data)
    scope = {"numpy": np, "images": images, "targets": targets, "data": data, "Subset": Subset}
    keep, pair, subset = re.search(
        r"(keep = .*); (\(\[.*\)). Of a Dataset: (Subset.*\]\)), ", str(caught.value)
    ).groups()
    if isinstance(data, tuple):
        exec(keep, scope)
        assert trainer.assess(eval(pair, scope)).targets.tolist() == [i % 3 for i in range(24) if i not in (3, 7)]
    else:
        few = eval(subset.replace("[1]", '["label"]') if form == "named samples" else subset, scope)
        assert trainer.assess(few).targets.tolist() == [i % 3 for i in range(24) if i not in (3, 7)]


# ---- the number of classes, where nothing is named


class Listing(Wrapper):
    """A data set with a list of its targets beside it."""

    @property
    def targets(self):
        return self.whatever.tensors[1]

    def __getitem__(self, index):
        return self.whatever[index]


HELD = {"pair": lambda *d: d, "data set": TensorDataset, "own data set": lambda *d: Listing(TensorDataset(*d))}
CALLS = [tk.fine_tune, tk.probe, tk.audit]


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "make", [lambda y: y[:, None], lambda y: y.to(torch.uint8), lambda y: torch.eye(3)[y].bfloat16()]
)
def test_targets_of_every_form_tell_their_number(call, held, make):
    """A column of indices, small integers and rows in bfloat16 give as many classes as they have, and are used."""
    images, targets = make_images(30)
    data = HELD[held](images, make(targets))
    assert find_classes(data, None) == ["0", "1", "2"]
    call(make_backbone(), data, device="cpu", verbose=0)


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (
            [8, 9, 10],
            r"the labels are of 3 classes \(8, 9, 10\), and none is 0: expected each of 0 to 10.*classes=.*11",
        ),
        ([1, 2, 3], r"the labels are of 3 classes \(1, 2, 3\), and none is 0"),
        ([0, 10**9, 1], r"the labels are of 3 classes \(0, 1, 1000000000\), and none is 2"),
        ([1, 1, 1], r"the labels are of 1 classes \(1\), and none is 0"),
    ],
)
def test_labels_with_gaps_make_no_classes(call, held, labels, match):
    """Numbers that no image has are no classes; numbering labels anew helps, and so does the number of classes."""
    images, targets = make_images(30)[0], torch.tensor(labels).repeat(10)
    with pytest.raises(TargetError, match=match) as caught:
        call(make_backbone(), HELD[held](images, targets), device="cpu", verbose=0)
    line = re.search(r"targets = (numpy.unique.*\[1\])", str(caught.value))[1]
    for given in (targets, targets.numpy(), targets.tolist()):
        again = eval(line, {"numpy": np, "targets": given})
        assert find_classes((images, again), None) == [*map(str, range(len(set(labels))))]
    assert find_classes(HELD[held](images, targets), 11) == [*map(str, range(11))]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("label", "match"),
    [
        (math.nan, r"nan at index 4: .*unlabeled"),
        (math.inf, r"inf at index 4"),
        (None, r"target None at index 4 is no number: .*Leave that image out"),
        (0.5, r"such as 0.5 at index 4: expected class indices"),
        (-1, r"target -1 at index 4 is out of range: .*unlabeled"),
        ([1, 2], "targets are not numbers of one shape"),
    ],
)
def test_labels_that_are_no_class_indices_are_named(call, label, match):
    """Where classes are counted, a gap in a column is refused as elsewhere, with its row."""
    images, targets = make_images(30)
    targets = [label if row == 4 else int(target) for row, target in enumerate(targets)]
    with pytest.raises(TargetError, match=match):
        call(make_backbone(), (images, targets), device="cpu", verbose=0)


@pytest.mark.parametrize("call", CALLS)
def test_iterators_are_called_that_where_classes_are_counted(call):
    """Images or targets that can be read once are not read, and the message says so."""
    images, targets = make_images()
    for data in ((images, iter(targets)), (iter(images), targets)):
        with pytest.raises(ArgumentError, match="an iterator, which can be read once"):
            call(make_backbone(), data, verbose=0)


def test_one_class_alone_is_refused():
    """Images of one class are refused by a sentence that is true where nobody passed classes."""
    for call in CALLS:
        with pytest.raises(ArgumentError, match=r"got 1 classes \(0\): expected 2 or more, with images of each"):
            call(make_backbone(), (make_images()[0], [0] * 24), verbose=0)
