"""Everything to be known about a GPU, in one call of at most nine minutes, without a network.

    python benchmarks/gpu.py                              # or: make gpu
    python benchmarks/gpu.py --device cpu --smoke         # the same parts on a few images, without a GPU

Runs the tests that need CUDA, the stages beside the card's limits (`limits.py`), the classic job (50,000 images at
224 px, every convolution frozen, a head of 4096-4096, 10 epochs of Adam) beside plain PyTorch and Lightning, and
`fine_tune`, each in its own process. Writes gpu.json and gpu.md into --out after each part; a part that fails, or for
which no time is left, says so there, and the next part follows.

CIFAR-10's 50,000 images are not in the repository. The images are the 2,000 that are, each in 25 crops: what they show
changes no time. Accuracy is reported only for `fine_tune`, on the 500 test images.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from job import BATCH_SIZE, JOBS, WEIGHTS, Data, Job, read_data
from peers import with_transferkit
from peers.machine import describe_machine
from peers.torch_parts import VALIDATION_BATCH_SIZE, ImageDataset, build_fast_model, trainable
from torch import nn
from torch.utils.data import DataLoader

import transferkit as tk

LIMIT_S = 9 * 60
JOB = JOBS["head224"]  # its head, rate and number of epochs
CROPS = 25
PEER_EPOCHS = 2  # the remaining epochs of the peers are estimated from the second


def images(*, smoke: bool) -> Data:
    data = read_data(JOBS["head64"])
    if smoke:
        return Data(*(part[:64] for part in vars(data).values()))
    padded = np.pad(data.train_images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    corners = [divmod(number, 5) for number in range(CROPS)]
    crops = np.concatenate([padded[:, top : top + 32, left : left + 32] for top, left in corners])
    return Data(crops, np.tile(data.train_targets, CROPS), data.validation_images, data.validation_targets)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def used_bytes(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


def transferkit(device: str, data: Data, job: Job) -> dict[str, Any]:
    """The library as in `compare.py`."""
    record = with_transferkit.train(job, data, device=device)
    return {"total_s": record.total_s, "epoch_s": record.epoch_s, "memory_bytes": used_bytes(device)}


def loaders(data: Data, job: Job) -> tuple[DataLoader, DataLoader]:
    """Return loaders as the tuning guide has them: a worker for each core, pinned memory, workers that stay."""
    common: dict[str, Any] = {"num_workers": min(16, os.cpu_count() or 1), "persistent_workers": True}
    common["pin_memory"] = torch.cuda.is_available()
    train = ImageDataset(data.train_images, data.train_targets, job.image_size)
    validation = ImageDataset(data.validation_images, data.validation_targets, job.image_size)
    return (
        DataLoader(train, batch_size=BATCH_SIZE, shuffle=True, **common),
        DataLoader(validation, batch_size=VALIDATION_BATCH_SIZE, **common),
    )


def estimate(epoch_s: list[float]) -> float:
    return epoch_s[0] + (JOB.epochs - 1) * epoch_s[-1]


def pytorch(device: str, data: Data, job: Job) -> dict[str, Any]:
    """Plain PyTorch at its best: workers, bf16, channels-last, frozen layers cast once and run without gradients."""
    body, head = build_fast_model(job).to(device)
    optimizer = torch.optim.Adam(trainable(head), lr=job.lr, fused=True)
    epoch_s: list[float] = []
    train, validation = loaders(data, job)

    def logits(batch: torch.Tensor) -> torch.Tensor:
        batch = batch.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                features = body(batch)
            return head(features)

    for _ in range(PEER_EPOCHS):
        started = time.perf_counter()
        for batch, targets in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits(batch).float(), targets.to(device, non_blocking=True)).backward()
            optimizer.step()
        correct = torch.zeros((), device=device)
        with torch.no_grad():
            for batch, targets in validation:
                correct += (logits(batch).argmax(dim=1) == targets.to(device)).sum()
        synchronize(device)
        epoch_s.append(time.perf_counter() - started)
    return {"total_s": estimate(epoch_s), "epoch_s": epoch_s, "memory_bytes": used_bytes(device)}


def lightning(device: str, data: Data, job: Job) -> dict[str, Any]:
    """Lightning with its bf16 precision, the same model and the same loaders."""
    from lightning import Trainer
    from peers.with_lightning import Classifier

    train, validation = loaders(data, job)
    module = Classifier(build_fast_model(job), job.lr, channels_last=True, fused=True)
    seconds = []
    for epochs in (1, 2):
        trainer = Trainer(
            max_epochs=epochs,
            accelerator={"cuda": "gpu"}.get(device, device),
            devices=1,
            precision="bf16-mixed",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        started = time.perf_counter()
        trainer.fit(module, train, validation)
        seconds.append(time.perf_counter() - started)
    epoch_s = [seconds[0], seconds[1] - seconds[0]]
    return {"total_s": estimate(epoch_s), "epoch_s": epoch_s, "memory_bytes": used_bytes(device)}


def fine_tune(device: str, data: Data, job: Job) -> dict[str, Any]:
    """`fine_tune` on the 2,000 images of the repository."""
    count = len(data.train_images) // CROPS if len(data.train_images) > 2000 else len(data.train_images)
    start = count * (CROPS // 2) if len(data.train_images) > count else 0  # the crop in the middle is the whole image
    middle = slice(start, start + count)
    backbone = tk.load_backbone(weights=WEIGHTS, preprocessing="IMAGENET1K_FEATURES", image_size=job.image_size)
    started = time.perf_counter()
    trainer = tk.fine_tune(backbone, (data.train_images[middle], data.train_targets[middle]), device=device, verbose=0)
    seconds = time.perf_counter() - started
    found = trainer.assess((data.validation_images, data.validation_targets))
    return {"total_s": seconds, "accuracy": found.accuracy, "memory_bytes": used_bytes(device)}


PARTS: dict[str, Callable[[str, Data, Job], dict[str, Any]]] = {
    "transferkit": transferkit,
    "pytorch": pytorch,
    "lightning": lightning,
    "fine_tune": fine_tune,
}


def run(command: list[str], seconds: float) -> tuple[str, str | None]:
    """Return what a process printed, and why it failed: None if it did not."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return "", f"stopped after {seconds:.0f} s: no time was left"
    last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
    return done.stdout, None if done.returncode == 0 else f"exit status {done.returncode}: {last}"


