"""Fine-tune VGG16 on your own images, one folder per class.

    python examples/finetune_folder.py flowers/train --validation flowers/val --budget 600 --save flowers.pt
    python examples/finetune_folder.py flowers --frozen-until block5 --lr 1e-4 --epochs 5
    python examples/finetune_folder.py --predict flowers.pt photo1.jpg photo2.jpg

Options that you leave out are chosen by the images and the budget. Torchvision downloads the weights; without a
network, pass --weights FILE --preprocessing CONVENTION.
"""

import argparse
from pathlib import Path

from PIL import Image
from torchvision.datasets import ImageFolder

import transferkit as tk


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="folder with one subfolder per class, or image files")
    parser.add_argument("--validation", type=Path, help="the same for validation images")
    parser.add_argument("--predict", type=Path, metavar="CHECKPOINT", help="predict the classes of image files instead")
    parser.add_argument("--budget", type=float, help="seconds (chosen by the number of images)")
    parser.add_argument(
        "--frozen-until", default="auto", help='first layer that trains: "head", "block5", "none" (auto)'
    )
    parser.add_argument("--lr", type=float, help="learning rate of the layers that train (auto)")
    parser.add_argument("--epochs", type=int, help="passes over the training images (auto)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step (32)")
    parser.add_argument("--augment", nargs="*", default=["flip", "crop"], help="flip, crop, color, trivial (flip crop)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (224)")
    parser.add_argument("--weights", default="IMAGENET1K_V1", help="name or path (IMAGENET1K_V1)")
    parser.add_argument("--preprocessing", default="auto", help="input convention of the weights, required with a path")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read images (0)")
    parser.add_argument("--device", default="auto", help="auto, cuda, cpu (auto)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="write the model here")
    parser.add_argument("--run", type=Path, help="save the run in this folder; the same command resumes it")
    return parser.parse_args()


def predict(checkpoint: Path, paths: list[Path], device: str) -> None:
    trainer = tk.Trainer(tk.load_model(checkpoint), device=device)
    probabilities = trainer.predict_proba([Image.open(path) for path in paths])
    for path, row in zip(paths, probabilities, strict=True):
        print(f"{path}  {trainer.model.classes[row.argmax()]}  {row.max():.3f}")


def train(options: argparse.Namespace) -> None:
    images = ImageFolder(options.paths[0])
    validation = ImageFolder(options.validation) if options.validation else None
    backbone = tk.load_backbone(
        "vgg16", weights=options.weights, preprocessing=options.preprocessing, image_size=options.image_size
    )
    trainer = tk.fine_tune(
        backbone,
        images,
        validation,
        budget=options.budget,
        freeze_until=None if options.frozen_until == "none" else options.frozen_until,
        lr=options.lr,
        epochs=options.epochs,
        batch_size=options.batch_size,
        augment=options.augment or None,
        folder=options.run,
        device=options.device,
        seed=options.seed,
        num_workers=options.num_workers,
    )
    if validation:
        print(trainer.assess(validation))
    if options.save:
        trainer.save(options.save)


def main() -> None:
    options = arguments()
    if options.predict:
        predict(options.predict, options.paths, options.device)
    else:
        train(options)


if __name__ == "__main__":
    main()
