"""Freezing: exactly the layers before the boundary, bit for bit, through training and back."""

import copy
import functools
import io
from collections.abc import Callable

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import transferkit as tk
from tiny import STANDARDIZE, changed, weights_of
from transferkit.data.preprocessing import CONVENTIONS
from transferkit.errors import UnknownLayerError
from transferkit.model.freezing import describe_frozen, first_trainable

Maker = Callable[..., tk.Backbone]


def meta_backbone(name: str) -> tk.Backbone:
    """A full-size network of names and shapes without memory, to freeze and look at."""
    return copy.deepcopy(_meta_backbone(name))


@functools.cache
def _meta_backbone(name: str) -> tk.Backbone:
    with torch.device("meta"):
        features = torchvision.models.get_model(name, weights=None, init_weights=False).features
    return tk.Backbone(name, features, CONVENTIONS["IMAGENET1K_V1"])


VGG16_LAYERS = meta_backbone("vgg16").layer_names
VGG16_BN_LAYERS = meta_backbone("vgg16_bn").layer_names


def frozen_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def eval_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if not module.training]


class Nested(nn.Module):
    """Containers in containers, and a parameter that no layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.stem = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.body = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 4))
        self.top = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.body(self.stem(x * self.scale)))


# --- where the boundary lies


@pytest.mark.parametrize("layer", VGG16_LAYERS)
def test_exactly_the_parameters_before_a_layer_are_frozen(layer: str) -> None:
    """For every layer of VGG16 the modules before it are frozen and it and those after it train."""
    backbone = tk.freeze_until(meta_backbone("vgg16"), layer)
    boundary = VGG16_LAYERS.index(layer)

    for place, module in enumerate(backbone.features):
        assert all(parameter.requires_grad is (place >= boundary) for parameter in module.parameters())
        assert module.training is (place >= boundary)


@pytest.mark.parametrize(("block", "place"), [(1, 0), (2, 5), (3, 10), (4, 17), (5, 24)])
def test_a_block_its_first_layer_and_its_module_are_one_boundary(block: int, place: int) -> None:
    """A block, its first convolution and torchvision's features.N freeze the same."""
    names = dict(meta_backbone("vgg16").named_parameters())
    expected = [f"features.{n}.{kind}" for n in range(place) for kind in ("weight", "bias")]

    for layer in (f"block{block}", f"block{block}_conv1", f"features.{place}"):
        frozen = frozen_names(tk.freeze_until(meta_backbone("vgg16"), layer))
        assert frozen == [name for name in expected if name in names]


def test_block5_of_vgg16_leaves_three_convolutions() -> None:
    """The usual boundary leaves block 5 of VGG16 to train: three convolutions, 7,079,424 parameters."""
    backbone = tk.freeze_until(meta_backbone("vgg16"), "block5")
    trainable = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]

    assert [name for name in trainable if name.endswith("weight")] == [f"features.{n}.weight" for n in (24, 26, 28)]
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == 3 * (512 * 512 * 9 + 512)


def test_head_freezes_a_whole_backbone(backbone: tk.Backbone) -> None:
    """On a backbone "head" freezes every parameter and puts every module in eval mode."""
    tk.freeze_until(backbone, "head").train()

    assert frozen_names(backbone) == [name for name, _ in backbone.named_parameters()]
    assert eval_names(backbone) == [name for name, _ in backbone.named_modules()]


def test_head_freezes_a_models_backbone_alone(model: tk.TransferModel) -> None:
    """On a model "head" freezes every parameter of the backbone and none of the head."""
    tk.freeze_until(model, "head").train()

    assert frozen_names(model) == [f"backbone.{name}" for name, _ in model.backbone.named_parameters()]
    assert not any(module.training for module in model.backbone.modules())
    assert all(module.training for module in model.head.modules())


@pytest.mark.parametrize("layer", ["block3", "block3_conv1", "features.6", "backbone.features.6"])
def test_a_model_takes_its_backbones_layer_names(model: tk.TransferModel, layer: str) -> None:
    """A model knows its backbone's blocks, layers and modules by the backbone's names and by its own."""
    tk.freeze_until(model, layer)

    assert frozen_names(model) == [f"backbone.features.{n}.{kind}" for n in (0, 3) for kind in ("weight", "bias")]


