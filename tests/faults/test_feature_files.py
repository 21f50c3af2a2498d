"""Files of features under flipped bits, kills, full disks and company: whole and right, or not used."""

import hashlib
import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch
from torch.utils.data import Dataset

import transferkit as tk
from cached import CLASSES, make_trainer
from transferkit.errors import CacheError
from transferkit.features import cache as cache_module
from transferkit.features.file import open_features, write_features

LAYERS = hashlib.sha256(b"one").hexdigest()
IMAGES = [hashlib.sha256(bytes([number])).digest()[:16] for number in range(40)]


def write(folder, features, layers=LAYERS):
    return write_features(folder, layers, IMAGES, features).path


def read(path):
    return open_features(path, layers=LAYERS, shape=(2, 2, 32), dtype=torch.bfloat16).read()


@pytest.fixture
def features():
    return torch.rand(40, 2, 2, 32).bfloat16()


@pytest.fixture
def train(make_backbone, data, capsys):
    """Train a head on cached features; return its weights, the lines printed and the trainer."""

    def train(folder, data=data, **arguments):
        torch.manual_seed(3)
        model = tk.attach_head(tk.freeze_until(make_backbone(), "head"), CLASSES)
        trainer = make_trainer(model, precision="fp32", seed=1, folder=folder)
        trainer.fit(data, epochs=2, batch_size=8, **arguments)
        return model.state_dict(), capsys.readouterr().out.splitlines(), trainer

    return train


def assert_same(one, other):
    assert list(one) == list(other)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def the_file(folder):
    (path,) = folder.glob("*.features")
    return path


# ---- a file that somebody writes to while it is mapped


def overwrite(path):
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\x00\x00\x80\x3f" * ((path.stat().st_size - 4096) // 4))


def cut_short(path):
    os.truncate(path, 4096)


def copy_over(path):
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes()[:4096] + bytes(path.stat().st_size - 4096))
    shutil.copyfile(other, path)
    other.unlink()


def touch(path):
    os.utime(path)


HARM = [overwrite, cut_short, copy_over, touch]


@pytest.mark.parametrize("harm", HARM)
def test_a_mapped_file_that_changes_between_two_fits_is_verified_anew(tmp_path, make_backbone, data, harm):
    """A trainer that has a file mapped does not train on what was written to it since, and does not die of it."""
    weights = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        torch.manual_seed(3)
        model = tk.attach_head(tk.freeze_until(make_backbone(), "head"), CLASSES)
        trainer = make_trainer(model, precision="fp32", seed=1, folder=folder)
        trainer.fit(data, epochs=1, batch_size=8, verbose=0)
        if folder.name == "b":
            harm(the_file(folder))
        trainer.fit(data, epochs=1, batch_size=8, verbose=0)
        weights.append(model.state_dict())
    assert_same(*weights)


@pytest.mark.parametrize("harm", HARM)
def test_a_mapped_file_that_changes_between_two_epochs_is_verified_anew(tmp_path, train, harm):
    """The same within a run: damaged features are computed anew before the next epoch."""
    expected = train(tmp_path / "a")[0]
    weights = train(tmp_path / "b", callbacks=[lambda *_: harm(the_file(tmp_path / "b"))])[0]
    assert_same(weights, expected)


@pytest.mark.parametrize("harm", HARM[:3])
def test_a_mapped_file_that_changes_within_an_epoch_ends_it(tmp_path, make_backbone, data, harm):
    """Between two steps there is no going back: an error names the file before a batch is read from it."""
    model = tk.attach_head(tk.freeze_until(make_backbone(), "head"), CLASSES)
    trainer = make_trainer(model, precision="fp32", folder=tmp_path)
    steps = trainer.steps(data, batch_size=4)
    next(steps)
    harm(the_file(tmp_path))
    with pytest.raises(CacheError, match=r"another program wrote to .*\.features while its features were used"):
        list(steps)


