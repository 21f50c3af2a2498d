"""Linear heads solved to their optimum."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from transferkit.compute.device import Device
from transferkit.errors import ArgumentError, EmptyDataError, NonFiniteError
from transferkit.features.chunks import CachedFeatures
from transferkit.linear import choice, design, logistic, table
from transferkit.linear.choice import LinearHead, assign_folds, solve
from transferkit.linear.table import Table
from transferkit.training.loss import BinaryCrossEntropy, CrossEntropy, FunctionLoss


def problem(rows: int, columns: int, *, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated features of very different sizes, away from zero, that tell something about the targets."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(rows) % classes
    features = torch.randn(rows, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    features += torch.randn(classes, columns, generator=generator)[targets]
    return (features + 5) * torch.logspace(-2, 2, columns), targets


def error(head: LinearHead, features: Tensor, targets: Tensor, loss: object, l2: float) -> float:
    """How far the weights are from the optimum, relative to their norm, at most.

    The objective, written down in float64, is convex with a curvature of at least `l2` in every weight.
    """
    rows = features.double()
    mean, std = rows.mean(dim=0), rows.std(dim=0, correction=0)
    rows = (rows - mean) / torch.where(std > 0, std, 1)
    weight, bias = (tensor.double().requires_grad_() for tensor in (head.weight, head.bias))
    logits = rows @ weight.T + bias
    objective = loss(logits, targets) + l2 / 2 * weight.square().sum()
    by_weight, by_bias = torch.autograd.grad(objective, [weight, bias])
    assert float(by_bias.norm()) < 1e-5
    return float(by_weight.norm() / l2 / weight.detach().norm())


SOFT = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.0, 0.0, 1.0], [0.4, 0.4, 0.2]]).repeat(15, 1)
HOT = torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0], [0, 0, 1]]).repeat(12, 1)
WEIGHTS = torch.tensor([1.0, 4.0, 0.5])


@pytest.mark.parametrize("columns", [1, 6, 90], ids=lambda columns: f"{columns} features")
@pytest.mark.parametrize("l2", [1.0, 1e-2])
@pytest.mark.parametrize(
    ("loss", "plain", "targets"),
    [
        (CrossEntropy(), torch.nn.CrossEntropyLoss(), torch.arange(60) % 3),
        (CrossEntropy(0.1, WEIGHTS), None, torch.arange(60) % 3),
        (CrossEntropy(), torch.nn.CrossEntropyLoss(), SOFT),
        (BinaryCrossEntropy(), torch.nn.BCEWithLogitsLoss(), HOT),
        (FunctionLoss(torch.nn.CrossEntropyLoss()), torch.nn.CrossEntropyLoss(), torch.arange(60) % 3),
    ],
    ids=["classes", "weighted and smoothed", "soft targets", "several labels", "a user's function"],
)
def test_the_weights_are_the_optimum(columns, l2, loss, plain, targets):
    """The weights agree with the optimum of mean loss and penalty to four digits, for any loss and any shape."""
    features, _ = problem(60, columns)
    if plain is None:

        def plain(logits: Tensor, targets: Tensor) -> Tensor:
            losses = torch.nn.functional.cross_entropy(
                logits, targets, WEIGHTS.double(), label_smoothing=0.1, reduction="sum"
            )
            return losses / WEIGHTS[targets].sum()

    head = solve(Table.of_tensor(features), targets, loss, classes=3, strengths=[l2], folds=0)
    assert error(head, features, targets, plain, l2) < 1e-4


@pytest.fixture(scope="module")
def linear_model():
    """scikit-learn's, which sets environment variables when it is imported."""
    return pytest.importorskip("sklearn.linear_model")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(300, 20), (50, 200)])
def test_scikit_learn_finds_the_same(shape, linear_model):
    """Weights, biases and probabilities agree to four digits with those of LogisticRegression(C=1 / (l2 * N))."""
    features, targets = problem(*shape)
    rows = features.double()
    rows = (rows - rows.mean(dim=0)) / rows.std(dim=0, correction=0)
    for l2 in (1.0, 1e-2):
        head = solve(Table.of_tensor(features), targets, CrossEntropy(), classes=3, strengths=[l2], folds=0)
        theirs = linear_model.LogisticRegression(C=1 / (l2 * len(rows)), tol=1e-8, max_iter=10_000)
        theirs.fit(rows.numpy(), targets.numpy())
        expected = torch.from_numpy(theirs.coef_)
        assert (head.weight - expected).norm() < 1e-4 * expected.norm()
        ours = (rows.float() @ head.weight.T + head.bias).softmax(dim=1)
        assert (ours - torch.from_numpy(theirs.predict_proba(rows.numpy()))).abs().max() < 1e-4


