"""Several processes that torchrun starts: the result is that of one, and they end together."""

import json
import multiprocessing
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import distributed

from tiny import environment, make_backbone, make_images, make_model, make_trainer
from transferkit.base import processes
from transferkit.errors import CacheError, ImageError, ProcessError

HERE = Path(__file__).parent


def start(script: str, size: int, *arguments: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a script beside this file in so many processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", f"--max-restarts={restarts}"]
    command = [sys.executable, *(launch if size > 1 else []), str(HERE / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=600, check=False)


def numbers(found: Any) -> list[Any]:
    """Return the leaves of nested lists and dicts; of a text a number that depends on it."""
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, list) else None
    if parts is not None:
        return [leaf for part in parts for leaf in numbers(part)]
    return [crc32(found.encode()) if isinstance(found, str) else found]


def fail(error: Exception) -> None:
    """Raise an error."""
    raise error


# ---- two forked processes, at once


def in_two(work: Any, tmp_path: Path) -> list[Any]:
    """Fork two processes that work together; return what each came to."""

    def run(rank: int) -> None:
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=rank, world_size=2)
        torch.set_num_threads(1)
        queue.put((rank, work(rank)))

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    both = [context.Process(target=run, args=(rank,)) for rank in range(2)]
    try:
        for each in both:
            each.start()
        return [found for _, found in sorted(queue.get() for _ in both)]
    finally:
        for each in both:
            each.kill()
            each.join()


def test_processes_exchange_numbers_rows_and_failures(tmp_path):
    """Sums, rows in order and objects are the same on both, and an error of one is raised by both, with its type."""

    def work(rank):
        rows = processes.gather(torch.full((2 + rank, 3), rank, dtype=torch.bfloat16), "rows")
        none = processes.gather(torch.ones(1, 2) if rank else None, "rows of one")
        found = [processes.total(rank + 1, "numbers"), rows[:, 0].tolist(), none.tolist()]
        found.append(processes.broadcast({"from": rank}, "a value"))
        for error in (ImageError("image 3 is broken"), CacheError("no room", "a line"), OSError("a disk")):
            with pytest.raises((ImageError, CacheError, OSError, ProcessError)) as caught, processes.together("work"):
                fail(error) if rank else processes.total(1, "what the other does not reach")
            found.append(f"{caught.type.__name__}: {caught.value}")
        found.append(processes.total(1, "all is well"))
        return found

    first, second = in_two(work, tmp_path)
    assert first[:4] == second[:4] == [3, [0, 0, 1, 1, 1], [[1, 1]], {"from": 0}]
    assert first[4:] == [
        "ImageError: on rank 1: image 3 is broken",
        "CacheError: on rank 1: no room\na line",
        "ProcessError: on rank 1: OSError: a disk",
        2,
    ]
    assert second[4:] == ["ImageError: image 3 is broken", "CacheError: no room\na line", "OSError: a disk", 2]


def test_nine_images_on_two_processes_are_each_counted_once(tmp_path):
    """Figures and predictions of 9 images, and of one, are those of one process, in the order of the input."""
    data = make_images(9)

    def evaluated(*_):
        trainer = make_trainer(make_model(make_backbone(), "head"))
        one = trainer.predict_proba(data[0][0])
        return [trainer.evaluate(data, batch_size=4), trainer.predict_proba(data[0]).tolist(), one.tolist()]

    first, second = in_two(evaluated, tmp_path)
    assert first == second
    assert numbers(first) == pytest.approx(numbers(evaluated()), abs=1e-6)


# ---- torchrun


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[tuple[int, int], dict[str, Any]]:
    """What each process of one, two and three came to, by their number and its own."""
    folder = tmp_path_factory.mktemp("together")
    results = {}
    for size in (1, 2, 3):
        done = start("together.py", size, str(folder))
        assert done.returncode == 0, done.stderr
        for rank in range(size):
            results[size, rank] = json.loads((folder / f"{size}-{rank}.json").read_text())
    return results


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_come_to_what_one_does(found, size):
    """Training, solving, search, audit, predictions: equal to one process to rounding, and the same on each process."""
    for name in found[size, 0].keys() & found[1, 0].keys():
        expected = found[1, 0][name]
        for rank in range(size):
            assert numbers(found[size, rank][name]) == pytest.approx(numbers(expected), abs=2e-6, rel=1e-5), name
            assert found[size, rank][name] == found[size, 0][name], name


@pytest.mark.slow
def test_what_cannot_be_done_together_is_refused(found):
    """All processes raise, with a sentence that names the cause, and can go on together."""
    expected = {
        "data": "ImageError: on rank 1: .*the disk broke",
        "callback": "ProcessError: on rank 1: ValueError: a fault of my own",
        "not finite": "NonFiniteError: .*the network's input for image",
        "other data": "ProcessError: .*rank 1 has data",
        "other arguments": "ProcessError: .*rank 1 has batch_size 5, rank 0 4",
        "other weights": "ProcessError: .*rank 1 has head",
        "other calls": "ProcessError: .*rank 0 is at fit, rank 1 is at",
        "loader": "ProcessError: .*a DataLoader makes its own batches",
        "batch norm": "ProcessError: .*Freeze it",
        "thread": "ProcessError: .*main thread",
    }
    for name, pattern in expected.items():
        assert re.match(pattern, found[2, 0][name]), found[2, 0][name]
        assert "nothing was raised" not in found[2, 1][name]


@pytest.mark.slow
def test_the_clock_of_the_first_process_decides_what_a_budget_allows(found):
    """With seconds to keep to, both processes train the same, and come to the same."""
    assert found[2, 0]["hurried"] == found[2, 1]["hurried"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The folder of a run in one process that nothing ends."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start("killed.py", 1, str(folder), "nowhere9", "9").returncode == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("where", ["fill1", "step1", "save0"])
def test_a_process_that_is_killed_ends_all_and_a_restart_resumes(tmp_path, undisturbed, where):
    """All end at once; `--max-restarts` goes on from the last checkpoint, to the result of an undisturbed run."""
    again = start("killed.py", 2, str(tmp_path / "again"), where, str(int(signal.SIGKILL)), restarts=2)
    assert again.returncode == 0, again.stderr
    assert ("resumed from" in again.stdout) == (where != "fill1")
    expected = json.loads((undisturbed / "came-to-0.json").read_text())
    for rank in range(2):
        came_to = json.loads((tmp_path / "again" / f"came-to-{rank}.json").read_text())
        assert numbers(came_to) == pytest.approx(numbers(expected), abs=2e-6, rel=1e-5)
    files, others = (
        sorted(path.name for path in (folder / "features").iterdir()) for folder in (undisturbed, tmp_path / "again")
    )
    assert files == others  # they do not depend on the number of processes
    if where == "save0":  # one process reads what two wrote
        assert start("killed.py", 1, str(tmp_path / "again"), "nowhere9", "9").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("where", ["fill0", "step1"])
def test_a_signal_to_one_process_ends_all_and_saves(tmp_path, where):
    """SIGTERM to one process: the first says where the run stopped and saves, and the run can be resumed."""
    done = start("killed.py", 2, str(tmp_path), where, str(int(signal.SIGTERM)))
    assert done.returncode != 0
    stopped = re.search(r"stopped after step (\d)", done.stdout)
    assert stopped, done.stdout
    assert "saved to" in done.stdout
    assert [path.name for path in (tmp_path / "run").glob(f"step-*{stopped[1]}.pt")]
