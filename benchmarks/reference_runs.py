"""Eight reference runs whose histories and weights a change of the code must not move by one bit.

    python benchmarks/reference_runs.py --write before.json
    python benchmarks/reference_runs.py --compare before.json

Compare on the machine, the torch and the number of threads that wrote the file: other kernels round differently. Uses
public names only. Takes a minute on two cores.
"""

import argparse
import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from job import WEIGHTS, read_images

import transferkit as tk

EPOCHS = 3


def build(
    *, name: str = "vgg16", frozen_until: str | None, hidden: tuple[int, ...] = (256,), dropout: float = 0.5
) -> tk.TransferModel:
    torch.manual_seed(0)
    if name == "vgg16":
        backbone = tk.load_backbone(name, weights=WEIGHTS, preprocessing="IMAGENET1K_FEATURES", image_size=32)
    else:
        backbone = tk.load_backbone(name, weights=None, image_size=32)
    return tk.freeze_until(
        tk.attach_head(backbone, 10, hidden=hidden, dropout=dropout, pooling="flatten"), frozen_until
    )


def loss_arguments() -> dict[str, Any]:
    """Label smoothing and balanced classes, as this version of the library takes them."""
    if hasattr(tk, "CrossEntropy"):
        return {"loss": tk.CrossEntropy(label_smoothing=0.1, class_weights="balanced")}
    return {"label_smoothing": 0.1, "class_weights": "balanced"}


def data(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, targets = read_images("train", start + count)
    return torch.as_tensor(images[start:]), torch.as_tensor(targets[start:])


@contextlib.contextmanager
def half_precision() -> Iterator[None]:
    """Let a CPU pass for a device that computes in fp16."""
    from transferkit import Device

    module = __import__(Device.__module__, fromlist=["supported_precisions"])
    before = module.supported_precisions
    module.supported_precisions = lambda _device: ("fp16", "fp32", "bf16")
    try:
        yield
    finally:
        module.supported_precisions = before


def run(
    model: tk.TransferModel, *, fit: dict[str, Any] | None = None, micro_batch_size: int | None = None, **options: Any
) -> dict[str, Any]:
    fixed = {
        "device": "cpu",
        "precision": "bf16",
        "seed": 3,
        "lr": 1e-4,
        "schedule": "constant",
        "clip_grad_norm": None,
    }
    trainer = tk.Trainer(model, **{**fixed, **options})
    trainer.micro_batch_size = micro_batch_size
    if trainer.device.precision == "fp16":
        trainer.device.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    arguments = {"validation_data": data(320, 64), "epochs": EPOCHS, "verbose": 0, **(fit or {})}
    trainer.fit(data(0, 320), **arguments)
    return outcome(trainer)


def outcome(trainer: tk.Trainer) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name, value in trainer.model.state_dict().items():
        digest.update(name.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in sorted(trainer.optimizer.state.get(parameter, {}).items()):
                if isinstance(value, torch.Tensor):
                    digest.update(name.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    figures = {name: values for name, values in trainer.history.history.items() if name != "epoch_s"}
    return {"history": figures, "weights": digest.hexdigest()}


def frozen_cached() -> dict[str, Any]:
    return run(build(frozen_until="head", hidden=(512, 512)), cache=True, lr=1e-3)


def frozen_uncached() -> dict[str, Any]:
    return run(build(frozen_until="head", hidden=(512, 512)), cache=False, lr=1e-3)


def block5_cached_fp32() -> dict[str, Any]:
    return run(build(frozen_until="block5"), cache=True, precision="fp32", **loss_arguments())


def block5_augmented() -> dict[str, Any]:
    return run(build(frozen_until="block5"), clip_grad_norm=1.0, schedule="cosine", fit={"augment": ["flip", "crop"]})


def everything() -> dict[str, Any]:
    return run(build(frozen_until=None), optimizer="sgd", lr=1e-3, micro_batch_size=12, fit={"epochs": 1})


def batch_norm() -> dict[str, Any]:
    return run(build(name="vgg16_bn", frozen_until="block5"), fit={"augment": "flip", "n_views": 2})


def resumed() -> dict[str, Any]:
    """Stopped by an error in the second epoch's callback, and resumed by another trainer."""

    def stop(_trainer: tk.Trainer, report: tk.EpochReport) -> None:
        if report.epoch == 1:
            raise ConnectionError("a stop")

    with tempfile.TemporaryDirectory() as folder:
        model = build(frozen_until="block5")
        checkpoint = tk.Checkpoint(folder, every_steps=4)
        with contextlib.suppress(ConnectionError):
            run(model, fit={"callbacks": [checkpoint, stop]})
        return run(build(frozen_until="block5"), fit={"resume_from": folder, "callbacks": [tk.Checkpoint(folder)]})


def fp16_scaled() -> dict[str, Any]:
    with half_precision():
        return run(build(frozen_until="head"), precision="fp16", lr=1e-3, clip_grad_norm=1.0)


RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    function.__name__: function
    for function in (
        frozen_cached,
        frozen_uncached,
        block5_cached_fp32,
        block5_augmented,
        everything,
        batch_norm,
        resumed,
        fp16_scaled,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--compare", type=Path, metavar="FILE")
    parser.add_argument("--only", choices=RUNS, nargs="*", default=list(RUNS))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    found = {name: RUNS[name]() for name in arguments.only}
    if arguments.write:
        arguments.write.write_text(json.dumps(found, indent=1))
    before = json.loads(arguments.compare.read_text()) if arguments.compare else {}
    for name, result in found.items():
        verdict = "" if not before else "equal" if json.loads(json.dumps(result)) == before[name] else "DIFFERENT"
        print(f"{name:20} {result['weights'][:12]}  loss {result['history']['loss'][-1]:.6f}  {verdict}")
    if before and any(json.loads(json.dumps(result)) != before[name] for name, result in found.items()):
        raise SystemExit("some runs are not what they were")


if __name__ == "__main__":
    main()