@pytest.mark.slow
def test_scikit_learn_finds_the_same_labels(linear_model):
    """With several labels each one's weights are those of its own LogisticRegression(C=1 / (l2 * N * K))."""
    features, _ = problem(60, 6)
    rows = features.double()
    rows = (rows - rows.mean(dim=0)) / rows.std(dim=0, correction=0)
    head = solve(Table.of_tensor(features), HOT, BinaryCrossEntropy(), classes=3, strengths=[1e-2], folds=0)
    for label in range(3):
        theirs = linear_model.LogisticRegression(C=1 / (1e-2 * 60 * 3), tol=1e-8, max_iter=10_000)
        theirs.fit(rows.numpy(), HOT[:, label].numpy())
        expected = torch.from_numpy(theirs.coef_[0])
        assert (head.weight[label] - expected).norm() < 1e-4 * expected.norm()
        assert float(head.bias[label]) == pytest.approx(float(theirs.intercept_[0]), abs=1e-4)


def counted(features: Tensor) -> tuple[Table, list[int]]:
    """A table, and where each of its blocks that was read began."""
    read: list[int] = []
    rows = Table.of_tensor(features)
    return dataclasses.replace(rows, read=lambda start, stop: read.append(start) or features[start:stop]), read


NOISY = torch.where(torch.arange(4000) % 7 < 3, (torch.arange(4000) * 7919) % 3, torch.arange(4000) % 3)


@pytest.mark.parametrize(
    ("loss", "targets", "plain"),
    [
        (CrossEntropy(), NOISY, torch.nn.CrossEntropyLoss()),
        (BinaryCrossEntropy(), torch.nn.functional.one_hot(NOISY).float(), torch.nn.BCEWithLogitsLoss()),
    ],
    ids=["classes", "several labels"],
)
def test_a_table_larger_than_memory_is_read_a_few_times(loss, targets, plain, monkeypatch):
    """A table of which half fits in memory is read at most eight times for the same optimum, all penalties included."""
    monkeypatch.setattr(table, "BLOCK_BYTES", 4 * 20 * 700)
    monkeypatch.setattr(Table, "rows_in_memory", lambda self: 2000)
    features, _ = problem(4000, 20)
    rows, read = counted(features)
    head = solve(rows, targets, loss, classes=3, strengths=[1.0, 0.1, 0.01])
    assert sorted(set(read)) == list(range(0, 4000, 700))
    assert read.count(0) <= 8
    assert error(head, features, targets, plain, head.l2) < 1e-4
    best = min(head.path, key=lambda strength: strength.loss)
    assert head.l2 == best.l2 / 2  # beside twice as many rows
    assert str(head) == f"accuracy {best.accuracy:.4f} ± {best.accuracy_error:.4f} on held-out images, L2 {head.l2:.3g}"
    assert len(head.held_out) == 2000
    assert float(loss.each(head.logits, targets[head.held_out]).mean()) == pytest.approx(best.loss, rel=1e-5)


def test_rows_that_tell_little_about_the_others_cost_more_readings(monkeypatch):
    """However few rows fit in memory, all of them lead to the same optimum, also with more features than rows."""
    features, targets = problem(60, 6)
    monkeypatch.setattr(Table, "rows_in_memory", lambda self: 15)
    head = solve(Table.of_tensor(features), targets, CrossEntropy(), classes=3, strengths=[1e-2])
    assert error(head, features, targets, torch.nn.CrossEntropyLoss(), 1e-2) < 1e-4
    features, targets = problem(60, 90)
    monkeypatch.setattr(design, "LARGEST_PRODUCTS", 59)
    head = solve(Table.of_tensor(features), targets, CrossEntropy(), classes=3, strengths=[1e-2])
    assert error(head, features, targets, torch.nn.CrossEntropyLoss(), 1e-2) < 1e-4


def test_every_fold_of_a_table_larger_than_memory_is_held_out(monkeypatch):
    """With every fold held out, each row has logits of a head that was solved without it."""
    features, targets = problem(60, 6)
    arguments = {"classes": 3, "strengths": [1e-2], "every_fold": True}
    expected = solve(Table.of_tensor(features), targets, CrossEntropy(), **arguments)
    monkeypatch.setattr(Table, "rows_in_memory", lambda self: 30)
    head = solve(Table.of_tensor(features), targets, CrossEntropy(), **arguments)
    assert head.held_out.tolist() == list(range(60))
    torch.testing.assert_close(head.logits, expected.logits, atol=2e-2, rtol=2e-2)