def test_a_solved_head_reads_no_changed_file(tmp_path, make_backbone, data):
    """A FeatureDataset, and whatever reads cached features, looks at the files before each batch."""
    model = tk.freeze_until(tk.attach_head(make_backbone(), CLASSES), "head")
    features = tk.cache_features(model, data, cache=tmp_path, device="cpu", precision="fp32")
    assert features[3][0].shape == (8, 1, 1) or features[3][0].numel() > 0
    overwrite(the_file(tmp_path))
    with pytest.raises(CacheError, match="another program wrote to"):
        features[3]


@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_a_mapped_file_that_is_deleted_or_replaced_serves_on(tmp_path, train, change):
    """Neither changes a byte of what is mapped: nothing is computed anew."""

    def harm(*_):
        path = the_file(tmp_path)
        other = path.with_suffix(".other")
        shutil.copyfile(path, other)
        other.replace(path) if change == "replaced" else path.unlink()
        other.unlink(missing_ok=True)

    _, lines, _ = train(tmp_path, callbacks=[lambda trainer, report: harm() if report.epoch == 0 else None])
    assert len([line for line in lines if "computed" in line]) == 1


def test_a_pipe_among_the_files_is_passed_over(tmp_path, train):
    """A pipe with the name of a file of features is not opened for ever."""
    train(tmp_path)
    path = the_file(tmp_path)
    path.unlink()
    os.mkfifo(path)
    _, lines, _ = train(tmp_path)
    assert any("skipped a feature file" in line and "a pipe or device" in line for line in lines)


