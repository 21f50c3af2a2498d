"""Mutate files that transferkit reads, and check that each is refused with the library's own error or read right.

    python fuzz/fuzz_files.py --files 20000 --seed 0

A file may be damaged (bits, blocks), spliced (put together of whole files, damaged or not, or with parts named twice),
or forged (with right checksums). A damaged or spliced one must be refused or give the same content; in torch's old
format, which has no checksums, a warning must come with other content. A forged one may give other content, but no
other exception, crash, hang or running code. Every finding is printed with the arguments to repeat it. Files are read
in batches, each in a forked process with limits on memory and time.
"""

import argparse
import hashlib
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
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
    return tk.Trainer(tk.attach_head(backbone, ["cat", "dog"]), device="cpu", precision="fp32")


def make_files(folder: Path) -> dict[str, bytes]:
    """Return one valid file of each kind."""
    trainer = make_trainer()
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    trainer.fit((images, torch.arange(8) % 2), batch_size=4, verbose=0)
    trainer.save(folder / "checkpoint")
    torch.save(trainer.model.state_dict(), folder / "weights")
    torch.save(trainer.model.state_dict(), folder / "old weights", _use_new_zipfile_serialization=False)
    images = [number.to_bytes(16, "big") for number in range(20)]
    write_features(folder, LAYERS, images, torch.rand(20, 2, 2, 16)).path.rename(folder / "features")
    return {kind: (folder / kind).read_bytes() for kind in READERS}


def read_features(path: Path) -> object:
    """Read a file of features: what it holds, and the features."""
    file = open_features(path, layers=LAYERS, shape=(2, 2, 16), dtype=torch.float32)
    return {"images": file.images, "features": file.read().clone()}


def read_both(path: Path) -> object:
    """Read a checkpoint as a state, into a trainer, and now and then as a model, which takes half a second."""
    state = read_checkpoint(path)
    if path.stat().st_size % 16 == 0:
        with suppress(TransferKitError):  # a valid one is refused, too: no VGG16 is so small
            tk.load_model(path)
    make_trainer().load(path)
    return state


READERS: dict[str, tuple[Callable[[Path], object], type[Exception]]] = {
    "checkpoint": (read_both, TransferKitError),
    "weights": (read_state_dict, WeightsError),
    "old weights": (read_state_dict, WeightsError),
    "features": (read_features, CacheError),
}


def content_of(kind: str, path: Path) -> bytes:
    """Return all that a reader reads, types and dtypes included, as bytes to compare."""
    file = io.BytesIO()
    torch.save(detached(READERS[kind][0](path)), file)
    return file.getvalue()


