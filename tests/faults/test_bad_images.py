"""Image files that are damaged, hostile or unusual, as users have them: made by Pillow, read from the disk."""

import io
import multiprocessing
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader, pil_loader

import transferkit as tk
from tiny import CLASSES, make_trainer
from transferkit.data.open import open_data
from transferkit.errors import ArgumentError, EmptyDataError, HeadMismatchError, ImageError, TargetError

ORIENTATION = 0x0112


def pixels(index, width=40, height=34):
    """A picture that no turning or mirroring leaves as it is."""
    noise = np.random.default_rng(index).integers(0, 120, (height, width, 3), dtype=np.uint8)
    noise[..., index % 3] += 120
    return noise


def picture(index, **size):
    return Image.fromarray(pixels(index, **size))


def make_folder(root, count=12, suffix="png", classes=CLASSES):
    """`count` files in the folders of the classes; `ImageFolder` lists them class by class."""
    for name in classes:
        (root / name).mkdir(parents=True)
    for index in range(count):
        picture(index).save(root / classes[index % len(classes)] / f"{index:03}.{suffix}")
    return root


class Files(Dataset):
    """A user's own data set, which opens files as most do, and lists them as torchvision does."""

    def __init__(self, folder, *, lazy=False):
        self.samples = ImageFolder(folder).samples
        self.targets = [target for _, target in self.samples]
        self.lazy = lazy

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, target = self.samples[index]
        if self.lazy:
            return Image.open(io.BytesIO(Path(path).read_bytes())), target
        with Image.open(path) as image:
            return image.convert("RGB"), target


KINDS = {
    "folder": ImageFolder,
    "own": Files,
    "own, lazy": lambda folder: Files(folder, lazy=True),
    "subset": lambda folder: Subset(ImageFolder(folder), range(12)),
}


def encoded(image, kind, **arguments):
    file = io.BytesIO()
    image.save(file, kind, **arguments)
    return file.getvalue()


def read_all(dataset, num_workers=0):
    """The images of a data set as the model would get them, before resizing."""
    source = open_data(dataset, CLASSES, num_workers=num_workers)
    found = []
    for images, _, _ in source.batches(4, seed=0, order=None):
        found += list(images)
    return found


def fit_error(model, dataset, **arguments):
    trainer = make_trainer(model)
    with pytest.raises(ImageError) as caught:
        trainer.fit(dataset, **{"epochs": 1, "batch_size": 4, "verbose": 0, **arguments})
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "photos")


# ---- files that cannot be used: an error with path and index


def half_jpeg(path):
    path.write_bytes(encoded(picture(0), "JPEG")[:900])


def jpeg_without_its_end(path):
    path.write_bytes(encoded(picture(0), "JPEG")[:-2])


