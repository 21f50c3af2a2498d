"""Accuracy and seconds over data sets, training sizes, methods and seeds, beside other libraries, in one run.

    python benchmarks/quality.py --out quality.json
    python benchmarks/quality.py --out quality.json --data flowers=photos/flowers --image-size 128 --sizes 500,2000,all
    python benchmarks/quality.py --out few.json --few
    python benchmarks/quality.py --table quality.json

A folder has train/<class>/*.jpg and test/<class>/*.jpg, or <class>/*.jpg: then each seed draws a quarter of each class
as the test part. Without --data: the images in examples/assets. The test part is measured and chooses nothing.

Each run is a process of its own on the CPU, one at a time. It starts with files in a folder and the backbone loaded.
With the same --out, a stopped benchmark continues, and tries again what failed. `pip install -e ".[bench]"` installs
all libraries; the methods of those that are missing fail.

Methods: `fine_tune` (`fine_tune:60` has a budget of 60 seconds); `solve`, a solved head on the frozen network
(`solve:letterbox` with that geometry); `old`, the recipe of the first version. The others are peers at their defaults,
or the best they do on a CPU: `fastai`, `fastai_best`, `keras`, `keras_best`, `pytorch_best` (a tuned loop),
`sklearn_best` (`LogisticRegressionCV`).
"""

import argparse
import dataclasses
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from compare import write_report
from job import IMAGES, WEIGHTS
from peers import BEST_ENVIRONMENT
from peers.machine import describe_machine, measure_rates
from quality_table import format_tables
from quality_task import Task, split

METHODS = {  # module and function
    "fine_tune": ("quality_transferkit", "fine_tune"),
    "solve": ("quality_transferkit", "solve"),
    "old": ("quality_transferkit", "old"),
    "fastai": ("quality_fastai", "default"),
    "fastai_best": ("quality_fastai", "best"),
    "keras": ("quality_keras", "default"),
    "keras_best": ("quality_keras", "best"),
    "pytorch_best": ("quality_pytorch", "tuned"),
    "sklearn_best": ("quality_pytorch", "logistic"),
}
PACKAGES = ("transferkit", "torch", "fastai", "keras", "tensorflow", "tensorflow-cpu", "scikit-learn")
FEW = {"sizes": "5/class,10/class,20/class,50/class", "seeds": 5, "methods": "solve,fine_tune,old"}


def run_here(task: Task) -> None:
    """Run a method in this process and print its points as one line of JSON."""
    module, function = METHODS[task.method.partition(":")[0]]
    curve = getattr(importlib.import_module(f"peers.{module}"), function)(task, *split(task))
    print(json.dumps({"points": curve.points}))


def run_process(task: Task) -> dict:
    command = [sys.executable, __file__, "--run", json.dumps(dataclasses.asdict(task))]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""} | (BEST_ENVIRONMENT if "_best" in task.method else {})
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def tasks(options: argparse.Namespace, folders: dict[str, str]) -> Iterator[Task]:
    """Yield all runs, seed by seed, the methods side by side."""
    sizes, methods = options.sizes.split(","), options.methods.split(",")
    if unknown := {method.partition(":")[0] for method in methods} - set(METHODS):
        raise SystemExit(f"--methods {','.join(sorted(unknown))}: expected any of {', '.join(METHODS)}")
    draws = itertools.product(range(options.seeds), folders.items(), options.image_size.split(","), sizes, methods)
    fixed = {"num_test": options.num_test, "weights": str(options.weights), "epochs": options.epochs}
    for seed, (data, folder), pixels, size, method in draws:
        yield Task(method, data, folder, image_size=int(pixels), size=size, seed=seed, **fixed)


def run_all(options: argparse.Namespace, folders: dict[str, str]) -> None:
    versions = {found.name: found.version for name in PACKAGES for found in distributions(name=name)}
    report = {"machine": describe_machine(), "versions": versions, "runs": []}
    if options.out.exists():
        earlier = json.loads(options.out.read_text())
        if any(earlier[name] != report[name] for name in ("machine", "versions")):
            raise SystemExit(f"{options.out} is of another machine or other versions: give another --out.")
        report["runs"] = [run for run in earlier["runs"] if "points" in run]
    done = [run["task"] for run in report["runs"]]
    for task in tasks(options, folders):
        if task.key() in done:
            continue
        run = {"task": task.key(), "before": measure_rates(), **run_process(task)}
        report["runs"].append(run)
        write_report(options.out, report)
        result = "{:.1f} s, accuracy {:.3f}".format(*run["points"][-1]) if "points" in run else run["failed"]
        print(f"{task.data} {task.image_size} px, {task.size}, seed {task.seed}, {task.method}: {result}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write results there after every run")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the results in this file, as Markdown")
    parser.add_argument("--data", action="append", metavar="NAME=FOLDER", help="may be given several times")
    parser.add_argument("--image-size", default="64", help="in pixels, as in 32,64")
    parser.add_argument("--sizes", default="2000", help="training images, as in 100,50/class,all")
    parser.add_argument("--seeds", type=int, default=3, help="number of draws of the training images")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--num-test", type=int, default=2000, help="largest number of test images")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="pretrained convolutions, IMAGENET1K_FEATURES")
    parser.add_argument("--epochs", type=int, help="of every method that has epochs, for a trial")
    parser.add_argument("--few", action="store_true", help=f"stands for {FEW}")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    if "--few" in sys.argv:
        parser.set_defaults(**FEW)
    options = parser.parse_args()
    if not (options.out or options.table or options.run):
        parser.error("expected --out or --table")
    return options


def main() -> None:
    options = parse_arguments()
    if options.run:
        run_here(Task(**json.loads(options.run)))
    elif options.table:
        print(format_tables(json.loads(options.table.read_text())))
    elif options.data:
        run_all(options, dict(pair.split("=", 1) for pair in options.data))
    else:
        with tempfile.TemporaryDirectory() as folder:
            zipfile.ZipFile(IMAGES).extractall(folder)
            run_all(options, {"cifar10_subset": folder})


if __name__ == "__main__":
    main()
