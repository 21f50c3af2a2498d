"""The hot path: one training step, one evaluation step."""

import copy

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import transferkit as tk
from transferkit.training.loss import CrossEntropy
from transferkit.training.metrics import Sums, count_correct
from transferkit.training.optimizers import build_optimizer
from transferkit.training.schedules import SCHEDULES
from transferkit.training.step import evaluation_step, guarded_step
from transferkit.training.training import Part, Training

WEIGHTS = torch.tensor([1.0, 2.0, 5.0])


def whole_batch(inputs, targets, loss):
    """Return a batch of which this process has all."""
    return Part(inputs, targets, len(targets), loss.total_weight(targets))


def training_of(model, optimizer, **settings):
    """What a trainer of the model would share with its steps."""
    device = settings.pop("device", None) or tk.Device("cpu", "fp32")
    settings = {"loss": CrossEntropy(), "metrics": {}, "clip_grad_norm": None, **settings}
    return Training(model, device, optimizer, schedule=SCHEDULES["constant"], max_skipped=0, seed=0, **settings)


def one_step(model, images, targets, *, micro_batch_size=None, cross_entropy=None, clip_grad_norm=None):
    """Loss, hits and weights after one step of SGD on a copy of the model."""
    model, loss = copy.deepcopy(model).train(), cross_entropy or CrossEntropy()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    training = training_of(model, optimizer, clip_grad_norm=clip_grad_norm, micro_batch_size=micro_batch_size)
    inputs = model.backbone.preprocess(images)
    update = guarded_step(model, whole_batch(inputs, targets, loss), training=training, loss=loss, seed=0)
    return update.loss, count_correct(update.logits, targets), model


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_torchs_cross_entropy(soft, weights, smoothing):
    """Sum over the batch divided by total weight is the mean of `nn.functional.cross_entropy`."""
    logits, targets = torch.randn(7, 3), torch.arange(7) % 3
    if soft:
        targets = torch.rand(7, 3).softmax(dim=1)
    loss = CrossEntropy(smoothing, weights)
    value = loss.sum(logits, targets) / loss.total_weight(targets)
    expected = functional.cross_entropy(logits, targets, weights, label_smoothing=smoothing)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


def test_loss_is_computed_in_float32():
    """Logits in bf16 are not summed in bf16."""
    logits = torch.randn(300, 3).bfloat16()
    targets = torch.zeros(300, dtype=torch.int64)
    assert torch.equal(CrossEntropy().sum(logits, targets), CrossEntropy().sum(logits.float(), targets))


@pytest.mark.parametrize("targets", [torch.tensor([0, 2, 1, 2, 2]), torch.eye(3)[[0, 2, 1, 2, 2]]])
@pytest.mark.parametrize("cross_entropy", [CrossEntropy(), CrossEntropy(0.1), CrossEntropy(0.1, WEIGHTS)])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 5, 9])
def test_parts_of_a_batch_give_the_whole_batchs_update(model, data, micro_batch_size, cross_entropy, targets):
    """5 images in parts of 2, 2 and 1 give loss, hits and update of all 5 at once (to the rounding of sums)."""
    whole = one_step(model, data[0][:5], targets, cross_entropy=cross_entropy)
    parts = one_step(model, data[0][:5], targets, cross_entropy=cross_entropy, micro_batch_size=micro_batch_size)
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-5, atol=0)
    assert torch.equal(parts[1], whole[1])
    expected = whole[2].state_dict()
    for name, value in parts[2].state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_memory_of_parts_is_that_of_a_part(model, data):
    """The model never sees more than `micro_batch_size` images at once."""
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    one_step(model, data[0][:5], data[1][:5], micro_batch_size=2)
    assert seen == [2, 2, 1]


def test_clipping_bounds_the_update_of_all_parts_together(model, data):
    """The limit applies once, to the gradient of the whole batch."""
    free = one_step(model, *data)[2]
    clipped = one_step(model, *data, clip_grad_norm=0.01, micro_batch_size=5)[2]

    def update(after):
        pairs = zip(after.parameters(), model.parameters(), strict=True)
        return torch.cat([(new - old).flatten() for new, old in pairs]).norm().item()

    assert update(free) > 0.05
    assert update(clipped) == pytest.approx(0.01, rel=1e-3)


