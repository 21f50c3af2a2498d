"""The cache in a folder: what one run wrote serves another, in parts too, and what is bad is computed anew, alone."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cached import assert_same_run, changed, fit, lines_of, make_model, make_trainer, through_the_whole_model, total
from transferkit.errors import CacheError
from transferkit.features import cache as cache_module
from transferkit.features.file import write_features

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def trainers(make_backbone, tmp_path):
    """A maker of two trainers of equal models: one with files in a folder, one through the whole model."""

    def make(folder=tmp_path / "cache", boundary="head"):
        one, whole = (make_trainer(make_model(make_backbone, boundary), folder=place) for place in (folder, None))
        return [one, through_the_whole_model(whole)]

    return make


@pytest.fixture
def small_chunks(monkeypatch):
    """Files of 8 images, computed 4 at once."""
    monkeypatch.setattr(cache_module, "CHUNK_IMAGES", 8)
    monkeypatch.setattr("transferkit.features.prefix._PIXELS_ON_CPU", 4 * 32 * 32)


def files(folder):
    return sorted(folder.glob("*.features"))


def passed_over(capsys):
    return [line for line in lines_of(capsys) if "skipped a feature file" in line]


# ---- what one wrote serves another


def test_a_second_trainer_computes_nothing(trainers, data, tmp_path, images_seen):
    """Another trainer with the same folder computes nothing and trains the same."""
    validation = (255 - data[0], data[1])
    fit(trainers()[0], data, validation_data=validation)
    assert len(files(tmp_path / "cache")) == len(list((tmp_path / "cache").iterdir())) == 2
    images_seen.clear()
    assert_same_run(trainers(), data, validation_data=validation)
    assert images_seen == []


def test_a_shallower_boundary_serves_a_deeper_one(trainers, data, images_seen):
    """A trainer with a deeper boundary starts from another one's files."""
    fit(trainers(boundary="block3")[0], data)
    images_seen.clear()
    assert_same_run(trainers(), data)
    assert images_seen == [(24, 6)]


@pytest.mark.usefixtures("small_chunks")
def test_many_files_are_one_cache(trainers, data, tmp_path, images_seen):
    """Features in several files train the same, in the run that writes them and in the next one."""
    assert_same_run(trainers(), data)
    assert len(files(tmp_path / "cache")) == 3
    images_seen.clear()
    assert_same_run(trainers(), (data[0].flip(0), data[1]))
    assert images_seen == []


@pytest.mark.usefixtures("small_chunks")
def test_parts_of_two_processes_serve_one(trainers, data, tmp_path, images_seen):
    """Processes that each filled a part, in folders of their own or in one, leave what one process would have."""
    fit(trainers(tmp_path / "alone")[0], data)
    for part in (0, 1):
        rows = torch.cat([torch.arange(8) + 8 * chunk for chunk in range(part, 3, 2)])
        fit(trainers(tmp_path / str(part))[0], (data[0][rows], data[1][rows]))
    (tmp_path / "both").mkdir()
    for path in (*files(tmp_path / "0"), *files(tmp_path / "1")):
        shutil.copy(path, tmp_path / "both")
    assert [path.name for path in files(tmp_path / "both")] == [path.name for path in files(tmp_path / "alone")]
    images_seen.clear()
    assert_same_run(trainers(tmp_path / "both"), data)
    assert images_seen == []
    fit(trainers(tmp_path / "alone")[0], (data[0][8:16], data[1][8:16]))  # and the reverse
    assert images_seen == []


SECOND_PROCESS = """
import sys
import torch
from torchvision.models.vgg import make_layers
import transferkit as tk
from cached import fit, make_trainer
from transferkit.features.prefix import Prefix
from transferkit.data.preprocessing import CONVENTIONS

torch.set_num_threads(1)
folder = sys.argv[1]
state = torch.load(f"{folder}/start.pt")
call, seen = Prefix.__call__, []

def counted(self, inputs, *, first=0):
    seen.extend([first] * len(inputs))
    return call(self, inputs, first=first)

Prefix.__call__ = counted
features = make_layers([4, "M", 4, "M", 8, "M", 8, "M", 8, "M"])
backbone = tk.Backbone("tiny", features, CONVENTIONS["IMAGENET1K_V1"].with_image_size(32))
model = tk.attach_head(backbone, ["cat", "dog", "owl"], hidden=(16,), dropout=0.5)
model.load_state_dict(state["model"])
fit(make_trainer(tk.freeze_until(model, "head"), folder=f"{folder}/features"), state["data"])
torch.save(model.state_dict(), f"{folder}/end.pt")
print(len(seen))
"""


