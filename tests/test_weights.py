"""Downloading and verifying weight files, against a real server on this machine."""

import hashlib
import http.server
import os
import pickle
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from transferkit.errors import WeightsDownloadError, WeightsError
from transferkit.model import weights


class Server(http.server.ThreadingHTTPServer):
    """Serves bodies by path; a path may announce more than it sends, or stall."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.bodies: dict[str, bytes] = {}
        self.missing_bytes = 0
        self.stall = False
        self.released = threading.Event()
        self.daemon_threads = False  # so that closing it waits for the answers under way
        self.requests = 0

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/models/{name}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        body = self.server.bodies.get(self.path.rsplit("/", 1)[-1])
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + self.server.missing_bytes))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
        if self.server.stall:
            self.server.released.wait(10)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()  # leaving the block joins the threads that answer


@pytest.fixture
def body(tmp_path: Path) -> bytes:
    """A real weight file, of more than one chunk."""
    path = tmp_path / "source.pt"
    torch.save({"a": torch.arange(300_000.0)}, path)
    content = path.read_bytes()
    path.unlink()
    return content


def name_of(body: bytes, digits: int = 8) -> str:
    return f"net-{hashlib.sha256(body).hexdigest()[:digits]}.pth"


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def closed_url(name: str) -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/{name}"


@pytest.mark.parametrize("digits", [8, 64])
def test_a_file_is_downloaded_into_the_folder(server: Server, tmp_path: Path, body: bytes, digits: int) -> None:
    """A file whose content has the hash in its name arrives whole, in a folder made for it, and nothing else does."""
    name = name_of(body, digits)
    server.bodies[name] = body

    path = weights.download(server.url(name), tmp_path / "new" / "folder")

    assert path == tmp_path / "new" / "folder" / name
    assert path.read_bytes() == body
    assert files_in(tmp_path) == [name]
    assert torch.equal(weights.read_state_dict(path)["a"], torch.arange(300_000.0))


def test_the_folder_is_torch_hubs_by_default(
    server: Server, tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a folder the file lies where torchvision looks for it."""
    name = name_of(body)
    server.bodies[name] = body
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    assert weights.download(server.url(name)) == tmp_path / "checkpoints" / name


def test_a_downloaded_file_can_be_read_by_others(server: Server, tmp_path: Path, body: bytes) -> None:
    """A downloaded file has the permissions of any new file, since the folder may be shared."""
    name = name_of(body)
    server.bodies[name] = body
    (tmp_path / "plain").touch()

    path = weights.download(server.url(name), tmp_path)

    assert oct(path.stat().st_mode) == oct((tmp_path / "plain").stat().st_mode)


def test_a_good_copy_needs_no_server(server: Server, tmp_path: Path, body: bytes) -> None:
    """A file that is in the folder already is not asked for again."""
    name = name_of(body)
    (tmp_path / name).write_bytes(body)

    assert weights.download(server.url(name), tmp_path) == tmp_path / name
    assert weights.download(closed_url(name), tmp_path) == tmp_path / name
    assert server.requests == 0


def test_a_file_of_another_hash_is_not_kept(server: Server, tmp_path: Path) -> None:
    """What does not have the hash in its name (a login page) is refused, with the reason, and not kept."""
    server.bodies["net-0123abcd.pth"] = b"<html>Please log in</html>"

    with pytest.raises(
        WeightsError, match=r"net-0123abcd\.pth sent \(26 bytes\).*SHA-256.*Nothing was kept.*pass a pa"
    ):
        weights.download(server.url("net-0123abcd.pth"), tmp_path)
    assert files_in(tmp_path) == []


def test_a_hash_is_compared_to_its_last_digit(server: Server, tmp_path: Path, body: bytes) -> None:
    """A name with all 64 digits of which only the last is wrong is refused."""
    right = hashlib.sha256(body).hexdigest()
    name = f"net-{right[:-1]}{'0' if right[-1] != '0' else '1'}.pth"
    server.bodies[name] = body

    with pytest.raises(WeightsError, match=r"does not have the SHA-256 in its name\. Nothing was kept"):
        weights.download(server.url(name), tmp_path)
    assert files_in(tmp_path) == []


