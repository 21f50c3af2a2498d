"""What surrounds a call in a user's program: gradients off, autocast, default dtype and device, other number types."""

import contextlib
import functools

import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import v2

import transferkit as tk
from tiny import CLASSES, differences, make_backbone, make_images, make_model, make_trainer, weights_of
from transferkit.errors import ArgumentError, HeadMismatchError, ImageError


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "device": lambda: torch.device("meta"),
}


def everything(data):
    """Return what all kinds of work come to, as lists and arrays."""
    torch.manual_seed(0)
    backbone = tk.load_backbone("vgg11", weights=None, image_size=32)
    model = tk.freeze_until(tk.attach_head(backbone, CLASSES, layers=["block1", "block2"]), "head")
    trainer = make_trainer(model, lr=1e-3)
    solved = trainer.solve(data, verbose=0)
    tk.freeze_until(model, "block2")
    swept = trainer.lr_find(data, num_steps=3, verbose=0)
    history = trainer.fit(data, validation_data=data, epochs=2, batch_size=8, augment="flip", verbose=0)
    list(trainer.steps(data, batch_size=8))
    calibrated = trainer.calibrate(data)
    features = tk.cache_features(model, data, device="cpu", precision="fp32").numpy()[0]
    numbers = [solved.weight.tolist(), swept.losses, history.history["loss"], calibrated, trainer.evaluate(data)]
    return [*numbers, features.tolist(), trainer.predict_proba(data).tolist()], weights_of(model)


@functools.cache
def plain():
    data = make_images()
    return data, everything(data)


@pytest.mark.parametrize("around", AROUND)
def test_what_surrounds_the_calls_changes_no_bit(around):
    """Building, solving, sweeping, training, calibrating, predicting: the same numbers, and the surroundings stay."""
    data, (numbers, weights) = plain()
    with AROUND[around]():
        before = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
        found, trained = everything(data)
        assert (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()) == before
    assert found == numbers
    assert differences(trained, weights) == []


def test_the_callers_mode_holds_between_steps():
    """Code between two steps runs in its own mode."""
    with torch.no_grad():
        enabled = [torch.is_grad_enabled() for _ in make_trainer(make_model(make_backbone())).steps(make_images())]
    assert enabled == [False]