def detached(state: object) -> object:
    """Return a state without what may hang on its tensors, such as forged hooks."""
    if isinstance(state, dict):
        return {key: detached(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(detached, state))
    return state.detach() if isinstance(state, torch.Tensor) else state


def damage(content: bytes, other: bytes, dice: random.Random) -> bytes:
    """Return the content with one to four accidents: flipped bits, and lost, zeroed, moved or foreign blocks."""
    for _ in range(dice.randint(1, 4)):
        start, size = dice.randrange(len(content) + 1), dice.choice((1, 4, 64, 512, 4096))
        before, block, after = content[:start], content[start : start + size], content[start + size :]
        flipped = bytes(byte ^ (1 << dice.randrange(8)) for byte in block[: dice.choice((1, 64))])
        place = dice.randrange(len(content) + 1)
        content = dice.choice(
            (
                before + flipped + block[len(flipped) :] + after,
                before,
                before + after,
                before + block + block + after,
                before + bytes(len(block)) + after,
                content[:place] + block + content[place + len(block) :],
                before + other[start : start + size] + after,
                before + other[start:],
                dice.randbytes(size) + content,
            )
        )
    return content


def splice(content: bytes, other: bytes, dice: random.Random) -> bytes:
    """Return files end to end, one of them damaged or not, or an archive of whose parts some are there twice."""
    broken, kind = damage(content, other, dice), dice.randrange(6)
    if kind < 3:
        pieces = [content, broken, dice.choice((content, broken, other, dice.randbytes(64)))]
        dice.shuffle(pieces)
        return b"".join(pieces[: dice.randint(2, 3)])
    if kind == 3:
        cut, again = sorted(dice.randrange(len(content) + 1) for _ in range(2))
        return content[:again] + content[cut:]
    if not content.startswith(b"PK"):
        return content + broken
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = [(name, archive.read(name)) for name in archive.namelist()]
    spliced = io.BytesIO()
    with zipfile.ZipFile(spliced, "w") as archive:
        for name, part in (
            dice.sample(parts, len(parts)) if dice.random() < 0.3 else parts
        ):  # the first names the folder
            archive.writestr(name, part)
        for name, part in dice.sample(parts, dice.randint(1, 3)):
            cased = dice.choice((name, name.upper(), name.swapcase(), name.replace("archive", "Archive")))
            archive.writestr(cased, dice.choice((part, damage(part, other, dice))))
    return spliced.getvalue()


def forge_archive(content: bytes, other: bytes, dice: random.Random) -> bytes:
    """Return an archive with right checksums whose parts were mutated, lost, doubled, renamed or packed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = [(name, archive.read(name)) for name in archive.namelist()]
    packing = zipfile.ZIP_STORED
    for _ in range(dice.randint(1, 3)):
        pickles = [number for number, (name, _) in enumerate(parts) if name.endswith("data.pkl")]
        number = dice.choice(pickles) if pickles and dice.random() < 0.7 else dice.randrange(len(parts))
        name, part = parts[number]
        kind = dice.randrange(12)
        if kind < 5:
            parts[number] = name, damage(part, other, dice)
        elif kind < 8:  # one opcode or number of the pickle
            place = dice.randrange(len(part) + 1)
            parts[number] = name, part[:place] + dice.choice(_OPCODES) + part[place + dice.randint(0, 3) :]
        elif kind == 8 and len(parts) > 1:
            del parts[number]
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
    *(b"c" + name + b"\n" for name in (b"os\nsystem", b"torch\nSize", b"collections\nOrderedDict")),
    *(b"ctorch._utils\n_rebuild_" + name + b"\n" for name in (b"parameter", b"sparse_tensor")),
    b"h\0" * 40,
    b"(" * 5000,
    b"]q\0" + b"h\0a" * 3,
)

_VALUES = (None, [], {}, -1, 0, 2**40, 2**63, 10**400, 1.5, "x", [2**32, 2**32], [-20, -64], [[1]], True, "bfloat16")


def forge_features(content: bytes, other: bytes, dice: random.Random) -> bytes:
    """Return a file of features whose first page was changed and has the right SHA-256."""
    page = json.loads(content[65:4096])
    for _ in range(dice.randint(1, 2)):
        key = dice.choice([*page, "more"])
        if dice.random() < 0.2:
            page.pop(key, None)
        elif key == "shape" and isinstance(page[key], list) and page[key] and dice.random() < 0.5:
            page[key][dice.randrange(len(page[key]))] = dice.choice(_VALUES)
        else:
            page[key] = dice.choice(_VALUES)
    text = json.dumps(dice.choice((page, page, page, [page], "page"))).encode()
    numbers = content[4096:] if dice.random() < 0.8 else damage(content[4096:], other, dice)
    return b"\n".join((hashlib.sha256(text).hexdigest().encode(), text)).ljust(4096) + numbers


def mutate(files: dict[str, bytes], seed: int) -> tuple[str, str, bytes]:
    """Return the kind of a file, what is done to it, and its content."""
    dice = random.Random(seed)  # noqa: S311
    kind = dice.choice(("checkpoint", "checkpoint", "weights", "old weights", "features"))
    how = dice.choice(("damaged", "spliced", "forged") if kind != "old weights" else ("damaged", "spliced"))
    forge = forge_features if kind == "features" else forge_archive
    change = {"damaged": damage, "spliced": splice, "forged": forge}[how]
    return kind, how, change(files[kind], files[dice.choice(list(files))], dice)


def check(files: dict[str, bytes], contents: dict[str, bytes], seed: int, path: Path) -> str:
    """Read one mutated file and return the result, which begins with FINDING if it is a fault."""
    kind, how, mutated = mutate(files, seed)
    path.write_bytes(mutated)
    label = f"{kind}, {how}"
    told: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            content = content_of(kind, path)
    except READERS[kind][1]:
        return f"{label}: refused"
    except BaseException as error:  # noqa: BLE001 - each other one is a finding
        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"FINDING {label}: {type(error).__name__}: {str(error)[:150]!r} ({Path(at.filename).name}:{at.lineno})"
    if content == contents[kind]:
        return f"{label}: identical"
    if kind == "old weights" and any("has no checksums" in str(warning.message) for warning in told):
        return f"{label}: other content, with a warning"
    return f"{label}: other content" if how == "forged" else f"FINDING {label}: read, and not the same"


def run_batch(files: dict[str, bytes], contents: dict[str, bytes], seeds: range) -> list[tuple[int, str]]:
    """Read a batch in a process of its own and return the results, a crash or hang included."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(BATCH_S)  # ends the process
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        with tempfile.TemporaryDirectory() as name:
            for seed in seeds:
                os.write(writer, f"{json.dumps([seed, check(files, contents, seed, Path(name) / 'file')])}\n".encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines:
        results = [(seed, text) for seed, text in map(json.loads, lines)]
    status = os.waitpid(child, 0)[1]
    if len(results) < len(seeds):
        fault = "it hangs" if status == signal.SIGALRM else f"the process died, status {status}"
        results.append((seeds[len(results)], f"FINDING {fault}"))
    return results


def main() -> int:
    """Fuzz for a while, or so many files; return 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--files", type=int, help="mutate so many instead")
    parser.add_argument("--seed", type=int, default=0, help="of the first file; the others follow")
    parser.add_argument("--keep", type=Path, help="a folder for the files of findings")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        files = make_files(Path(name))
        contents = {kind: content_of(kind, Path(name) / kind) for kind in READERS}
    counts: Counter[str] = Counter()
    first: dict[str, int] = {}
    seed, ends = arguments.seed, time.monotonic() + 60 * arguments.minutes
    last = arguments.seed + (arguments.files or 0)
    while seed < last if arguments.files else time.monotonic() < ends:
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