def test_a_layer_of_the_head_freezes_what_lies_before_it(model: tk.TransferModel) -> None:
    """The boundary may lie in the head."""
    tk.freeze_until(model, "head.logits")

    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "head.logits.weight",
        "head.logits.bias",
    ]


def test_a_module_that_contains_a_backbone_takes_its_layer_names(backbone: tk.Backbone) -> None:
    """A module of the user's own around a backbone knows the backbone's layer names."""
    own = nn.ModuleDict({"stem": nn.Conv2d(3, 3, 1), "body": backbone, "top": nn.Linear(8, 2)})

    tk.freeze_until(own, "block2").train()

    assert frozen_names(own) == ["stem.weight", "stem.bias", "body.features.0.weight", "body.features.0.bias"]
    assert eval_names(own) == ["stem", "body.features.0", "body.features.1", "body.features.2"]


def test_none_unfreezes_everything(model: tk.TransferModel) -> None:
    """None makes every parameter trainable again."""
    tk.freeze_until(tk.freeze_until(model, "head"), None)

    assert frozen_names(model) == []


def test_the_model_itself_is_returned(backbone: tk.Backbone) -> None:
    """freeze_until changes the model in place and returns it."""
    assert tk.freeze_until(backbone, "block2") is backbone


def test_freezing_twice_is_freezing_once(model: tk.TransferModel) -> None:
    """A second call with the same boundary changes nothing, and one call undoes both."""
    once = copy.deepcopy(tk.freeze_until(model, "block3")).train()
    twice = tk.freeze_until(model, "block3").train()

    assert frozen_names(twice) == frozen_names(once)
    assert eval_names(twice) == eval_names(once)
    assert eval_names(tk.freeze_until(twice, None)) == []


@pytest.mark.parametrize("first", ["block1", "block4_relu1", "head", None])
@pytest.mark.parametrize("second", ["block2", "block5_conv1", "head", None])
def test_the_last_call_alone_counts(make_backbone: Maker, first: str | None, second: str | None) -> None:
    """Deeper then shallower, or the reverse, gives what the second call alone gives."""
    moved = tk.attach_head(make_backbone(batch_norm=True), 3)
    fresh = copy.deepcopy(moved)

    tk.freeze_until(tk.freeze_until(moved, first), second).train()
    tk.freeze_until(fresh, second).train()

    assert frozen_names(moved) == frozen_names(fresh)
    assert eval_names(moved) == eval_names(fresh)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(layer=st.sampled_from(VGG16_BN_LAYERS), mode=st.booleans())
def test_what_is_frozen_is_a_prefix_in_eval_mode(layer: str, mode: bool) -> None:
    """Wherever the boundary lies, the frozen parameters come first, and their modules ignore train()."""
    backbone = tk.freeze_until(meta_backbone("vgg16_bn"), layer).train(mode)
    frozen = [not parameter.requires_grad for parameter in backbone.parameters()]
    boundary = VGG16_BN_LAYERS.index(layer)

    assert frozen == sorted(frozen, reverse=True)
    assert sum(frozen) == sum(len(list(module.parameters())) for module in backbone.features[:boundary])
    assert [module.training for module in backbone.features] == [
        mode and place >= boundary for place in range(len(VGG16_BN_LAYERS))
    ]


# --- layers that are not there


@pytest.mark.parametrize(
    ("layer", "meant"), [("block6", "block5"), ("blok4_conv2", "block4_conv2"), ("features.31", "features.30")]
)
def test_an_unknown_layer_is_refused_with_close_names(layer: str, meant: str) -> None:
    """A misspelt layer is refused with the names it resembles and the way to freeze nothing."""
    with pytest.raises(
        UnknownLayerError, match=rf"layer '{layer}': Backbone.*Did you mean.*'{meant}'.*None freezes noth"
    ):
        tk.freeze_until(meta_backbone("vgg16"), layer)


def test_an_unknown_layer_changes_nothing(model: tk.TransferModel) -> None:
    """A refused call leaves what was frozen before."""
    tk.freeze_until(model, "block3")
    before = frozen_names(model), eval_names(model)

    with pytest.raises(UnknownLayerError, match=r"TransferModel has no such layer"):
        tk.freeze_until(model, "block9_conv9")
    assert (frozen_names(model), eval_names(model)) == before