@pytest.mark.parametrize("change", ["more images", "fewer images", "another shape", "another dtype"])
def test_planted_features_of_another_shape_are_passed_over(tmp_path, train, change):
    """A file under the right name, with right checksums, that holds other numbers than the layers give is not used."""
    expected = train(tmp_path / "a")[0]
    train(tmp_path / "b")
    path = the_file(tmp_path / "b")
    page = json.loads(path.read_bytes()[65:4096])
    count, *shape = page["shape"]
    planted = {
        "more images": torch.ones(count + 1, *shape),
        "fewer images": torch.ones(count - 14, *shape),
        "another shape": torch.ones(count, *shape[:-1], shape[-1] // 2),
        "another dtype": torch.ones(count, *shape).double(),
    }[change]
    images = [path.read_bytes()[-16 * count :][16 * row : 16 * row + 16] for row in range(count)][: len(planted)]
    images += [bytes(16)] * (len(planted) - len(images))
    path.unlink()
    write_features(tmp_path / "b", page["layers"], images, planted)
    weights, lines, _ = train(tmp_path / "b")
    if change in ("more images", "fewer images"):  # whoever can write there can plant features: SECURITY.md
        assert len(weights) == len(expected)
    else:
        assert any("skipped a feature file" in line for line in lines)
        assert_same(weights, expected)


# ---- damage


def test_no_flipped_bit_is_read_in_silence(tmp_path, features):
    """Of 1,000 files with 1 to 8 random bits flipped not one is read: page, numbers and digests are covered."""
    path = write(tmp_path, features)
    content = bytearray(path.read_bytes())
    generator = torch.Generator().manual_seed(5)
    silent = 0
    for number in range(1000):
        damaged = bytearray(content)
        area = len(content) if number % 2 else 400  # half of them in the text of the first page
        for place in set(torch.randint(area, (1 + number % 8,), generator=generator).tolist()):
            damaged[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        path.write_bytes(damaged)
        try:
            read(path)
        except CacheError:
            continue
        silent += 1
    assert silent == 0


@pytest.mark.parametrize("kind", ["swapped blocks", "duplicated block", "zeroed block", "another file's numbers"])
def test_blocks_of_a_disk_gone_astray_are_noticed(tmp_path, features, kind):
    """Blocks that a disk mixed up, doubled or lost, and numbers of another file of the same shape, are refused."""
    path = write(tmp_path, features)
    content = path.read_bytes()
    first, second = content[4096:8192], content[8192:12288]
    head, rest = content[:4096], content[12288:]
    other = write(tmp_path, -features, layers=hashlib.sha256(b"two").hexdigest()).read_bytes()
    damaged = {
        "swapped blocks": head + second + first + rest,
        "duplicated block": head + first + first + rest,
        "zeroed block": head + first + bytes(4096) + rest,
        "another file's numbers": head + other[4096:],
    }[kind]
    assert damaged != content
    path.write_bytes(damaged)
    with pytest.raises(CacheError, match=r"damaged: its features do not match their SHA-256\. Delete it"):
        read(path)


@pytest.mark.parametrize("key", ["format", "layers", "images", "shape", "dtype", "sha256"])
@pytest.mark.parametrize(
    "value",
    ["missing", None, [], -1, "x", 10**400, [0, 2, 2, 32], [-1, 2, 2, 32], [True, 2, 2, 32], [10**400, 2, 2, 32]],
    ids=lambda value: str(value)[:20],
)
def test_a_first_page_that_somebody_else_wrote_is_refused(tmp_path, features, key, value):
    """A page with a right SHA-256 that lacks an entry, or has another value there, is refused."""
    path = write(tmp_path, features)
    content = path.read_bytes()
    page = json.loads(content[65:4096])
    if value == "missing":
        del page[key]
    else:
        page[key] = value
    text = json.dumps(page).encode()
    page = b"\n".join((hashlib.sha256(text).hexdigest().encode(), text)).ljust(4096)
    path.write_bytes(page + content[4096:])
    with pytest.raises(CacheError, match=r"elete it"):
        read(path)


DAMAGES = {
    "flipped bit": lambda content: content[:4100] + bytes([content[4100] ^ 16]) + content[4101:],
    "first page lost": lambda content: bytes(4096) + content[4096:],
    "empty": lambda content: b"",
    "one page": lambda content: content[:4096],
    "too long": lambda content: content + b"\0",
    "text": lambda content: b"hello" * 3000,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_passes_over_a_damaged_file_and_mends_it(tmp_path, train, damage):
    """A run says what is wrong with the file, computes the features anew, replaces it, and trains the same weights."""
    expected, _, _ = train(tmp_path)
    path = the_file(tmp_path)
    content = path.read_bytes()
    path.write_bytes(DAMAGES[damage](content))
    weights, lines, _ = train(tmp_path)
    assert_same(weights, expected)
    assert [str(path) in line for line in lines if "skipped a feature file" in line] == [True]
    assert path.read_bytes() == content
    weights, lines, _ = train(tmp_path)
    assert_same(weights, expected)
    assert any("known already" in line for line in lines)
    assert names(tmp_path) == [path.name]


def test_a_file_cut_at_every_4_kib_is_refused(tmp_path, features):
    """A file that was cut where a page ends is refused."""
    path = write(tmp_path, features)
    content = path.read_bytes()
    assert len(content) > 3 * 4096
    for size in range(0, len(content), 4096):
        path.write_bytes(content[:size])
        with pytest.raises(CacheError, match=r"elete it"):
            read(path)
    path.write_bytes(content)
    assert torch.equal(read(path), features)


def test_a_renamed_file_is_not_taken_for_another(tmp_path, make_backbone, data, capsys):
    """Features of other layers under the name of these ones are passed over, and the weights are the right ones."""

    def train(folder, seed=0):
        torch.manual_seed(3)
        model = tk.freeze_until(tk.attach_head(make_backbone(seed=seed), CLASSES), "head")
        make_trainer(model, folder=folder).fit(data, epochs=2, batch_size=8, verbose=2)
        return model.state_dict()

    expected = train(None)
    train(tmp_path / "others", seed=1)
    train(tmp_path / "these")
    shutil.move(the_file(tmp_path / "others"), the_file(tmp_path / "these"))
    capsys.readouterr()
    assert_same(train(tmp_path / "these"), expected)
    assert any("skipped a feature file" in line and "expected" in line for line in capsys.readouterr().out.splitlines())


def test_a_file_under_any_name_of_its_layers_serves(tmp_path, train):
    """Which images a file has features of is told by its content, not by its name."""
    expected, _, _ = train(tmp_path)
    path = the_file(tmp_path)
    path.rename(path.with_name(f"{path.name[:33]}copy.features"))
    weights, lines, _ = train(tmp_path)
    assert_same(weights, expected)
    assert any("known already" in line for line in lines)


def test_a_directory_under_the_files_name_leaves_features_in_memory(tmp_path, train):
    """A file that cannot be replaced takes a line, and the run goes on in memory."""
    expected, _, _ = train(tmp_path)
    path = the_file(tmp_path)
    path.unlink()
    path.mkdir()
    weights, lines, _ = train(tmp_path)
    assert_same(weights, expected)
    assert any("features are not cached in a file" in line for line in lines)
    assert names(tmp_path) == [path.name]


def test_a_file_whose_folder_is_gone_in_mid_run_does_no_harm(tmp_path, train):
    """What is mapped stays readable when the folder is deleted; a later fit of the same trainer goes on."""
    expected, _, _ = train(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")

    def delete(trainer, report):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    weights, _, trainer = train(tmp_path / "cache", callbacks=[delete])
    assert_same(weights, expected)
    trainer.fit((torch.randint(0, 255, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 3), verbose=0, epochs=1)


# ---- full disks


def test_a_disk_without_room_leaves_features_in_memory(small_disk, train, data):
    """A disk that is full from the start: a line with both sizes, nothing written, the same weights."""
    expected, _, _ = train(None)
    (small_disk / "other").write_bytes(bytes(256 * 1024 - 4096))
    weights, lines, _ = train(small_disk)
    assert_same(weights, expected)
    said = [line for line in lines if "features are not cached in a file" in line]
    assert len(said) == 1
    assert str(small_disk) in said[0]
    assert names(small_disk) == ["other"]


class FillsTheDisk(Dataset):
    """Another program fills the disk once the first file of features is there."""

    def __init__(self, data, folder):
        self.data = data
        self.folder = folder
        self.full = False

    def __len__(self):
        return len(self.data[0])

    def __getitem__(self, index):
        if any(self.folder.glob("*.features")) and not self.full:
            self.full = True
            try:
                (self.folder / "other").write_bytes(bytes(2**20))
            except OSError:
                assert (self.folder / "other").exists()
        return self.data[0][index], self.data[1][index]


def test_a_disk_that_fills_up_leaves_the_rest_in_memory(small_disk, make_backbone, capsys, monkeypatch):
    """Another program takes the room between two files: a line, the first file stays, the features are right."""
    monkeypatch.setattr("transferkit.features.prefix._PIXELS_ON_CPU", 50 * 32 * 32)
    monkeypatch.setattr(cache_module, "CHUNK_IMAGES", 50)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (150, 3, 32, 32), dtype=torch.uint8, generator=generator)
    trained = []
    for folder in (None, small_disk):
        torch.manual_seed(3)
        model = tk.attach_head(tk.freeze_until(make_backbone(), "block3"), CLASSES)
        dataset = FillsTheDisk((images, torch.arange(150) % 3), small_disk)
        make_trainer(model, precision="fp32", folder=folder).fit(dataset, batch_size=64, verbose=2, epochs=1)
        trained.append(model.state_dict())
        assert dataset.full is (folder is not None)
    assert_same(*trained)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "features are not cached in a file" in line]
    assert str(small_disk) in line
    assert names(small_disk) == sorted([the_file(small_disk).name, "other"])


def test_a_file_size_limit_leaves_features_in_memory(tmp_path, make_backbone):
    """Where a quota or ulimit stops the writing the run goes on in memory with the same weights."""
    import resource

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (100, 3, 32, 32), dtype=torch.uint8, generator=generator)
    trained = []
    for folder in (None, tmp_path):
        torch.manual_seed(3)
        model = tk.attach_head(tk.freeze_until(make_backbone(), "block3"), CLASSES, pooling="avg")
        trainer = make_trainer(model, precision="fp32", folder=folder)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            trainer.fit((images, torch.arange(100) % 3), batch_size=50, verbose=0, epochs=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        trained.append(model.state_dict())
    assert_same(*trained)
    assert names(tmp_path) == []


# ---- processes


def in_child(action):
    """Run in a forked process of its own and return its number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return child


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_the_whole_file_or_none(tmp_path):
    """50 kills at random moments: never half a file under the name, and the next writer removes what was hidden."""
    features = torch.rand(40, 64, 64, 32)  # 21 MB
    generator = torch.Generator().manual_seed(7)
    path = write(tmp_path, features)
    started = time.monotonic()
    write(tmp_path, features)
    takes = time.monotonic() - started
    path.unlink()
    whole = hidden = 0
    for moment in torch.rand(50, generator=generator).tolist():
        writer = in_child(lambda: write(tmp_path, features))
        time.sleep(moment * 1.5 * takes)
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        left = names(tmp_path)
        if path.name in left:
            found = open_features(path, layers=LAYERS, shape=(64, 64, 32), dtype=torch.float32).read()
            assert torch.equal(found, features)
            whole += 1
        hidden += any(name.startswith(".") for name in left)
        assert len(left) <= 2
        write(tmp_path, features)
        assert names(tmp_path) == [path.name]
        path.unlink()
    assert hidden >= 5


@pytest.mark.slow
def test_a_run_after_a_killed_run_uses_its_files(tmp_path, train, data, monkeypatch):
    """A run is killed while it computes features; the next one reads what was written and trains the same weights."""
    monkeypatch.setattr("transferkit.features.prefix._PIXELS_ON_CPU", 4 * 32 * 32)
    monkeypatch.setattr(cache_module, "CHUNK_IMAGES", 8)
    expected, _, _ = train(None)

    class Slow(Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, index):
            if index == 20 and len(list(tmp_path.iterdir())) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return data[0][index], int(data[1][index])

    run = in_child(lambda: train(tmp_path, data=Slow()))
    assert os.waitpid(run, 0)[1] == signal.SIGKILL
    assert [name[-9:] for name in names(tmp_path)] == [".features"] * 2
    weights, lines, _ = train(tmp_path, data=list(zip(data[0], data[1].tolist(), strict=True)))
    assert_same(weights, expected)
    assert any("16 known, 8 computed" in line for line in lines)
    assert len(names(tmp_path)) == 3


@pytest.mark.slow
def test_readers_see_a_whole_file_while_writers_replace_it(tmp_path, features):
    """Two processes replace the file again and again; every reading meanwhile gives whole features, and keeps them."""
    path = write(tmp_path, features)

    def replace():
        for _ in range(60):
            write(tmp_path, features)

    writers = [in_child(replace) for _ in range(2)]
    first = read(path)
    readings = 0
    while any(os.waitpid(writer, os.WNOHANG) == (0, 0) for writer in writers[:1]):
        assert torch.equal(read(path), features)
        readings += 1
    os.waitpid(writers[1], 0)
    assert readings > 5
    assert torch.equal(first, features)
    assert names(tmp_path) == [path.name]


@pytest.mark.slow
def test_runs_that_share_a_folder_at_once_train_the_same_weights(tmp_path, train):
    """Three runs begin at once with an empty folder: each ends with the weights of a run alone, one file stays."""
    expected, _, _ = train(None)
    folder = tmp_path / "cache"

    def run(number):
        weights, _, _ = train(folder)
        torch.save(weights, tmp_path / f"{number}.pt")

    children = [in_child(lambda number=number: run(number)) for number in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    for number in range(3):
        assert_same(torch.load(tmp_path / f"{number}.pt"), expected)
    assert [name.endswith(".features") for name in names(folder)] == [True]


def test_threads_that_write_at_once_end_with_one_whole_file(tmp_path, features):
    """Threads of one process that write the same features do not get into each other's way."""
    errors = []

    def run():
        try:
            for _ in range(5):
                write(tmp_path, features)
        except CacheError as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert torch.equal(read(the_file(tmp_path)), features)
    assert len(names(tmp_path)) == 1
