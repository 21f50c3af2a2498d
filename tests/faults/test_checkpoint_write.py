"""Writing checkpoints while processes are killed, disks fill and folders go: the old file or the new one."""

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

import pytest
import torch

import transferkit as tk
from tiny import STANDARDIZE
from transferkit.errors import ArgumentError, CheckpointError, CheckpointTypeError, CheckpointWriteError
from transferkit.saving import archive
from transferkit.training.checkpoint import read_newest, steps_in

SCRIPT = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from torchvision.models.vgg import make_layers
import transferkit as tk
from transferkit.saving import archive
from transferkit.training.checkpoint import read_newest
from transferkit.data.preprocessing import CONVENTIONS

torch.set_num_threads(1)
folder = Path(sys.argv[1])
features = make_layers([4, "M", 4, "M", 8, "M", 8, "M", 8, "M"])
backbone = tk.Backbone("vgg16", features, CONVENTIONS["IMAGENET1K_V1"].with_image_size(32))
model = tk.attach_head(backbone, ["cat", "dog", "owl"], hidden=(64,))
trainer = tk.Trainer(model, device="cpu", precision="fp32")


def become(number):  # every weight is the number
    trainer.training.global_step = number
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(number)


def number_of(state):  # None if the weights are not all of one state
    weights = [weight for name, weight in state["model"]["weights"].items() if "standardize" not in name]
    number = state["progress"]["global_step"]
    return number if all(bool((weight == number).all()) for weight in weights) else None