def half_png(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def bits_flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


BREAKAGES = {
    "half a JPEG": half_jpeg,
    "JPEG without its last marker": jpeg_without_its_end,
    "half a PNG": half_png,
    "flipped bits": bits_flipped,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("404: not found\n" * 20),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_cannot_be_read_is_named_by_path_and_index(model, folder, kind, breakage):
    """Whatever is wrong with a file, one error has path, index, reason, what was expected and the remedy."""
    dataset = KINDS[kind](folder)
    listed = ImageFolder(folder).samples
    path = Path(listed[5][0])
    BREAKAGES[breakage](path)
    message = fit_error(model, dataset)
    assert message.startswith(f"cannot read image 5 ({path}): ")
    assert "Expected a complete image file" in message
    assert "on_bad_image" in message


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("BMP", {}),
        ("GIF", {}),
        ("WEBP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PPM", {}),
    ],
    ids=str,
)
def test_a_file_cut_short_anywhere_never_gives_other_pixels(folder, kind, arguments):
    """Cut at 40 places and at each of its last 14 bytes, a file is refused, or (an end mark alone) gives its pixels."""
    content = encoded(picture(0), kind, **arguments)
    dataset = ImageFolder(folder)
    path = Path(dataset.samples[0][0])
    path.write_bytes(content)
    samples = open_data(dataset, CLASSES).samples
    whole = samples.read(0, 0)[0]
    refused = 0
    for size in [*range(0, len(content) - 14, len(content) // 40), *range(len(content) - 14, len(content))]:
        path.write_bytes(content[:size])
        try:
            read = samples.read(0, 0)[0]
        except ImageError as error:
            named = str(path) in str(error)
            refused += named
        else:
            assert torch.equal(read, whole)
    assert refused >= 40


@pytest.mark.parametrize("kind", KINDS)
def test_a_guests_LOAD_TRUNCATED_IMAGES_does_not_hide_truncation(model, folder, kind, monkeypatch):
    """Set by another library, the switch that fills half an image with gray does not reach us, and stays as it was."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    dataset = KINDS[kind](folder)
    path = Path(dataset.dataset.samples[5][0] if kind == "subset" else dataset.samples[5][0])
    half_jpeg(path)
    assert Image.open(path).convert("RGB").size == (40, 34)  # Pillow itself does not object
    assert str(path) in fit_error(model, dataset)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    BREAKAGES["empty"](path)
    assert "image 5" in fit_error(model, dataset)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_truncation_is_seen_in_workers_too(model, folder, monkeypatch):
    """A worker does not inherit the guest's switch either."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    dataset = ImageFolder(folder)
    half_jpeg(Path(dataset.samples[5][0]))
    assert dataset.samples[5][0] in fit_error(model, dataset, num_workers=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("times", [1.5, 3])
def test_a_decompression_bomb_is_refused(model, folder, kind, times, monkeypatch):
    """More pixels than Pillow's limit are an error; Pillow itself only warns up to twice as many."""
    dataset = KINDS[kind](folder)
    path = Path(ImageFolder(folder).samples[5][0])
    picture(5, width=200, height=200).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(200 * 200 / times))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        message = fit_error(model, dataset)
    assert str(path) in message
    assert "image 5" in message
    assert "pixels" in message


@pytest.mark.parametrize("kind", KINDS)
def test_a_16_bit_gray_file_is_refused(model, folder, kind):
    """16-bit values, which Pillow's conversion cuts off at 255, are refused, also where the loader is torchvision's."""
    dataset = (Files(folder, lazy=True)) if kind.startswith("own") else KINDS[kind](folder)
    path = Path(ImageFolder(folder).samples[5][0])
    Image.fromarray((np.arange(34 * 40, dtype=np.uint16) * 40).reshape(34, 40)).save(path)
    message = fit_error(model, dataset)
    assert str(path) in message
    assert "image 5 has mode 'I;16': expected 8 bits" in message


@pytest.mark.parametrize("mode", ["F", "I"])
def test_a_tiff_of_32_bits_is_refused(model, folder, mode):
    """So are 32-bit files."""
    path = folder / "cat" / "000.png"
    path.unlink()
    Image.fromarray(np.full((34, 40), 1000, np.float32 if mode == "F" else np.int32)).save(path.with_suffix(".tiff"))
    assert f"has mode {mode!r}: expected 8 bits" in fit_error(model, ImageFolder(folder))


# ---- files that are converted


CONVERTED = {
    "CMYK": ("jpg", lambda image: image.convert("CMYK")),
    "RGBA": ("png", lambda image: image.convert("RGBA")),
    "palette": ("png", lambda image: image.convert("P")),
    "gray": ("png", lambda image: image.convert("L")),
    "gray and alpha": ("png", lambda image: image.convert("LA")),
    "one bit": ("png", lambda image: image.convert("1")),
    "YCbCr": ("jpg", lambda image: image.convert("YCbCr")),
    "1x1": ("png", lambda image: image.resize((1, 1))),
    "1000x1": ("png", lambda image: image.resize((1000, 1))),
}


@pytest.mark.parametrize("kind", ["folder", "own, lazy", "subset"])
def test_an_unusual_file_is_converted_to_rgb(model, folder, kind):
    """CMYK, RGBA, palette, gray, 1-bit and tiny files come out as Pillow's RGB conversion, and a run trains on them."""
    for (suffix, convert), (name, _) in zip(CONVERTED.values(), ImageFolder(folder).samples, strict=False):
        Path(name).unlink()
        convert(picture(5)).save(Path(name).with_suffix(f".{suffix}"))
    dataset = KINDS[kind](folder)
    for form, (path, _), image in zip(CONVERTED, ImageFolder(folder).samples, read_all(dataset), strict=False):
        with Image.open(path) as file:
            expected = torch.from_numpy(np.asarray(file.convert("RGB")).copy()).permute(2, 0, 1)
        assert torch.equal(image, expected), form
    trainer = make_trainer(model)
    trainer.fit(dataset, batch_size=4, verbose=0, epochs=1)
    assert trainer.global_step == 3
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_comes_out_upright(folder, kind, orientation):
    """All 8 EXIF orientations of a file give the picture that was taken; what a data set converted stays as it is."""
    upright = picture(5)
    way_back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that the camera's turn undoes
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(way_back[orientation]))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = ImageFolder(folder).samples[5][0]
    stored.save(path, exif=exif)
    if kind == "own" and orientation > 1:
        with pytest.warns(UserWarning, match="carry the EXIF orientation"):
            read, upright = read_all(KINDS[kind](folder))[5], stored
    else:
        read = read_all(KINDS[kind](folder))[5]
    assert torch.equal(read, torch.from_numpy(np.asarray(upright).copy()).permute(2, 0, 1))


def test_a_16_bit_colour_file_is_scaled(folder):
    """A file with 16 bits for each of three channels, which Pillow reads as eight, gives its high bytes."""
    samples = (torch.arange(3 * 34 * 40).reshape(3, 34, 40) * 16).to(torch.uint16)
    rows = samples.permute(1, 2, 0).numpy().astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    path = Path(ImageFolder(folder).samples[0][0])
    header = struct.pack(">IIBBBBB", 40, 34, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    )
    assert torch.equal(read_all(ImageFolder(folder))[0], (samples.int() >> 8).to(torch.uint8))


# ---- where it happens


def test_the_message_has_path_and_index_through_subsets_and_concatenations(folder, tmp_path):
    """The index is the one in the data that was passed, the path that of the file, however data sets are nested."""
    other = ImageFolder(make_folder(tmp_path / "more", count=6))
    path = other.samples[4][0]
    half_jpeg(Path(path))
    nested = Subset(ConcatDataset([ImageFolder(folder), Subset(other, [5, 4, 3])]), torch.tensor([0, 1, 13, 14]))
    nested.classes = CLASSES
    with pytest.raises(ImageError) as caught:
        read_all(nested)
    assert f"cannot read image 2 ({path}): " in str(caught.value)


class Oversampled(Dataset):
    """Its attributes have the names of a `Subset`'s and mean something else."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.indices = [1, 2]

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return self.dataset[self.indices[index % 2]]


def test_a_data_set_that_draws_its_images_itself_names_the_failure(folder):
    """A data set with attributes like a `Subset`'s, but more images than indices: the failure is told all the same."""
    inner = ImageFolder(folder)
    Path(inner.samples[2][0]).write_bytes(b"")
    with pytest.raises(ImageError, match=r"cannot read image 3.*UnidentifiedImageError"):
        open_data(Oversampled(inner), CLASSES).samples.read(3, 0)


class Odd(Dataset):
    """Likewise a `ConcatDataset`'s, and an `ImageFolder`'s."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __len__(self):
        return 10

    def __getitem__(self, index):
        raise OSError("no such picture")


@pytest.mark.parametrize(
    "attributes",
    [
        {"dataset": [1], "indices": [1, 2]},
        {"dataset": [1], "indices": {"train": 1}},
        {"dataset": [1], "indices": lambda index: index},
        {"datasets": [[1]], "cumulative_sizes": [3]},
        {"datasets": [[1]], "cumulative_sizes": None},
        {"samples": [(1, 2)] * 10},
        {"samples": 5},
        {"imgs": [None] * 10},
        {"samples": [()] * 10},
    ],
    ids=" ".join,
)
def test_attributes_that_only_look_known_do_not_hide_the_failure(attributes):
    """A data set of one's own whose attributes are named like torch's but mean something else: the failure is told."""
    with pytest.raises(ImageError, match=r"cannot read image 0: OSError: no such picture\. Expected"):
        read_all(Odd(**attributes))


def test_the_message_is_the_same_with_and_without_workers(model, folder):
    """Two workers give the very message that this process gives, in one line, without a worker's traceback."""
    dataset = ImageFolder(folder)
    half_jpeg(Path(dataset.samples[5][0]))
    messages = {fit_error(model, dataset, num_workers=num_workers) for num_workers in (0, 2)}
    assert len(messages) == 1
    message = messages.pop()
    assert "\n" not in message
    assert "Traceback" not in message
    assert "worker" not in message


@pytest.mark.parametrize("error", [ValueError("bad header"), KeyError("label"), MemoryError(), RecursionError("deep")])
def test_whatever_a_data_set_raises_becomes_one_error(model, error):
    """Any exception of a data set is an `ImageError` with its kind and text, and the exception as its cause."""

    class Raises(Odd):
        def __getitem__(self, index):
            if index == 7:
                raise error
            return pixels(index), 0

    for num_workers in (0, 1):
        trainer = make_trainer(model)
        with pytest.raises(ImageError, match=rf"cannot read image 7: {type(error).__name__}") as caught:
            trainer.fit(Raises(), batch_size=4, verbose=0, num_workers=num_workers, epochs=1)
        if num_workers == 0:
            assert caught.value.__cause__ is error


def test_an_image_that_fails_in_the_second_epoch_ends_the_run_with_a_checkpoint(make_backbone, folder, tmp_path):
    """The error names the image, the state was saved where it stood, and the run is resumed to the same weights."""

    def train(dataset, callbacks=(), resume_from=None):
        torch.manual_seed(3)
        model = tk.attach_head(make_backbone(), CLASSES)
        trainer = make_trainer(model)
        trainer.fit(dataset, epochs=3, batch_size=2, verbose=0, callbacks=callbacks, resume_from=resume_from)
        return model.state_dict()

    broken = ImageFolder(folder)
    path = Path(broken.samples[3][0])
    content = path.read_bytes()
    expected = train(broken)

    def break_after_first_epoch(trainer, report):
        if report.epoch == 0:
            path.write_bytes(b"")

    with pytest.raises(ImageError, match=r"cannot read image 3 ") as caught:
        train(broken, callbacks=[break_after_first_epoch, tk.Checkpoint(tmp_path / "run")])
    assert str(path) in str(caught.value)
    saved = sorted(path.name for path in (tmp_path / "run").glob("step-*.pt"))
    assert saved[-1] >= "step-00000006.pt"  # of 6 steps an epoch
    path.write_bytes(content)
    resumed = train(ImageFolder(folder), callbacks=[tk.Checkpoint(tmp_path / "run")], resume_from=tmp_path / "run")
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())


