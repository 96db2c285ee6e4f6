"""What an evaluation leaves behind: metrics.csv, summary.json, table.md and sheet.png."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..image_files import write_whole
from .datasets import NAMED_DATASETS
from .runner import Job, Row, as_json

PAPER = "HI-Diff (arXiv:2305.12966)"
RESAMPLES = 10_000
FIGURE_DPI = 100


def write_report(job: Job, rows: Sequence[Row], timings: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the four files, the sheet only where an image has a figure.

    Args:
        job: What was done.
        rows: One for each pair, in their order.
        timings: What may differ from run to run, for the summary.
    Returns:
        The summary.
    Raises:
        OSError: A file cannot be written.
    """
    summary = summarize(job.settings, rows, timings)
    write_whole(job.output / "metrics.csv", as_csv(job.settings, rows).encode())
    write_whole(job.output / "table.md", as_table(summary).encode())
    if any(row.error is None for row in rows):
        write_whole(job.output / "sheet.png", contact_sheet(job, rows))
    write_whole(job.output / "summary.json", as_json(summary))  # last: where it stands, all is done
    return summary


# Numbers


def as_csv(settings: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """A line per image; one that failed has no figures but a reason. What a command does not know is left out."""
    metrics = metric_names(rows)
    constant = [name for name in ("steps", "scheduler", "seed") if name in settings]
    timed = ["seconds"] if constant else []
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["name", *metrics, "width", "height", *timed, *constant, "error"])
    for row in rows:
        scores = [f"{row.scores[name]:.6f}" if name in row.scores else "" for name in metrics]
        seconds = [f"{row.seconds:.4f}"] if timed else []
        values = [settings[name] for name in constant]
        table.writerow([row.name, *scores, row.width, row.height, *seconds, *values, row.error or ""])
    return text.getvalue()


def metric_names(rows: Sequence[Row]) -> list[str]:
    """In the order of the first image that has figures."""
    return next((list(row.scores) for row in rows if row.scores), ["psnr", "ssim"])


def summarize(settings: Mapping[str, Any], rows: Sequence[Row], timings: Mapping[str, Any]) -> dict[str, Any]:
    """Means over the images that did not fail, beside the settings and the names of those that did."""
    scored = [row for row in rows if row.error is None]
    return {
        **settings,
        "scored": len(scored),
        "failed": [{"name": row.name, "error": row.error} for row in rows if row.error is not None],
        "metrics": {name: statistics([row.scores[name] for row in scored]) for name in metric_names(rows)},
        "paper": paper_figures(settings),
        "timings": dict(timings),
    }


def statistics(values: Sequence[float]) -> dict[str, Any]:
    """Mean and bootstrap interval; where a value is infinite there are none, but a count of such values."""
    infinite = sum(math.isinf(value) for value in values)
    if infinite or not values:
        return {"mean": None, "interval_95": None, "infinite": infinite}
    return {"mean": float(np.mean(values)), "interval_95": bootstrap_interval(values), "infinite": 0}


