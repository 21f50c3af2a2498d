"""Several processes that torchrun starts: the result is that of one, and they end together."""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor, distributed, nn

import transferkit as tk
from tiny import environment, make_backbone, make_images, make_model, make_trainer, summed
from transferkit.base import processes
from transferkit.errors import ArgumentError, CacheError, ImageError, OutOfMemoryError, ProcessError
from transferkit.features import cache, prefix

HERE = Path(__file__).parent


def begin(command: Sequence[str], **changes: str) -> subprocess.Popen[str]:
    """Start a program, in a group of its own."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=environment(**changes), start_new_session=True
    )


def launched(script: str, size: int, *arguments: str, restarts: int = 0) -> subprocess.Popen[str]:
    """Start a script beside this file in so many processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", f"--max-restarts={restarts}"]
    return begin([sys.executable, *(launch if size > 1 else []), str(HERE / script), *arguments])


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a program."""
    try:
        printed, errors = process.communicate(timeout=600)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, printed, errors)


def start(script: str, size: int, *arguments: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a script beside this file in so many processes."""
    return ended(launched(script, size, *arguments, restarts=restarts))


def numbers(found: Any) -> list[Any]:
    """Return the leaves of nested lists and dicts; of a text a number that depends on it."""
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, list) else None
    if parts is not None:
        return [leaf for part in parts for leaf in numbers(part)]
    return [crc32(found.encode()) if isinstance(found, str) else found]


def fail(error: Exception) -> None:
    """Raise an error."""
    raise error


# ---- forked processes, at once

FORK = multiprocessing.get_context("fork")


def in_two(work: Callable[[int], Any], tmp_path: Path, *, jobs: int = 1) -> list[Any]:
    """Fork two processes that work together, for each job; return what each came to. The second job's are 2 and 3."""

    def run(number: int) -> None:
        job, rank = divmod(number, 2)
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting-{job}", rank=rank, world_size=2)
        torch.set_num_threads(1)
        try:
            queue.put((number, work(number)))
        except BaseException as error:
            queue.put((number, repr(error)))
            raise

    queue = FORK.SimpleQueue()
    every = [FORK.Process(target=run, args=(number,)) for number in range(2 * jobs)]
    try:
        for each in every:
            each.start()
        found = dict(queue.get() for _ in every)
        return [found[number] for number in range(2 * jobs)]
    finally:
        for each in every:
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


class Hungry(nn.Module):
    """Asks for 256 MB for each image in training; the second process has so much for a few `images` in all."""

    def __init__(self, images: float) -> None:
        super().__init__()
        self.images = images
        self.refused: list[int] = []

    def forward(self, inputs: Tensor) -> Tensor:
        before = resource.getrlimit(resource.RLIMIT_AS)
        if processes.rank() == 1 and self.training:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            limit = used + int(self.images * 2**28)  # of now; below 0 what threads free at their end is no room
            resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
        try:
            torch.empty(len(inputs), 2**26)
        except RuntimeError:
            self.refused.append(len(inputs))
            raise
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
        return inputs


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: /proc and RLIMIT_AS")
def test_memory_that_runs_out_in_one_process_ends_both_or_changes_nothing(tmp_path):
    """That process goes on with smaller parts; without room for one image, or for features, both say or do the same."""

    def trained(images: float, share: float = 0.5) -> list[Any]:
        trainer = make_trainer(make_model(make_backbone(), "block5"))
        trainer.model.head.append(hungry := Hungry(images))
        cache.MEMORY_SHARE = share
        trainer.fit(make_images(24), batch_size=12, epochs=1, verbose=0)
        return [summed(trainer.model), hungry.refused]

    def work(rank: int) -> list[Any]:
        little = trained(3.5)
        with pytest.raises(OutOfMemoryError) as caught:
            trained(-1.0)
        return [little, str(caught.value), trained(99, share=0 if rank else 0.5)[0]]

    first, second = in_two(work, tmp_path)
    expected = numbers(trained(99)[0])
    for found in (first, second):
        assert numbers(found[0][0]) == pytest.approx(expected, abs=1e-6)
        assert numbers(found[2]) == pytest.approx(expected, abs=1e-6)
    assert first[0][1] == []
    assert second[0][1] == [12, 6, 6]  # where the head's features are measured, and in a step
    assert "the head's features, even one image at a time" in second[1]
    assert first[1] == f"on rank 1: {second[1]}"


def test_two_jobs_share_a_folder_of_features_and_not_one_of_checkpoints(tmp_path, monkeypatch):
    """Both fill the folder at once, with the result of a job alone; the checkpoints of one are refused to the other."""
    monkeypatch.setattr(prefix, "_PIXELS_ON_CPU", 4 * 32**2)
    monkeypatch.setattr(cache, "CHUNK_IMAGES", 4)
    barrier = FORK.Barrier(4, timeout=60)

    def trained(folder: Path, *callbacks: Any) -> dict[str, Any]:
        trainer = make_trainer(make_model(make_backbone(), "block5"), cache=folder)
        trainer.fit(make_images(23), batch_size=5, epochs=1, verbose=0, callbacks=callbacks)
        return summed(trainer.model)

    def both_wait(*_: object) -> None:
        barrier.wait()  # until the other job has been refused
        barrier.wait()

    def work(number: int) -> list[Any]:
        barrier.wait()
        found = trained(tmp_path / "both")
        saves = tk.Checkpoint(tmp_path / "run")
        if number < 2:
            return [found, trained(tmp_path / "both", saves, both_wait)]
        barrier.wait()
        with pytest.raises(ArgumentError) as caught:
            trained(tmp_path / "both", saves)
        barrier.wait()
        return [found, str(caught.value)]

    expected = numbers(trained(tmp_path / "alone"))
    *ours, other, last = in_two(work, tmp_path, jobs=2)
    for found in (*(figures for own in ours for figures in own), other[0], last[0]):
        assert numbers(found) == pytest.approx(expected, abs=1e-6)
    assert other[1] == f"another process saves its run to {tmp_path / 'run'}: name another folder."
    assert last[1] == f"on rank 0: {other[1]}"
    files, others = ({path.name for path in (tmp_path / name).iterdir()} for name in ("alone", "both"))
    assert files == others


