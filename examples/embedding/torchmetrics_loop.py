"""Torchmetrics in a callback, on cached features of the test images.

Run from a clone: python examples/embedding/torchmetrics_loop.py

For metrics of the validation data, `tk.Trainer(model, metrics={"f1": MulticlassF1Score(10)})` is enough.
"""

import torch
from subset import WEIGHTS, read_images
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score

import transferkit as tk


def main() -> None:
    torch.manual_seed(0)
    images, targets, classes = read_images("train", per_class=50)
    test_images, test_targets, _ = read_images("test", per_class=25)
    backbone = tk.load_backbone("vgg16", weights=WEIGHTS, preprocessing="IMAGENET1K_FEATURES", image_size=32)
    model = tk.freeze_until(tk.attach_head(backbone, classes, hidden=(256,)), "head")

    device = tk.Device("auto")
    metrics = MetricCollection(
        {
            "accuracy": MulticlassAccuracy(len(classes), average="micro"),  # not "macro", the default
            "f1": MulticlassF1Score(len(classes)),
            "auroc": MulticlassAUROC(len(classes)),
        }
    ).to(device.torch_device)

    def measure(_: tk.Trainer, report: tk.EpochReport) -> None:
        """Run after each epoch, on the features of the test images, which are computed once."""
        model.eval()
        _, suffix = model.split()
        for inputs, labels in device.batches(torch.utils.data.DataLoader(test_features, batch_size=125)):
            with torch.no_grad(), device.autocast():
                metrics.update(suffix(inputs).float(), labels)
        print(
            f"epoch {report.epoch + 1}  "
            + "  ".join(f"{name} {value:.3f}" for name, value in metrics.compute().items())
        )
        metrics.reset()

    test_features = tk.cache_features(model, (test_images, test_targets), device=device)
    trainer = tk.Trainer(model, lr=1e-3, device=device.torch_device, precision=device.precision)
    trainer.fit((images, targets), epochs=8, batch_size=32, callbacks=[measure], verbose=0)
    print(f"accuracy {trainer.evaluate((test_images, test_targets))['accuracy']:.3f}")  # equals the last one above


if __name__ == "__main__":
    main()
