"""The parts in other people's training code: each example runs, and what is promised holds inside each library."""

import copy
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import transferkit as tk
from tiny import changed, offline, weights_of

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "embedding"
Data = tuple[Tensor, Tensor]


pytestmark = pytest.mark.slow  # importing the other libraries takes several seconds


def peer(name: str) -> Any:
    """Import another library, whatever warnings its own imports give; skip the test where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.fixture(scope="module", autouse=True)
def _peers() -> Iterator[None]:
    """Import the others before a test begins: some set variables of the environment then."""
    before = dict(os.environ)
    for name in (
        "lightning",
        "accelerate",
        "skorch",
        "sklearn.model_selection",
        "torchmetrics.classification",
        "optuna",
        "ray.train",
    ):
        with suppress(pytest.skip.Exception):
            peer(name)
    yield
    os.environ.clear()
    os.environ.update(before)


# --- the examples


PRINTED = {
    "plain_pytorch": ("torch", r"^frozen layers unchanged: True$"),
    "lightning_finetuning": ("lightning", r"^changed: (features\.2[468]\.(bias|weight)(, )?){6}$"),
    "accelerate_loop": ("accelerate", r"^frozen unchanged: True$"),
    "skorch_grid_search": (
        "skorch",
        r"^best of 6: \{'lr': [\d.]+, 'module__dropout': 0\.[05]\}, 0\.[3-7]\d* in 3 folds$",
    ),
    "optuna_search": (
        "optuna",
        r"^best of 12, [1-9]\d* of them pruned: \{'hidden': \d+, 'lr': [\d.e-]+\}, 0\.[4-8]\d*$",
    ),
    "distributed_loop ddp head": ("torch.distributed", r"^trained 246,474 parameters; frozen layers unchanged: True$"),
    "distributed_loop fsdp2 block5": (
        "torch.distributed",
        r"^trained 7,325,898 parameters; frozen layers unchanged: True$",
    ),
    "ray_train": ("ray.train", r"^frozen layers unchanged: True$"),
    "torchmetrics_loop": ("torchmetrics", r"^epoch 8  accuracy (0\.\d{3})  .*\naccuracy \1$"),
}


@pytest.mark.parametrize("example", PRINTED)
def test_example_runs_and_learns(example: str, tmp_path: Path) -> None:
    """Each example runs offline, names far more test images right than chance (0.1), and shows what it is there for."""
    library, shown = PRINTED[example]
    peer(library)
    name, *arguments = example.split()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if arguments else []
    command = [sys.executable, *launch, str(EXAMPLES / f"{name}.py"), *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=offline(tmp_path), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert re.search(shown, result.stdout, re.MULTILINE), result.stdout
    [accuracy] = re.findall(r"^accuracy (0\.\d{3})$", result.stdout, re.MULTILINE)
    assert float(accuracy) > 0.3
    assert {path.name for path in tmp_path.iterdir()} <= {".cache", ".config", ".ray"}  # nothing is left behind


def test_examples_use_all_the_parts_and_are_short() -> None:
    """The examples use load_backbone, freeze_until, attach_head, Device and cache_features, in under 80 lines each."""
    sources = [path.read_text() for path in EXAMPLES.glob("*.py")]
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"subset", *(example.split()[0] for example in PRINTED)}
    for part in ("load_backbone", "freeze_until", "attach_head", "Device", "cache_features"):
        assert any(f"tk.{part}(" in source for source in sources), part
    assert max(len(source.splitlines()) for source in sources) < 80


# --- Lightning


def lightning_fit(model: tk.TransferModel, data: Data, *, tunes: Callable[[], nn.Module], **settings: Any) -> None:
    """Fit for three epochs with BackboneFinetuning over what `tunes` returns, in training from the second epoch on."""
    lightning = peer("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        backbone = property(lambda self: tunes())

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def on_train_epoch_start(self) -> None:
            self.train()  # as many modules do: Lightning by itself leaves modes alone

        def training_step(self, batch: Data) -> Tensor:
            return cross_entropy(self.model(model.backbone.preprocess(batch[0])), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            trained = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)

    callback = lightning.pytorch.callbacks.BackboneFinetuning(
        unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-2, **settings
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")  # what is frozen
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")  # Lightning's use of torch
        warnings.filterwarnings(
            "ignore", message="The provided params to be frozen already exist"
        )  # it adds them twice
        trainer.fit(Module(), DataLoader(TensorDataset(*data), batch_size=8))


@pytest.mark.parametrize("train_bn", [True, False])
def test_lightning_leaves_frozen_blocks_bit_identical(
    make_backbone: Callable[..., tk.Backbone], data: Data, *, train_bn: bool
) -> None:
    """With BackboneFinetuning over block 5 alone, fit changes block 5 and the head and no bit of blocks 1 to 4.

    Weights, batch norm's parameters and its statistics alike, whatever the callback's `train_bn`.
    """
    model = tk.freeze_until(tk.attach_head(make_backbone(batch_norm=True), 3), "block5")
    first = model.backbone.layer_names.index("block5_conv1")
    before = weights_of(model)

    lightning_fit(model, data, tunes=lambda: model.backbone.features[first:], train_bn=train_bn)

    trained = changed(before, model)
    assert all(int(name.split(".")[2]) >= first for name in trained if name.startswith("backbone."))
    assert {f"backbone.features.{first}.weight", "head.logits.weight"} <= trained


def test_backbone_finetuning_over_everything_undoes_freezing(
    make_backbone: Callable[..., tk.Backbone], data: Data
) -> None:
    """What docs/how-to/embedding.md warns of: over the whole backbone the callback trains what freeze_until froze.

    It sets requires_grad of all of it. The frozen modules stay in eval mode nonetheless, so batch norm's statistics
    stay as they were.
    """
    model = tk.freeze_until(tk.attach_head(make_backbone(batch_norm=True), 3), "block5")
    before = weights_of(model)

    lightning_fit(model, data, tunes=lambda: model.backbone)

    trained = changed(before, model)
    assert "backbone.features.0.weight" in trained
    assert "backbone.features.1.weight" in trained
    assert "backbone.features.1.running_mean" not in trained


# --- Accelerate


def loop(model: nn.Module, data: Data, preprocess: tk.Preprocessing, accelerator: Any = None) -> None:
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    loader: Any = DataLoader(TensorDataset(*data), batch_size=8)
    if accelerator is not None:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(3):
        model.train()
        for images, targets in loader:
            loss = cross_entropy(model(preprocess(images)), targets)
            loss.backward() if accelerator is None else accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


def test_accelerate_gives_the_weights_of_a_plain_loop(make_backbone: Callable[..., tk.Backbone], data: Data) -> None:
    """A frozen model that Accelerate prepared ends with a plain loop's weights, bit for bit, the frozen untouched."""
    accelerate = peer("accelerate")
    model = tk.freeze_until(tk.attach_head(make_backbone(batch_norm=True), 3), "block5")
    plain, before = copy.deepcopy(model), weights_of(model)
    preprocess = model.backbone.preprocess

    loop(plain, data, preprocess)
    loop(model, data, preprocess, accelerate.Accelerator(cpu=True))

    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    first = model.backbone.layer_names.index("block5_conv1")
    trained = changed(before, model)
    assert "head.logits.weight" in trained
    assert all(int(name.split(".")[2]) >= first for name in trained if name.startswith("backbone."))