# ---- torchrun


@pytest.fixture(scope="module")
def hung(tmp_path_factory) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """The folder of a run whose second process stops for good in the fill; begun first, for it waits for 50 s."""
    folder = tmp_path_factory.mktemp("hung")
    with launched("killed.py", 2, str(folder), "fill1", str(int(signal.SIGSTOP)), restarts=1) as process:
        yield folder, process
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def found(tmp_path_factory, hung) -> dict[tuple[int, int], dict[str, Any]]:
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
        "thread": "ProcessError: .*Call it in the thread MainThread",
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


def check_result(folder: Path, undisturbed: Path, *, size: int = 2, computed: int) -> None:
    """Check that a run came to the result of an undisturbed one, and for how many images it computed features."""
    *expected, all_images = json.loads((undisturbed / "came-to-0.json").read_text())
    assert all_images == 23
    results = [json.loads((folder / f"came-to-{rank}.json").read_text()) for rank in range(size)]
    for found in results:
        assert numbers(found[:2]) == pytest.approx(numbers(expected), abs=2e-6, rel=1e-5)
    assert sum(found[2] for found in results) == computed
    names = {path.name for path in (undisturbed / "features").iterdir()}
    for features in folder.glob("features*"):
        assert {path.name for path in features.iterdir()} == names  # which do not depend on the number of processes


def check_kept(folder: Path) -> None:
    """Check that chunks which were there when a process ended have stayed."""
    kept = json.loads((folder / "written.json").read_text())
    assert len(kept) == 3
    assert kept == {name: (folder / "features" / name).stat().st_mtime_ns for name in kept}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["fill1", "step1", "save0"])
def test_a_process_that_is_killed_ends_all_and_a_restart_resumes(tmp_path, undisturbed, where):
    """All end at once; `--max-restarts` goes on from the last checkpoint and from the chunks of features that exist."""
    folder = tmp_path / "again"
    again = start("killed.py", 2, str(folder), where, str(int(signal.SIGKILL)), restarts=2)
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stdout or where == "fill1"
    check_result(folder, undisturbed, computed=23 - 12 if where == "fill1" else 0)
    if where == "fill1":
        check_kept(folder)
    if where == "save0":  # one process reads what two wrote
        assert start("killed.py", 1, str(folder), "nowhere9", "9").returncode == 0


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


@pytest.mark.slow
def test_a_process_that_hangs_ends_all_and_a_restart_resumes(hung, undisturbed):
    """The others name it when they have waited for as long as is set; torchrun then kills it and starts all again."""
    folder, process = hung
    done = ended(process)
    assert done.returncode == 0, done.stderr
    assert re.search(r"rank0.*ProcessError: rank 1 did not come to the next features within 20 s: hangs", done.stderr)
    check_result(folder, undisturbed, computed=23 - 12)
    check_kept(folder)


# ---- several hosts


def run_ip(*arguments: str) -> None:
    """Run the command `ip`; skip the test where it is not allowed."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip")
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture(params=["one machine", "two network namespaces"])
def hosts(request) -> Iterator[list[tuple[list[str], str, str]]]:
    """What begins a command on each of two hosts, the host's address and its network interface."""
    if request.param == "one machine":
        yield [([], "127.0.0.1", "lo")] * 2
        return
    names = [f"transferkit-{os.getpid()}-{host}" for host in range(2)]
    try:
        for name in names:
            run_ip("netns", "add", name)
        run_ip("link", "add", "tk0", "netns", names[0], "type", "veth", "peer", "name", "tk1", "netns", names[1])
        for host, name in enumerate(names):
            run_ip("-n", name, "address", "add", f"10.77.0.{host + 1}/24", "dev", f"tk{host}")
            for interface in ("lo", f"tk{host}"):
                run_ip("-n", name, "link", "set", interface, "up")
        yield [(["ip", "netns", "exec", name], f"10.77.0.{host + 1}", f"tk{host}") for host, name in enumerate(names)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.mark.slow
def test_hosts_with_folders_of_their_own_compute_each_image_once(tmp_path, undisturbed, hosts):
    """Three processes on two hosts come to the result of one; each host's folder then holds all features."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    running = []
    for host, (command, address, interface) in enumerate(hosts):
        launch = [f"--rdzv-endpoint={hosts[0][1]}:{port}", f"--rdzv-conf=is_host={int(host == 0)}"]
        launch += ["--rdzv-backend=c10d", "--rdzv-id=hosts", f"--local-addr={address}"]
        launch += ["--nnodes=2", f"--nproc-per-node={2 - host}", str(HERE / "killed.py"), str(tmp_path), "hosts"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *launch]
        running.append(begin([*command, *torchrun], GLOO_SOCKET_IFNAME=interface))
    done = [ended(process) for process in running]
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    assert "features of 23 images: computed by 3 processes" in "".join(each.stdout for each in done)
    assert len(list(tmp_path.glob("features of host *"))) == 2
    check_result(tmp_path, undisturbed, size=3, computed=23)
