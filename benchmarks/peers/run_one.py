"""Run one configuration of one contestant in this process and print the results as one line of JSON.

`compare.py` starts it: python benchmarks/peers/run_one.py pytorch best '{"name": "head64", ...}' [cache folder]
"""

import importlib
import importlib.metadata
import importlib.util
import json
import resource
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where job.py and peers/ are

from job import Job, read_data  # noqa: E402

from peers import PACKAGES  # noqa: E402


def version_of(package: str) -> str:
    """Return the version of the distribution that provides a package: tensorflow may be tensorflow-cpu."""
    distributions = importlib.metadata.packages_distributions().get(package, [package])
    return importlib.metadata.version(package if package in distributions else distributions[0])


def peak_memory_mb() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    name, configuration, job_json, *cache_folder = sys.argv[1:]
    missing = [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]
    if missing:
        print(json.dumps({"not_installed": missing}))
        return
    job = Job(**json.loads(job_json))
    train = getattr(importlib.import_module(f"peers.with_{name}"), configuration)
    record = train(job, read_data(job), *cache_folder)
    result = {
        "epoch_s": record.epoch_s,
        "total_s": record.total_s,
        "validation_accuracy": record.validation_accuracy,
        "peak_memory_mb": peak_memory_mb(),
        "versions": {package: version_of(package) for package in PACKAGES[name]},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
