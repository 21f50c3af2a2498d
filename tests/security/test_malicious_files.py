"""Files made to run code or to take the machine's memory or time: refused, whatever reads them."""

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import pytest
import torch

import transferkit as tk
from transferkit.errors import CheckpointError, TransferKitError, WeightsError
from transferkit.saving import archive
from transferkit.saving.model import model_state

# --- code


class Payload:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(canary):
    return {
        "os.system": Payload(os.system, f"touch {canary}"),
        "exec": Payload(exec, f"open({str(canary)!r}, 'w').close()"),
        "subprocess": Payload(subprocess.check_call, ["touch", str(canary)]),
    }


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "the code in the file was run"


def test_the_payloads_work(tmp_path):
    """Each payload does create the canary when its file is read without care."""
    for payload in payloads(tmp_path / "canary").values():
        pickle.loads(pickle.dumps(payload, protocol=2))
        (tmp_path / "canary").unlink()


@pytest.mark.parametrize("kind", ["os.system", "exec", "subprocess"])
@pytest.mark.parametrize("form", ["zip", "old torch format", "pickle"])
@pytest.mark.parametrize("place", ["alone", "in the model", "as a key"])
def test_code_in_a_file_is_not_run(tmp_path, canary, backbone, kind, form, place):
    """Code in a checkpoint or weight file, reached through a link, is refused by every reader and not run."""
    payload, path = payloads(canary)[kind], tmp_path / "evil.pt"
    inside = {"a": torch.zeros(2), "evil": payload} if place == "in the model" else {payload: 1}
    content = payload if place == "alone" else {"format": archive.FORMAT, "model": inside}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    (tmp_path / "link.pt").symlink_to(path)
    path = tmp_path / "link.pt"
    trainer = tk.Trainer(tk.attach_head(backbone, 2), device="cpu")

    for read, error in (
        (tk.load_model, CheckpointError),
        (trainer.load, CheckpointError),
        (lambda path: tk.load_backbone("vgg11", weights=path, preprocessing="KERAS", image_size=32), WeightsError),
    ):
        with pytest.raises(error, match=r"cannot read .*link\.pt") as caught:
            read(path)
        assert "weights_only" not in str(caught.value)  # torch's own message says how to run the code
        assert "\n" not in str(caught.value)


def test_code_in_a_frozen_file_is_not_run(tmp_path, canary, make_backbone, data):
    """Code in the place of a run's frozen weights is refused, and not run."""
    model = tk.freeze_until(tk.attach_head(make_backbone(), 3), "head")
    trainer = tk.Trainer(model, device="cpu", precision="fp32")
    trainer.fit(data, batch_size=8, verbose=0, callbacks=[tk.Checkpoint(tmp_path / "run")], epochs=1)
    frozen = next((tmp_path / "run").glob("frozen-*.pt"))
    torch.save({"format": archive.FORMAT, "frozen": payloads(canary)["os.system"]}, frozen)
    other = tk.Trainer(tk.attach_head(make_backbone(seed=9), 3), device="cpu", precision="fp32")

    with pytest.raises(CheckpointError, match=r"cannot read .*frozen-"):
        other.load(tmp_path / "run" / "step-00000003.pt")
    with pytest.raises(CheckpointError, match=r"cannot read .*frozen-"):
        other.fit(data, batch_size=8, epochs=2, verbose=0, resume_from=tmp_path / "run")


def test_code_is_not_run_where_the_environment_allows_it(tmp_path, canary, monkeypatch):
    """torch's own switch for unsafe loading does not change what the library reads."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"format": archive.FORMAT, "model": payloads(canary)["os.system"]}, tmp_path / "evil.pt")

    with pytest.raises(CheckpointError):
        tk.load_model(tmp_path / "evil.pt")
    with pytest.raises(WeightsError):
        tk.load_backbone("vgg11", weights=tmp_path / "evil.pt", preprocessing="KERAS")


def test_an_address_is_not_fetched():
    """An http address is no path: nothing is fetched."""
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        tk.load_model("http://127.0.0.1:9/model.pt")
    with pytest.raises(TransferKitError):
        tk.load_backbone("vgg11", weights="http://127.0.0.1:9/model.pt", preprocessing="KERAS")


# --- memory and time

READ = """
import json, os, resource, sys, time
from pathlib import Path
import torch, torchvision
import transferkit as tk
from transferkit.saving import archive

readers = {
    "checkpoint": archive.read_checkpoint,
    "model": tk.load_model,
    "weights": lambda path: tk.load_backbone("vgg11", weights=path, preprocessing="KERAS", image_size=32),
}
try:
    tk.load_backbone("vgg11", weights=__file__ if "__file__" in globals() else "none", preprocessing="KERAS")
except tk.TransferKitError:
    pass  # what is imported on first use is not counted below
found = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    for name, read in readers.items():
        if name not in path.name.split(".")[0].split("-"):
            continue
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30,) * 2)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                read(path)
                outcome = "taken"
            except tk.TransferKitError as error:
                outcome = "refused" if len(str(error)) < 2000 else "refused with a message without end"
            except BaseException as error:
                outcome = type(error).__name__
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            os.write(writer, json.dumps([outcome, grown]).encode())
            os._exit(0)
        os.close(writer)
        deadline = time.monotonic() + 3
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(child, 9)
                os.waitpid(child, 0)
                break
            time.sleep(0.01)
        content = os.read(reader, 10**4)
        found[f"{name} {path.name}"] = json.loads(content) if content else ["no end", 0]
        os.close(reader)
