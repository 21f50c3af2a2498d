"""Transfer learning with torchvision's VGG networks: freeze early layers, attach a head, fine-tune.

>>> import transferkit as tk
>>> backbone = tk.load_backbone("vgg16", weights=None, image_size=64)
>>> model = tk.attach_head(tk.freeze_until(backbone, "head"), ["cat", "dog"], hidden=(256,))
>>> trainer = tk.Trainer(model, optimizer="adam", lr=1e-3)
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from transferkit.base.installation import check_torchvision

check_torchvision()  # before anything imports it, so that the user sees a sentence and not a missing operator

from transferkit.compute.device import Device
from transferkit.data.preprocessing import Preprocessing
from transferkit.errors import TransferKitError
from transferkit.features.dataset import FeatureDataset, cache_features
from transferkit.fine_tune import fine_tune
from transferkit.linear.choice import LinearHead
from transferkit.model.backbone import Backbone, load_backbone
from transferkit.model.export import WithPreprocessing
from transferkit.model.freezing import freeze_until
from transferkit.model.head import TransferModel, attach_head
from transferkit.probe import probe
from transferkit.results.assessment import Assessment, confusion_matrix, plot_confusion_matrix, plot_predictions
from transferkit.results.history import EpochReport, History
from transferkit.results.lr_sweep import LearningRateSweep, plot_lr_find
from transferkit.results.probing import Probe, plot_probe
from transferkit.results.summary import Summary, summary
from transferkit.saving.model import load_model, save_model
from transferkit.search import SearchResult, Trial, search
from transferkit.trainer import Trainer
from transferkit.training.averaging import WeightAverage
from transferkit.training.callbacks import EarlyStopping, GradualUnfreezing
from transferkit.training.checkpoint import Checkpoint
from transferkit.training.loggers import CSVLogger, TensorBoardLogger
from transferkit.training.loss import BinaryCrossEntropy, CrossEntropy
from transferkit.training.optimizers import discriminative_lr
from transferkit.training.schedules import warmup
from transferkit.training.step import Step

if TYPE_CHECKING:
    from transferkit.data_audit import audit
    from transferkit.explaining import explain, nearest_images, plot_explanations, show_batch
    from transferkit.results.auditing import Audit

__version__ = version("transferkit")


_LATER = {
    "Audit": "results.auditing",
    "audit": "data_audit",
    "explain": "explaining",
    "nearest_images": "explaining",
    "plot_explanations": "explaining",
    "show_batch": "explaining",
}
"""Names that few programs need, and the module that each is imported from when it is first used."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"transferkit.{_LATER[name]}"), name)


__all__ = [
    "Assessment",
    "Audit",
    "Backbone",
    "BinaryCrossEntropy",
    "CSVLogger",
    "Checkpoint",
    "CrossEntropy",
    "Device",
    "EarlyStopping",
    "EpochReport",
    "FeatureDataset",
    "GradualUnfreezing",
    "History",
    "LearningRateSweep",
    "LinearHead",
    "Preprocessing",
    "Probe",
    "SearchResult",
    "Step",
    "Summary",
    "TensorBoardLogger",
    "Trainer",
    "TransferKitError",
    "TransferModel",
    "Trial",
    "WeightAverage",
    "WithPreprocessing",
    "attach_head",
    "audit",
    "cache_features",
    "confusion_matrix",
    "discriminative_lr",
    "explain",
    "fine_tune",
    "freeze_until",
    "load_backbone",
    "load_model",
    "nearest_images",
    "plot_confusion_matrix",
    "plot_explanations",
    "plot_lr_find",
    "plot_predictions",
    "plot_probe",
    "probe",
    "save_model",
    "search",
    "show_batch",
    "summary",
    "warmup",
]