@pytest.mark.parametrize("layer", [24, "", "train", ["block5"], {"block5"}, 2.5])
def test_what_names_no_layer_is_refused(backbone: tk.Backbone, layer: object) -> None:
    """An index, an empty name, an attribute and a list are no layers."""
    with pytest.raises(UnknownLayerError, match=r"has no such layer.*(Did you mean|Known)"):
        tk.freeze_until(backbone, layer)  # type: ignore[arg-type]


def test_a_module_without_head_has_no_head_to_freeze_until() -> None:
    """ "head" means the end on a backbone only; elsewhere it is a module's name or an error."""
    with pytest.raises(UnknownLayerError, match=r"'head': Nested has no such layer"):
        tk.freeze_until(Nested(), "head")


# --- modules of other kinds


def test_a_sequential_is_frozen_by_index() -> None:
    """A plain Sequential is frozen until one of its indices."""
    layers = tk.freeze_until(nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2), nn.Linear(2, 2)), "2")

    assert frozen_names(layers.train()) == ["0.weight", "0.bias"]
    assert eval_names(layers) == ["0", "1"]


@pytest.mark.parametrize(
    ("layer", "frozen", "in_eval"),
    [
        ("body", ["scale", "stem.0", "stem.1"], ["stem", "stem.0", "stem.1", "stem.2"]),
        (
            "body.0.1",
            ["scale", "stem.0", "stem.1", "body.0.0"],
            ["stem", "stem.0", "stem.1", "stem.2", "body.0.0"],
        ),
        (
            "top",
            ["scale", "stem.0", "stem.1", "body.0.0", "body.0.1", "body.1"],
            ["stem", "stem.0", "stem.1", "stem.2", "body", "body.0", "body.0.0", "body.0.1", "body.1"],
        ),
    ],
)
def test_a_nested_module_is_frozen_by_dotted_name(layer: str, frozen: list[str], in_eval: list[str]) -> None:
    """In nested containers all before the boundary is frozen, a container's own parameter too; what contains the
    boundary trains on.
    """
    model = tk.freeze_until(Nested(), layer).train()

    assert {name.removesuffix(".weight").removesuffix(".bias") for name in frozen_names(model)} == set(frozen)
    assert eval_names(model) == in_eval


def test_torchvisions_own_vgg_is_frozen_by_module_name() -> None:
    """torchvision's vgg16 with its classifier is frozen until features.24 or until the classifier."""
    with torch.device("meta"):
        theirs = torchvision.models.vgg16(weights=None, init_weights=False)

    tk.freeze_until(theirs, "features.24")
    assert frozen_names(theirs) == [
        n for n, _ in theirs.named_parameters() if int(n.split(".")[1]) < 24 and n[0] == "f"
    ]
    tk.freeze_until(theirs, "classifier")
    assert frozen_names(theirs) == [n for n, _ in theirs.named_parameters() if n.startswith("features.")]