def test_step_measures_before_the_update(model, data):
    """Loss and hits are those of the weights before the step."""
    images, targets = data
    with torch.no_grad():
        logits = model(model.backbone.preprocess(images))
    loss, correct, _ = one_step(model, images, targets)
    torch.testing.assert_close(loss, functional.cross_entropy(logits, targets), rtol=1e-6, atol=0)
    assert correct == (logits.argmax(dim=1) == targets).sum()


def test_step_clears_gradients_first_and_leaves_no_graph(model, data):
    """A step begins without gradients, leaves its own, and its results hold no graph."""
    loss, correct, expected = one_step(model, *data)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    training = training_of(model, torch.optim.SGD(model.parameters(), lr=1.0))
    inputs = model.backbone.preprocess(data[0])
    batch = whole_batch(inputs, data[1], CrossEntropy())
    guarded_step(model.train(), batch, training=training, loss=CrossEntropy(), seed=0)
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, other)
        assert torch.equal(parameter.grad, other.grad)
    assert not loss.requires_grad
    assert (loss.dtype, correct.dtype) == (torch.float32, torch.int64)


def test_batch_of_weight_zero_leaves_the_model_finite(model, data):
    """A batch that holds only images of a class of weight 0 trains nothing, and does not make the weights NaN."""
    only_cats = torch.zeros(5, dtype=torch.int64)
    loss, _, after = one_step(model, data[0][:5], only_cats, cross_entropy=CrossEntropy(0.0, torch.tensor([0.0, 1, 1])))
    assert loss.isfinite()
    assert all(parameter.isfinite().all() for parameter in after.parameters())


def test_evaluation_gives_float32_logits_without_a_graph(model, data):
    """Evaluation in bf16 gives float32 logits and keeps no graph."""
    logits = evaluation_step(model.eval(), model.backbone.preprocess(data[0]), device=tk.Device("cpu", "bf16"))
    assert (logits.dtype, logits.shape, logits.requires_grad) == (torch.float32, (24, 3), False)


def test_hits_are_counted_for_indices_and_rows():
    """A hit is a largest logit at the target, or at the row's largest share."""
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 2.0]])
    assert count_correct(logits, torch.tensor([0, 2, 2])) == 2
    assert count_correct(logits, torch.tensor([[0.6, 0.4, 0.0], [0.1, 0.7, 0.2], [0.0, 1.0, 0.0]])) == 2


def test_sums_weigh_batches_by_their_images():
    """Mean loss and accuracy are over images, not over batches."""
    sums = Sums(torch.device("cpu"))
    sums.add(torch.tensor(1.0), torch.tensor(2), 6, logits=torch.zeros(6, 3), targets=torch.zeros(6))
    sums.add(torch.tensor(4.0), torch.tensor(1), 2, logits=torch.zeros(2, 3), targets=torch.zeros(2))
    assert sums.means() == ((1.0 * 6 + 4.0 * 2) / 8, 3 / 8)


class HostReads(TorchDispatchMode):
    """Notes every operation that makes the host wait for a value: `.item()`, a tensor as a condition, `nonzero`."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        if operation.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.names.append(str(operation))
        return operation(*arguments, **(keywords or {}))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_step_reads_nothing_back_to_the_host(model, data, optimizer, weights):
    """A step with clipping, parts and class weights, and adding up its figures, makes no host sync."""
    device, sums = tk.Device("cpu", "bf16"), Sums(torch.device("cpu"))
    built = build_optimizer(optimizer, device.prepare(model), 1e-3, 0.01)
    training = training_of(model, built, device=device, clip_grad_norm=1.0, micro_batch_size=10)
    images, loss = model.backbone.preprocess(data[0]), CrossEntropy(0.1, weights)

    def step():
        update = guarded_step(model, whole_batch(images, data[1], loss), training=training, loss=loss, seed=0)
        sums.add(update.loss, update.correct, len(data[1]), logits=update.logits, targets=data[1])

    step()  # the first one makes the optimizer's state
    with HostReads() as reads:
        step()
        step()
        assert reads.names == []
        sums.means()
    assert len(reads.names) == 2  # what an epoch costs; and the test can fail
