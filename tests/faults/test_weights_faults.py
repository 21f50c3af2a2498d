"""Weight files from real servers on this machine, under faults of the disk, the network and other processes."""

import hashlib
import http.server
import io
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from torchvision.models.vgg import make_layers

import transferkit as tk
from transferkit.errors import TransferKitError, WeightsDownloadError, WeightsError
from transferkit.model import weights


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked[self.path] += 1
        name = self.path.rsplit("/", 1)[-1]
        status, headers, body = self.server.answers.get(name, (404, {}, b"no such file"))
        self.server.gate.wait(20)
        self.send_response(status)
        for header, value in {"Content-Length": str(len(body)), **headers}.items():
            if value is not None:
                self.send_header(header, value)
        self.end_headers()
        self.wfile.write(body)
        if self.server.stall:
            self.server.ended.wait(20)

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.answers, self.asked, self.stall = {}, Counter(), False
        self.gate, self.ended = threading.Event(), threading.Event()
        self.gate.set()

    def serve(self, name, body, status=200, **headers):
        self.answers[name] = status, headers, body
        return f"http://127.0.0.1:{self.server_address[1]}/models/{name}"


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.gate.set()
        server.ended.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def body():
    """A real file of weights, of 1.2 MB: more than one chunk."""
    file = io.BytesIO()
    torch.save({"a": torch.arange(300_000.0)}, file)
    return file.getvalue()


@pytest.fixture
def name(body):
    return f"net-{hashlib.sha256(body).hexdigest()[:16]}.pth"


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def closed_url(name):
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/{name}"


# --- downloads


@pytest.mark.parametrize("digits", [8, 64])
def test_a_file_is_downloaded_into_the_folder(server, body, tmp_path, digits):
    """A file with the hash in its name arrives whole, in a folder made for it, readable by others like any new file."""
    name = f"net-{hashlib.sha256(body).hexdigest()[:digits]}.pth"
    (tmp_path / "plain").touch()

    path = weights.download(server.serve(name, body), tmp_path / "new" / "folder")

    assert path == tmp_path / "new" / "folder" / name
    assert path.read_bytes() == body
    assert files_in(tmp_path / "new") == [name]
    assert oct(path.stat().st_mode) == oct((tmp_path / "plain").stat().st_mode)
    assert torch.equal(weights.read_state_dict(path)["a"], torch.arange(300_000.0))


def test_the_folder_is_torch_hubs_by_default(server, body, name, tmp_path, monkeypatch):
    """Without a folder the file lies where torchvision looks for it."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    assert weights.download(server.serve(name, body)) == tmp_path / "checkpoints" / name


def test_a_good_copy_needs_no_server(body, name, tmp_path):
    """A file that is in the folder already is not asked for again."""
    (tmp_path / name).write_bytes(body)

    assert weights.download(closed_url(name), tmp_path) == tmp_path / name


@pytest.mark.parametrize("known", [False, True], ids=["in the name", "in the table"])
def test_a_hash_is_compared_to_its_last_digit(server, body, tmp_path, monkeypatch, known):
    """All 64 digits, from the name or the library's table, are compared: in a download, and in a copy that is there."""
    right = hashlib.sha256(body).hexdigest()
    wrong = right[:-1] + ("0" if right[-1] != "0" else "1")
    name = f"net-{wrong[:8] if known else wrong}.pth"
    monkeypatch.setattr(weights, "_FULL_SHA256", {name: wrong} if known else {})

    with pytest.raises(WeightsError, match=r"does not have the SHA-256 in its name\. Nothing was kept"):
        weights.download(server.serve(name, body), tmp_path)
    assert files_in(tmp_path) == []
    (tmp_path / name).write_bytes(body)
    with pytest.raises(WeightsError, match=rf"got SHA-256 {right}, expected {wrong}\. It has not been opened"):
        weights.download(closed_url(name), tmp_path)


def test_a_name_without_hash_is_refused_before_anything_is_fetched(server, body, tmp_path):
    """A file that could not be verified is refused without being asked for, and nothing is kept."""
    with pytest.raises(WeightsError, match=r"net\.pth has no SHA-256 in its name: expected.*vgg16-397923af\.pth"):
        weights.download(server.serve("net.pth", body), tmp_path)
    assert files_in(tmp_path) == []
    assert server.asked.total() == 0