def test_torchvisions_resnet_is_frozen_by_module_name() -> None:
    """torchvision's resnet18 is frozen until layer4, batch norms included."""
    with torch.device("meta"):
        theirs = torchvision.models.resnet18(weights=None)

    tk.freeze_until(theirs, "layer4").train()

    assert frozen_names(theirs) == [n for n, _ in theirs.named_parameters() if not n.startswith(("layer4", "fc"))]
    norms = {n: m.training for n, m in theirs.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms == {name: name.startswith("layer4") for name in norms}


def test_a_shared_parameter_stays_frozen() -> None:
    """A weight that a frozen layer shares with a trainable one stays frozen: the frozen part must not change."""
    first, last = nn.Linear(3, 3), nn.Linear(3, 3)
    last.weight = first.weight
    tk.freeze_until(nn.Sequential(first, nn.Linear(3, 3), last), "1")

    assert not last.weight.requires_grad
    assert last.bias.requires_grad


# --- training leaves every bit


def norms_and_dropout() -> nn.Sequential:
    """Two equal halves of a convolution, batch norm and dropout."""
    halves = [[nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(0.5)] for _ in range(2)]
    return nn.Sequential(*(layer for half in halves for layer in half), nn.Flatten(), nn.Linear(3 * 64, 2))


@pytest.mark.parametrize("call", ["model", "submodule", "eval first"])
def test_frozen_norms_and_dropout_stay_in_eval(call: str) -> None:
    """model.train(), train() of the frozen layers themselves and eval() then train() leave them in eval mode."""
    layers = tk.freeze_until(norms_and_dropout(), "3")

    if call == "submodule":
        for layer in layers[:3]:
            assert layer.train() is layer
    elif call == "eval first":
        layers.eval().train()
    else:
        layers.train(True)

    assert [layer.training for layer in layers] == [False] * 3 + [True] * 5


def test_dropout_before_the_boundary_drops_nothing() -> None:
    """In training mode the frozen part gives the same output twice, the trainable part does not."""
    layers = tk.freeze_until(norms_and_dropout(), "3").train()
    images = torch.randn(4, 3, 8, 8)

    frozen, frozen_again = layers[:3](images), layers[:3](images)
    out, out_again = layers[3:6](frozen), layers[3:6](frozen)

    assert torch.equal(frozen, frozen_again)
    assert not torch.equal(out, out_again)


@pytest.mark.parametrize("boundary", ["block2", "block3_conv1", "block4_relu1", "head"])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda parameters: torch.optim.Adam(parameters, lr=0.1, weight_decay=0.1),
    ],
    ids=["sgd", "adam"],
)
def test_training_changes_no_bit_of_what_is_frozen(
    make_backbone: Maker, boundary: str, optimizer: Callable[..., torch.optim.Optimizer]
) -> None:
    """After real steps, with momentum and gradients left over from before, all frozen parameters and buffers are
    bit-identical, and every trainable parameter and statistic of batch norm has changed.
    """
    model = tk.attach_head(make_backbone(batch_norm=True), 3).train()
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8) % 3
    stepper = optimizer(model.parameters())  # all of them, as in one's own loop
    nn.functional.cross_entropy(model(images), targets).backward()
    stepper.step()  # momentum and stale gradients for all

    tk.freeze_until(model, boundary)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = weights_of(model)
    for _ in range(3):
        model.train()
        nn.functional.cross_entropy(model(images), targets).backward()
        stepper.step()
        stepper.zero_grad(set_to_none=False)

    in_training = {name for name, module in model.named_modules() if module.training}
    buffers = {name for name, _ in model.named_buffers() if name.rpartition(".")[0] in in_training}
    assert changed(before, model) == trainable | buffers - STANDARDIZE
    assert len(trainable) < len(list(model.parameters()))


def test_left_over_gradients_are_cleared(model: tk.TransferModel) -> None:
    """Gradients from before are gone from what is frozen, and stay where training goes on."""
    model(torch.randn(2, 3, 32, 32)).sum().backward()

    tk.freeze_until(model, "block4")

    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == frozen_names(model) != []


def test_the_forward_pass_of_a_frozen_model_is_that_in_eval_mode(make_backbone: Maker) -> None:
    """A wholly frozen backbone in training mode gives bit for bit what it gives in eval mode."""
    backbone = make_backbone(batch_norm=True)
    images = torch.randn(4, 3, 32, 32)
    expected = backbone.eval()(images)

    got = tk.freeze_until(backbone.train(), "head").train()(images)

    assert torch.equal(got, expected)


# --- copies


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_frozen_model_is_frozen(make_backbone: Maker, copied: Callable[[nn.Module], nn.Module]) -> None:
    """A copy keeps what is frozen through train(), and copy and original do not touch each other's modes."""
    original = tk.freeze_until(tk.attach_head(make_backbone(batch_norm=True), 3), "block3")
    twin = copied(original).train()
    original.eval()

    assert frozen_names(twin) == frozen_names(original)
    assert eval_names(twin) == [f"backbone.features.{place}" for place in range(8)]

    tk.freeze_until(twin, None).train()
    assert eval_names(twin) == []
    assert eval_names(original.train()) == [f"backbone.features.{place}" for place in range(8)]


def test_a_frozen_state_dict_is_an_ordinary_one(model: tk.TransferModel) -> None:
    """Freezing adds nothing to the state dict and takes nothing from it."""
    before = weights_of(model)

    tk.freeze_until(model, "block4")

    assert list(model.state_dict()) == list(before)
    assert changed(before, model) == set()


# --- unfreezing


@pytest.mark.parametrize("first", ["block3", "head"])
def test_unfreezing_a_model_puts_its_modules_back_in_training_mode(make_backbone: Maker, first: str) -> None:
    """What is unfrozen in a model in training mode trains at once, without another call of train()."""
    model = tk.attach_head(make_backbone(batch_norm=True), 3)

    tk.freeze_until(tk.freeze_until(model, first), "block2")

    assert eval_names(model) == [f"backbone.features.{place}" for place in range(4)]


