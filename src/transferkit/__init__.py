"""Transfer learning with torchvision's VGG networks: freeze early layers, attach a head, fine-tune.

>>> import transferkit as tk
>>> backbone = tk.load_backbone("vgg16", weights=None, image_size=64)
>>> model = tk.attach_head(tk.freeze_until(backbone, "head"), ["cat", "dog"], hidden=(256,))
>>> trainer = tk.Trainer(model, optimizer="adam", lr=1e-3)
"""

from importlib.metadata import version

from transferkit.installation import check_torchvision

check_torchvision()  # before anything imports it, so that the user sees a sentence and not a missing operator

from transferkit.assessment import Assessment, confusion_matrix
from transferkit.backbone import Backbone, load_backbone
from transferkit.callbacks import EarlyStopping, GradualUnfreezing
from transferkit.checkpoint import Checkpoint
from transferkit.device import Device
from transferkit.errors import TransferKitError
from transferkit.export import WithPreprocessing
from transferkit.feature_dataset import FeatureDataset, cache_features
from transferkit.freezing import freeze_until
from transferkit.head import TransferModel, attach_head
from transferkit.history import EpochReport, History
from transferkit.hyperparameter_search import SearchResult, Trial, search
from transferkit.learning_rate_sweep import LearningRateSweep
from transferkit.loggers import CSVLogger, TensorBoardLogger
from transferkit.model_state import load_model, save_model
from transferkit.model_summary import Summary, summary
from transferkit.optimizers import discriminative_lr
from transferkit.plots import plot_confusion_matrix, plot_lr_find, plot_predictions
from transferkit.preprocessing import Preprocessing
from transferkit.step import Step
from transferkit.trainer import Trainer

__version__ = version("transferkit")

__all__ = [
    "Assessment",
    "Backbone",
    "CSVLogger",
    "Checkpoint",
    "Device",
    "EarlyStopping",
    "EpochReport",
    "FeatureDataset",
    "GradualUnfreezing",
    "History",
    "LearningRateSweep",
    "Preprocessing",
    "SearchResult",
    "Step",
    "Summary",
    "TensorBoardLogger",
    "Trainer",
    "TransferKitError",
    "TransferModel",
    "Trial",
    "WithPreprocessing",
    "attach_head",
    "cache_features",
    "confusion_matrix",
    "discriminative_lr",
    "freeze_until",
    "load_backbone",
    "load_model",
    "plot_confusion_matrix",
    "plot_lr_find",
    "plot_predictions",
    "save_model",
    "search",
    "summary",
]
