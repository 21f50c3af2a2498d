"""Measure `search` beside the same trials one by one in a plain PyTorch loop at its best.

32 trials, of 4 learning rates, 2 batch sizes and 4 depths, at a constant rate, each with all numbers of epochs up to
10; those among them that train the head alone; and 16 linear heads at once beside one by one, all of them in
`Trainer.fit` on cached features. The plain loop has images preprocessed once, frozen layers in bf16, autocast,
channels-last and fused Adam. It makes two epochs of each depth and batch size. The second, which the rate does not
change, is multiplied. Seconds are CPU seconds of the process, which other processes change little:

    OMP_NUM_THREADS=1 python benchmarks/search.py
    OMP_NUM_THREADS=1 python benchmarks/search.py --smoke
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable

import torch
from job import WEIGHTS, read_images
from torch import Tensor, nn

import transferkit as tk

RATES, BATCH_SIZES, DEPTHS = [1e-4, 3e-4, 1e-3, 3e-3], [32, 128], ["head", "block5_conv3", "block5", "block4"]
EPOCHS = 10
Data = tuple[Tensor, Tensor]


def load(part: str, count: int) -> Data:
    images, targets = read_images(part, count)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(targets)


def seconds_of(function: Callable[[], object]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def plain_epoch_s(backbone: tk.Backbone, depth: str, size: int, train: Data, validation: Data) -> float:
    """Return the seconds of the second epoch of a plain loop."""
    torch.manual_seed(0)
    model = tk.freeze_until(tk.attach_head(copy.deepcopy(backbone), 10), depth)
    frozen, suffix = model.to(memory_format=torch.channels_last).split()
    frozen = copy.deepcopy(frozen).to(torch.bfloat16)
    weights = [parameter for parameter in suffix.parameters() if parameter.requires_grad]
    optimizer, criterion = torch.optim.Adam(weights, lr=1e-4, fused=True), nn.CrossEntropyLoss()
    images, targets = backbone.preprocess(train[0]).contiguous(memory_format=torch.channels_last), train[1]
    held_out = backbone.preprocess(validation[0]).contiguous(memory_format=torch.channels_last)

    def epoch() -> None:
        suffix.train()
        for rows in torch.randperm(len(targets)).split(size):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    features = frozen(images[rows].bfloat16())
                loss = criterion(suffix(features), targets[rows])
            loss.backward()
            optimizer.step()
        suffix.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for part in held_out.split(128):
                suffix(frozen(part.bfloat16())).argmax(dim=1)

    epoch()
    return seconds_of(epoch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=1000, help="training images")
    parser.add_argument("--validation", type=int, default=250, help="validation images")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--smoke", action="store_true", help="few images, 8 trials of up to 2 epochs: does it run?")
    arguments = parser.parse_args()
    rates, depths, epochs = (RATES[:2], DEPTHS[:2], 2) if arguments.smoke else (RATES, DEPTHS, EPOCHS)
    counts = (64, 32) if arguments.smoke else (arguments.train, arguments.validation)
    train, validation = load("train", counts[0]), load("test", counts[1])
    backbone = tk.load_backbone(
        "vgg16", weights=WEIGHTS, preprocessing="IMAGENET1K_FEATURES", image_size=arguments.image_size
    )
    print(
        f"{len(train[1])} training and {len(validation[1])} validation images at {arguments.image_size} px, "
        f"{torch.get_num_threads()} threads, {tk.Device('cpu').precision}"
    )

    def search(cache: str = "auto", **space: list[object]) -> tk.SearchResult:
        space = {"schedule": ["constant"], **space}
        given = {"validation_data": validation, "device": "cpu", "cache": cache, "verbose": 0}
        return tk.search(lambda: tk.attach_head(backbone, 10), space, train, **given)

    every = list(range(1, epochs + 1))
    plain = {
        (depth, size): plain_epoch_s(backbone, depth, size, train, validation)
        for depth in depths
        for size in BATCH_SIZES
    }
    for name, among in (("all depths", depths), ("heads", ["head"])):
        space = {"freeze_until": among, "lr": rates, "batch_size": BATCH_SIZES, "epochs": every}
        ours = seconds_of(lambda space=space: search(**space))
        one_run = len(rates) * sum(seconds for (depth, _), seconds in plain.items() if depth in among)
        print(f"{name}: search {ours:.1f} s")
        for text, number in (("each number of epochs a run", sum(every)), ("one run of all epochs", epochs)):
            print(f"  plain loop, {text}: {one_run * number:.1f} s, ratio {one_run * number / ours:.1f}")
    for (depth, size), seconds in plain.items():
        print(f"  plain epoch from {depth} on, batches of {size}: {seconds:.2f} s")

    many = [10 ** (-4 + place / 8) for place in range(4 if arguments.smoke else 16)]
    with tempfile.TemporaryDirectory() as folder:
        first = tk.Trainer(tk.freeze_until(tk.attach_head(backbone, 10), "head"), device="cpu", cache=folder)
        first.fit(train, validation_data=validation, epochs=1, verbose=0)  # features

        def one_by_one() -> None:
            for rate in many:
                trainer = tk.Trainer(tk.freeze_until(tk.attach_head(backbone, 10), "head"), lr=rate, device="cpu")
                trainer.share_features(first)
                trainer.fit(train, validation_data=validation, epochs=epochs, batch_size=32, verbose=0)

        def together() -> None:
            search(folder, freeze_until=["head"], lr=many, batch_size=[32], epochs=[epochs], schedule=["auto"])

        alone, at_once = seconds_of(one_by_one), seconds_of(together)
    print(f"{len(many)} linear heads: one by one {alone:.2f} s, at once {at_once:.2f} s, ratio {alone / at_once:.1f}")


if __name__ == "__main__":
    main()