@pytest.mark.slow
def test_a_second_process_computes_nothing(make_backbone, data, tmp_path):
    """Another process with the same folder computes nothing and ends with the same weights."""
    model = make_model(make_backbone)
    torch.save({"model": model.state_dict(), "data": data}, tmp_path / "start.pt")
    fit(make_trainer(model, folder=tmp_path / "features"), data)
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.run(
        [sys.executable, "-c", SECOND_PROCESS, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdout == "0\n"
    assert changed(torch.load(tmp_path / "end.pt"), model) == set()


# ---- files that cannot be used


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path):
    path.write_bytes(b"")


def flipped(place):
    def flip(path):
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)

    return flip


DAMAGES = {
    "cut short": cut_short,
    "emptied": emptied,
    "bit of the features": flipped(4097),
    "bit of the first page": flipped(100),
    "bit of an image's digest": flipped(-1),
}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_told_and_computed_anew_alone(trainers, data, tmp_path, capsys, images_seen, damage):
    """Of several files a damaged one is passed over with a line, and its images alone are computed again."""
    fit(trainers()[0], data)
    path = files(tmp_path / "cache")[1]
    good = path.read_bytes()
    DAMAGES[damage](path)
    images_seen.clear()
    assert_same_run(trainers(), data, verbose=2)
    (line,) = passed_over(capsys)
    assert str(path) in line
    assert total(images_seen) == 8
    assert path.read_bytes() == good
    assert len(files(tmp_path / "cache")) == 3


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((24, 2, 2, 2), "bfloat16"), ((24, 1, 1, 9), "bfloat16"), ((24, 8), "bfloat16"), ((24, 1, 1, 4), "float32")],
    ids=str,
)
def test_planted_features_of_another_shape_are_refused(trainers, data, tmp_path, capsys, shape, dtype):
    """A file of the right name, layers and images, whose features have another shape or dtype, is computed anew."""
    trainer = trainers()[0]
    fit(trainer, data)
    (path,) = files(tmp_path / "cache")
    good = path.read_bytes()
    (chunk,) = trainer.training.features.chunks
    write_features(path.parent, chunk.layers, chunk.images, torch.ones(shape, dtype=getattr(torch, dtype)))
    assert path.read_bytes() != good
    assert files(tmp_path / "cache") == [path]
    assert_same_run(trainers(), data, verbose=2)
    (line,) = passed_over(capsys)
    assert "expected" in line
    assert path.read_bytes() == good


def test_a_file_of_an_earlier_version_is_told(trainers, data, tmp_path, capsys):
    """A file under a name of the first format is passed over with a line, and stays."""
    (tmp_path / "cache").mkdir()
    old = tmp_path / "cache" / f"{'0' * 32}.features"
    old.write_bytes(b"old")
    assert_same_run(trainers(), data, verbose=2)
    assert str(old) in passed_over(capsys)[0]
    assert old.read_bytes() == b"old"


def test_a_directory_in_a_files_place(trainers, data, tmp_path, capsys):
    """A directory under a file's name is told, and the run goes on in memory."""
    fit(trainers()[0], data)
    (path,) = files(tmp_path / "cache")
    path.unlink()
    path.mkdir()
    assert_same_run(trainers(), data, verbose=2)
    assert sum(str(path) in line for line in lines_of(capsys)) == 2  # when it is read and when it is written


# ---- folders that cannot be written


@contextmanager
def ordinary_user():
    """The superuser may write anywhere: be somebody else."""
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)


def test_a_read_only_folder(trainers, data, capsys):
    """With a folder that cannot be written the run goes on in memory, and one line says so."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        with ordinary_user():
            assert_same_run(trainers(name), data, verbose=2)
        (line,) = [line for line in lines_of(capsys) if "not cached in a file" in line]
        assert name in line
        assert list(Path(name).iterdir()) == []


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("room_for", [0, 1])
def test_a_full_disk(trainers, data, tmp_path, capsys, monkeypatch, images_seen, room_for):
    """When the disk has no room for another file the run goes on in memory, says so once, computes nothing twice."""
    free = lambda _: Usage(0, 0, 10**9 if len(files(tmp_path / "cache")) < room_for else 10)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", free)
    assert_same_run(trainers(), data, verbose=2)
    lines = lines_of(capsys)
    (line,) = [line for line in lines if "not cached in a file" in line]
    assert str(tmp_path) in line
    assert len(files(tmp_path / "cache")) == len(list((tmp_path / "cache").iterdir())) == room_for
    assert total(images_seen) == 24
    told = next(line for line in lines if "features of 24 images: computed" in line)
    assert "memory of cpu" in told
    assert (str(tmp_path) in told) == bool(room_for)


def test_a_folder_that_cannot_be_used_is_refused(make_backbone, tmp_path):
    """A path that is a file is refused when the trainer is made."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cache="):
        make_trainer(make_model(make_backbone), folder=tmp_path / "file")