def hidden():
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def killed_while_saving(save, first):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        for number in range(first, first + 10**6):
            become(number)
            save()
            os.write(writer, b".")
    os.close(writer)
    os.read(reader, 1)  # it is warm
    time.sleep(random.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    finished = 1 + sum(len(chunk) for chunk in iter(lambda: os.read(reader, 2**16), b""))
    os.close(reader)
    return first + finished - 1
"""


def run(script, folder):
    """What a script prints as JSON in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + script, str(folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def make_trainer(backbone, layer=None, **options):
    model = tk.freeze_until(tk.attach_head(backbone, ["cat", "dog", "owl"]), layer)
    return tk.Trainer(model, device="cpu", precision="fp32", lr=1e-2, schedule="constant", **options)


def fit(trainer, data, epochs=1, **options):
    """Three steps an epoch."""
    return trainer.fit(data, epochs=epochs, batch_size=8, verbose=0, **options)


def same(left, right):
    """Whether two states are the same to the bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def damage(path):
    """Flip a bit in the middle of the largest part."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        part = max(file.infolist(), key=lambda member: member.file_size)
    name, extra = struct.unpack_from("<HH", content, part.header_offset + 26)
    content[part.header_offset + 30 + name + extra + part.file_size // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def trainer(backbone):
    return make_trainer(backbone)


@pytest.fixture
def saved(trainer, tmp_path):
    """A checkpoint in a folder of its own; the trainer is another one by now."""
    path = tmp_path / "run" / "last.pt"
    path.parent.mkdir()
    trainer.save(path)
    trainer.training.global_step = 7
    return path


# --- killed


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    """After each of 100 SIGKILLs the file is whole, of the last save finished or the one begun, bit for bit."""
    result = run(
        """
path = folder / "last.pt"
wrong, parts, first = [], 0, 1
for _ in range(100):
    done = killed_while_saving(lambda: trainer.save(path), first)
    parts += len(hidden()) > 0
    found = number_of(archive.read_checkpoint(path))
    if found not in (done, done + 1) or len(hidden()) > 1:
        wrong.append([done, found, hidden()])
    first = done + 2
become(first)
trainer.save(path)
print(json.dumps({"wrong": wrong, "parts": parts, "left": os.listdir(folder)}))
""",
        tmp_path,
    )

    assert result["wrong"] == []
    assert result["parts"] > 10  # so many hit it in the middle of writing
    assert result["left"] == ["last.pt"]


@pytest.mark.slow
def test_a_run_killed_while_saving_leaves_a_good_state_though_it_keeps_one(tmp_path):
    """With keep_last=1 a kill between writing the new state and deleting the old one leaves one good file at least."""
    result = run(
        """
tk.freeze_until(model, "head")
callback = tk.Checkpoint(folder, keep_last=1)
wrong, two, first, times = [], 0, 1, 0
while times < 40 or (two == 0 and times < 400):
    times += 1
    done = killed_while_saving(lambda: callback.save(trainer), first)
    two += sum(path.name.startswith("step-") for path in folder.iterdir()) > 1
    path, state = read_newest(folder)
    found = number_of(state)
    if found not in (done, done + 1) or not any(folder.glob("frozen-*.pt")):
        wrong.append([done, found, os.listdir(folder)])
    first = done + 2
print(json.dumps({"wrong": wrong, "two": two}))
""",
        tmp_path,
    )

    assert result["wrong"] == []
    assert result["two"] > 0  # so many hit it between writing and deleting


@pytest.mark.slow
def test_two_processes_that_save_the_same_path_do_not_mix(tmp_path):
    """Of two processes that save to one path fifty times each, one wins whole at every moment; no part is left."""
    result = run(
        """
path = folder / "last.pt"
become(1)
trainer.save(path)
children = []
for start in (1000, 2000):
    child = os.fork()
    if child == 0:
        for number in range(start, start + 50):
            become(number)
            trainer.save(path)
        os._exit(0)
    children.append(child)
found, codes = [], []
while children:
    found.append(number_of(archive.read_checkpoint(path)))
    done, code = os.waitpid(-1, os.WNOHANG)
    if done:
        children.remove(done)
        codes.append(code)
print(json.dumps({"found": sorted(map(str, set(found))), "codes": codes, "left": os.listdir(folder)}))
""",
        tmp_path,
    )

    assert result["codes"] == [0, 0]
    assert "None" not in result["found"]
    assert len(result["found"]) > 2
    assert result["left"] == ["last.pt"]


def test_what_a_killed_writer_left_is_removed_by_the_next(trainer, tmp_path):
    """A hidden part file that nobody writes any more goes with the next save, and no other hidden file."""
    others = [".run [1].pt.old.bak", ".run [1].pt.notes.txt", ".last.pt.4194305.0123abcd"]
    for name in [*others, ".run [1].pt.4194305.0123abcd"]:
        (tmp_path / name).write_bytes(b"half")

    trainer.save(tmp_path / "run [1].pt")

    assert names(tmp_path) == sorted([*others, "run [1].pt"])


def test_a_part_file_that_is_being_written_stays(trainer, tmp_path):
    """The part file of a writer that lives is not taken for abandoned."""
    writer = archive.atomic_write(tmp_path / "last.pt")
    with writer as file:
        file.write(b"slow")
        trainer.save(tmp_path / "last.pt")
        assert len(names(tmp_path)) == 2

    assert (tmp_path / "last.pt").read_bytes() == b"slow"
    assert names(tmp_path) == ["last.pt"]


# --- full disks


@contextlib.contextmanager
def small_disk(folder, options):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("a file system can be mounted by root only, and not in every container")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_too_small_is_told_before_writing(trainer, tmp_path):
    """On a full file system the error has path, room needed and room free; the old file stays and no part file."""
    with small_disk(tmp_path / "disk", "size=2m") as disk:
        trainer.save(disk / "last.pt")
        before = (disk / "last.pt").read_bytes()
        (disk / "ballast").write_bytes(bytes(1024 * 1024))
        with pytest.raises(CheckpointWriteError, match=r"last\.pt: it needs 0\.?\d* MB and \S*disk has \d+\.?\d* MB"):
            trainer.save(disk / "last.pt")
        assert (disk / "last.pt").read_bytes() == before
        assert names(disk) == ["ballast", "last.pt"]


def test_a_disk_without_room_for_one_more_file_keeps_the_old_one(trainer, tmp_path):
    """Where no new file can be made (no inode is left) the save is an error that names path and cause."""
    with small_disk(tmp_path / "disk", "size=8m,nr_inodes=3") as disk:
        trainer.save(disk / "last.pt")
        before = (disk / "last.pt").read_bytes()
        (disk / "other").touch()
        with pytest.raises(CheckpointWriteError, match=r"last\.pt: .*No space left on device.*file there is unchanged"):
            trainer.save(disk / "last.pt")
        assert (disk / "last.pt").read_bytes() == before
        assert names(disk) == ["last.pt", "other"]


@pytest.mark.parametrize("limit", [0, 64, 4096, 8192, 12_000])
def test_a_write_that_fails_at_any_byte_keeps_the_old_file(trainer, saved, limit):
    """When the system takes only the first bytes, the save is a CheckpointWriteError and the old file stays."""
    before = saved.read_bytes()
    assert limit < len(before)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # no file may grow beyond
    try:
        with pytest.raises(CheckpointWriteError, match=r"cannot write a checkpoint to .*last\.pt: .*Expected a folder"):
            trainer.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert saved.read_bytes() == before
    assert names(saved.parent) == ["last.pt"]


# --- folders that cannot be written


@contextlib.contextmanager
def another_user():
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public():
    """A folder that any user can reach, as tmp_path is not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_folder_of_somebody_else_is_refused(trainer, public):
    """Without permission to write, save names the path and the cause, and Checkpoint cannot be made there."""
    with another_user():
        with pytest.raises(CheckpointWriteError, match=rf"{public}/last\.pt: .*Permission denied.*Expected a folder"):
            trainer.save(public / "last.pt")
        with pytest.raises(CheckpointWriteError, match=rf"{public}/runs: .*Permission denied.*Expected a folder"):
            tk.Checkpoint(public / "runs")

    assert names(public) == []


def test_a_run_in_a_folder_that_cannot_be_written_is_never_silent(trainer, public, data):
    """A Checkpoint whose folder takes no file warns at each save, and fit ends with the error."""
    callback = tk.Checkpoint(public)
    with (
        another_user(),
        pytest.warns(UserWarning, match="the run continues unsaved") as warned,
        pytest.raises(CheckpointWriteError, match=r"step-00000006\.pt: .*Permission denied"),
    ):
        fit(trainer, data, epochs=2, callbacks=[callback])

    assert (len(warned), trainer.epoch) == (2, 2)


def test_a_folder_that_cannot_be_listed_is_no_obstacle(trainer, public):
    """Where files may be made and not listed the checkpoint is there, so the save is no error."""
    public.chmod(0o733)
    with another_user():
        trainer.save(public / "last.pt")
    public.chmod(0o755)

    assert same(archive.read_checkpoint(public / "last.pt")["model"], trainer.state_dict()["model"])


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(trainer, public):
    """Without permission to read, the error says so, and nobody is told to delete the file."""
    trainer.save(public / "last.pt")
    (public / "last.pt").chmod(0)
    with another_user(), pytest.raises(CheckpointError, match=r"last\.pt: .*Permission denied") as error:
        trainer.load(public / "last.pt")
    assert "delete" not in str(error.value)


def test_a_read_only_file_system_is_refused(trainer, tmp_path):
    """On a read-only file system the error says so, and what is there stays."""
    with small_disk(tmp_path / "disk", "size=2m") as disk:
        trainer.save(disk / "last.pt")
        before = (disk / "last.pt").read_bytes()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(CheckpointWriteError, match=r"last\.pt: .*Read-only file system"):
            trainer.save(disk / "last.pt")
        assert (disk / "last.pt").read_bytes() == before
        assert names(disk) == ["last.pt"]


def test_a_folder_in_the_place_of_the_file_is_refused(trainer, tmp_path):
    """A target that is a folder is refused by name, and nothing is left in it or beside it."""
    (tmp_path / "last.pt").mkdir()
    with pytest.raises(CheckpointWriteError, match=r"last\.pt: it is a folder, expected the name of a file"):
        trainer.save(tmp_path / "last.pt")

    assert names(tmp_path) == ["last.pt"]
    assert names(tmp_path / "last.pt") == []


def test_a_file_in_the_place_of_the_folder_is_refused(trainer, saved):
    """A path below a file is refused by name; a Checkpoint cannot be made there."""
    with pytest.raises(CheckpointWriteError, match=r"last\.pt/more\.pt"):
        trainer.save(saved / "more.pt")
    with pytest.raises(CheckpointWriteError, match=r"last\.pt.*Expected a folder"):
        tk.Checkpoint(saved)


def test_a_path_through_a_link_to_a_folder_is_written(trainer, tmp_path):
    """A folder reached through a symbolic link is a folder like any other."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    trainer.save(tmp_path / "link" / "last.pt")

    assert names(tmp_path / "real") == ["last.pt"]


# --- nothing is staged elsewhere


def test_no_folder_for_temporary_files_is_needed(trainer, saved, monkeypatch):
    """A save needs no TMPDIR: with a missing one it succeeds."""
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, "/no/such/folder")
    monkeypatch.setattr(tempfile, "tempdir", None)
    trainer.save(saved)

    assert archive.read_checkpoint(saved)["progress"]["global_step"] == 7


# --- EIO


@pytest.mark.parametrize(
    ("owner", "name", "error", "raised"),
    [
        (os, "fsync", OSError(errno.EIO, "Input/output error"), CheckpointWriteError),
        (Path, "replace", OSError(errno.EIO, "Input/output error"), CheckpointWriteError),
        (torch, "save", OSError(errno.ENOSPC, "No space left on device"), CheckpointWriteError),
        (os, "fsync", KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["flush", "rename", "write", "Ctrl-C"],
)
def test_a_disk_that_does_not_take_the_content_keeps_the_old_file(
    trainer, saved, monkeypatch, owner, name, error, raised
):
    """An error of the disk, or Ctrl-C, while a file is written or renamed: the old file stays and no part file."""
    before = saved.read_bytes()

    def failing(*arguments):
        raise error

    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(raised, match=rf"last\.pt: .*{error.strerror}" if raised is CheckpointWriteError else None):
        trainer.save(saved)

    assert saved.read_bytes() == before
    assert names(saved.parent) == ["last.pt"]


def test_the_content_is_on_the_disk_before_the_name_and_the_name_after(trainer, saved, monkeypatch):
    """The file is flushed to the disk, then renamed, then its folder is flushed: no power failure can empty it."""
    order = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor):
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")  # noqa: PTH112
        fsync(descriptor)

    def replaced(path, target):
        order.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    trainer.save(saved)

    assert order == ["file", "rename", "folder"]


def test_a_file_system_without_locks_leaves_no_part_file(trainer, saved, monkeypatch):
    """Where files cannot be locked (some network file systems) a save leaves the old file or the new, and no other."""
    before = saved.read_bytes()

    def unlockable(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unlockable)
    with contextlib.suppress(CheckpointWriteError):
        trainer.save(saved)

    assert names(saved.parent) == ["last.pt"]
    assert archive.read_checkpoint(saved)["progress"]["global_step"] in (0, 7)
    assert before


def test_a_state_that_does_not_verify_is_an_error_and_nothing_older_goes(trainer, tmp_path, monkeypatch):
    """What was written is read back: where a bit of it changed, the save fails and every older file stays."""
    callback = tk.Checkpoint(tmp_path, keep_last=1)
    path = callback.save(trainer)
    before, save = path.read_bytes(), torch.save

    def unsound(state, file):
        save(state, file)
        file.flush()
        damage(Path(file.name))

    monkeypatch.setattr(torch, "save", unsound)
    for step, name in ((0, path.name), (1, "step-00000001.pt")):
        trainer.training.global_step = step
        with pytest.raises(CheckpointWriteError, match=rf"{name}: it is damaged in its part .*on a working disk"):
            callback.save(trainer)

    assert names(tmp_path) == ["step-00000000.pt"]
    assert path.read_bytes() == before


# --- weights that change meanwhile


def test_weights_that_another_thread_changes_while_they_are_saved_are_refused(trainer, saved):
    """With a thread that writes to the weights meanwhile a save is refused with the remedy, and the old file stays."""
    ending = threading.Event()

    def change():
        while not ending.is_set():
            with torch.no_grad():
                trainer.model.head.logits.weight.add_(1)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(1000):
            content = saved.read_bytes()
            try:
                trainer.save(saved)
            except CheckpointWriteError as error:
                message = str(error)
                break
        else:
            pytest.fail("no save was refused")
    finally:
        ending.set()
        thread.join()
    assert re.search(r"last\.pt: another thread changed its tensors meanwhile, save between two steps", message)
    assert saved.read_bytes() == content
    assert names(saved.parent) == ["last.pt"]


# --- what cannot be saved


class Thing:
    """No plain type."""


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (Thing(), "Thing"),
        (len, "builtin_function_or_method"),
        (torch.Size([1]), "Size"),
        ([{"deep": Thing()}], "Thing"),
    ],
    ids=["instance", "function", "tuple of its own class", "deep"],
)
def test_something_strange_in_an_optimizer_group_is_named_before_any_byte(trainer, saved, value, kind):
    """What a checkpoint cannot hold is a CheckpointTypeError with its place and type, before anything is written."""
    trainer.optimizer.param_groups[0]["mine"] = value
    before = saved.read_bytes(), saved.stat().st_mtime_ns, saved.parent.stat().st_mtime_ns
    with pytest.raises(CheckpointTypeError, match=rf"optimizer/groups/0/mine\S* is a {kind}: .*plain types and tens"):
        trainer.save(saved)

    assert (saved.read_bytes(), saved.stat().st_mtime_ns, saved.parent.stat().st_mtime_ns) == before
    assert issubclass(CheckpointTypeError, TypeError)


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(3).to_sparse(), torch.zeros(3, device="meta"), torch.zeros(1).expand(10**9)],
    ids=["sparse", "meta", "expanded"],
)
def test_a_strange_tensor_is_named_before_any_byte(trainer, saved, tensor):
    """A sparse tensor, one without memory or one of a single number many times over is refused by its place."""
    trainer.optimizer.param_groups[0]["mine"] = tensor
    with pytest.raises(CheckpointTypeError, match=r"^optimizer/groups/0/mine is not an ordinary dense tensor"):
        trainer.save(saved)