def test_no_worker_outlives_a_bad_image_while_its_error_is_kept(model, folder):
    """A notebook keeps the last error: the workers are gone all the same."""
    dataset = ImageFolder(folder)
    half_jpeg(Path(dataset.samples[5][0]))
    trainer = make_trainer(model)
    with pytest.raises(ImageError) as caught:
        trainer.fit(dataset, batch_size=2, verbose=0, num_workers=1, epochs=1)
    assert multiprocessing.active_children() == []
    assert caught.value is not None


# ---- on_bad_image="skip"


def fit_lines(capsys, model, dataset, **arguments):
    """Train with "skip" and return the trainer and the lines that were printed."""
    trainer = make_trainer(model, **arguments.pop("trainer", {}))
    trainer.fit(dataset, **{"epochs": 1, "on_bad_image": "skip", "batch_size": 4, **arguments})
    return trainer, capsys.readouterr().out.splitlines()


def without(dataset, *places):
    """What the data set would be if these were not in it."""
    return Subset(dataset, [place for place in range(len(dataset)) if place not in places])


@pytest.mark.parametrize("place", [0, 5, 11], ids=["first", "middle", "last"])
@pytest.mark.parametrize("frozen", [None, "head"], ids=["images", "kept features"])
def test_a_run_that_skips_is_a_run_without_the_image(make_backbone, folder, capsys, place, frozen):
    """The weights are those of training on the data set without the bad image, wherever it is; a line names it."""
    trained = []
    for skip in (False, True):
        dataset = ImageFolder(folder)
        good = Path(dataset.samples[place][0]).read_bytes()
        if skip:
            Path(dataset.samples[place][0]).write_bytes(good[:200])
        torch.manual_seed(3)
        model = tk.attach_head(tk.freeze_until(make_backbone(), frozen), CLASSES)
        data = dataset if skip else without(dataset, place)
        trainer, lines = fit_lines(capsys, model, data, epochs=2)
        assert trainer.global_step == 2 * 3  # 11 images in batches of 4
        named = [line for line in lines if "left out" in line]
        assert len(named) == skip
        if skip:
            assert dataset.samples[place][0] in named[0]
            assert f"image {place} " in named[0]
            if frozen:
                assert any("features of 11 images: computed" in line for line in lines)
        trained.append(model.state_dict())
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_what_is_said_of_a_skipped_image_does_not_ask_for_what_was_done(model, capsys):
    """Neither the line nor the error of a run that skips tells the user to pass on_bad_image="skip"."""
    _, lines = fit_lines(capsys, model, Counted(120, [17]))
    assert not [line for line in lines if "pass on_bad" in line]
    with pytest.raises(ImageError) as caught:
        make_trainer(model).fit(Counted(120, [17, 18]), on_bad_image="skip", verbose=0, epochs=1)
    assert "pass on_bad" not in str(caught.value)


