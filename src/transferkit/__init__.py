"""Transfer learning with torchvision's VGG networks: freeze early layers, attach a head, fine-tune.

>>> import transferkit as tk
>>> backbone = tk.load_backbone("vgg16", weights=None, image_size=64)
>>> model = tk.attach_head(tk.freeze_until(backbone, "head"), ["cat", "dog"], hidden=(256,))
>>> trainer = tk.Trainer(model, optimizer="adam", lr=1e-3)
"""

from importlib.metadata import version

from transferkit.installation import check_torchvision

check_torchvision()  # before anything imports it, so that the user sees a sentence and not a missing operator

from transferkit.backbone import Backbone, load_backbone
from transferkit.checkpoint import Checkpoint
from transferkit.device import Device
from transferkit.errors import TransferKitError
from transferkit.feature_dataset import FeatureDataset, cache_features
from transferkit.freezing import freeze_until
from transferkit.head import TransferModel, attach_head
from transferkit.history import EpochReport, History
from transferkit.model_state import load_model, save_model
from transferkit.optimizers import discriminative_lr
from transferkit.preprocessing import Preprocessing
from transferkit.step import Step
from transferkit.trainer import Trainer

__version__ = version("transferkit")

__all__ = [
    "Backbone",
    "Checkpoint",
    "Device",
    "EpochReport",
    "FeatureDataset",
    "History",
    "Preprocessing",
    "Step",
    "Trainer",
    "TransferKitError",
    "TransferModel",
    "attach_head",
    "cache_features",
    "discriminative_lr",
    "freeze_until",
    "load_backbone",
    "load_model",
    "save_model",
]