print(json.dumps(found))
"""


# a pickle by hand: pickle.dumps makes no such file


def text(value):
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def number(value):
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def mapping(**items):
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def called(function, *arguments):
    return function + b"(" + b"".join(arguments) + b"tR"


def tensor(shape, strides, numbers=4):
    storage = (
        b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu") + number(numbers) + b"tQ"
    )
    sizes = b"(" + b"".join(map(number, shape)) + b"t(" + b"".join(map(number, strides)) + b"t"
    rebuild = named("torch._utils", "_rebuild_tensor_v2")
    return called(rebuild, storage, number(0), sizes, b"\x89", called(named("collections", "OrderedDict")))


def laughs():
    """A list of lists ... that takes a kilobyte and prints 2^60 brackets."""
    nested = b"]q\x00"
    for n in range(1, 60):
        nested = b"]q" + bytes([n]) + b"(" + nested + b"h" + bytes([n - 1]) + b"e"
    return nested


def write(path, pickled, members=()):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02" + pickled + b".")
        file.writestr("a/byteorder", "little")
        file.writestr("a/data/0", bytes(16))
        file.writestr("a/version", "3\n")
        for name in members:
            file.writestr(name, b"")


FORMAT = number(archive.FORMAT)

PICKLES = {
    "one number many times": mapping(format=FORMAT, w=tensor([10**9], [0])),
    "storage larger than its part": mapping(format=FORMAT, w=tensor([10**9], [1], numbers=10**9)),
    "shape without end": mapping(format=FORMAT, w=tensor([2**62, 2**62], [0, 0])),
    "bytes from nothing": mapping(format=FORMAT, w=called(named("builtins", "bytearray"), number(10**9))),
    "laughs for a format": mapping(format=laughs()),
    "laughs for a model": mapping(format=FORMAT, model=laughs()),
    "laughs for weights": mapping(format=FORMAT, model=mapping(weights=laughs())),
    "laughs for versions": mapping(format=number(99), versions=mapping(transferkit=laughs())),
    "a number for a format": mapping(format=number(1 << 1900)),
    "depth for a format": mapping(format=b"]" * 100_000 + b"a" * 99_999),
    "depth": mapping(format=FORMAT, w=b"]" * 100_000 + b"a" * 99_999),
    "numbers without end": mapping(format=FORMAT, w=b"](" + b"N" * 30_000_000 + b"e"),
    "lists without end": mapping(format=FORMAT, w=b"](" + b"]" * 10_000_000 + b"e"),
}


def changed_model(**changes):
    state = dict(model_state(tk.attach_head(tk.load_backbone("vgg11", weights=None, image_size=32), 2)))
    for name, value in changes.items():
        part, _, key = name.partition("__")
        state[part] = {**state[part], key: value} if key else value
    return {"model": state}


MODELS = {
    "head 1e9 wide": {"head__hidden": [10**9]},
    "head 2^40 wide": {"head__hidden": [2**40]},
    "head 2^62 wide": {"head__hidden": [2**62]},
    "head of many layers": {"head__hidden": [1] * 100_000},
    "image of 1e9 pixels": {"preprocessing__image_size": 10**9},
    "image of 2^62 pixels": {"preprocessing__image_size": 2**62},
    "many classes": {"classes": [str(number) for number in range(1_000_000)]},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each reader makes of each file, and by how many MB its process grew meanwhile."""
    folder = tmp_path_factory.mktemp("bombs")
    for name, pickled in PICKLES.items():
        write(folder / f"checkpoint-weights.{name}.pt", pickled)
    for name, changes in MODELS.items():
        torch.save({"format": archive.FORMAT, **changed_model(**changes)}, folder / f"model.{name}.pt")
    write(
        folder / "checkpoint-weights.1e5 parts.pt", mapping(format=FORMAT), [f"a/data/{n}" for n in range(1, 100_000)]
    )
    with zipfile.ZipFile(folder / "checkpoint-weights.inflated.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("a/data.pkl", b"\x80\x02" + mapping(format=FORMAT, w=tensor([10**8], [1], 10**8)) + b".")
        file.writestr("a/byteorder", "little")
        file.writestr("a/version", "3\n")
        with file.open("a/data/0", "w", force_zip64=True) as part:
            for _ in range(400):
                part.write(bytes(10**6))
    with zipfile.ZipFile(folder / "checkpoint-weights.overlapping.pt", "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02" + mapping(format=FORMAT) + b".")
        file.writestr("a/data/0", bytes(10**6))
        file.filelist += [file.filelist[-1]] * 5000
    done = subprocess.run(
        [sys.executable, "-c", READ, str(folder)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


FILES = [*PICKLES, "1e5 parts", "inflated", "overlapping"]
TAKEN = {"laughs for a model", "laughs for weights", "depth"}  # plain lists, which the archive's reader hands on


BOMBS = [
    *(f"checkpoint checkpoint-weights.{name}.pt" for name in FILES),
    *(f"weights checkpoint-weights.{name}.pt" for name in FILES),
    *(f"model model.{name}.pt" for name in MODELS),
]


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused(results, bomb):
    """Read as a checkpoint, as weights or as a model's description a file is refused at once, in less than 200 MB."""
    outcome, grown = results[bomb]

    assert outcome == ("taken" if bomb.startswith("checkpoint") and bomb.split(".")[1] in TAKEN else "refused")
    assert grown < 200


def test_laughs_for_a_model_are_refused(tmp_path, backbone):
    """A list of lists without end in the place of a model is refused by whatever builds or loads one."""
    write(tmp_path / "bomb.pt", PICKLES["laughs for a model"])
    trainer = tk.Trainer(tk.attach_head(backbone, 2), device="cpu")
    for read in (tk.load_model, trainer.load):
        with pytest.raises(CheckpointError, match=r"bomb\.pt (has a list as model|lacks optimizer)"):
            read(tmp_path / "bomb.pt")