@pytest.mark.parametrize("place", [0, 5])
def test_a_run_that_skips_is_resumed_to_the_same_weights(make_backbone, folder, tmp_path, place):
    """A stop in the middle of an epoch and a resume give the weights of the run that did not stop."""
    dataset = ImageFolder(folder)
    Path(dataset.samples[place][0]).write_bytes(b"")

    def train(stop_at=None, **arguments):
        torch.manual_seed(3)
        model = tk.attach_head(make_backbone(), CLASSES)
        trainer = make_trainer(model)

        class Stops(tk.Checkpoint):
            def after_step(self, trainer):
                if trainer.global_step == stop_at:
                    raise RuntimeError("stopped")

        folder_of_run = tmp_path / f"run{place}"
        callbacks = [Stops(folder_of_run)] if stop_at or arguments else []
        trainer.fit(dataset, epochs=3, batch_size=4, on_bad_image="skip", verbose=0, callbacks=callbacks, **arguments)
        assert trainer.global_step == 9
        return model.state_dict()

    expected = train()
    with pytest.raises(RuntimeError, match="stopped"):
        train(stop_at=5)
    resumed = train(resume_from=tmp_path / f"run{place}")
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())


def test_validation_images_are_skipped_too(model, folder, tmp_path, capsys):
    """A bad validation image is left out with a line, and the measure is that of the others."""
    validation = ImageFolder(make_folder(tmp_path / "val", count=7))
    Path(validation.samples[3][0]).write_bytes(b"")
    trainer, lines = fit_lines(capsys, model, ImageFolder(folder), validation_data=validation)
    assert [validation.samples[3][0] in line for line in lines if "left out" in line] == [True]
    expected = trainer.evaluate(without(validation, 3))
    assert f"{expected['accuracy']:.3f}"[:4] in " ".join(lines[-2:])