def test_a_strange_state_is_named(tmp_path):
    """Where the state itself is none that can be written, the message says so."""
    with pytest.raises(CheckpointTypeError, match=r"^the state is a Thing"):
        archive.write_checkpoint(tmp_path / "last.pt", Thing())


def test_keys_that_are_no_text_are_named(trainer, saved):
    """A key that is no text is refused with its place."""
    trainer.optimizer.param_groups[0]["mine"] = {3: "x"}
    with pytest.raises(CheckpointTypeError, match=r"^optimizer/groups/0/mine has the key 3: expected text"):
        trainer.save(saved)


def test_a_state_that_cannot_be_saved_leaves_a_checkpoints_folder_empty(backbone, tmp_path):
    """Checkpoint, too, looks at all of the state before it writes any file."""
    trainer = make_trainer(backbone, "head")
    trainer.optimizer.param_groups[0]["mine"] = Thing()
    with pytest.raises(CheckpointTypeError, match="optimizer/groups/0/mine"):
        tk.Checkpoint(tmp_path).save(trainer)

    assert names(tmp_path) == []


# --- the callback


def test_a_save_that_fails_is_a_warning_and_an_error_at_the_end(trainer, tmp_path, data):
    """A folder that goes while the run is under way costs no epoch: a warning each time, the error at the end."""
    callback = tk.Checkpoint(tmp_path / "runs")

    def remove(trainer, report):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)

    with (
        pytest.warns(UserWarning, match=r"the run continues unsaved: cannot write a checkpoint to .*step") as warned,
        pytest.raises(CheckpointWriteError, match=r"step-00000009\.pt"),
    ):
        fit(trainer, data, epochs=3, callbacks=[remove, callback])

    assert (len(warned), trainer.epoch, trainer.global_step) == (3, 3, 9)


