"""A transferkit model in Lightning, with its BackboneFinetuning.

Run from a clone: python examples/embedding/lightning_finetuning.py

freeze_until freezes the layers that never change, BackboneFinetuning those that wait for some epochs. The callback
freezes and later unfreezes all of the LightningModule's `backbone`, even layers that were frozen before. So here
`backbone` is block 5 alone, and blocks 1 to 4 stay out of the callback's reach.
"""

import warnings

import lightning
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from subset import WEIGHTS, read_images
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import transferkit as tk

FIRST_TRAINED = "block5_conv1"
warnings.filterwarnings("ignore", message=".*does not have many workers")  # the images are in memory
warnings.filterwarnings("ignore", message="Found .* in eval mode at the start")  # the frozen ones, as intended


class FineTuned(lightning.LightningModule):
    """Takes raw images and targets; knows nothing about freezing."""

    def __init__(self, model: tk.TransferModel) -> None:
        super().__init__()
        self.model = model

    @property  # not an attribute, which would put its weights into checkpoints twice
    def backbone(self) -> nn.Module:
        first = self.model.backbone.layer_names.index(FIRST_TRAINED)
        return self.model.backbone.features[first:]

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.model.backbone.preprocess(images))  # raw images, on any device

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("accuracy", (self(batch[0]).argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.head.parameters(), lr=1e-3)  # the callback adds a group for block 5


def main() -> None:
    lightning.seed_everything(0, verbose=False)
    images, targets, classes = read_images("train", per_class=40)
    test_images, test_targets, _ = read_images("test", per_class=20)
    backbone = tk.load_backbone("vgg16", weights=WEIGHTS, preprocessing="IMAGENET1K_FEATURES", image_size=32)
    model = tk.freeze_until(tk.attach_head(backbone, classes, hidden=(256,), pooling="flatten"), FIRST_TRAINED)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}

    trainer = lightning.Trainer(
        max_epochs=4,
        callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=2, backbone_initial_lr=1e-4, train_bn=False)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    tuned = FineTuned(model)
    trainer.fit(tuned, DataLoader(TensorDataset(images, targets), batch_size=32, shuffle=True))
    [scores] = trainer.test(tuned, DataLoader(TensorDataset(test_images, test_targets), batch_size=200), verbose=False)

    changed = {name for name, value in backbone.state_dict().items() if not torch.equal(value.cpu(), before[name])}
    print("changed:", ", ".join(sorted(changed)))  # features.24, 26 and 28 are block 5
    print(f"accuracy {scores['accuracy']:.3f}")


if __name__ == "__main__":
    main()