@pytest.mark.parametrize("change", ["double", "half", "bfloat16"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_of_other_numbers_is_refused(change, when):
    """By the constructor, and by every use afterwards; the advice, followed, mends it."""
    model, data = make_model(make_backbone(), "head"), make_images()
    trainer = make_trainer(model) if when == "after" else None
    getattr(model, change)()
    uses = [lambda: make_trainer(model)]
    if trainer is not None:
        uses = [lambda: trainer.fit(data, verbose=0), lambda: trainer.predict(data), lambda: trainer.solve(data)]
    for use in uses:
        with pytest.raises(ArgumentError, match=r"expected a float32 model, model\.float\(\)"):
            use()
    model.float()
    (trainer or make_trainer(model)).fit(data, epochs=1, verbose=0)


def test_weights_made_under_inference_mode_are_refused():
    """Those of a user's own head: torch could not train them."""
    with torch.inference_mode():
        model = tk.attach_head(make_backbone(), 3, head=nn.Sequential(nn.Flatten(), nn.Linear(8, 3)))
        with pytest.raises(ArgumentError, match=r"made under torch\.inference_mode"):
            make_trainer(model)


@pytest.mark.parametrize("use", ["fit", "predict", "evaluate", "lr_find"])
def test_other_image_sizes_for_a_head_that_flattens_are_refused(use):
    """A larger size, set between two runs; a head that pools takes it."""
    data = make_images()
    for pooling in ("flatten", "avgmax"):
        trainer = make_trainer(make_model(make_backbone(), "head", pooling=pooling))
        backbone = trainer.model.backbone
        backbone.preprocess = backbone.preprocess.with_image_size(64)
        refused = pytest.raises(HeadMismatchError, match='pooling="avg"')
        with refused if pooling == "flatten" else contextlib.nullcontext():
            getattr(trainer, use)(data)
    assert trainer.global_step == (10 if use == "fit" else 0)


class Other(nn.Module):
    """A head that gives something else than logits."""

    def __init__(self, change):
        super().__init__()
        self.layers, self.change = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), change

    def forward(self, features):
        return self.change(self, self.layers(features))


NO_LOGITS = {
    "softmax": lambda _, logits: logits.softmax(1),
    "tuple": lambda _, logits: (logits, logits),
    "tuple in training": lambda self, logits: (logits, logits) if self.training else logits,
    "dict": lambda _, logits: {"logits": logits},
    "detached": lambda _, logits: logits.detach(),
    "classes": lambda _, logits: logits.argmax(1),
    "one column": lambda _, logits: logits[:, :1],
    "four axes": lambda _, logits: logits[:, :, None, None],
}


@pytest.mark.parametrize("kind", NO_LOGITS)
def test_a_head_that_gives_no_logits_is_refused(kind):
    """When it is attached, and when it replaces one afterwards."""
    with pytest.raises(HeadMismatchError, match="head returns"):
        tk.attach_head(make_backbone(), 3, head=Other(NO_LOGITS[kind]))
    trainer = make_trainer(tk.attach_head(make_backbone(), 3, layers=None, pooling="flatten"))
    trainer.model.head = Other(NO_LOGITS[kind])
    with pytest.raises(HeadMismatchError, match="head returns"):
        trainer.predict(make_images())


@pytest.mark.parametrize("last", [nn.Softmax(dim=1), nn.Sigmoid()])
def test_a_head_that_ends_with_probabilities_is_refused(last):
    """The loss would take a softmax of a softmax."""
    with pytest.raises(HeadMismatchError, match="Remove the softmax or sigmoid"):
        tk.attach_head(make_backbone(), 3, head=nn.Sequential(nn.Flatten(), nn.Linear(8, 3), last))


@pytest.mark.parametrize("mix", [v2.CutMix(num_classes=3), v2.MixUp(num_classes=3)])
def test_cutmix_is_told_where_it_belongs(mix):
    """As `augment` it is refused before the first step; the advice, a collate_fn, trains."""
    data, trainer = make_images(), make_trainer(make_model(make_backbone(), "head"))
    with pytest.raises(ImageError, match="DataLoader's collate_fn"):
        trainer.fit(data, augment=mix, verbose=0)
    assert trainer.global_step == 0
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(trainer.model.backbone.preprocess(data[0]), data[1]),
        batch_size=8,
        collate_fn=lambda batch: mix(*torch.utils.data.default_collate(batch)),
    )
    trainer.fit(loader, epochs=1, verbose=0)
    assert trainer.global_step == 3


@pytest.mark.parametrize("pooling", ["avgmax", "flatten"])
def test_symbolic_tracing_gives_the_same(pooling):
    """torchvision's feature extractor works on model and backbone, as on its own VGG."""
    model = make_model(make_backbone(), pooling=pooling).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(torch.fx.symbolic_trace(model)(images), model(images))
    inner = create_feature_extractor(model, ["backbone.features.4"])(images)["backbone.features.4"]
    assert torch.equal(inner, create_feature_extractor(model.backbone, ["features.4"])(images)["features.4"])


class Sam(torch.optim.SGD):
    def step(self, closure):
        return closure()


class SamWithDefault(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        assert closure is not None, "Sharpness Aware Minimization requires closure"


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Sam, SamWithDefault, torch.optim.Muon, torch.optim.SparseAdam])
def test_optimizers_of_other_kinds_are_refused(kind):
    """By the constructor, with what they need."""
    with pytest.raises(ArgumentError, match=r"closure|groups|2D|sparse"):
        make_trainer(make_model(make_backbone(), "head"), optimizer=kind, lr=None)


@pytest.mark.parametrize(
    "kind",
    ["Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"],
)
def test_optimizers_of_torch_are_taken(kind):
    """Each that steps on dense gradients trains."""
    trainer = make_trainer(make_model(make_backbone(), "head"), optimizer=getattr(torch.optim, kind), lr=1e-3)
    trainer.fit(make_images(), epochs=1, verbose=0)
    assert trainer.global_step == 1