def test_a_share_is_held_back_from_the_good_images(model, folder, capsys):
    """`validation_split` divides what can be used."""
    dataset = ImageFolder(folder)
    Path(dataset.samples[0][0]).write_bytes(b"")
    trainer, _ = fit_lines(capsys, model, dataset, validation_split=3 / 11, batch_size=2)
    assert trainer.global_step == 4  # 8 of 11


class Counted(Dataset):
    """Of many small images some are bad; counts how often each is read."""

    def __init__(self, count, bad):
        self.images = torch.randint(0, 255, (count, 3, 32, 32), dtype=torch.uint8)
        self.bad = set(bad)
        self.reads = []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.reads.append(index)
        if index in self.bad:
            raise OSError(f"picture {index} is bad")
        return self.images[index], index % 3


def test_one_in_a_hundred_may_be_bad_and_no_more(model, capsys):
    """2 of 200 are left out, each with its line; 3 of 200 end the run, and all are named."""
    _, lines = fit_lines(capsys, model, Counted(200, [17, 150]), batch_size=50)
    assert [("image 17:" in line, "image 150:" in line) for line in lines if "left out" in line] == [
        (True, False),
        (False, True),
    ]
    trainer = make_trainer(model)
    with pytest.raises(
        ImageError, match=r"3 of the first 200 images .* at most 1% of all 200(?s:.*)17 is bad(?s:.*)150"
    ):
        trainer.fit(Counted(200, [17, 100, 150]), on_bad_image="skip", verbose=0, epochs=1)
    assert trainer.global_step == 0