def test_a_table_in_memory_is_read_once():
    """A table that fits is read once, for its moments and to be held, however long the path is."""
    features, targets = problem(60, 6)
    rows, read = counted(features)
    solve(rows, targets, CrossEntropy(), classes=3)
    assert read == [0]


def test_what_hardly_varies_is_divided_by_the_median_of_its_kind():
    """A feature with a smaller deviation than the median one of its kind is divided by that; a constant kind by 1."""
    features = torch.tensor([[-1.0, 1.0], [-3.0, 3.0], [-0.1, 0.1], [5.0, 5.0], [-0.2, 0.2], [7.0, 7.0]]).T
    whole = design.design_of(Table.of_tensor(features))
    assert whole.std.tolist() == pytest.approx([1, 3, 0.1, 1, 0.2, 1])
    parts = design.design_of(Table.of_tensor(features, columns=[slice(0, 4), slice(4, 5), slice(5, 6)]))
    assert parts.std.tolist() == pytest.approx([1, 3, 1, 1, 0.2, 1])


def test_cached_features_are_flattened_as_the_head_sees_them():
    """Cached features in several parts, bf16 and in two views, are the rows that nn.Flatten makes of (N, C, h, w)."""
    parts = [torch.randn(count, 2, 3, 5, generator=torch.Generator().manual_seed(count)).bfloat16() for count in (4, 3)]
    rows = torch.tensor([[6, 0, 2], [1, 5, 3]])
    cached = CachedFeatures(parts, rows, torch.zeros(3), Device("cpu"))
    expected = torch.cat(parts)[rows.flatten()].permute(0, 3, 1, 2).flatten(1).float()
    assert torch.equal(torch.cat(list(Table.of_features(cached).blocks())), expected)
    some = Table.of_features(cached, columns=[slice(20, 30), slice(3, 5)])
    assert some.shape == (6, 12)
    assert torch.equal(torch.cat(list(some.blocks())), torch.cat([expected[:, 20:30], expected[:, 3:5]], dim=1))


@pytest.mark.parametrize("columns", [4, 40])
def test_leave_one_out_is_exact(columns):
    """With as many folds as rows, a row's logits are those of a head solved without it, on the same scale."""
    features, targets = problem(15, columns)
    head = solve(Table.of_tensor(features), targets, CrossEntropy(), classes=3, strengths=[0.1], folds=15)
    rows = (features - head.mean) / head.std
    for row in range(15):
        others = torch.arange(15) != row
        parts = design.design_of(Table.of_tensor(features))
        alone = logistic.Problems(parts, targets, CrossEntropy(), classes=3, members=others[:, None])
        alone.solve(0.1, tolerance=1e-5)
        weight, bias = parts.on_features(alone.weights[0])
        scale = float(weight.norm())
        left_out = rows[others].double()
        logits = (left_out @ weight.double().T + bias).requires_grad_()
        loss = torch.nn.functional.cross_entropy(logits, targets[others])
        (slopes,) = torch.autograd.grad(loss, logits)
        assert (slopes.T @ left_out + 0.1 * weight).norm() < 1e-4 * 0.1 * scale  # the optimum without the row
        torch.testing.assert_close(head.logits[row], rows[row] @ weight.T + bias, atol=0.02, rtol=0.02)


def test_the_penalty_has_the_least_held_out_loss():
    """The penalty of least loss is chosen, and the path ends when the loss has risen twice beyond its noise."""
    features, targets = problem(80, 30)
    head = solve(Table.of_tensor(features), targets, CrossEntropy(), classes=3)
    losses = [strength.loss for strength in head.path]
    assert [strength.l2 for strength in head.path] == list(choice.STRENGTHS[: len(losses)])
    best = losses.index(min(losses))
    assert 0 < best < len(losses) - 2 < len(choice.STRENGTHS) - 3
    assert head.l2 == head.path[best].l2
    assert float(CrossEntropy().each(head.logits, targets).mean()) == pytest.approx(losses[best], rel=1e-6)
    assert head.path[best].accuracy == float((head.logits.argmax(dim=1) == targets).double().mean())
    assert head.held_out.tolist() == list(range(80))
    assert error(head, features, targets, torch.nn.CrossEntropyLoss(), head.l2) < 1e-4
    fold = assign_folds(targets, 4)
    right = torch.stack([(head.logits.argmax(dim=1) == targets)[fold == part].double().mean() for part in range(4)])
    assert head.path[best].accuracy_error == pytest.approx(float(right.std()) / 2)


