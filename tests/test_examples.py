"""The examples and README do what they say."""

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

import transferkit as tk
from tiny import offline

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "examples" / "assets"


def run(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=offline(folder), capture_output=True, text=True, check=False)


def test_assets_are_the_files_their_readme_lists() -> None:
    """Each asset has the size and SHA-256 that its README gives, and all together are at most 35 MB."""
    listed = re.findall(r"\| `(\S+)` \| ([\d,]+) \| `([0-9a-f]{64})` \|", (ASSETS / "README.md").read_text())
    found = {
        path.name: (f"{path.stat().st_size:,}", hashlib.sha256(path.read_bytes()).hexdigest())
        for path in ASSETS.iterdir()
        if path.name != "README.md"
    }
    assert found == {name: (size, digest) for name, size, digest in listed}
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) <= 35e6


def readme_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_quickstart_is_short() -> None:
    """The quickstart has under 60 lines."""
    assert len((ROOT / "examples" / "quickstart.py").read_text().splitlines()) < 60


def test_readme_shows_what_the_quickstart_prints() -> None:
    """README's block of output ends with the line that the quickstart prints."""
    [shown] = re.findall(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    line = r"accuracy 0\.\d{3} \(95 % interval 0\.\d{3} to 0\.\d{3}\) on 500 test images"
    assert re.fullmatch(line, shown.splitlines()[-1])


@pytest.mark.slow
def test_quickstart_runs(tmp_path: Path, small_assets: Path) -> None:
    """The quickstart writes its pictures where it is called; here on fewer images, with less time."""
    source, count = re.subn(r"BUDGET = \d+", "BUDGET = 5", (ROOT / "examples" / "quickstart.py").read_text())
    assert count == 1
    (tmp_path / "assets").symlink_to(small_assets)
    (tmp_path / "quickstart.py").write_text(source)
    result = run(tmp_path / "quickstart.py", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^accuracy 0\.\d{3} \(95 % interval .*\) on 80 test images$", result.stdout, re.MULTILINE)
    pictures = {"predictions.png", "confusion_matrix.png"} if importlib.util.find_spec("matplotlib") else set()
    assert {path.name for path in tmp_path.glob("*.png")} == pictures


def test_readme_code_runs(model: tk.TransferModel, data: tuple[torch.Tensor, torch.Tensor]) -> None:
    """README's third block of code, its parts in a loop, runs as it stands, given a trainer, data and a network."""
    block = readme_blocks()[2]
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3))
    logged: list[float] = []
    logger = type("Logger", (), {"log": staticmethod(lambda loss, lr: logged.append(lr))})
    names = {
        "tk": tk,
        "trainer": tk.Trainer(tk.freeze_until(model, "head"), lr=1e-3, schedule="constant", device="cpu"),
        "train": data,
        "my_logger": logger,
        "net": net,
        "loader": [(data[0].float(), data[1])],
        "criterion": torch.nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(net.parameters(), lr=1e-6),
    }
    before = net[1].weight.detach().clone()
    exec(block, names)
    assert logged == [1e-3] * 3
    assert not torch.equal(net[1].weight, before)


def test_readme_fourth_block_runs(
    backbone: tk.Backbone, data: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """README's fourth block of code, on searching and inspecting, runs as it stands."""
    monkeypatch.chdir(tmp_path)
    block = readme_blocks()[3]
    assert "tk.search(" in block
    train = TensorDataset(*data)
    train.classes = ["cat", "dog", "owl"]
    model = tk.freeze_until(tk.attach_head(backbone, train.classes), "head")
    names = {"tk": tk, "backbone": backbone, "train": train, "val": data, "test": data}
    exec(block, {**names, "trainer": tk.Trainer(model, lr=1e-2, device="cpu")})
    assert (tmp_path / "log.csv").exists()


@pytest.mark.slow
def test_cifar10_example_says_offline_what_to_pass(tmp_path: Path) -> None:
    """Without a network finetune_cifar10.py ends in one message that names the arguments to pass instead."""
    result = run(ROOT / "examples" / "finetune_cifar10.py", folder=tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    for part in ("--weights FILE", "--data FOLDER", "cifar-10-batches-py"):
        assert part in result.stderr


@pytest.mark.slow
def test_folder_example_trains_and_predicts(tmp_path: Path) -> None:
    """finetune_folder.py trains on folders of images, saves, goes on with the run, and names classes of image files."""
    with zipfile.ZipFile(ASSETS / "cifar10_subset.zip") as archive:
        names = [name for name in archive.namelist() if re.search(r"train/(cat|ship)/00[01]\d\.jpg", name)]
        archive.extractall(tmp_path, names)
    example = ROOT / "examples" / "finetune_folder.py"
    weights = ("--weights", ASSETS / "vgg16_imagenet_features_bf16.pt", "--preprocessing", "IMAGENET1K_FEATURES")
    flags = ("--image-size", "32", "--epochs", "3", "--batch-size", "8", "--save", "model.pt", "--augment", "flip")
    for line in ("has no checkpoint yet", "resumed from"):
        trained = run(example, "train", *weights, *flags, "--run", "run", folder=tmp_path)
        assert trained.returncode == 0, trained.stderr
        assert line in trained.stdout
    predicted = run(example, "--predict", "model.pt", "train/ship/0000.jpg", folder=tmp_path)
    assert re.fullmatch(r"train/ship/0000\.jpg  (cat|ship)  [01]\.\d{3}\n", predicted.stdout), predicted.stderr


@pytest.mark.slow
def test_readme_first_blocks_run(tmp_path: Path, small_assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's first block, the whole job in one call, and its second, by hand, run on real weights and images."""
    with zipfile.ZipFile(small_assets / "cifar10_subset.zip") as archive:
        archive.extractall(tmp_path / "photos", [name for name in archive.namelist() if name.endswith(".jpg")])
    monkeypatch.chdir(tmp_path)
    shutil.copy(next((tmp_path / "photos" / "test" / "cat").iterdir()), "cat.jpg")
    names: dict[str, object] = {"WEIGHTS": ASSETS / "vgg16_imagenet_features_bf16.pt"}
    first, second = readme_blocks()[:2]
    local = "weights=WEIGHTS, preprocessing='IMAGENET1K_FEATURES', image_size=32"
    assert "image_size=64" in first
    exec(first.replace("image_size=64", local), names)
    assert "epochs=5" in second
    exec(second.replace("epochs=5", "epochs=1"), {**names, "val": names["test"]})
