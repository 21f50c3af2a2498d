"""Markdown tables of a file that `quality.py` wrote: accuracy with spread, seconds, and time to accuracy."""

from collections.abc import Iterable
from statistics import mean, stdev

Runs = dict[int, list[list[float]]]
"""Points (seconds, accuracy) of a method's runs, by seed."""
OWN = ("fine_tune", "solve", "old")


def is_own(method: str) -> bool:
    return method.partition(":")[0] in OWN


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def final(runs: Runs) -> str:
    """Return the accuracy at the end, mean and standard deviation over the seeds, and the mean seconds."""
    if not runs:
        return ""
    seconds, accuracies = zip(*(points[-1] for points in runs.values()), strict=True)
    spread = f" ± {stdev(accuracies):.3f}" if len(runs) > 1 else ""
    return f"{mean(accuracies):.3f}{spread}, {mean(seconds):.0f} s"


def times_to(runs: Runs, peer: Runs) -> list[float]:
    """Return the seconds until each run first reaches what the peer's run of the same seed ends with, if it does."""
    targets = {seed: points[-1][1] for seed, points in peer.items()}
    reached = [
        [seconds for seconds, accuracy in points if accuracy >= targets[seed]]
        for seed, points in runs.items()
        if seed in targets
    ]
    return [seconds[0] for seconds in reached if seconds]


def time_to_accuracy(methods: dict[str, Runs]) -> str:
    """Return a row for each peer, and in it the seconds of each method; the ratio is to transferkit's fastest.

    A method that gets there with some seeds only shows their number, and has no part in the ratio.
    """
    rows = []
    for name, peer in methods.items():
        if is_own(name):
            continue
        times = {method: times_to(runs, peer) for method, runs in methods.items()}
        always = {method: mean(seconds) for method, seconds in times.items() if len(seconds) == len(peer)}
        own = [seconds for method, seconds in always.items() if is_own(method)]
        cells = [
            f"{always[method]:.1f}" if method in always else f"{len(seconds)} of {len(peer)} seeds"
            for method, seconds in times.items()
        ]
        accuracy = mean(points[-1][1] for points in peer.values())
        rows.append([name, f"{accuracy:.3f}", *cells, f"{always[name] / min(own):.1f}" if own else ""])
    return markdown(["until what this ends with", "accuracy", *(f"{method}, s" for method in methods), "ratio"], rows)


def format_tables(report: dict) -> str:
    groups: dict[tuple, dict[str, dict[str, Runs]]] = {}
    for run in report["runs"]:
        if "points" in run:
            task = run["task"]
            sizes = groups.setdefault(tuple(task[name] for name in ("data", "image_size", "num_test", "epochs")), {})
            sizes.setdefault(task["size"], {}).setdefault(task["method"], {})[task["seed"]] = run["points"]
    versions = ", ".join(" ".join(pair) for pair in report["versions"].items())
    rates = [run["before"]["product_gflop_s"] for run in report["runs"]]
    machine = "{processor}, {cores} cores, {memory_gb} GB; Python {python}".format(**report["machine"])
    parts = [f"{machine}; {versions}. A bf16 product ran at {min(rates):.0f} to {max(rates):.0f} GFLOP/s meanwhile."]
    for (data, image_size, num_test, epochs), sizes in groups.items():
        draws = max(len(runs) for methods in sizes.values() for runs in methods.values())
        trial = f", a trial of {epochs} epochs" if epochs else ""
        every = dict.fromkeys(method for methods in sizes.values() for method in methods)
        rows = [[method, *(final(methods.get(method, {})) for methods in sizes.values())] for method in every]
        parts.append(f"## {data} at {image_size} px, seeds: {draws}, up to {num_test} test images{trial}")
        parts.append(markdown(["method", *sizes], rows))
        for size, methods in sizes.items():
            if len({is_own(method) for method in methods}) == 2:
                parts.append(f"### Time to accuracy, {size} training images\n\n{time_to_accuracy(methods)}")
    return "\n\n".join(parts)