class Scripted:
    """Held-out rows whose losses are written down, one line a penalty; as scores and as loss."""

    def __init__(self, *losses: list[float]) -> None:
        self.losses = [torch.tensor([line]).T for line in losses]
        self.targets = self.rows = torch.arange(len(losses[0]))
        self.parts = [self.rows]

    def solve(self, l2: float) -> Tensor:
        return self.losses.pop(0)

    def weights(self) -> Tensor:
        return torch.tensor(len(self.losses))

    def each(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.squeeze(1)


def test_a_path_ends_after_two_rises_beyond_the_noise():
    """One rise does not end the path, nor does a rise whose standard error is larger, however high the loss is."""
    best, noisy, clear = [1.0, 9.0, 5.0, 1.0], [9.0, 1.0, 1.0, 7.0], [1.1, 9.2, 5.1, 1.2]
    scores = Scripted([2.0, 9.0, 6.0, 1.0], best, clear, noisy, clear, clear, [0.0] * 4)
    l2, path, weights, logits = choice._choose(
        scores, [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], scores, lambda logits, targets: torch.tensor(0)
    )
    assert [strength.l2 for strength in path] == [7.0, 6.0, 5.0, 4.0, 3.0, 2.0]
    assert (l2, int(weights), logits.flatten().tolist()) == (6.0, 5, best)


def test_what_float32_cannot_tell_from_zero_ends_the_steps():
    """A tolerance that no float32 weight meets does not take all steps."""
    features, targets = problem(40, 10)
    parts = design.design_of(Table.of_tensor(features))
    members = torch.ones(40, 1, dtype=torch.bool)
    alone = logistic.Problems(parts, targets, CrossEntropy(), classes=3, members=members)
    assert alone.solve(1e-5, tolerance=0) < 300


@pytest.mark.parametrize("curvature", [1e-6, 1e6])
def test_a_step_has_the_right_length_whatever_curvature_is_expected(curvature):
    """Steps that begin far too long or far too short are measured along the way, and lead to the optimum at once."""
    features, targets = problem(60, 6)
    parts = design.design_of(Table.of_tensor(features))
    members = torch.ones(60, 1, dtype=torch.bool)
    solved = []
    for expected in (0.2, curvature):
        alone = logistic.Problems(parts, targets, CrossEntropy(), classes=3, members=members)
        alone.curvature[:] = expected
        assert alone.solve(0.01, tolerance=1e-4) < 30
        solved.append(alone.weights)
    torch.testing.assert_close(solved[0], solved[1], atol=1e-3, rtol=1e-3)


def test_products_are_exact_whatever_torch_may_do():
    """Matrix products are in float32 proper although torch was allowed less, and stay allowed afterwards."""
    seen = []

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return torch.nn.functional.cross_entropy(logits, targets)

    features, targets = problem(12, 4)
    torch.set_float32_matmul_precision("medium")
    try:
        solve(Table.of_tensor(features), targets, FunctionLoss(loss), classes=3, strengths=[1.0], folds=0)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"highest"}


def test_validation_rows_choose_the_penalty():
    """With validation rows the loss and the logits are theirs, and all training rows are trained on."""
    features, targets = problem(60, 20)
    more, labels = problem(30, 20, seed=1)
    head = solve(
        Table.of_tensor(features), targets, CrossEntropy(), classes=3, validation=(Table.of_tensor(more), labels)
    )
    assert head.logits.shape == (30, 3)
    losses = {strength.l2: strength.loss for strength in head.path}
    assert losses[head.l2] == min(losses.values())
    weight, bias = head.folded()
    exact = CrossEntropy().each(more @ weight.T + bias, labels).mean()
    assert losses[head.l2] == pytest.approx(float(exact), rel=0.01)
    assert error(head, features, targets, torch.nn.CrossEntropyLoss(), head.l2) < 1e-4


