"""Mutate files that transferkit reads, and see that each is refused with the library's own error or read right.

    python fuzz/fuzz_files.py --minutes 1 --seed 0

Each batch of files is read in a forked process with a memory limit and a time limit. Damage must be refused or leave
the content as it was. A forgery, whose checksums are right, may hold other content, but nothing else may come of it: no
other exception, no crash, no hang, no code run. Every finding is printed with the arguments that repeat it.
"""

import argparse
import hashlib
import io
import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torchvision.models.vgg import make_layers

import transferkit as tk
from transferkit.data.preprocessing import CONVENTIONS
from transferkit.errors import CacheError, TransferKitError, WeightsError
from transferkit.features.file import open_features, write_features
from transferkit.model.weights import read_state_dict
from transferkit.saving.archive import read_checkpoint

BATCH = 40
BATCH_S = 60
MEMORY_BYTES = 2 * 10**9
LAYERS = hashlib.sha256(b"fuzz").hexdigest()


def make_trainer() -> tk.Trainer:
    """Return a trainer of a tiny network."""
    torch.manual_seed(0)
    features = make_layers([4, "M", 4, "M", 8, "M", 8, "M", 8, "M"])
    backbone = tk.Backbone("vgg16", features, CONVENTIONS["IMAGENET1K_V1"].with_image_size(32))
    model = tk.attach_head(backbone, ["cat", "dog"])
    return tk.Trainer(model, device="cpu", precision="fp32")


def make_files(folder: Path) -> dict[str, bytes]:
    """Return one valid file of each kind."""
    trainer = make_trainer()
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    trainer.fit((images, torch.arange(8) % 2), batch_size=4, verbose=0)
    trainer.save(folder / "checkpoint")
    torch.save(trainer.model.state_dict(), folder / "weights")
    images = [number.to_bytes(16, "big") for number in range(20)]
    write_features(folder, LAYERS, images, torch.rand(20, 2, 2, 16)).path.rename(folder / "features")
    return {kind: (folder / kind).read_bytes() for kind in READERS}


def read_features(path: Path) -> object:
    """Read a file of features: what it holds, and the features."""
    file = open_features(path, layers=LAYERS, shape=(2, 2, 16), dtype=torch.float32)
    return {"images": file.images, "features": file.read().clone()}


def read_both(path: Path) -> object:
    """Read a checkpoint as a state, into a trainer and as a model (which no tiny network is)."""
    state = read_checkpoint(path)
    if path.stat().st_size % 16 == 0:  # now and then: it takes half a second
        with suppress(TransferKitError):
            tk.load_model(path)
    make_trainer().load(path)
    return state


READERS: dict[str, Callable[[Path], object]] = {
    "checkpoint": read_both,
    "weights": read_state_dict,
    "features": read_features,
}
ERRORS = {"checkpoint": TransferKitError, "weights": WeightsError, "features": CacheError}


def damage(content: bytes, other: bytes, dice: random.Random) -> bytes:
    """Return the content with one to four accidents: flipped bits, lost, doubled, moved or foreign blocks."""
    for _ in range(dice.randint(1, 4)):
        start, size = dice.randrange(len(content) + 1), dice.choice((1, 4, 64, 512, 4096))
        block = content[start : start + size]
        place = dice.randrange(len(content) + 1)
        flipped = bytes(byte ^ (1 << dice.randrange(8)) for byte in block[: dice.choice((1, 1, 1, 64))])
        content = dice.choice(
            (
                content[:start] + flipped + content[start + len(flipped) :],
                content[:start],
                content[:start] + content[start + size :],
                content[:start] + block + content[start:],
                content[:start] + bytes(len(block)) + content[start + size :],
                content[:place] + block + content[place + len(block) :],
                content[:start] + other[start : start + size] + content[start + size :],
                content[:start] + other[start:],
                content + dice.randbytes(size),
                dice.randbytes(size) + content,
            )
        )
    return content


