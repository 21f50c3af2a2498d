"""A small version of the main job: pretrained VGG16, convolutions frozen, a new head, CIFAR-10. Runs offline.

Run from a clone: python examples/quickstart.py
The weights and the 2,500 images are in examples/assets; the README there says where they come from.
"""

import tempfile
import time
import zipfile
from pathlib import Path

import torch
from torchvision.datasets import ImageFolder

import transferkit as tk

ASSETS = Path(__file__).parent / "assets"
LEARNING_RATE = 1e-3
EPOCHS = 10
BATCH_SIZE = 32
FROZEN_UNTIL = "head"  # freezes every convolution; "block5" would train the last three, too


def main() -> None:
    torch.manual_seed(0)  # for the head's initial weights
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(ASSETS / "cifar10_subset.zip").extractall(folder)
        train = ImageFolder(Path(folder) / "train")  # one folder per class
        test = ImageFolder(Path(folder) / "test")

        backbone = tk.load_backbone(
            "vgg16",
            weights=ASSETS / "vgg16_imagenet_features_bf16.pt",
            preprocessing="IMAGENET1K_FEATURES",
            image_size=32,
        )
        model = tk.attach_head(backbone, train.classes, hidden=(4096, 4096))
        tk.freeze_until(model, FROZEN_UNTIL)

        trainer = tk.Trainer(model, optimizer="adam", lr=LEARNING_RATE)
        trainer.fit(train, validation_data=test, epochs=EPOCHS, batch_size=BATCH_SIZE)
        scores = trainer.evaluate(test)

        image, target = test[0]  # a PIL image
        predicted = trainer.predict([image])[0]
    print(f"accuracy {scores['accuracy']:.3f} on 500 test images, after {time.perf_counter() - started:.0f} s")
    print(f"the first test image is of class {model.classes[target]!r}; predicted: {model.classes[predicted]!r}")


if __name__ == "__main__":
    main()
