"""Train a model from VGG16's ImageNet weights and 2,000 images in one call. Runs offline, on the CPU.

Run from a clone: python examples/quickstart.py
Weights and images are in examples/assets; the README there names their origin. With matplotlib installed, it writes
predictions.png and confusion_matrix.png to the current folder.
"""

import importlib.util
import tempfile
import zipfile
from pathlib import Path

from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

import transferkit as tk

ASSETS = Path(__file__).parent / "assets"
BUDGET = 50  # seconds


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(ASSETS / "cifar10_subset.zip").extractall(folder)
        train, test = ImageFolder(Path(folder) / "train"), ImageFolder(Path(folder) / "test")  # one folder per class
        weights = ASSETS / "vgg16_imagenet_features_bf16.pt"  # online, load_backbone("vgg16") is enough
        backbone = tk.load_backbone("vgg16", weights=weights, preprocessing="IMAGENET1K_FEATURES", image_size=64)

        trainer = tk.fine_tune(backbone, train, budget=BUDGET)

        assessment = trainer.assess(test)  # the first time that a test image is used
        low, high = assessment.accuracy_interval()
        print(f"accuracy {assessment.accuracy:.3f} (95 % interval {low:.3f} to {high:.3f}) on {len(test)} test images")

        if importlib.util.find_spec("matplotlib"):
            shown = Subset(test, range(10, len(test), 42))  # 12 images
            tk.plot_predictions(trainer.assess(shown), shown, num_images=12).savefig("predictions.png", dpi=150)
            tk.plot_confusion_matrix(assessment).savefig("confusion_matrix.png", dpi=150)
            print("predictions.png and confusion_matrix.png written")


if __name__ == "__main__":
    main()
