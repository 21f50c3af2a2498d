"""Fine-tune VGG16 on your own images, one folder per class.

    python examples/finetune_folder.py flowers/train --validation flowers/val --save flowers.pt
    python examples/finetune_folder.py flowers --frozen-until block5 --lr 1e-4 --augment flip crop
    python examples/finetune_folder.py --predict flowers.pt photo1.jpg photo2.jpg

Without --validation, a random fifth of the images is held out. Torchvision downloads the weights; without a network,
pass --weights FILE --preprocessing CONVENTION.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import transferkit as tk


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="folder with one subfolder per class, or image files")
    parser.add_argument("--validation", type=Path, help="the same for validation images")
    parser.add_argument("--predict", type=Path, metavar="CHECKPOINT", help="predict the classes of image files instead")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (1e-3)")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training images (10)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step (32)")
    parser.add_argument(
        "--frozen-until", default="head", help='first layer that trains: "head", "block5", "none" (head)'
    )
    parser.add_argument("--hidden", type=int, nargs="*", default=(256,), help="widths of the head (256)")
    parser.add_argument("--augment", nargs="*", help="flip, crop, color, trivial (none)")
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
    torch.manual_seed(options.seed)
    images = ImageFolder(options.paths[0])
    validation = ImageFolder(options.validation) if options.validation else None
    backbone = tk.load_backbone(
        "vgg16", weights=options.weights, preprocessing=options.preprocessing, image_size=options.image_size
    )
    model = tk.attach_head(backbone, images.classes, hidden=options.hidden)
    tk.freeze_until(model, None if options.frozen_until == "none" else options.frozen_until)
    trainer = tk.Trainer(model, lr=options.lr, device=options.device, seed=options.seed)
    trainer.fit(
        images,
        validation_data=validation,
        validation_split=None if validation else 0.2,
        epochs=options.epochs,
        batch_size=options.batch_size,
        augment=options.augment,
        num_workers=options.num_workers,
        callbacks=[tk.Checkpoint(options.run)] if options.run else [],
        resume_from=options.run,
    )
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