def test_many_rows_hold_out_one_fold(monkeypatch):
    """Above a number of rows only the first fold is held out."""
    monkeypatch.setattr(choice, "ONE_FOLD_ROWS", 50)
    features, targets = problem(60, 6)
    head = solve(Table.of_tensor(features), targets, CrossEntropy(), classes=3, strengths=[1.0, 0.1])
    assert torch.equal(head.held_out, (assign_folds(targets, 4) == 0).nonzero().squeeze(1))
    assert head.logits.shape == (15, 3)
    accuracy = head.path[0].accuracy
    assert head.path[0].accuracy_error == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 15))


def test_problems_in_batches_give_the_same(monkeypatch):
    """Folds that do not fit together are solved one after the other, to the same result."""
    features, targets = problem(60, 6)

    def head() -> LinearHead:
        return solve(Table.of_tensor(features), targets, CrossEntropy(), classes=3)

    expected = head()
    monkeypatch.setattr(choice, "_BATCH_NUMBERS", 1)
    torch.testing.assert_close(head().logits, expected.logits, atol=1e-2, rtol=1e-2)


def test_the_result_is_reproducible():
    """The same call gives the same bits, and the seed draws other folds."""
    features, targets = problem(40, 8)
    heads = [
        solve(Table.of_tensor(features), targets, CrossEntropy(), classes=3, strengths=[1.0, 0.1], seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert torch.equal(heads[0].logits, heads[1].logits)
    assert not torch.equal(heads[0].logits, heads[2].logits)


def test_folded_weights_take_the_features_as_they_are():
    """Folded weights give the logits of the standardized features from the raw ones."""
    features, targets = problem(40, 8)
    head = solve(Table.of_tensor(features), targets, CrossEntropy(), classes=3, strengths=[0.1])
    weight, bias = head.folded()
    expected = (features - head.mean) / head.std @ head.weight.T + head.bias
    torch.testing.assert_close(features @ weight.T + bias, expected, atol=1e-3, rtol=1e-3)


def test_folds_are_stratified_and_keep_groups_together():
    """Every class is spread evenly over the folds, and rows of one group share a fold."""
    targets = torch.tensor([0] * 16 + [1] * 8 + [2] * 4)
    fold = assign_folds(targets, 4)
    for label, count in [(0, 4), (1, 2), (2, 1)]:
        assert torch.bincount(fold[targets == label], minlength=4).tolist() == [count] * 4
    groups = torch.arange(28).repeat(3) + 100  # three views of each image, end to end
    by_group = assign_folds(targets.repeat(3), 4, groups=groups).view(3, 28)
    assert torch.equal(by_group[0], by_group[1])
    assert torch.equal(by_group[0], by_group[2])
    assert torch.bincount(by_group[0][targets == 2], minlength=4).tolist() == [1] * 4
    rare = torch.tensor([[1.0, 0]] * 8 + [[1.0, 1]] * 4)  # the second label is the rarer
    assert torch.bincount(assign_folds(rare, 4)[8:], minlength=4).tolist() == [1] * 4
    assert assign_folds(targets, 1000).unique().tolist() == list(range(28))


ONES = torch.ones(12, 3)


@pytest.mark.parametrize(
    ("features", "targets", "classes"),
    [
        (torch.tensor([[1.0, 2.0]]), torch.tensor([1]), 2),
        (ONES, torch.arange(12) % 2, 2),
        (ONES * 1e8, torch.arange(12) % 2, 2),
        (torch.arange(12.0)[:, None], torch.arange(12) % 2, 2),
        (torch.randn(4, 3).repeat(3, 1), torch.arange(12) % 2, 2),
        (torch.randn(12, 3), torch.ones(12, dtype=torch.int64), 2),
        (torch.randn(12, 30), torch.arange(12) % 3, 5),
        (torch.randn(12, 3), torch.tensor([0] * 11 + [1]), 2),
        (torch.arange(12.0)[:, None] * 1e18, (torch.arange(12) > 5).long(), 2),
        (torch.arange(12.0)[:, None].half(), (torch.arange(12) > 5).long(), 2),
    ],
    ids=[
        "one image",
        "constant",
        "large and constant",
        "one feature",
        "duplicates",
        "one class",
        "classes without images",
        "a class of one image",
        "huge",
        "separable",
    ],
)
def test_odd_data_ends_in_finite_numbers(features, targets, classes):
    """Data with nothing to learn, or a class without images, ends in finite weights and does not run on."""
    head = solve(Table.of_tensor(features), targets, CrossEntropy(), classes=classes)
    assert all(tensor.isfinite().all() for tensor in (head.weight, head.bias, head.mean, head.std, head.logits))
    assert all(tensor.isfinite().all() for tensor in head.folded())
    assert head.weight.shape == (classes, features.shape[1])
    assert all(math.isfinite(strength.loss) and 0 <= strength.accuracy <= 1 for strength in head.path)
    assert len(head.path) > 0 or len(features) == 1


def test_a_class_without_images_is_not_predicted():
    """The bias of a class without training images goes down, and its probability is next to nothing."""
    features, targets = problem(40, 5)
    head = solve(Table.of_tensor(features), targets, CrossEntropy(), classes=4, strengths=[0.1])
    weight, bias = head.folded()
    assert (features @ weight.T + bias).softmax(dim=1)[:, 3].max() < 1e-3


def test_a_constant_feature_has_no_weight():
    """A constant feature has a standard deviation of 1 and no weight, however its mean is rounded."""
    features, targets = problem(40, 3)
    features = torch.cat([features, torch.full((40, 1), 0.1)], dim=1)
    head = solve(Table.of_tensor(features), targets, CrossEntropy(), classes=3, strengths=[0.1])
    assert head.std[3] == 1
    assert head.weight[:, 3].abs().max() < 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_feature_that_is_not_finite_is_named(bad, monkeypatch):
    """An infinite or NaN feature is an error that names its row, in training and in validation rows."""
    monkeypatch.setattr(table, "BLOCK_BYTES", 4 * 4 * 10)
    features, targets = problem(40, 4)
    broken = features.clone()
    broken[23, 1] = bad
    with pytest.raises(NonFiniteError, match="row 23"):
        solve(Table.of_tensor(broken), targets, CrossEntropy(), classes=3)
    validation = Table.of_tensor(broken), targets
    with pytest.raises(NonFiniteError, match="validation row 23"):
        solve(Table.of_tensor(features), targets, CrossEntropy(), classes=3, validation=validation)


def test_a_loss_that_is_not_finite_is_an_error():
    """A loss whose slope is NaN is reported, not returned as weights."""
    features, targets = problem(12, 4)
    loss = FunctionLoss(lambda logits, targets: (logits * math.nan).mean())
    with pytest.raises(NonFiniteError, match="gradient of the loss is not finite"):
        solve(Table.of_tensor(features), targets, loss, classes=3)


def test_arguments_that_cannot_be_used_are_named():
    """Wrong penalties, folds and sizes are rejected before anything is read."""
    features, targets = problem(12, 4)
    rows = Table.of_tensor(features)
    for strengths in ([], [0.0], [0.1, 1.0], [math.inf], [1.0, 1.0]):
        with pytest.raises(ArgumentError, match="from strong to weak"):
            solve(rows, targets, CrossEntropy(), classes=3, strengths=strengths)
    with pytest.raises(ArgumentError, match="2 folds or more"):
        solve(rows, targets, CrossEntropy(), classes=3, folds=1)
    with pytest.raises(ArgumentError, match="12 rows of 4 features and 11 targets"):
        solve(rows, targets[1:], CrossEntropy(), classes=3)
    few = Table.of_tensor(features[:, :3]), targets
    with pytest.raises(ArgumentError, match="validation data has 12 rows of 3 features"):
        solve(rows, targets, CrossEntropy(), classes=3, validation=few)
    with pytest.raises(EmptyDataError, match="training data has 0 images"):
        solve(Table.of_tensor(features[:0]), targets[:0], CrossEntropy(), classes=3)


def test_a_path_is_followed_in_few_steps(monkeypatch):
    """Each penalty starts from the last two solutions, so a path takes far fewer steps than its parts alone."""
    features, targets = problem(120, 20)
    parts = design.design_of(Table.of_tensor(features))
    members = torch.ones(120, 1, dtype=torch.bool)
    steps = []
    solve_one = logistic.Problems.solve
    monkeypatch.setattr(
        logistic.Problems, "solve", lambda self, *args, **kwargs: steps.append(solve_one(self, *args, **kwargs))
    )
    followed = logistic.Problems(parts, targets, CrossEntropy(), classes=3, members=members)
    for l2 in choice.STRENGTHS:
        followed.follow(l2, tolerance=3e-3)
    alone = 0
    for l2 in choice.STRENGTHS:
        fresh = logistic.Problems(parts, targets, CrossEntropy(), classes=3, members=members)
        alone += solve_one(fresh, l2, tolerance=3e-3)
    assert sum(steps) < 0.7 * alone
    assert (followed.weights - fresh.weights).norm() < 0.02 * fresh.weights.norm()