def test_one_image_may_always_be_bad_and_two_of_few_not(model, capsys):
    """In a small data set one image may be bad."""
    trainer, _ = fit_lines(capsys, model, Counted(5, [2]))
    assert trainer.global_step == 1
    with pytest.raises(ImageError, match=r"2 of the first 5 images"):
        trainer.fit(Counted(5, [2, 4]), on_bad_image="skip", verbose=0, epochs=1)


@pytest.mark.parametrize("count", [1, 40])
def test_data_without_a_good_image_is_refused(model, count):
    """Where every image is bad nothing is trained and an error says so."""
    trainer = make_trainer(model)
    with pytest.raises((ImageError, EmptyDataError), match="picture 0 is bad"):
        trainer.fit(Counted(count, range(count)), on_bad_image="skip", verbose=0, epochs=1)
    assert trainer.global_step == 0


def test_a_bad_image_is_read_once_and_never_again(model):
    """Only the look before the run touches the bad image; the others are measured, then read once an epoch."""
    dataset = Counted(120, [40])
    make_trainer(model).fit(dataset, epochs=3, batch_size=40, on_bad_image="skip", verbose=0)
    assert dataset.reads.count(40) == 1
    assert dataset.reads.count(41) == 1 + 1 + 3


def test_skipping_with_workers_gives_the_same_weights(make_backbone, folder, capsys):
    """`num_workers` changes neither what is left out nor a bit of the weights."""
    dataset = ImageFolder(folder)
    Path(dataset.samples[5][0]).write_bytes(b"")
    trained = []
    for num_workers in (0, 2):
        torch.manual_seed(3)
        model = tk.attach_head(make_backbone(), CLASSES)
        _, lines = fit_lines(capsys, model, dataset, num_workers=num_workers)
        trained.append((model.state_dict(), [line for line in lines if "left out" in line]))
    assert trained[0][1] == trained[1][1] != []
    assert all(torch.equal(value, trained[1][0][name]) for name, value in trained[0][0].items())


