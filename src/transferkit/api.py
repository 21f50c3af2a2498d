"""Every public name, which `import transferkit` loads when one of them is first used."""

from transferkit.base.installation import check_torchvision as _check_torchvision

_check_torchvision()  # before anything imports it, so that the user sees a sentence and not a missing operator

from transferkit.compute.device import Device as Device
from transferkit.data.preprocessing import Preprocessing as Preprocessing
from transferkit.data_audit import Audit as Audit, audit as audit
from transferkit.errors import TransferKitError as TransferKitError
from transferkit.explaining import (
    explain as explain,
    nearest_images as nearest_images,
    plot_explanations as plot_explanations,
    show_batch as show_batch,
)
from transferkit.features.dataset import FeatureDataset as FeatureDataset, cache_features as cache_features
from transferkit.fine_tuning import fine_tune as fine_tune
from transferkit.linear.choice import LinearHead as LinearHead
from transferkit.model.backbone import Backbone as Backbone, load_backbone as load_backbone
from transferkit.model.export import WithPreprocessing as WithPreprocessing
from transferkit.model.freezing import freeze_until as freeze_until
from transferkit.model.head import TransferModel as TransferModel, attach_head as attach_head
from transferkit.probing import Probe as Probe, plot_probe as plot_probe, probe as probe
from transferkit.results.assessment import (
    Assessment as Assessment,
    confusion_matrix as confusion_matrix,
    plot_confusion_matrix as plot_confusion_matrix,
    plot_predictions as plot_predictions,
)
from transferkit.results.history import EpochReport as EpochReport, History as History
from transferkit.results.lr_sweep import LearningRateSweep as LearningRateSweep, plot_lr_find as plot_lr_find
from transferkit.results.summary import Summary as Summary, summary as summary
from transferkit.saving.model import load_model as load_model, save_model as save_model
from transferkit.searching import SearchResult as SearchResult, Trial as Trial, search as search
from transferkit.trainer import Trainer as Trainer
from transferkit.training.averaging import WeightAverage as WeightAverage
from transferkit.training.callbacks import EarlyStopping as EarlyStopping, GradualUnfreezing as GradualUnfreezing
from transferkit.training.checkpoint import Checkpoint as Checkpoint
from transferkit.training.loggers import CSVLogger as CSVLogger, TensorBoardLogger as TensorBoardLogger
from transferkit.training.loss import BinaryCrossEntropy as BinaryCrossEntropy, CrossEntropy as CrossEntropy
from transferkit.training.optimizers import discriminative_lr as discriminative_lr
from transferkit.training.schedules import warmup as warmup
from transferkit.training.step import Step as Step
