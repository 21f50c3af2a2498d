"""The optimizer over backbone and head."""

import functools

import numpy as np
import pytest
import torch

import transferkit as tk
from transferkit.errors import ArgumentError
from transferkit.training.optimizers import build_optimizer, parameter_groups, scale_lr, set_lr

GROUPS = ["block1", "block2", "block3", "block4", "block5", "head"]


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("boundary", [None, "block3", "head"])
def test_the_groups_are_the_same_whatever_is_frozen(model, boundary):
    """Each block's parameters make a group and the head's another, frozen ones included, in the model's order."""
    groups = build_optimizer("adam", tk.freeze_until(model, boundary), None, None).param_groups
    assert [group["name"] for group in groups] == GROUPS
    assert [id(p) for group in groups for p in group["params"]] == [id(p) for p in model.parameters()]
    assert [id(p) for p in groups[-1]["params"]] == [id(p) for p in model.head.parameters()]
    assert [len(group["params"]) for group in groups] == [2, 2, 2, 2, 2, 4]


def test_batch_norm_belongs_to_its_block(make_backbone):
    """A block's group holds its batch norm's parameters too."""
    model = tk.attach_head(make_backbone(batch_norm=True), 3)
    assert [len(group) for group in parameter_groups(model).values()] == [4, 4, 4, 4, 4, 2]


@pytest.mark.parametrize(
    ("name", "kind", "options", "own"),
    [
        ("adam", torch.optim.Adam, {"weight_decay": 0.0}, [1e-4] * 5 + [3e-4]),
        ("adamw", torch.optim.AdamW, {"weight_decay": 0.01}, [1e-4] * 5 + [3e-4]),
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.0}, [1e-3] * 5 + [1e-2]),
        ("rmsprop", torch.optim.RMSprop, {"weight_decay": 0.0}, [1e-4] * 5 + [3e-4]),
    ],
)
def test_names_stand_for_torchs_optimizers(model, name, kind, options, own):
    """Each name is the torch optimizer of that name with the documented options, and rates for backbone and head."""
    optimizer = build_optimizer(name, model, None, None)
    assert type(optimizer) is kind
    assert all(group[key] == value for group in optimizer.param_groups for key, value in options.items())
    assert rates(optimizer) == own


@pytest.mark.parametrize(
    ("kind", "own"), [(torch.optim.Adam, 1e-3), (torch.optim.SGD, 1e-3), (torch.optim.Rprop, 1e-2)]
)
def test_a_class_keeps_its_own_default_rate(model, kind, own):
    """Without `lr` an optimizer class has the rate that it has without a trainer, in every group."""
    assert rates(build_optimizer(kind, model, None, None)) == [own] * 6


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", torch.optim.Adam])
def test_optimizers_are_fused(model, optimizer):
    """Where torch has a fused kernel it is used."""
    assert all(group["fused"] is True for group in build_optimizer(optimizer, model, None, None).param_groups)


def test_weight_decay_reaches_every_group(model):
    """`weight_decay` is given to every group."""
    groups = build_optimizer("sgd", model, None, 1e-4).param_groups
    assert [group["weight_decay"] for group in groups] == [1e-4] * 6


@pytest.mark.parametrize(
    "optimizer", ["adamw", torch.optim.AdamW, functools.partial(torch.optim.AdamW, weight_decay=0.1)]
)
def test_weight_decay_of_zero_is_zero(model, optimizer):
    """0 means 0, whatever the optimizer's own default or that of a `functools.partial`."""
    groups = build_optimizer(optimizer, model, None, 0.0).param_groups
    assert [group["weight_decay"] for group in groups] == [0.0] * 6


def test_partial_keeps_its_options(model):
    """What a `functools.partial` says stands: momentum, weight decay, and foreach instead of fused."""
    partial = functools.partial(torch.optim.SGD, momentum=0.5, weight_decay=0.1, foreach=True)
    groups = build_optimizer(partial, model, 1e-2, None).param_groups
    assert [(g["momentum"], g["weight_decay"], g["foreach"], g["fused"], g["lr"]) for g in groups] == [
        (0.5, 0.1, True, None, 1e-2)
    ] * 6


def test_learning_rate_of_a_partial_stands(model):
    """`partial(SGD, lr=0.1)` without another `lr` trains at 0.1."""
    optimizer = build_optimizer(functools.partial(torch.optim.SGD, lr=0.1), model, None, None)
    assert rates(optimizer) == [0.1] * 6
    scale_lr(optimizer, 0.5)
    assert rates(optimizer) == [0.05] * 6


