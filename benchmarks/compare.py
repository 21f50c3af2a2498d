"""Compare transfer learning with VGG16 in transferkit, PyTorch, Lightning, fastai, Keras and skorch, one process each.

    python benchmarks/compare.py --job head64 --json head64.json
    python benchmarks/compare.py --from head64.json

The jobs are in job.py, the contestants in peers/: each at its defaults, and as fast as a user who knows it well can
make it. They run one after another, in rounds, on the CPU. With the same --json, a stopped comparison continues.
Libraries that are not installed are skipped: pip install -e ".[bench]" installs all.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from job import JOBS, Job
from peers import BEST_ENVIRONMENT, CONFIGURATIONS
from peers.machine import describe_machine, measure_rates
from peers.table import format_report

RUN_ONE = Path(__file__).resolve().parent / "peers" / "run_one.py"


def choose_contestants(only: str | None, job: Job) -> list[tuple[str, str]]:
    """Return pairs of contestant and configuration; `only` names either a contestant or `contestant/configuration`."""
    everyone = [(name, configuration) for name, several in CONFIGURATIONS.items() for configuration in several]
    if not job.frozen:  # nothing is frozen, so there are no features to cache
        everyone = [pair for pair in everyone if pair[1] not in ("uncached", "kept")]
    if only is None:
        return everyone
    wanted = only.split(",")
    unknown = [name for name in wanted if name not in {*CONFIGURATIONS, *map("/".join, everyone)}]
    if unknown:
        raise SystemExit(f"--only {','.join(unknown)}: expected any of {', '.join(map('/'.join, everyone))}")
    return [pair for pair in everyone if pair[0] in wanted or "/".join(pair) in wanted]


def run_process(name: str, configuration: str, job: Job, *arguments: str) -> dict:
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="")
    if configuration == "best":
        environment.update(BEST_ENVIRONMENT)
    command = [sys.executable, RUN_ONE, name, configuration, json.dumps(dataclasses.asdict(job)), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    output = done.stdout.strip().splitlines()
    if done.returncode or not output:
        errors = done.stderr.strip().splitlines()
        return {"failed": errors[-1] if errors else f"exit status {done.returncode}"}
    return json.loads(output[-1])


def run_contestant(name: str, configuration: str, job: Job) -> dict:
    if configuration != "kept":
        return run_process(name, configuration, job)
    with tempfile.TemporaryDirectory() as folder:
        filled = run_process(name, configuration, dataclasses.replace(job, epochs=1), folder)  # fills the folder
        return run_process(name, configuration, job, folder) if "total_s" in filled else filled


def extrapolate(result: dict, epochs: int) -> dict:
    """Return the result with its total for all epochs: first epoch + (epochs - 1) * mean of the later ones."""
    result["measured_total_s"] = result["total_s"]
    result["estimated"] = len(result["epoch_s"]) < epochs
    if result["estimated"]:
        first, *later = result["epoch_s"]
        outside = result["total_s"] - sum(result["epoch_s"])  # preprocessing done once
        result["total_s"] = outside + first + (epochs - 1) * statistics.mean(later or [first])
    return result


def open_report(path: Path | None, job: Job, peer_epochs: int) -> dict:
    """Return the report to continue: the one at `path` if it is of the same job, else a new one."""
    report = {"job": dataclasses.asdict(job), "peer_epochs": peer_epochs, "machine": describe_machine(), "runs": []}
    if path is None or not path.exists():
        return report
    earlier = json.loads(path.read_text())
    if any(earlier[name] != report[name] for name in ("job", "peer_epochs", "machine")):
        raise SystemExit(f"{path} is of another job or another machine: give another --json, or remove it.")
    earlier["runs"] = [run for run in earlier["runs"] if "total_s" in run]  # retry what failed
    return earlier


def write_report(path: Path | None, report: dict) -> None:
    if path is not None:
        new = path.with_name(path.name + ".new")
        new.write_text(json.dumps(report, indent=1) + "\n")
        new.replace(path)


def compare(job: Job, contestants: list[tuple[str, str]], options: argparse.Namespace) -> dict:
    report = open_report(options.json, job, options.peer_epochs or job.epochs)
    dtype = torch.bfloat16 if job.bf16 else torch.float32
    done = {(run["contestant"], run["configuration"], run["repetition"]) for run in report["runs"]}
    for repetition in range(options.repetitions):
        for name, configuration in contestants:
            if (name, configuration, repetition) in done:
                continue
            own = name == "transferkit"
            epochs = job.epochs if own else min(job.epochs, report["peer_epochs"])
            run = {"contestant": name, "configuration": configuration, "repetition": repetition}
            run["before"] = measure_rates(dtype)
            result = run_contestant(name, configuration, dataclasses.replace(job, epochs=epochs))
            run["after"] = measure_rates(dtype)
            run.update(extrapolate(result, job.epochs) if "total_s" in result else result)
            report["runs"].append(run)
            write_report(options.json, report)
            words = f"{run['total_s']:.1f} s" if "total_s" in run else "no result"
            print(f"{name}/{configuration}, repetition {repetition + 1}: {words}", file=sys.stderr)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=JOBS, default="head64")
    parser.add_argument("--epochs", type=int, help="10; 2 for full64")
    parser.add_argument("--peer-epochs", type=int, help="epochs of the other libraries; the rest is estimated")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--only", help="names, as in transferkit,pytorch/best")
    parser.add_argument("--training-images", type=int)
    parser.add_argument("--validation-images", type=int)
    parser.add_argument("--precision", choices=["auto", "fp32"], help="fp32 leaves bf16 out on all sides")
    parser.add_argument("--json", type=Path, help="write results there after every contestant, and continue from them")
    parser.add_argument("--from", dest="source", type=Path, help="only print the results in this file")
    options = parser.parse_args()
    if options.source is not None:
        report = json.loads(options.source.read_text())
    else:
        job = JOBS[options.job]
        changes = {
            "epochs": options.epochs,
            "precision": options.precision,
            "num_training": options.training_images,
            "num_validation": options.validation_images,
        }
        job = dataclasses.replace(job, **{name: value for name, value in changes.items() if value is not None})
        report = compare(job, choose_contestants(options.only, job), options)
    print(format_report(report))


if __name__ == "__main__":
    main()