def test_unfreezing_a_whole_backbone_puts_it_back_in_training_mode(make_backbone: Maker) -> None:
    """A backbone in training mode that was frozen to its end and unfrozen is in training mode again."""
    backbone = tk.freeze_until(tk.freeze_until(make_backbone(batch_norm=True), "head"), None)

    assert eval_names(backbone) == []


def test_unfreezing_a_model_in_eval_mode_leaves_it_there(model: tk.TransferModel) -> None:
    """What is unfrozen in a model in eval mode is in eval mode until train() is called."""
    tk.freeze_until(tk.freeze_until(model, "head").eval(), None)

    assert eval_names(model) == [name for name, _ in model.named_modules()]
    assert eval_names(model.train()) == []


def test_unfrozen_parameters_train(make_backbone: Maker) -> None:
    """After unfreezing a step changes the parameters that were frozen, and batch norm counts again."""
    model = tk.freeze_until(tk.freeze_until(tk.attach_head(make_backbone(batch_norm=True), 3), "head"), None).train()
    before = weights_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    nn.functional.cross_entropy(model(torch.randn(8, 3, 32, 32)), torch.arange(8) % 3).backward()
    optimizer.step()

    assert {"backbone.features.0.weight", "backbone.features.1.running_mean"} <= changed(before, model)


# --- what is frozen, in words


@pytest.mark.parametrize("layer", ["block1_conv1", "block2_conv1", "block4_conv1"])
def test_first_trainable_is_the_boundary(model: tk.TransferModel, layer: str) -> None:
    """The first trainable layer goes by its backbone's layer name, and freezing until it changes nothing."""
    tk.freeze_until(model, layer)
    before = frozen_names(model)

    assert first_trainable(model) == layer
    assert frozen_names(tk.freeze_until(model, first_trainable(model))) == before


def test_first_trainable_behind_a_layer_without_parameters(model: tk.TransferModel) -> None:
    """With the boundary at a pool the first trainable layer is the next convolution."""
    assert first_trainable(tk.freeze_until(model, "block2_pool")) == "block3_conv1"


def test_first_trainable_of_the_head(model: tk.TransferModel) -> None:
    """With the backbone frozen it is the head's first layer with parameters, by its module name."""
    assert first_trainable(tk.freeze_until(model, "head")) == "head.fc1"


def test_nothing_trainable_is_none(backbone: tk.Backbone) -> None:
    """With everything frozen there is no first trainable layer."""
    assert first_trainable(tk.freeze_until(backbone, "head")) is None


def test_frozen_parts_are_described_with_counts() -> None:
    """The line says how many parameters are frozen, before which layer, and how many train."""
    backbone = tk.freeze_until(meta_backbone("vgg16"), "block5")

    assert (
        describe_frozen(backbone) == "frozen: 7,635,264 parameters before block5_conv1; training: 7,079,424 parameters"
    )


def test_nothing_frozen_is_described() -> None:
    """With nothing frozen the line says so."""
    assert describe_frozen(nn.Linear(2, 2)) == "frozen: nothing; training: 6 parameters"


def test_everything_frozen_is_described(backbone: tk.Backbone) -> None:
    """With everything frozen the line counts it and speaks of no layer."""
    count = sum(parameter.numel() for parameter in backbone.parameters())

    described = describe_frozen(tk.freeze_until(backbone, "head"))

    assert described.startswith(f"frozen: {count:,} parameters")
    assert described.endswith("training: 0 parameters")
    assert "None" not in described


# --- batch norm that is frozen otherwise


def convert(model: tk.TransferModel) -> None:
    """Replace the backbone's batch norm by new modules, as `convert_sync_batchnorm` does."""
    for index, old in enumerate(model.backbone.features):
        if isinstance(old, nn.BatchNorm2d):
            new = nn.BatchNorm2d(old.num_features)
            new.weight, new.bias = old.weight, old.bias
            new.running_mean, new.running_var = old.running_mean, old.running_var
            model.backbone.features[index] = new


def to_sync(model: tk.TransferModel) -> None:
    """Convert as torch does; what is frozen is in eval mode and needs no process group."""
    nn.SyncBatchNorm.convert_sync_batchnorm(model)


