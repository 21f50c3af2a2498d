"""The whole of VGG16 with its real weights on real images: slow, and what the small networks cannot show."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import ImageFolder

import transferkit as tk

pytestmark = pytest.mark.slow

ASSETS = Path(__file__).parent.parent / "examples" / "assets"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10's subset as a folder for each class."""
    path = tmp_path_factory.mktemp("cifar10")
    with zipfile.ZipFile(ASSETS / "cifar10_subset.zip") as archive:
        archive.extractall(path)
    return path


def pretrained(image_size: int = 32) -> tk.Backbone:
    weights = ASSETS / "vgg16_imagenet_features_bf16.pt"
    return tk.load_backbone(weights=weights, preprocessing="IMAGENET1K_FEATURES", image_size=image_size)


def first_images(folder: Path, split: str, each: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first `each` images of every class, uint8 (10 * each, 3, 32, 32)."""
    images = ImageFolder(folder / split)
    chosen = [index for index in range(len(images)) if index % (len(images) // 10) < each]
    pixels = torch.stack([torch.from_numpy(np.array(images[index][0])) for index in chosen])
    return pixels.permute(0, 3, 1, 2).contiguous(), torch.tensor([images.targets[index] for index in chosen])


def test_pretrained_features_separate_the_classes(folder: Path) -> None:
    """A head on the frozen ImageNet features learns ten classes from 1,000 images far above chance."""
    model = tk.freeze_until(tk.attach_head(pretrained(), 10), "head")
    trainer = tk.Trainer(model, lr=1e-3, device="cpu")
    history = trainer.fit(
        first_images(folder, "train", 100), validation_data=first_images(folder, "test", 20), epochs=4, verbose=0
    )
    assert max(history.history["val_accuracy"]) > 0.4


def test_same_seed_gives_the_same_bits(folder: Path) -> None:
    """Two runs in bf16 with two threads, dropout and augmentation have bit-identical histories and weights."""
    train = first_images(folder, "train", 8)
    runs = []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(2):
            torch.manual_seed(3)
            model = tk.freeze_until(tk.attach_head(pretrained(), 10, hidden=(256,), dropout=0.5), "block5")
            trainer = tk.Trainer(model, lr=1e-4, device="cpu", precision="bf16", seed=5)
            history = trainer.fit(train, validation_data=train, epochs=2, augment=["flip", "crop"], verbose=0).history
            runs.append(({**history, "epoch_s": None}, [p.detach().clone() for p in model.parameters()]))
    finally:
        torch.set_num_threads(threads)
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.filterwarnings("ignore:pretrained layers train")
@pytest.mark.parametrize(("boundary", "frozen_convolutions"), [("head", 13), ("block5", 10), ("block3", 4)])
def test_frozen_convolutions_stay_bit_identical(folder: Path, boundary: str, frozen_convolutions: int) -> None:
    """After training steps with weight decay every frozen convolution has the bits it was loaded with, no other has."""
    model = tk.freeze_until(tk.attach_head(pretrained(), 10), boundary)
    trainer = tk.Trainer(model, optimizer="adamw", weight_decay=0.1, lr=1e-3, device="cpu")
    trainer.fit(first_images(folder, "train", 4), epochs=1, batch_size=20, verbose=0)
    loaded = pretrained().state_dict()
    same = [torch.equal(value, loaded[name]) for name, value in model.backbone.state_dict().items() if "weight" in name]
    assert same == [True] * frozen_convolutions + [False] * (13 - frozen_convolutions)


def test_images_of_any_size_train(folder: Path, tmp_path: Path) -> None:
    """A folder whose images differ in size trains as it is, and the saved model predicts from the files alone."""
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number, path in enumerate(sorted((folder / "train" / name).glob("*.jpg"))[:4]):
            image = ImageFolder(folder / "train").loader(str(path)).resize((40 + 10 * number, 90 - 10 * number))
            image.save(tmp_path / "train" / name / f"{number}.png")
    images = ImageFolder(tmp_path / "train")
    model = tk.freeze_until(tk.attach_head(pretrained(image_size=64), images.classes), "head")
    trainer = tk.Trainer(model, device="cpu", precision="fp32")
    trainer.fit(images, epochs=2, batch_size=4, verbose=0)
    trainer.save(tmp_path / "animals.pt")
    again = tk.Trainer(tk.load_model(tmp_path / "animals.pt"), device="cpu", precision="fp32")
    assert again.model.classes == ("cat", "dog")
    assert (again.predict_proba(images) == trainer.predict_proba(images)).all()


def test_forgetting_to_freeze_ruins_nothing(folder: Path) -> None:
    """Where everything trains at the default rates, accuracy is at least that of the head alone."""
    train, test = first_images(folder, "train", 20), first_images(folder, "test", 20)
    accuracy = {}
    for boundary in ("head", None):
        torch.manual_seed(0)
        model = tk.freeze_until(tk.attach_head(pretrained(), 10), boundary)
        trainer = tk.Trainer(model, device="cpu")
        trainer.fit(train, epochs=3, verbose=0)
        accuracy[boundary] = trainer.evaluate(test)["accuracy"]
    assert accuracy[None] >= accuracy["head"] > 0.3