def test_rates_may_differ_between_the_groups(model):
    """A mapping gives each group its own learning rate, in whatever order it names them."""
    assert rates(build_optimizer("adam", model, {"head": 1e-2, "backbone": 1e-5}, None)) == [1e-5] * 5 + [1e-2]


def test_scaling_starts_from_the_base_rate(model):
    """Factors do not pile up: each is applied to the base rate."""
    optimizer = build_optimizer("adam", model, {"head": 1e-2, "backbone": 1e-4}, None)
    scale_lr(optimizer, 0.5)
    scale_lr(optimizer, 0.1)
    assert rates(optimizer) == pytest.approx([1e-5] * 5 + [1e-3])


def test_numpy_rate_serves(model):
    """A rate out of a numpy grid is a number like any other."""
    for rate in np.array([0.25], np.float32), np.array([0.25], np.float64):
        assert rates(build_optimizer("adam", model, rate[0], None)) == [0.25] * 6


@pytest.mark.parametrize("lr", [0, 0.0, -1, float("nan"), float("inf"), "x", True, [1e-3]])
def test_rate_that_cannot_be_used_is_refused(model, lr):
    """A rate is a finite number above 0; the message has the value and an example."""
    with pytest.raises(ArgumentError, match=r"^lr( of \w+)?=.* cannot be used: expected a finite number above 0"):
        build_optimizer("adam", model, lr, None)


def test_a_block_may_have_a_rate_of_its_own(model):
    """A block's own entry wins over the backbone's, which stands for the blocks that are not named."""
    optimizer = build_optimizer("adam", model, {"head": 1e-2, "backbone": 1e-5, "block4": 1e-4}, None)
    assert rates(optimizer) == [1e-5, 1e-5, 1e-5, 1e-4, 1e-5, 1e-2]
    set_lr(optimizer, dict(zip(GROUPS, [1, 2, 3, 4, 5, 6], strict=True)))
    assert rates(optimizer) == [1, 2, 3, 4, 5, 6]


def test_discriminative_rates_fall_by_a_factor_from_block_to_block(model):
    """The head has the rate itself, and each earlier block that of the next times the factor."""
    optimizer = build_optimizer("adam", model, tk.discriminative_lr(model, 1e-2, factor=0.5), None)
    assert rates(optimizer) == pytest.approx([1e-2 * 0.5**n for n in (5, 4, 3, 2, 1, 0)])


@pytest.mark.parametrize(("lr", "factor", "name"), [(0, 0.3, "lr=0"), (1e-3, -1, "factor=-1"), (1e-3, True, "factor")])
def test_discriminative_rates_out_of_range_are_refused(model, lr, factor, name):
    """Rate and factor are finite numbers above 0."""
    with pytest.raises(ArgumentError, match=f"{name}.*expected a finite number above 0"):
        tk.discriminative_lr(model, lr, factor=factor)


@pytest.mark.parametrize(
    "lr",
    [
        {"head": 1e-3},
        {"backbone": 1e-3, "classifier": 1e-3},
        {},
        {"head": 1e-3, "backbone": 1e-3, "block9": 1e-3},
        {"head": 1e-3, "block5": 1e-3},
    ],
)
def test_mapping_of_other_groups_is_refused(model, lr):
    """A mapping has a rate for each group and for nothing else."""
    with pytest.raises(
        ArgumentError,
        match=r"lr names the groups \[.*\]: expected a rate for each of \['block1', .*'head'\] \(\"backbone",
    ):
        build_optimizer("adam", model, lr, None)


def test_groups_of_an_optimizer_built_elsewhere_are_named_exactly(model):
    """The backbone stands for blocks only where there are blocks."""
    optimizer = build_optimizer(torch.optim.SGD(model.parameters(), lr=0.5), model, None, None)
    with pytest.raises(ArgumentError, match=r"lr names the groups \['backbone', 'head'\]: expected .* \['0'\], or one"):
        set_lr(optimizer, {"backbone": 1e-5, "head": 1e-3})
    set_lr(optimizer, {"0": 0.25})
    assert rates(optimizer) == [0.25]


def test_bad_rate_of_one_group_changes_nothing(model):
    """A mapping with one bad rate is refused whole."""
    optimizer = build_optimizer("adam", model, 1e-3, None)
    with pytest.raises(ArgumentError, match=r"lr of head=-1 cannot be used"):
        set_lr(optimizer, {"backbone": 1e-2, "head": -1})
    assert rates(optimizer) == [1e-3] * 6