def bootstrap_interval(values: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> list[float]:
    """Where 95 % of the means of images drawn with replacement lie: from the 2.5th to the 97.5th percentile."""
    numbers, generator = np.asarray(values), np.random.default_rng(seed)
    means = [generator.choice(numbers, len(numbers)).mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return [float(low), float(high)]


def paper_figures(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the paper reports for this data set, if it is one of the paper's."""
    known = NAMED_DATASETS.get(settings.get("dataset", ""))
    figures = known.figures if known is not None and settings.get("split") == "test" else {}
    return [{"trained_on": name, "psnr": psnr, "ssim": ssim} for name, (psnr, ssim) in figures.items()]


# The table


def as_table(summary: Mapping[str, Any]) -> str:
    """Our figures and the paper's, in Markdown."""
    metrics = list(summary["metrics"])
    lines = [
        f"| {title_of(summary)} | {' | '.join(heading(name) for name in metrics)} | images |",
        f"|---|{'---|' * (len(metrics) + 1)}",
    ]
    known = NAMED_DATASETS.get(summary.get("dataset", ""))
    for figures in summary["paper"]:
        given = {"psnr": f"{figures['psnr']:.2f}", "ssim": f"{figures['ssim']:.3f}"}
        cells = [given.get(name, "") for name in metrics]
        images = known.test_images if known is not None else ""
        lines.append(f"| {PAPER}, trained on {figures['trained_on']} | {' | '.join(cells)} | {images} |")
    cells = [cell(name, summary["metrics"][name]) for name in metrics]
    lines.append(f"| {label_of(summary)} | {' | '.join(cells)} | {summary['scored']} of {summary['images']} |")
    notes = ["", "In brackets: 95 % bootstrap intervals of the means."]
    if known is not None and summary["paper"] and summary["scored"] != known.test_images:
        notes.append(
            f"The paper's figures are means of {known.test_images} images; ours, of {summary['scored']}, compare with them "
            "only when they are of the same."
        )
    if summary["failed"]:
        notes += ["", f"Failed: {', '.join(failure['name'] for failure in summary['failed'])}."]
    return "\n".join([*lines, *notes]) + "\n"


def heading(metric: str) -> str:
    return {"psnr": "PSNR (dB)", "ssim": "SSIM"}.get(metric, metric)


def title_of(summary: Mapping[str, Any]) -> str:
    dataset = summary.get("dataset")
    known = NAMED_DATASETS.get(dataset or "")
    name = known.title if known is not None else dataset
    return f"{name} ({summary['protocol']} protocol)" if name else f"{summary['protocol']} protocol"


def label_of(summary: Mapping[str, Any]) -> str:
    model = summary.get("model")
    if model is None:
        return str(summary.get("restored", "restored"))
    return f"{model['name']}, {summary['steps']} steps of {summary['scheduler']}"


def cell(metric: str, values: Mapping[str, Any]) -> str:
    digits = 2 if metric == "psnr" else 4
    if values["mean"] is None:
        return f"infinite for {values['infinite']}" if values["infinite"] else "none"
    low, high = values["interval_95"]
    return f"{values['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


# The sheet


def contact_sheet(job: Job, rows: Sequence[Row]) -> bytes:
    """A PNG of the images with the best, the median and the worst PSNR, restored once more; of as many as there are."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    chosen = extremes(rows)
    pictures = [columns_of(job, row) for _, row in chosen]
    names = list(pictures[0])
    largest = max(1.0, *(images[names[-1]].max() for images in pictures))
    figure = Figure(figsize=(4 * len(names) + 1, 3.2 * len(chosen)), dpi=FIGURE_DPI, layout="constrained")
    grid = figure.subplots(len(chosen), len(names), squeeze=False)
    for axes, (place, row), images in zip(grid, chosen, pictures, strict=True):
        for axis, name in zip(axes, names, strict=True):
            shown = axis.imshow(images[name], cmap="inferno", vmin=0, vmax=largest)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(name)
        axes[0].set_ylabel(f"{place}: {row.name}\n{row.scores['psnr']:.2f} dB, SSIM {row.scores['ssim']:.4f}")
        figure.colorbar(shown, ax=axes[-1], label="levels of 255")
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png")
    return encoded.getvalue()


def extremes(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Best, median and worst by PSNR; each image once."""
    ranked = sorted((row for row in rows if row.error is None), key=lambda row: (row.scores["psnr"], row.name))
    places = {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0]}
    chosen: dict[int, tuple[str, Row]] = {}
    for place, row in places.items():
        chosen.setdefault(row.index, (place, row))
    return list(chosen.values())


def columns_of(job: Job, row: Row) -> dict[str, np.ndarray]:
    """Title -> picture; last the error: mean absolute difference over the channels, in levels, before any alignment."""
    pair = job.pairs[row.index]
    restored, sharp = job.restore(pair), pair.read_sharp()
    blurry = {} if pair.read_blurry is None else {"blurry": pair.read_blurry()}
    error = np.abs(restored.astype(np.float32) - sharp.astype(np.float32)).mean(axis=-1)
    title = "error, not aligned" if job.protocol.name == "realblur" else "error"
    return {**blurry, "restored": restored, "sharp": sharp, title: error}