def forge_archive(content: bytes, other: bytes, dice: random.Random) -> bytes:
    """Return an archive whose checksums are right and whose parts were mutated, lost, doubled, renamed or packed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = [(name, archive.read(name)) for name in archive.namelist()]
    pickled = next(number for number, (name, _) in enumerate(parts) if name.endswith("data.pkl"))
    packing = zipfile.ZIP_STORED
    for _ in range(dice.randint(1, 3)):
        number = pickled if dice.random() < 0.7 else dice.randrange(len(parts))
        name, part = parts[number]
        kind = dice.randrange(12)
        if kind < 5:
            parts[number] = name, damage(part, other, dice)
        elif kind < 8 and part:  # one opcode or number of the pickle
            place = dice.randrange(len(part))
            parts[number] = name, part[:place] + dice.choice(_OPCODES) + part[place + dice.randint(0, 3) :]
        elif kind == 8 and len(parts) > 1:
            parts.remove(parts[number])
            pickled = 0
        elif kind == 9:
            parts.append((name, part))
        elif kind == 10:
            parts[number] = dice.choice(("../" + name, "/etc/x", name + "\0", "archive/data/999", "x" * 300)), part
        else:
            packing = zipfile.ZIP_DEFLATED
    forged = io.BytesIO()
    with zipfile.ZipFile(forged, "w", packing) as archive:
        for name, part in parts:
            archive.writestr(name, part)
    return forged.getvalue()


_OPCODES = (
    *(bytes([code]) for code in b"()]}.0NRXcbehjlopqrstu\x80\x81\x85\x86\x87\x88\x89\x93\x94"),
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",  # a whole number of eight bytes
    b"\x8b\xff\xff\xff\x7f",  # one of two gigabytes
    b"J\xff\xff\xff\xff",
    b"X\xff\xff\xff\x7f",  # a text of two gigabytes
    b"G\x7f\xf8\0\0\0\0\0\0",  # not a number
    b"cos\nsystem\n",
    b"ctorch\nSize\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch._utils\n_rebuild_sparse_tensor\n",
    b"ccollections\nOrderedDict\n",
    b"h\0" * 40,
    b"(" * 5000,
    b"]q\0" + b"h\0a" * 3,
)


def forge_features(content: bytes, other: bytes, dice: random.Random) -> bytes:
    """Return a file of features whose first page was changed and has the right SHA-256."""
    page = json.loads(content[65:4096])
    values = (
        None,
        [],
        {},
        -1,
        0,
        2**40,
        2**63,
        10**400,
        1.5,
        "x",
        [2**32, 2**32],
        [0],
        [-20, -64],
        [[1]],
        True,
        "bfloat16",
    )
    for _ in range(dice.randint(1, 2)):
        key = dice.choice([*page, "more"])
        if dice.random() < 0.2:
            page.pop(key, None)
        elif key == "shape" and isinstance(page.get("shape"), list) and page["shape"] and dice.random() < 0.5:
            page["shape"][dice.randrange(len(page["shape"]))] = dice.choice(values)
        else:
            page[key] = dice.choice(values)
    text = json.dumps(dice.choice((page, page, page, [page], "page"))).encode()
    numbers = content[4096:] if dice.random() < 0.8 else damage(content[4096:], other, dice)
    return b"\n".join((hashlib.sha256(text).hexdigest().encode(), text)).ljust(4096) + numbers


def same(one: object, other: object) -> bool:
    """Say whether two contents are equal bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def mutate(files: dict[str, bytes], seed: int) -> tuple[str, bool, bytes]:
    """Return the kind of a file, whether it is forged, and its content."""
    dice = random.Random(seed)  # noqa: S311
    kind = dice.choice(("checkpoint", "checkpoint", "weights", "features"))
    other = files[dice.choice(list(files))]
    if dice.random() < 0.5:
        return kind, False, damage(files[kind], other, dice)
    return kind, True, (forge_features if kind == "features" else forge_archive)(files[kind], other, dice)


def check(files: dict[str, bytes], contents: dict[str, object], seed: int, folder: Path) -> str:
    """Read one mutated file; return what came of it, beginning with FINDING if that may not be."""
    kind, forged, content = mutate(files, seed)
    path = folder / "file"
    path.write_bytes(content)
    label = f"{kind}, {'forged' if forged else 'damaged'}"
    try:
        read = READERS[kind](path)
    except ERRORS[kind]:
        return f"{label}: refused"
    except BaseException as error:  # noqa: BLE001 - each other one is a finding
        at = traceback.extract_tb(error.__traceback__)[-1]
        line = str(error).splitlines()[0][:150] if str(error) else ""
        return f"FINDING {label}: {type(error).__name__}: {line} ({Path(at.filename).name}:{at.lineno})"
    if same(read, contents[kind]):
        return f"{label}: identical"
    return f"{label}: other content" if forged else f"FINDING {label}: read, and not the same"


@contextmanager
def limited_memory() -> Iterator[None]:
    """Let this process take so much more memory than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    yield


def run_batch(files: dict[str, bytes], contents: dict[str, object], seeds: range) -> list[tuple[int, str]]:
    """Read a batch in a process of its own; return what came of each, a crash or hang included."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = 1
        try:
            with limited_memory(), tempfile.TemporaryDirectory() as name, os.fdopen(writer, "w") as report:
                for seed in seeds:
                    report.write(f"{seed} {check(files, contents, seed, Path(name))!r}\n")
                    report.flush()
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    told, ends = b"", time.monotonic() + BATCH_S
    while select.select([reader], [], [], max(0, ends - time.monotonic()))[0] and (part := os.read(reader, 65536)):
        told += part
    os.close(reader)
    late = time.monotonic() >= ends
    if late:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    results = [(int(seed), text[1:-1]) for seed, text in (line.split(" ", 1) for line in told.decode().splitlines())]
    if status != 0 and len(results) < len(seeds):
        results.append((seeds[len(results)], f"FINDING {'it hangs' if late else f'the process died, status {status}'}"))
    return results


def main() -> int:
    """Fuzz for a while; return 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first file; the others follow")
    parser.add_argument("--keep", type=Path, help="a folder for the files of findings")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = make_files(folder)
        contents = {kind: READERS[kind](folder / kind) for kind in READERS}
    counts: Counter[str] = Counter()
    first: dict[str, int] = {}
    seed, ends = arguments.seed, time.monotonic() + 60 * arguments.minutes
    while time.monotonic() < ends:
        results = run_batch(files, contents, range(seed, seed + BATCH))
        for number, text in results:
            counts[text] += 1
            if text.startswith("FINDING") and first.setdefault(text, number) == number and arguments.keep:
                (arguments.keep / f"{number}").write_bytes(mutate(files, number)[2])
        seed = results[-1][0] + 1
    for text, count in sorted(counts.items()):
        repeat = f"   [--minutes 0.01 --seed {first[text]}]" if text in first else ""
        print(f"{count:8,}  {text}{repeat}")  # noqa: T201
    return bool(first)


if __name__ == "__main__":
    sys.exit(main())