# --- skorch and scikit-learn


def test_grid_search_picks_a_learning_rate_and_predicts(model: tk.TransferModel, data: Data) -> None:
    """GridSearchCV over skorch takes the rate that learns; its head predicts the same on the backbone."""
    skorch, selection = peer("skorch"), peer("sklearn.model_selection")
    tk.freeze_until(model, "head")
    features, targets = tk.cache_features(model, data, device="cpu", precision="fp32").numpy()
    scale = features.std()  # the network is random, and its features small

    def build_head() -> nn.Module:
        return tk.attach_head(model.backbone, model.classes, hidden=(16,)).head

    net = skorch.NeuralNetClassifier(
        build_head,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        max_epochs=60,
        batch_size=8,
        train_split=None,
        verbose=0,
    )
    search = selection.GridSearchCV(net, {"lr": [1e-9, 1e-2]}, cv=3, scoring="accuracy")
    search.fit(features / scale, targets)

    assert search.best_params_ == {"lr": 1e-2}
    assert (search.predict(features / scale) == targets).mean() > 0.9
    head = nn.Sequential(Scaled(scale), search.best_estimator_.module_)
    whole = tk.attach_head(model.backbone, model.classes, layers=model.layers, head=head)
    trainer = tk.Trainer(whole, device="cpu", precision="fp32")
    assert (trainer.predict(data[0]) == search.predict(features / scale)).all()


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = float(scale)

    def forward(self, features: Tensor) -> Tensor:
        return features / self.scale


# --- torchmetrics


def test_torchmetrics_agrees_with_ours(model: tk.TransferModel, data: Data) -> None:
    """Accuracy, confusion matrix and F1 of torchmetrics, fed from a plain loop, are those of evaluate and assess."""
    classification = peer("torchmetrics.classification")
    trainer = tk.Trainer(model, device="cpu", precision="fp32")
    accuracy = classification.MulticlassAccuracy(3, average="micro")
    matrix = classification.MulticlassConfusionMatrix(3)
    f1 = classification.MulticlassF1Score(3, average="none")
    model.eval()
    for images, targets in tk.Device("cpu", "fp32").batches(DataLoader(TensorDataset(*data), batch_size=7)):
        with torch.no_grad():
            logits = model(model.backbone.preprocess(images))
        for metric in (accuracy, matrix, f1):
            metric.update(logits, targets)

    assessment = trainer.assess(data)

    assert accuracy.compute().item() == pytest.approx(trainer.evaluate(data)["accuracy"], abs=1e-6)
    assert accuracy.compute().item() == pytest.approx(assessment.accuracy, abs=1e-6)
    assert (matrix.compute().numpy() == np.asarray(assessment.confusion_matrix())).all()
    ours = [figures.f1 for figures in assessment.per_class()]
    assert f1.compute().tolist() == pytest.approx(ours, abs=1e-6)