def test_another_bad_image_on_resuming_is_noticed(make_backbone, tmp_path):
    """A run that left out image 30 is not resumed leaving out image 50: its batches would be others."""

    def train(bad, **arguments):
        dataset = Counted.__new__(Counted)
        dataset.images, dataset.bad, dataset.reads = images, {bad}, []
        torch.manual_seed(3)
        trainer = make_trainer(tk.attach_head(make_backbone(), CLASSES))
        trainer.fit(dataset, **{"epochs": 1, **arguments}, batch_size=60, on_bad_image="skip", verbose=0)

    images = torch.randint(0, 255, (120, 3, 32, 32), dtype=torch.uint8)
    train(30, callbacks=[tk.Checkpoint(tmp_path / "run")])
    with pytest.raises(tk.TransferKitError, match="data"):
        train(50, epochs=2, resume_from=tmp_path / "run")


def test_skipping_does_not_reach_a_loader(model, data):
    """A `DataLoader` reads images itself: it is refused with what to pass instead, before a step."""
    trainer = make_trainer(model)
    loader = DataLoader(TensorDataset(*data), batch_size=8, shuffle=True)
    for arguments in ({"data": loader}, {"data": data, "validation_data": loader}):
        with pytest.raises(ArgumentError, match=r'on_bad_image="skip" does not work with a DataLoader.*its Dataset'):
            trainer.fit(arguments.pop("data"), epochs=1, on_bad_image="skip", verbose=0, **arguments)
    assert trainer.global_step == 0


@pytest.mark.parametrize("policy", ["ignore", None, True])
def test_an_unknown_policy_is_refused(model, data, policy):
    """What is done with bad images is "raise" or "skip"."""
    with pytest.raises(ArgumentError, match=r"on_bad_image=.* is not known.*'raise'"):
        make_trainer(model).fit(data, on_bad_image=policy, verbose=0, epochs=1)


def test_images_in_memory_are_not_looked_through(make_backbone, data):
    """For tensors "skip" changes nothing."""
    trained = []
    for policy in ("raise", "skip"):
        torch.manual_seed(3)
        model = tk.attach_head(make_backbone(), CLASSES)
        make_trainer(model).fit(data, on_bad_image=policy, batch_size=8, verbose=0, epochs=1)
        trained.append(model.state_dict())
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


@pytest.mark.parametrize("method", ["predict", "predict_proba", "evaluate"])
def test_predictions_never_skip(model, folder, method):
    """A prediction has a row for each image: a bad one is an error, in the middle as in front."""
    dataset = ImageFolder(folder)
    Path(dataset.samples[5][0]).write_bytes(b"")
    with pytest.raises(ImageError, match=r"cannot read image 5 ") as caught:
        getattr(make_trainer(model), method)(dataset, batch_size=4)
    assert "(on_bad_image" in str(caught.value)


# ---- labels (case 38)


@pytest.mark.parametrize("num_classes", [CLASSES, 3], ids=["named", "numbered"])
@pytest.mark.parametrize("wrap", ["plain", "subset", "loader", "concatenation"])
def test_folders_whose_classes_differ_are_refused(backbone, folder, tmp_path, num_classes, wrap):
    """Folders to validate on with other classes would shift every label: refused, also by a model of numbers."""
    other = ImageFolder(make_folder(tmp_path / "val", classes=["cat", "fox", "owl"]))
    wrapped = {
        "plain": other,
        "subset": Subset(other, [0, 1, 2]),
        "loader": DataLoader(other, batch_size=2, collate_fn=list),
        "concatenation": ConcatDataset([other, other]),
    }[wrap]
    trainer = make_trainer(tk.attach_head(backbone, num_classes))
    with pytest.raises(HeadMismatchError, match=r"cat, fox, owl") as caught:
        trainer.fit(ImageFolder(folder), validation_data=wrapped, verbose=0, epochs=1)
    assert "cat, dog, owl" in str(caught.value)
    assert trainer.global_step == 0


