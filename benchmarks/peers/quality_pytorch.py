"""Plain PyTorch in `quality.py`: a tuned loop that trains block 4 on, and scikit-learn on features computed once."""

import itertools
import math

import numpy as np
import torch
from job import DEVIATION, MEAN
from quality_task import BATCH_SIZE, TEST_BATCH_SIZE, Curve, Task, files, read_images
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import Subset
from torchvision.transforms import v2

from peers.torch_parts import build_body

BLOCK_ENDS = (16, 23, 30)  # the pooling layers of blocks 3, 4 and 5


def tuned_epochs(num_images: int) -> int:
    return max(8, math.ceil(400 * BATCH_SIZE / num_images))  # 400 steps where the images are few


def decode(part: Subset, image_size: int) -> tuple[Tensor, Tensor]:
    """Return images, uint8 `(N, 3, S, S)`, and targets."""
    paths, targets = files(part)
    return torch.from_numpy(read_images(paths, image_size)).permute(0, 3, 1, 2), torch.tensor(targets)


def prepare(images: Tensor) -> Tensor:
    normalized = v2.functional.normalize(images.float() / 255, MEAN, DEVIATION)
    return normalized.contiguous(memory_format=torch.channels_last)


def flip_and_crop(images: Tensor) -> Tensor:
    size = images.shape[-1]
    change = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(size, padding=size // 8, padding_mode="reflect")])
    return torch.stack([change(image) for image in images])


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, targets: Tensor) -> float:
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        predicted = [model(prepare(part)).argmax(dim=1) for part in images.split(TEST_BATCH_SIZE)]
    return (torch.cat(predicted) == targets).double().mean().item()


def tuned(task: Task, train: Subset, test: Subset) -> Curve:
    torch.manual_seed(task.seed)
    body = build_body(weights=task.weights)
    held_out = decode(test, task.image_size)
    curve = Curve()
    images, targets = decode(train, task.image_size)
    body[: BLOCK_ENDS[0] + 1].requires_grad_(requires_grad=False).to(torch.bfloat16)
    block4, block5 = (body[start + 1 : end + 1] for start, end in itertools.pairwise(BLOCK_ENDS))
    hidden = nn.Linear(512 * (task.image_size // 32) ** 2, 256)
    head = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, len(train.dataset.classes)))
    model = nn.Sequential(body, head).to(memory_format=torch.channels_last)
    rates = {block4: 1e-4, block5: 2e-4, head: 1e-3}
    groups = [{"params": list(part.parameters()), "lr": lr} for part, lr in rates.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    epochs = task.epochs or tuned_epochs(len(images))
    steps = epochs * math.ceil(len(images) / BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / (0.1 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    for epoch in range(1, epochs + 1):
        model.train()
        for batch in torch.randperm(len(images)).split(BATCH_SIZE):
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(prepare(flip_and_crop(images[batch]))), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch == epochs or epoch % math.ceil(epochs / 16) == 0:  # measuring takes longer than a short epoch
            curve.measure(lambda: accuracy(model, *held_out))
    return curve


@torch.no_grad()
def pooled(body: nn.Sequential, images: Tensor) -> np.ndarray:
    """Return the average-pooled outputs of blocks 3, 4 and 5, float32 `(N, 1280)`."""
    rows = []
    for part in images.split(TEST_BATCH_SIZE):
        outputs = itertools.accumulate(body, lambda x, layer: layer(x), initial=prepare(part).bfloat16())
        blocks = [x.float().mean(dim=(2, 3)) for place, x in enumerate(outputs, -1) if place in BLOCK_ENDS]
        rows.append(torch.cat(blocks, dim=1))
    return torch.cat(rows).numpy()


def logistic(task: Task, train: Subset, test: Subset) -> Curve:
    body = build_body(weights=task.weights).to(torch.bfloat16, memory_format=torch.channels_last)
    held_out = decode(test, task.image_size)
    curve = Curve()
    images, targets = decode(train, task.image_size)
    options = {"cv": 4, "scoring": "neg_log_loss", "l1_ratios": (0,), "use_legacy_attributes": False}
    head = LogisticRegressionCV(Cs=np.logspace(-5, 0, 11), max_iter=1000, **options)
    model = make_pipeline(StandardScaler(), head).fit(pooled(body, images), targets)
    return curve.measure(lambda: np.mean(model.predict(pooled(body, held_out[0])) == held_out[1].numpy()))