def test_a_later_save_that_succeeds_makes_good(trainer, tmp_path, data):
    """If a later save succeeds the run ends without an error, and can be loaded."""
    callback = tk.Checkpoint(tmp_path / "runs")

    def remove_once(trainer, report):
        shutil.rmtree(tmp_path / "runs") if report.epoch == 0 else (tmp_path / "runs").mkdir()

    with pytest.warns(UserWarning, match="the run continues unsaved") as warned:
        fit(trainer, data, epochs=2, callbacks=[remove_once, callback])

    assert len(warned) == 1
    assert callback.failure is None
    assert same(read_newest(tmp_path / "runs")[1]["optimizer"], trainer.state_dict()["optimizer"])


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, [9, 12]),
        ({"keep_last": 10}, [3, 6, 9, 12]),
        ({"every_epochs": 3, "keep_last": 10}, [9]),
        ({"every_epochs": 10, "every_steps": 5, "keep_last": 10}, [5, 10]),
        ({"every_steps": 2, "keep_last": 10}, [2, 3, 4, 6, 8, 9, 10, 12]),
    ],
    ids=["default", "all", "every third epoch", "every fifth step", "epochs and steps"],
)
def test_saved_as_often_and_kept_as_many_as_asked(trainer, tmp_path, data, options, left):
    """Four epochs of three steps leave the states asked for, each of them whole, and nothing else."""
    fit(trainer, data, epochs=4, callbacks=[tk.Checkpoint(tmp_path, **options)])

    assert names(tmp_path) == [f"step-{step:08d}.pt" for step in left]
    assert [archive.read_checkpoint(path)["progress"]["global_step"] for path in steps_in(tmp_path)] == left