def test_a_body_cut_short_is_a_download_error(server, body, name, tmp_path):
    """A connection that ends before the announced length is a broken download, not a wrong file; nothing is kept."""
    url = server.serve(name, body[:-1000], **{"Content-Length": str(len(body))})

    with pytest.raises(WeightsDownloadError, match=rf"could not download .*{name}.*bytes.*Nothing was kept"):
        weights.download(url, tmp_path)
    assert files_in(tmp_path) == []


def test_a_stalled_server_is_a_download_error(server, body, name, tmp_path, monkeypatch):
    """A server that goes silent in mid-file is given up after the time limit; nothing is kept."""
    monkeypatch.setattr(weights, "TIMEOUT_S", 0.2)
    server.stall = True
    url = server.serve(name, body[:-1000], **{"Content-Length": str(len(body))})

    with pytest.raises(WeightsDownloadError, match=r"timed out.*Nothing was kept.*pass its path"):
        weights.download(url, tmp_path)
    assert files_in(tmp_path) == []


def test_a_refused_connection_is_a_download_error(tmp_path):
    """Where nobody listens there is one clear error, also an OSError; nothing is kept."""
    with pytest.raises(OSError, match=r"net-0123abcd\.pth to .*refused.*Without a network.*pass its path") as caught:
        weights.download(closed_url("net-0123abcd.pth"), tmp_path)
    assert isinstance(caught.value, WeightsDownloadError)
    assert files_in(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_a_download_error(server, body, name, tmp_path):
    """A file where the folder should be is one clear error with the path, before anything is fetched."""
    (tmp_path / "taken").touch()

    with pytest.raises(WeightsDownloadError, match=r"taken.*Nothing was kept.*pass its path"):
        weights.download(server.serve(name, body), tmp_path / "taken")
    assert server.asked.total() == 0


def test_an_interrupted_download_leaves_nothing(server, body, name, tmp_path, monkeypatch):
    """Ctrl-C in mid-download leaves no file behind."""

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        weights.download(server.serve(name, body), tmp_path)
    assert files_in(tmp_path) == []


# --- faults


@pytest.fixture
def shared_folder():
    """A folder that any user can reach."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def as_somebody_else(action):
    """Run in a forked process of another user; return what it returned, or the class and text of its error."""
    if os.geteuid() != 0:
        pytest.skip("only the superuser can become another user")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            os.setgid(65534)
            os.setuid(65534)
            try:
                answer = str(action())
            except BaseException as error:  # noqa: BLE001 - told to the parent
                answer = f"{type(error).__name__}: {error}"
            os.write(writer, answer.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        text = answer.read().decode()
    os.waitpid(child, 0)
    return text


DOWNLOAD = """
import sys
sys.path[:] = {path!r}
from pathlib import Path
from transferkit.model import weights
print(weights.download(sys.argv[1], Path(sys.argv[2])))
"""


@pytest.mark.slow
def test_two_processes_that_download_at_once_both_get_the_file(server, body, name, tmp_path):
    """Both processes are under way at once, both return the path, and one whole file lies there."""
    url = server.serve(name, body)
    server.gate.clear()  # nobody is answered until both have asked
    command = [sys.executable, "-c", DOWNLOAD.format(path=sys.path), url, str(tmp_path / "cache")]
    loaders = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    while server.asked.total() < 2 and all(loader.poll() is None for loader in loaders):
        threading.Event().wait(0.01)
    assert server.asked.total() == 2
    server.gate.set()
    said = [loader.communicate(timeout=60) for loader in loaders]
    path = tmp_path / "cache" / name
    assert [out.strip() for out, _ in said] == [str(path)] * 2, said
    assert path.read_bytes() == body
    assert list(path.parent.iterdir()) == [path]


def test_a_download_killed_in_the_middle_is_cleared_by_the_next(server, body, name, tmp_path):
    """What a killed process left is no file of weights, and goes with the next download."""
    url = server.serve(name, body)
    child = os.fork()
    if child == 0:
        weights._CHUNK_BYTES = 1 << 16
        written = 0

        def killed(response, file, url, expected):
            file.write(response.read(1 << 16))
            file.flush()
            os.kill(os.getpid(), 9)

        weights._copy_verified = killed
        weights.download(url, tmp_path)
        os._exit(written)
    assert os.waitpid(child, 0)[1] == 9
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    assert left[0].name.startswith(".")
    weights.download(url, tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_a_disk_that_is_too_small_is_a_download_error(server, body, name, small_disk):
    """A disk that fills up in mid-download: one error with address, path, reason and remedy; the disk is as it was."""
    with pytest.raises(WeightsDownloadError, match=r"No space left on device.*Nothing was kept") as caught:
        weights.download(server.serve(name, body), small_disk)
    assert str(small_disk / name) in str(caught.value)
    assert "pass its path as weights=" in str(caught.value)
    assert list(small_disk.iterdir()) == []


def test_a_read_only_folder_is_a_download_error(server, body, name, shared_folder):
    """Who may not write to the folder is told so, with the path and what to do."""
    url = server.serve(name, body)
    shared_folder.chmod(0o555)
    said = as_somebody_else(lambda: weights.download(url, shared_folder))
    assert said.startswith("WeightsDownloadError: could not download")
    assert "Permission denied" in said
    assert str(shared_folder) in said
    assert "pass its path as weights=" in said
    assert list(shared_folder.iterdir()) == []
    assert server.asked.total() == 0


def test_a_good_file_in_a_read_only_folder_is_used(server, body, name, shared_folder):
    """What an administrator put there serves everybody, and nobody is asked for it."""
    (shared_folder / name).write_bytes(body)
    (shared_folder / name).chmod(0o444)
    shared_folder.chmod(0o555)
    url = server.serve(name, body)
    said = as_somebody_else(lambda: weights.read_state_dict(weights.download(url, shared_folder))["a"].sum().item())
    assert float(said) == torch.arange(300_000.0).sum().item()
    assert server.asked.total() == 0


@pytest.mark.parametrize("use", ["download", "read_state_dict", "load_backbone"])
def test_a_file_that_may_not_be_read_is_the_librarys_error(server, body, name, shared_folder, use):
    """A file in the cache without the right to read it: an error of the library's own, with the path."""
    path = shared_folder / (name if use != "load_backbone" else "vgg16-397923af.pth")
    path.write_bytes(body)
    path.chmod(0)
    url = server.serve(name, body)
    said = as_somebody_else(
        {
            "download": lambda: weights.download(url, shared_folder),
            "read_state_dict": lambda: weights.read_state_dict(path),
            "load_backbone": lambda: tk.load_backbone("vgg16", weights=path),
        }[use]
    )
    assert said.startswith("Weights")
    assert f"Permission denied: '{path}'" in said


def test_a_folder_in_the_files_place_is_the_librarys_error(server, body, name, tmp_path):
    """A folder under the file's name is told as such."""
    (tmp_path / name).mkdir()

    with pytest.raises(TransferKitError, match=name):
        weights.download(server.serve(name, body), tmp_path)


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("form", ["zip", "old format", "pickle"])
def test_a_payload_in_the_place_of_a_file_never_runs(server, name, body, tmp_path, form):
    """A file that was replaced by code runs nothing: not by its name, not by its path, not as a backbone's weights."""
    canary = tmp_path / "canary"
    path = tmp_path / name
    if form == "pickle":
        path.write_bytes(pickle.dumps(Payload(canary), protocol=2))
    else:
        torch.save({"a": Payload(canary)}, path, _use_new_zipfile_serialization=form == "zip")
        torch.load(path, weights_only=False)
        assert canary.exists()  # it would work
        canary.unlink()
    with pytest.raises(WeightsError, match=r"It has not been opened\. Delete it"):
        weights.download(server.serve(name, body), tmp_path)
    with pytest.raises(WeightsError, match=r"cannot read weights from .*delete it"):
        weights.read_state_dict(path)
    with pytest.raises(TransferKitError):
        tk.load_backbone("vgg16", weights=path, preprocessing="IMAGENET1K_V1", image_size=32)
    assert not canary.exists()


def test_a_name_that_cannot_be_resolved_is_a_download_error(tmp_path):
    """DNS failure: one error with address, path and remedy; nothing is kept."""
    with pytest.raises(
        WeightsDownloadError, match=r"no-such-host\.invalid/net-0123abcd\.pth to .*Nothing was kept"
    ) as e:
        weights.download("http://no-such-host.invalid/net-0123abcd.pth", tmp_path)
    assert "Without a network" in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_a_login_page_is_refused(server, tmp_path):
    """A page of HTML, as a hotel's network answers or redirects to, is refused with that guess; nothing is kept."""
    page = server.serve("net-0123abcd.pth", b"<html>Welcome</html>", **{"Content-Type": "text/html"})
    redirected = server.serve("net-4567abcd.pth", b"", status=302, Location=page)
    for url in (page, redirected):
        with pytest.raises(WeightsError, match=r"\(20 bytes\) does not have the SHA-256.*login page may have answered"):
            weights.download(url, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the next test is about those
@pytest.mark.parametrize(
    ("status", "headers", "reason"),
    [
        (500, {}, "500"),
        (404, {}, "404"),
        (302, {"Location": "http://127.0.0.1:1/x"}, "refused"),
        (302, {"Location": "file:///etc/passwd"}, "302|not allowed"),
        (200, {"Content-Length": "many"}, "many|Content-Length"),
        (200, {"Content-Length": "-5"}, "SHA-256|Content-Length|-5"),
    ],
    ids=["500", "404", "redirect to nowhere", "redirect to a file", "no number", "negative"],
)
def test_a_server_that_answers_nonsense_is_one_error(server, body, tmp_path, status, headers, reason):
    """Whatever a server answers is a download or weights error with the address; nothing is kept."""
    url = server.serve("net-0123abcd.pth", body, status=status, **headers)
    with pytest.raises((WeightsDownloadError, WeightsError), match=reason) as caught:
        weights.download(url, tmp_path)
    assert url in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_refusal_leaves_no_connection_open(server, tmp_path):
    """Where a server answers with an error its connection is closed, though the error is kept."""
    with pytest.raises(WeightsDownloadError, match="404") as caught:
        weights.download(server.serve("other", b"").replace("other", "net-0123abcd.pth"), tmp_path)
    assert caught.value.__cause__.closed


def test_a_peer_that_speaks_no_http_is_one_error(tmp_path):
    """An answer that is no HTTP, or none at all, is a download error."""
    for said in (b"SSH-2.0-server\r\n", b""):
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def answer(listener=listener, said=said):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(said)

            thread = threading.Thread(target=answer)
            thread.start()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/net-0123abcd.pth"
            with pytest.raises(WeightsDownloadError, match=r"Nothing was kept"):
                weights.download(url, tmp_path)
            thread.join()
    assert list(tmp_path.iterdir()) == []


def test_without_a_length_a_short_body_is_not_kept(server, body, name, tmp_path):
    """A server that does not say how long the file is and breaks off: the checksum tells."""
    url = server.serve(name, body[:-100], **{"Content-Length": None})
    with pytest.raises((WeightsDownloadError, WeightsError), match=r"Nothing was kept"):
        weights.download(url, tmp_path)
    assert list(tmp_path.iterdir()) == []


OFFLINE = """
import socket, sys
sys.path[:] = {path!r}
asked = []
sys.addaudithook(lambda event, arguments: asked.append(event) if event.startswith(("socket.", "urllib.")) else None)
from pathlib import Path
import torch, torchvision
import transferkit as tk
from transferkit.model import weights
path = weights.download("http://no-such-host.invalid/" + sys.argv[1], Path(sys.argv[2]))
print(len(weights.read_state_dict(path)))
print([event for event in asked if event not in ("socket.__new__", "socket.gethostname")])
"""


@pytest.mark.slow
def test_a_good_cache_makes_no_connection(body, name, tmp_path):
    """Python's own record of what opens a socket, resolves a name or asks for a URL stays empty."""
    (tmp_path / name).write_bytes(body)
    script = OFFLINE.format(path=sys.path)
    done = subprocess.run(
        [sys.executable, "-c", script, name, tmp_path], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split("\n")[:2] == ["1", "[]"], done.stderr


def test_every_truncation_of_a_file_is_refused(tmp_path):
    """A file of weights cut at 60 places is refused with the path, never read in part."""
    path = tmp_path / "tiny.pth"
    torch.save(make_layers([4, "M", 4, "M"]).state_dict(), path)
    content = path.read_bytes()
    for size in range(0, len(content), len(content) // 60):
        path.write_bytes(content[:size])
        with pytest.raises(WeightsError, match=r"tiny\.pth"):
            weights.read_state_dict(path)


@pytest.mark.parametrize("count", [50, pytest.param(400, marks=pytest.mark.slow)])
def test_every_flipped_bit_in_a_file_is_refused_or_harmless(tmp_path, count):
    """Each file with a flipped bit is refused with the path, or gives the very same tensors."""
    path = tmp_path / "tiny.pth"
    expected = make_layers([4, "M", 4, "M"]).state_dict()
    torch.save(expected, path)
    content = bytearray(path.read_bytes())
    refused = 0
    for place in torch.randint(len(content), (count,)).tolist():
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        content[place] ^= 1 << place % 8
        try:
            read = weights.read_state_dict(path)
        except WeightsError:
            refused += 1
        else:
            assert list(read) == list(expected)
            assert all(torch.equal(value, expected[key]) for key, value in read.items())
    assert refused > count / 4