def set_training(model: tk.TransferModel) -> None:
    """Set the flag of every module by hand."""
    for module in model.modules():
        module.training = True


def without_parameters(model: tk.TransferModel) -> None:
    """Replace the first batch norm by one that has no parameters."""
    old = model.backbone.features[1]
    model.backbone.features[1] = nn.BatchNorm2d(old.num_features, affine=False)


@pytest.mark.parametrize("change", [convert, to_sync, set_training, without_parameters])
@pytest.mark.parametrize(
    ("when", "boundary"),
    [("before", "block5"), ("after", "head"), ("callback", "block5"), ("steps", "head"), ("lr_find", "block5")],
)
def test_frozen_batch_norm_does_not_move(
    make_backbone: Maker,
    data: tuple[Tensor, Tensor],
    change: Callable[[tk.TransferModel], None],
    when: str,
    boundary: str,
) -> None:
    """Batch norm that was converted or switched on after freezing keeps its statistics in whatever trains the rest."""
    torch.manual_seed(0)
    model = tk.freeze_until(tk.attach_head(make_backbone(batch_norm=True), 3), boundary)
    if when == "before":
        change(model)
    trainer = tk.Trainer(model, device="cpu", precision="fp32")
    if when not in ("before", "callback"):
        change(model)
    frozen = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)][
        : 4 if boundary == "block5" else 5
    ]
    before = weights_of(model)
    if when == "steps":
        list(trainer.steps(data, batch_size=8, epochs=2))
    elif when == "lr_find":
        trainer.lr_find(data, batch_size=8, num_steps=4, verbose=0)
    else:
        callbacks = [lambda trainer, report: change(trainer.model)] if when == "callback" else []
        trainer.fit(data, epochs=2, batch_size=8, verbose=0, callbacks=callbacks)
    live = model.state_dict()
    assert all(
        torch.equal(live[f"{name}.{buffer}"], before[f"{name}.{buffer}"])
        for name in frozen
        for buffer in ("running_mean", "running_var")
        if when != "callback" or change is not without_parameters
    )


def test_batch_norm_frozen_by_hand_does_not_move(make_backbone: Maker, data: tuple[Tensor, Tensor], capsys) -> None:
    """Parameters frozen with `requires_grad` alone take their batch norm's statistics with them, and a line says so."""
    torch.manual_seed(0)
    model = tk.attach_head(make_backbone(batch_norm=True), 3)
    model.backbone.requires_grad_(requires_grad=False)
    before = weights_of(model.backbone)
    trainer = tk.Trainer(model, device="cpu", precision="fp32")
    trainer.fit(data, epochs=1, batch_size=8, verbose=2)
    assert changed(before, model.backbone) == set()
    assert (
        "batch norm whose parameters are frozen keeps its statistics, too: backbone.features.1"
        in capsys.readouterr().out
    )


def test_batch_norm_of_the_head_without_parameters_moves(make_backbone: Maker, data: tuple[Tensor, Tensor]) -> None:
    """In the head it has nothing that is frozen, so it gathers statistics as usual."""
    head = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3))
    model = tk.freeze_until(tk.attach_head(make_backbone(), 3, head=head), "head")
    tk.Trainer(model, device="cpu", precision="fp32").fit(data, epochs=1, batch_size=8, verbose=0)
    assert bool(head[1].running_mean.any())


@pytest.mark.parametrize("boundary", ["block3", "head"])
def test_update_bn_keeps_frozen_statistics(make_backbone: Maker, data: tuple[Tensor, Tensor], boundary: str) -> None:
    """torch's `update_bn` fills the statistics of layers that train anew, and leaves those of frozen ones."""
    model = tk.freeze_until(tk.attach_head(make_backbone(batch_norm=True), 3), boundary)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.normal_()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.optim.swa_utils.update_bn([model.backbone.preprocess(data[0])], averaged)
    after = [module for module in averaged.modules() if isinstance(module, nn.BatchNorm2d)]
    same = [torch.equal(norm.running_mean, other.running_mean) for norm, other in zip(norms, after, strict=True)]
    assert same == [True] * 2 + [False] * 3 if boundary == "block3" else same == [True] * 5
    tk.freeze_until(averaged.module, None)
    after[0].reset_running_stats()
    assert not after[0].running_mean.any()
