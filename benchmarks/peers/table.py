"""The table and the headline ratios of a file that `compare.py` wrote."""

import statistics
from collections.abc import Callable

from quality_table import markdown

COLUMNS = ("contestant", "configuration", "s/epoch", "min-max", "total s", "memory MB", "val. accuracy", "ratio")


def rows_by_contestant(report: dict) -> dict[tuple[str, str], list[dict]]:
    """Group the runs of a report by contestant and configuration, in the order in which they first ran."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for run in report["runs"]:
        groups.setdefault((run["contestant"], run["configuration"]), []).append(run)
    return groups


def median_total(runs: list[dict]) -> float | None:
    totals = [run["total_s"] for run in runs if "total_s" in run]
    return statistics.median(totals) if totals else None


def median_epoch(runs: list[dict]) -> float | None:
    epochs = [seconds for run in runs for seconds in run.get("epoch_s", ())]
    return statistics.median(epochs) if epochs else None


def comparison(report: dict) -> tuple[Callable[[list[dict]], float | None], str]:
    """Return the figure that ratios compare, and its name: for `full64` the time of an epoch, else the total."""
    return (median_epoch, "seconds per epoch") if report["job"]["name"] == "full64" else (median_total, "total")


def row(name: str, configuration: str, runs: list[dict], ratio: float | None) -> list[str]:
    finished = [run for run in runs if "total_s" in run]
    if not finished:
        last = runs[-1]
        missing = ", ".join(last.get("not_installed", ()))
        reason = f"not installed: {missing}" if missing else f"failed: {last['failed']}"
        return [name, configuration, reason, *[""] * (len(COLUMNS) - 3)]
    epochs = [seconds for run in finished for seconds in run["epoch_s"]]
    estimated = any(run["estimated"] for run in finished)
    total = median_total(finished)
    accuracy = max(max(run["validation_accuracy"]) for run in finished)
    after = f" (epoch {len(finished[0]['epoch_s'])})" if estimated else ""
    return [
        name,
        configuration,
        f"{median_epoch(finished):.2f}",
        f"{min(epochs):.2f}-{max(epochs):.2f}",
        f"{total:.1f}" + (" estimated" if estimated else ""),
        f"{statistics.median(run['peak_memory_mb'] for run in finished):.0f}",
        f"{accuracy:.3f}{after}",
        f"{ratio:.2f}" if ratio else "-",
    ]


def headlines(report: dict) -> list[str]:
    """Return two ratios to transferkit: of the fastest peer, and of the fastest peer at its defaults."""
    measure, unit = comparison(report)
    groups = rows_by_contestant(report)
    reference = measure(groups.get(("transferkit", "default"), []))
    lines = []
    for configurations, words in ((("default", "best"), "fastest peer, any"), (("default",), "fastest peer, default")):
        figures = [
            (measure(runs), f"{name}/{configuration}", any(run.get("estimated") for run in runs))
            for (name, configuration), runs in groups.items()
            if name != "transferkit" and configuration in configurations and measure(runs)
        ]
        if reference and figures:
            seconds, who, estimated = min(figures)
            note = ", estimated" if estimated and measure is median_total else ""
            lines.append(f"{words} configuration ({who}) / transferkit: {seconds / reference:.2f} ({unit}{note})")
    return lines


def format_report(report: dict) -> str:
    """Return the report as Markdown."""
    job, machine = report["job"], report["machine"]
    versions = {name: version for run in report["runs"] for name, version in run.get("versions", {}).items()}
    groups = rows_by_contestant(report)
    measure, _ = comparison(report)
    reference = measure(groups.get(("transferkit", "default"), []))
    ratios = {key: measure(runs) / reference for key, runs in groups.items() if reference and measure(runs)}
    rates = [run[when] for run in report["runs"] for when in ("before", "after")]
    lines = [
        f"{job['name']}: {job['num_training']} training and {job['num_validation']} validation images at "
        f"{job['image_size']} px, {job['epochs']} epochs, {'convolutions frozen' if job['frozen'] else 'all trains'}",
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB; Python {machine['python']}",
        ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
    ]
    dtype = "fp32" if job.get("precision") == "fp32" else "bf16"
    for name, words in (
        ("copy_gb_s", "GB/s copied"),
        ("product_gflop_s", f"GFLOP/s of a product in {dtype}"),
    ):
        figures = [rate[name] for rate in rates]
        if figures:
            lines.append(f"machine meanwhile: {min(figures):.1f} to {max(figures):.1f} {words}")
    rows = [row(*key, runs, ratios.get(key)) for key, runs in groups.items()]
    return "\n\n".join([*filter(None, lines), markdown(list(COLUMNS), rows), *headlines(report)])
