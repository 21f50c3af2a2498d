"""The examples and README do what they say."""

import hashlib
import re
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


def test_quickstart_is_short() -> None:
    """The quickstart has under 60 lines."""
    assert len((ROOT / "examples" / "quickstart.py").read_text().splitlines()) < 60


def test_readme_code_runs(model: tk.TransferModel, data: tuple[torch.Tensor, torch.Tensor]) -> None:
    """README's second block of code runs as it stands, given a trainer, data and a network."""
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3))
    logged: list[float] = []
    logger = type("Logger", (), {"log": staticmethod(lambda loss, lr: logged.append(lr))})
    names = {
        "tk": tk,
        "trainer": tk.Trainer(tk.freeze_until(model, "head"), device="cpu"),
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


def test_readme_third_block_runs(
    backbone: tk.Backbone, data: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """README's third block of code, on choosing and looking, runs as it stands."""
    monkeypatch.chdir(tmp_path)
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[2]
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
def test_readme_first_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's ten lines run as they stand on real weights and images, with one epoch instead of fifteen."""
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    block = block.replace('weights="IMAGENET1K_FEATURES"', "weights=WEIGHTS, preprocessing='IMAGENET1K_FEATURES'")
    block = re.sub(r"epochs=\d+", "epochs=1", block).replace("image_size=64", "image_size=32")
    from torchvision.datasets import ImageFolder

    with zipfile.ZipFile(ASSETS / "cifar10_subset.zip") as archive:
        names = [name for name in archive.namelist() if re.search(r"test/\w+/000\d\.jpg", name)]
        archive.extractall(tmp_path, names)
    images = ImageFolder(tmp_path / "test")
    monkeypatch.chdir(tmp_path)
    images[0][0].resize((60, 50)).save("cat.jpg")
    names_in_block = {"train": images, "val": images, "test": images}
    exec(block, {**names_in_block, "WEIGHTS": ASSETS / "vgg16_imagenet_features_bf16.pt"})