@pytest.mark.parametrize("weight_decay", [-1e-4, float("nan"), float("inf")])
def test_weight_decay_out_of_range_is_refused(model, weight_decay):
    """Weight decay is 0 or more."""
    with pytest.raises(
        ArgumentError, match=rf"weight_decay={weight_decay} cannot be used: expected a finite number of 0 or more"
    ):
        build_optimizer("adam", model, None, weight_decay)


def test_weight_decay_that_is_no_number_is_refused(model):
    """Weight decay that is no number is refused by name, not with Python's own error."""
    with pytest.raises(ArgumentError, match=r"weight_decay='x' cannot be used: expected a finite number of 0 or more"):
        build_optimizer("adam", model, None, "x")


@pytest.mark.parametrize(("name", "hint"), [("addam", "Did you mean 'adam"), ("lion", "Known: 'adam', 'adamw', 'sgd'")])
def test_unknown_name_is_refused(model, name, hint):
    """An unknown optimizer is refused with the names that come close."""
    with pytest.raises(ArgumentError, match=rf"optimizer='{name}' is not known. {hint}"):
        build_optimizer(name, model, None, None)


@pytest.mark.parametrize("optimizer", [None, 5])
def test_optimizer_of_another_type_is_refused(model, optimizer):
    """What is no name, class or optimizer is refused by name, not with Python's own error."""
    with pytest.raises(
        ArgumentError, match=rf"optimizer={optimizer!r} cannot be used: expected a name .*adam.*an optimizer class"
    ):
        build_optimizer(optimizer, model, None, None)


def test_instance_is_taken_as_it_is(model):
    """An optimizer already built is used, with its own groups and rates."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    assert build_optimizer(optimizer, model, None, None) is optimizer
    scale_lr(optimizer, 0.1)
    assert rates(optimizer) == pytest.approx([0.05])


def test_instance_over_the_trainable_part_is_taken(model):
    """An instance need not hold what is frozen."""
    tk.freeze_until(model, "head")
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.5)
    assert build_optimizer(optimizer, model, None, None) is optimizer


def test_instance_over_another_model_is_refused(model, make_backbone):
    """An instance over the parameters of another model, which would train nothing, is refused."""
    other = tk.attach_head(make_backbone(), 3)
    with pytest.raises(
        ArgumentError, match=r"holds 12 parameters of another model and lacks 14 that train \(backbone."
    ):
        build_optimizer(torch.optim.SGD(other.parameters(), lr=0.5), model, None, None)


def test_instance_that_lacks_parameters_is_refused(model):
    """An instance that lacks parameters that train is refused with their names."""
    with pytest.raises(
        ArgumentError, match=r"0 parameters of another model and lacks 10 that train \(backbone.features.0"
    ):
        build_optimizer(torch.optim.SGD(model.head.parameters(), lr=0.5), model, None, None)


@pytest.mark.parametrize(("lr", "weight_decay"), [(1e-3, 0.0), (None, 1e-4)])
def test_instance_together_with_options_is_refused(model, lr, weight_decay):
    """A rate or decay that an instance would not get is refused, not ignored."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with pytest.raises(ArgumentError, match=rf"lr={lr} and weight_decay={weight_decay} have no effect on an optimizer"):
        build_optimizer(optimizer, model, lr, weight_decay)


class Sam(torch.optim.SGD):
    """An optimizer that computes the loss a second time in its step."""

    def step(self, closure):
        return closure()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (torch.optim.LBFGS, "cannot be built over the model: LBFGS"),
        (torch.optim.Muon, "cannot be built over the model: Muon"),
        (torch.optim.SparseAdam, "SparseAdam needs sparse gradients"),
        (Sam, "Sam needs a closure"),
        (functools.partial(Sam, lr=0.1), "Sam needs a closure"),
    ],
    ids=["LBFGS", "Muon", "SparseAdam", "a closure", "a partial"],
)
def test_an_optimizer_of_another_kind_is_refused(model, kind, message):
    """What cannot step on groups of dense gradients is refused when the trainer is made, with what can."""
    with pytest.raises(ArgumentError, match=rf"{message}.*such as torch.optim.AdamW"):
        tk.Trainer(model, optimizer=kind, device="cpu")


def test_an_instance_of_another_kind_is_refused(model):
    """An optimizer that is already built is refused likewise."""
    with pytest.raises(ArgumentError, match="LBFGS needs a closure"):
        tk.Trainer(model, optimizer=torch.optim.LBFGS(model.parameters()), device="cpu")