def test_a_known_whole_hash_is_compared_beyond_the_name(
    server: Server, tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the whole hash is known, a file that only begins with the digits in its name is refused."""
    name = name_of(body)
    server.bodies[name] = body
    monkeypatch.setattr(weights, "_FULL_SHA256", {name: name[4:12] + 56 * "0"})

    with pytest.raises(WeightsError, match=r"does not have the SHA-256.*Nothing was kept"):
        weights.download(server.url(name), tmp_path)
    assert files_in(tmp_path) == []


def test_a_name_without_hash_is_refused_before_anything_is_fetched(server: Server, tmp_path: Path, body: bytes) -> None:
    """A file that could not be verified is refused without being asked for, and nothing is kept."""
    server.bodies["net.pth"] = body

    with pytest.raises(WeightsError, match=r"net\.pth has no SHA-256 in its name: expected.*vgg16-397923af\.pth"):
        weights.download(server.url("net.pth"), tmp_path)
    assert files_in(tmp_path) == []
    assert server.requests == 0


def test_a_missing_file_is_a_download_error(server: Server, tmp_path: Path) -> None:
    """A 404 is one error with address, folder and what to do; nothing is kept."""
    with pytest.raises(
        WeightsDownloadError, match=r"http://127\S+/net-0123abcd\.pth to .*404.*Nothing was kept.*pass its path"
    ):
        weights.download(server.url("net-0123abcd.pth"), tmp_path)
    assert files_in(tmp_path) == []


def test_a_body_cut_short_is_a_download_error(server: Server, tmp_path: Path, body: bytes) -> None:
    """A connection that ends before the announced length is a broken download, not a wrong file; nothing is kept."""
    name = name_of(body)
    server.bodies[name] = body[:-1000]
    server.missing_bytes = 1000

    with pytest.raises(WeightsDownloadError, match=rf"could not download .*{name}.*bytes.*Nothing was kept"):
        weights.download(server.url(name), tmp_path)
    assert files_in(tmp_path) == []


def test_a_stalled_server_is_a_download_error(
    server: Server, tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that goes silent in mid-file is given up after the time limit; nothing is kept."""
    monkeypatch.setattr(weights, "TIMEOUT_S", 0.2)
    server.bodies["net-0123abcd.pth"] = body
    server.missing_bytes = 1000
    server.stall = True

    with pytest.raises(WeightsDownloadError, match=r"timed out.*Nothing was kept.*pass its path"):
        weights.download(server.url("net-0123abcd.pth"), tmp_path)
    assert files_in(tmp_path) == []


def test_a_refused_connection_is_a_download_error(tmp_path: Path) -> None:
    """Where nobody listens there is one clear error, also an OSError; nothing is kept."""
    with pytest.raises(OSError, match=r"net-0123abcd\.pth to .*refused.*Without a network.*pass its path") as caught:
        weights.download(closed_url("net-0123abcd.pth"), tmp_path)
    assert isinstance(caught.value, WeightsDownloadError)
    assert files_in(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_a_download_error(server: Server, tmp_path: Path, body: bytes) -> None:
    """A file where the folder should be is one clear error with the path, before anything is fetched."""
    (tmp_path / "taken").touch()

    with pytest.raises(WeightsDownloadError, match=r"taken.*Nothing was kept.*pass its path"):
        weights.download(server.url(name_of(body)), tmp_path / "taken")
    assert server.requests == 0


def test_an_interrupted_download_leaves_nothing(
    server: Server, tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in mid-download leaves no file behind."""
    server.bodies[name_of(body)] = body

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        weights.download(server.url(name_of(body)), tmp_path)
    assert files_in(tmp_path) == []


def test_a_full_disk_is_a_download_error(
    server: Server, tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up is one clear error with the system's reason, and nothing is kept."""
    server.bodies[name_of(body)] = body

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WeightsDownloadError, match=r"No space left on device.*Nothing was kept"):
        weights.download(server.url(name_of(body)), tmp_path)
    assert files_in(tmp_path) == []


def test_a_replaced_copy_is_refused_unopened(server: Server, tmp_path: Path, body: bytes) -> None:
    """A copy in the folder that is not the published file is refused with both hashes; its code does not run."""
    name, canary = name_of(body), tmp_path / "canary"
    (tmp_path / name).write_bytes(pickle.dumps(Payload(canary)))
    got = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()

    with pytest.raises(
        WeightsError, match=rf"{name} is not the file published.*got SHA-256 {got}.*{name[4:12]}.*Delete"
    ):
        weights.download(server.url(name), tmp_path)
    assert not canary.exists()
    assert server.requests == 0


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def test_a_damaged_copy_is_refused(tmp_path: Path, body: bytes) -> None:
    """One flipped bit in a copy that was good is seen at the next use."""
    name = name_of(body)
    damaged = bytearray(body)
    damaged[len(body) // 2] ^= 1
    (tmp_path / name).write_bytes(damaged)

    with pytest.raises(
        WeightsError, match=r"is not the file published.*damaged or was replaced.*Delete it and run aga"
    ):
        weights.download(closed_url(name), tmp_path)


def test_a_copys_hash_is_compared_to_its_last_digit(tmp_path: Path, body: bytes) -> None:
    """A copy whose name holds all 64 digits, of which only the last is wrong, is refused."""
    right = hashlib.sha256(body).hexdigest()
    name = f"net-{right[:-1]}{'0' if right[-1] != '0' else '1'}.pth"
    (tmp_path / name).write_bytes(body)

    with pytest.raises(WeightsError, match=rf"got SHA-256 {right}, expected {name[4:-4]}\."):
        weights.download(closed_url(name), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "published"),
    [
        ("net-{}.pth", b"right", True),
        ("net-{}.pth", b"wrong", False),
        ("net.pth", b"right", False),
        ("net-{}.pth", None, False),
    ],
)
def test_a_published_file_is_known_by_name_and_content(
    tmp_path: Path, name: str, content: bytes | None, published: bool
) -> None:
    """A file counts as published if its name holds a hash and its content has that hash."""
    path = tmp_path / name.format(hashlib.sha256(b"right").hexdigest()[:8])
    if content is not None:
        path.write_bytes(content)

    assert weights.is_published(path) is published


def test_differences_are_counted_past_five() -> None:
    """Of seven missing names five are listed and two counted."""
    own = {f"k{number}": torch.zeros(1) for number in range(7)}

    assert weights.differences(own, {}) == "missing k0, k1, k2, k3, k4 and 2 more"


def test_equal_names_and_shapes_have_no_differences() -> None:
    """Values and number types are no difference, names and shapes are all that is compared."""
    assert weights.differences({"a": torch.zeros(2)}, {"a": torch.ones(2).bfloat16()}) == ""