def test_what_is_frozen_is_written_once(make_backbone, tmp_path, data):
    """Three epochs write the frozen weights once, to one file; the states do not hold them and come back with them."""
    trainer = make_trainer(make_backbone(), "block5")
    stamps = []

    def look(trainer, report):
        stamps.append([(path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.glob("frozen-*.pt")])

    look.order = 3  # after the Checkpoint
    fit(trainer, data, epochs=3, callbacks=[tk.Checkpoint(tmp_path), look])

    assert len(stamps[0]) == 1
    assert stamps == [stamps[0]] * 3
    held = set(archive.read_checkpoint(steps_in(tmp_path)[-1])["model"]["weights"])
    assert held == STANDARDIZE | {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    other = make_trainer(make_backbone(seed=5))
    other.load(steps_in(tmp_path)[-1])
    assert same(other.model.state_dict(), dict(trainer.model.state_dict()))


def test_a_boundary_that_moves_in_a_run_makes_every_kept_state_whole(make_backbone, tmp_path, data):
    """After a callback froze less, the states from before and after it come back with all weights."""
    trainer, states = make_trainer(make_backbone(), "head"), []

    def thaw(trainer, report):
        states.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        tk.freeze_until(trainer.model, "block5")

    fit(trainer, data, epochs=2, callbacks=[tk.Checkpoint(tmp_path), thaw])

    for path, expected in zip(steps_in(tmp_path), states, strict=True):
        other = make_trainer(make_backbone(seed=5))
        other.load(path)
        assert same(dict(other.model.state_dict()), expected)


def test_a_frozen_file_that_went_is_written_again(make_backbone, tmp_path, data):
    """If somebody removes the file of frozen weights while the run is under way, the next state has it again."""
    trainer = make_trainer(make_backbone(), "block5")

    def remove(trainer, report):
        if report.epoch == 0:
            next(tmp_path.glob("frozen-*.pt")).unlink()

    remove.order = 3  # after the Checkpoint
    fit(trainer, data, epochs=2, callbacks=[tk.Checkpoint(tmp_path), remove])

    other = make_trainer(make_backbone(seed=5))
    other.load(steps_in(tmp_path)[-1])
    assert same(dict(other.model.state_dict()), dict(trainer.model.state_dict()))


def test_a_frozen_file_of_an_earlier_process_is_written_anew(make_backbone, tmp_path):
    """A run does not trust a file of frozen weights that it has not written: it may be damaged."""
    tk.Checkpoint(tmp_path).save(make_trainer(make_backbone(), "block5"))
    frozen = next(tmp_path.glob("frozen-*.pt"))
    before = frozen.read_bytes()
    damage(frozen)

    tk.Checkpoint(tmp_path).save(make_trainer(make_backbone(), "block5"))

    assert frozen.read_bytes() == before


def test_an_old_state_that_somebody_removes_first_is_no_error(trainer, tmp_path, monkeypatch):
    """Another process may remove an old state at the moment when the callback does."""
    callback, unlink = tk.Checkpoint(tmp_path, keep_last=1), Path.unlink
    callback.save(trainer)
    trainer.training.global_step = 1

    def second(path, **options):
        if path.suffix == ".pt":
            os.unlink(path)  # noqa: PTH108
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", second)
    callback.save(trainer)

    assert names(tmp_path) == ["step-00000001.pt"]


def test_a_second_run_of_a_trainer_may_save_where_the_first_did(trainer, tmp_path, data):
    """States up to the step at which a run begins are of its own past."""
    for _ in range(2):
        fit(trainer, data, callbacks=[tk.Checkpoint(tmp_path)])

    assert names(tmp_path) == ["step-00000003.pt", "step-00000006.pt"]


@pytest.mark.parametrize("linked", ["callback", "resume_from"])
def test_a_folder_is_the_same_under_another_name(make_backbone, tmp_path, data, linked):
    """A run resumed from an older state may save to the state's folder, through a link or not."""
    fit(make_trainer(make_backbone()), data, epochs=2, callbacks=[tk.Checkpoint(tmp_path / "runs")])
    (tmp_path / "link").symlink_to("runs")
    folder = {"callback": tmp_path / "runs", "resume_from": tmp_path / "runs", linked: tmp_path / "link"}
    old = folder["resume_from"] / "step-00000003.pt"

    fit(make_trainer(make_backbone()), data, 2, callbacks=[tk.Checkpoint(folder["callback"])], resume_from=old)


def test_a_folder_of_another_run_is_refused(make_backbone, tmp_path, data):
    """A new run may not save where a longer one did: refused before the first step with both ways out."""
    fit(make_trainer(make_backbone()), data, epochs=2, callbacks=[tk.Checkpoint(tmp_path)])
    before, trainer = names(tmp_path), make_trainer(make_backbone())
    with pytest.raises(ArgumentError, match=r"holds the checkpoints of another run, up to step-00000006\.pt: continue"):
        fit(trainer, data, callbacks=[tk.Checkpoint(tmp_path)])

    assert (names(tmp_path), trainer.global_step) == (before, 0)


def test_a_folder_of_another_run_is_refused_on_resuming_too(make_backbone, tmp_path, data):
    """A run resumed from one folder may not save into another that holds a longer run, whose states would be mixed."""
    fit(make_trainer(make_backbone()), data, callbacks=[tk.Checkpoint(tmp_path / "a")])
    fit(make_trainer(make_backbone()), data, epochs=3, callbacks=[tk.Checkpoint(tmp_path / "b", keep_last=1)])
    with pytest.raises(ArgumentError, match="another run"):
        fit(
            make_trainer(make_backbone()),
            data,
            epochs=2,
            callbacks=[tk.Checkpoint(tmp_path / "b", keep_last=1)],
            resume_from=tmp_path / "a",
        )


def test_the_newest_state_is_read_by_its_own_name(trainer, tmp_path):
    """The newest of several states comes with its path, and the one before it is named where it is damaged."""
    callback = tk.Checkpoint(tmp_path, keep_last=3)
    for step in range(3):
        trainer.training.global_step = step
        callback.save(trainer)

    path, state = read_newest(tmp_path)
    assert (path.name, state["progress"]["global_step"]) == ("step-00000002.pt", 2)

    damage(path)
    with pytest.raises(CheckpointError, match=r"The newest good one is .*step-00000001\.pt"):
        read_newest(tmp_path)


def test_a_damaged_newest_state_names_the_newest_good_one(make_backbone, tmp_path, data):
    """With the last two states damaged the error names the third, which can be passed as it stands in the message."""
    fit(make_trainer(make_backbone()), data, epochs=4, callbacks=[tk.Checkpoint(tmp_path, keep_last=4)])
    for path in steps_in(tmp_path)[-2:]:
        damage(path)
    trainer = make_trainer(make_backbone())
    with pytest.raises(CheckpointError, match=r"step-00000012\.pt .*damaged.* newest good one is .*06\.pt") as error:
        fit(trainer, data, epochs=5, resume_from=tmp_path)
    assert trainer.global_step == 0

    good = re.search(r"resume_from='(.*)'", str(error.value))[1]
    assert len(fit(trainer, data, epochs=5, resume_from=good).reports) == 5
    for path in steps_in(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step-00000012\.pt .*There is no other"):
        fit(trainer, data, epochs=6, resume_from=tmp_path)


@pytest.mark.parametrize("keep_last", [1, 2])
def test_going_on_behind_a_damaged_state_keeps_a_good_one_at_every_moment(make_backbone, tmp_path, data, keep_last):
    """Resumed from the good state that the error named, a run has a good state in its folder after every step."""
    fit(make_trainer(make_backbone()), data, epochs=4, callbacks=[tk.Checkpoint(tmp_path)])
    damage(steps_in(tmp_path)[-1])
    found = []

    class Watched(tk.Checkpoint):
        def after_step(self, trainer):
            super().after_step(trainer)
            found.append([good(path) for path in steps_in(tmp_path)])

    callback = Watched(tmp_path, keep_last=keep_last, every_steps=1)
    fit(make_trainer(make_backbone()), data, epochs=4, callbacks=[callback], resume_from=steps_in(tmp_path)[0])

    assert len(found) == 3
    assert all(any(states) for states in found), found


def good(path):
    with contextlib.suppress(CheckpointError):
        return bool(archive.read_checkpoint(path))
    return False


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "missing",
            r"step-00000003\.pt was saved without its 8 frozen weights .*their SHA-256, .*frozen-\w{16}\.pt",
        ),
        ("damaged", r"frozen-\w{16}\.pt .*damaged"),
        ("of other weights", r"frozen-\w{16}\.pt does not hold the frozen weights that its name says"),
    ],
)
def test_a_frozen_file_that_cannot_be_used_is_refused(make_backbone, tmp_path, data, fault, message):
    """Without the right frozen weights another model refuses the state, unchanged; one that has them takes it."""
    trainer = make_trainer(make_backbone(), "block5")
    fit(trainer, data, callbacks=[tk.Checkpoint(tmp_path)])
    frozen = next(tmp_path.glob("frozen-*.pt"))
    if fault == "missing":
        frozen.unlink()
    elif fault == "damaged":
        damage(frozen)
    else:
        weights = archive.read_checkpoint(frozen)["frozen"]
        archive.write_checkpoint(frozen, {"frozen": {name: weight + 1 for name, weight in weights.items()}})

    other = make_trainer(make_backbone(seed=5))
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        other.load(steps_in(tmp_path)[-1])
    assert same(dict(other.model.state_dict()), before)

    equal = make_trainer(make_backbone())
    equal.load(steps_in(tmp_path)[-1])
    assert same(dict(equal.model.state_dict()), dict(trainer.model.state_dict()))