def test_a_folder_to_validate_on_that_lacks_a_class_is_refused(backbone, folder, tmp_path):
    """torchvision numbers what it finds: without "cat", "dog" would be 0 there and 1 in training."""
    shutil.copytree(folder, tmp_path / "val")
    shutil.rmtree(tmp_path / "val" / "cat")
    trainer = make_trainer(tk.attach_head(backbone, 3))
    with pytest.raises(HeadMismatchError, match=r"3"):
        trainer.fit(ImageFolder(folder), validation_data=ImageFolder(tmp_path / "val"), verbose=0, epochs=1)
    assert trainer.global_step == 0


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("target", [3, -1, -100, 0.5])
def test_a_bad_label_is_named_before_it_reaches_the_loss(model, num_workers, target):
    """A label that only shows when its sample is read: index and value are named, nothing became NaN."""

    class Labels(Odd):
        def __getitem__(self, index):
            return pixels(index), target if index == 7 else index % 3

    trainer = make_trainer(model)
    with pytest.raises(TargetError, match=rf"{target}|7"):
        trainer.fit(Labels(), batch_size=4, num_workers=num_workers, verbose=0, epochs=1)
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


# ---- channels in another order


def bgr(path):
    """What `cv2.imread` returns."""
    return np.asarray(Image.open(path).convert("RGB"))[..., ::-1]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_loader_of_arrays_is_warned_of(folder, wrapped):
    """Nobody sees BGR in an array, so a warning says what an own loader must give; the corrected loader is right."""
    dataset = ImageFolder(folder, loader=bgr)
    with pytest.warns(UserWarning, match=r"cannot be seen.*cv2\.imread gives BGR"):
        read_all(Subset(dataset, range(12)) if wrapped else dataset)
    corrected = ImageFolder(folder, loader=lambda path: bgr(path)[..., ::-1])
    with pytest.warns(UserWarning, match="cannot be seen"):
        assert torch.equal(read_all(corrected)[5], read_all(ImageFolder(folder))[5])


@pytest.mark.parametrize("loader", [default_loader, pil_loader, lambda path: Image.open(path).convert("RGB")])
def test_a_loader_of_pil_images_is_not_warned_of(folder, loader):
    """PIL images name their channels."""
    assert len(read_all(ImageFolder(folder, loader=loader))) == 12


# ---- forms that a data set may give (cases 39 and 40)


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (torch.zeros(1, 32, 32, dtype=torch.uint8), r"image 5.*Write: image = image\.repeat_interleave\(3, dim=-3\)"),
        (torch.zeros(4, 32, 32, dtype=torch.uint8), r"image 5.*Write: image = 255 - .*image\[\.\.\., :3, :, :\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"image 5.*shape \(1, 3, 32, 32\)"),
        (torch.zeros(3, 32, 0, dtype=torch.uint8), r"image 5.*shape \(3, 32, 0\)"),
        (np.zeros((32, 32, 3), np.int64), r"image 5.*astype\('uint8'\)"),
        (None, r"image 5.*NoneType"),
        (b"\xff\xd8", r"image 5.*cannot identify"),
    ],
    ids=["gray", "alpha", "batch of one", "no pixels", "int64", "None", "bytes"],
)
def test_an_image_of_another_form_is_named(model, image, match):
    """What a data set gives for one image is refused with its index, what was got and the fix."""

    class Forms(Odd):
        def __getitem__(self, index):
            return (image if index == 5 else pixels(index)), 0

    assert fit_error(model, Forms()) != ""
    with pytest.raises(ImageError, match=match):
        read_all(Forms())


def test_a_data_set_that_is_empty_in_the_second_epoch_only(flat_model, data):
    """A loader that makes no batch in its second epoch is an error then, and says so."""

    class Once(torch.utils.data.IterableDataset):
        rounds = 0

        def __iter__(self):
            self.rounds += 1
            return iter(zip(*data, strict=True) if self.rounds == 1 else ())

    trainer = make_trainer(flat_model)
    with pytest.raises(EmptyDataError, match=r"made no batch in this epoch"):
        trainer.fit(DataLoader(Once(), batch_size=8), epochs=2, verbose=0)
    assert trainer.global_step == 3