def page(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = [f"# {report['device']}, torch {report['torch']}", ""]
    for name, part in report["parts"].items():
        if "failed" in part:
            lines.append(f"- {name}: {part['failed']}")
        elif "tests" in part:
            lines.append(f"- tests: {part['tests']}")
    timed = {name: part for name, part in report["parts"].items() if "total_s" in part}
    if timed:
        lines += ["", f"{report['job']}", "", "| | seconds | of transferkit's | peak memory, GB | accuracy |"]
        lines.append("|---|--:|--:|--:|--:|")
    own = timed.get("transferkit", {}).get("total_s")
    for name, part in timed.items():
        ratio = f"{part['total_s'] / own:.1f}" if own and name != "fine_tune" else ""
        memory = "" if part["memory_bytes"] is None else f"{part['memory_bytes'] / 1e9:.1f}"
        accuracy = f"{part['accuracy']:.3f}" if "accuracy" in part else ""
        lines.append(f"| {name} | {part['total_s']:.1f} | {ratio} | {memory} | {accuracy} |")
    stages = report["parts"].get("limits", {}).get("stages", [])
    if stages:
        lines += ["", "| stage | ms | GFLOP/s | square product's | time / floor |", "|---|--:|--:|--:|--:|"]
    for stage in stages:
        numbers = f"{stage['ms']:.2f} | {stage['gflops']:.0f} | {stage['product_gflops']:.0f} | {stage['ratio']:.2f}"
        lines.append(f"| {stage['stage']} | {numbers} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--smoke", action="store_true", help="64 images of 64 px: shows that every part runs")
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    image_size = 64 if options.smoke else 224
    if options.part:
        job = dataclasses.replace(JOB, image_size=image_size)
        print(json.dumps(PARTS[options.part](options.device, images(smoke=options.smoke), job)))
        return
    end = time.monotonic() + LIMIT_S
    options.out.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).resolve()
    device = tk.Device(options.device)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else repr(device),
        "machine": describe_machine(),
        "torch": torch.__version__,
        "job": f"{'64 images' if options.smoke else '50,000 images'} of {image_size} px, {JOB.epochs} epochs, frozen",
        "parts": {},
    }
    limits = options.out / "limits.json"
    limits.unlink(missing_ok=True)
    size = ["--image-size", str(image_size), "--repetitions", "3" if options.smoke else "9"]
    own = [sys.executable, str(here), "--device", options.device, *(["--smoke"] if options.smoke else [])]
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(here.parent.parent / "tests")]
    if options.device == "cpu":
        tests.append("--collect-only")  # they need CUDA
    commands = {
        "tests": tests,
        "limits": [sys.executable, str(here.parent / "limits.py"), *size, "--json", str(limits)],
        **{part: [*own, "--part", part] for part in PARTS},
    }
    for name, command in commands.items():
        output, failed = run(command, end - time.monotonic())
        part: dict[str, Any] = {"failed": failed} if failed else {}
        if name == "tests":
            part["tests"] = (output.strip().splitlines() or ["no output"])[-1]
        elif failed is None:
            part = json.loads(limits.read_text() if name == "limits" else output.strip().splitlines()[-1])
        report["parts"][name] = part
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "gpu.md").write_text(page(report))
        print(f"{name}: {failed or 'done'}", file=sys.stderr)
    print(page(report))


if __name__ == "__main__":
    main()
