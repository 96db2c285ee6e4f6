"""What an evaluation leaves behind: metrics.csv, summary.json, table.md, sheet.jpg and, beside blurry images, gains.png."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..image_files import write_whole
from ..utils.panels import TEXT_SIZE, Panel, empty_figure, encoded, sheet
from .datasets import NAMED_DATASETS
from .runner import Job, Row, as_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "HI-Diff (arXiv:2305.12966)"
RESAMPLES = 10_000
FEW_IMAGES = 12  # so many have a line each in the table
BESIDE = {"blurry": "blurry", "oracle": "with the prior of stage 1, which sees the sharp image"}


def write_report(job: Job, rows: Sequence[Row], timings: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the files, the pictures only where an image has a figure.

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
    write_whole(job.output / "table.md", as_table(summary, rows).encode())
    if any(row.error is None for row in rows):
        write_whole(job.output / "sheet.jpg", encoded(contact_sheet(job, rows), ".jpg"))
        if "blurry" in job.beside:
            write_whole(job.output / "gains.png", encoded(gains_figure(rows, summary), ".png"))
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
        **({"gains": gain_statistics(settings, scored)} if "blurry" in settings.get("beside", ()) else {}),
        "paper": paper_figures(settings),
        "timings": dict(timings),
    }


def gain_statistics(settings: Mapping[str, Any], scored: Sequence[Row]) -> dict[str, Any]:
    """PSNR over that of the blurry image: of the restored one, and of what stands beside it."""
    others = [name for name in settings["beside"] if name != "blurry"]
    return {name: statistics([gain(row, name) for row in scored]) for name in ["restored", *others]}


def gain(row: Row, name: str = "restored") -> float:
    """PSNR over that of the blurry image, dB."""
    return row.scores["psnr" if name == "restored" else f"{name}_psnr"] - row.scores["blurry_psnr"]


def statistics(values: Sequence[float]) -> dict[str, Any]:
    """Mean and bootstrap interval; where a value is not finite there are none, but a count of such values."""
    infinite = sum(not math.isfinite(value) for value in values)
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


def as_table(summary: Mapping[str, Any], rows: Sequence[Row] = ()) -> str:
    """Our figures and the paper's, in Markdown; then a line for each image if they are few and have blurry ones beside."""
    metrics = base_metrics(summary)
    gains = summary.get("gains", {})
    lines = [
        f"| {title_of(summary)} | {' | '.join([*map(heading, metrics), *(['gain (dB)'] if gains else []), 'images'])} |",
        f"|---|{'---|' * (len(metrics) + bool(gains) + 1)}",
    ]
    known = NAMED_DATASETS.get(summary.get("dataset", ""))
    for figures in summary["paper"]:
        given = {"psnr": f"{figures['psnr']:.2f}", "ssim": f"{figures['ssim']:.3f}"}
        cells = [given.get(name, "") for name in metrics] + [""] * bool(gains)
        images = known.test_images if known is not None else ""
        lines.append(f"| {PAPER}, trained on {figures['trained_on']} | {' | '.join(cells)} | {images} |")
    labels = {"blurry": BESIDE["blurry"], "restored": label_of(summary), "oracle": BESIDE["oracle"]}
    for name, label in labels.items():
        if name != "restored" and name not in summary.get("beside", ()):
            continue
        prefix = "" if name == "restored" else f"{name}_"
        cells = [cell(metric, summary["metrics"][prefix + metric]) for metric in metrics]
        if gains:
            cells.append(cell("psnr", gains[name], sign="+") if name in gains else "")
        lines.append(f"| {label} | {' | '.join(cells)} | {summary['scored']} of {summary['images']} |")
    notes = ["", "In brackets: 95 % bootstrap intervals of the means."]
    if known is not None and summary["paper"] and summary["scored"] != known.test_images:
        notes.append(
            f"The paper's figures are means of {known.test_images} images; ours, of {summary['scored']}, compare with them "
            "only when they are of the same."
        )
    if summary["failed"]:
        notes += ["", f"Failed: {', '.join(failure['name'] for failure in summary['failed'])}."]
    if gains and len(rows) <= FEW_IMAGES:
        notes += ["", *table_of_images(list(gains), rows)]
    return "\n".join([*lines, *notes]) + "\n"


def base_metrics(summary: Mapping[str, Any]) -> list[str]:
    """The metrics of the restored image alone."""
    prefixes = tuple(f"{name}_" for name in summary.get("beside", ()))
    return (
        [name for name in summary["metrics"] if not name.startswith(prefixes)] if prefixes else list(summary["metrics"])
    )


def table_of_images(ways: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """PSNR of the blurry image and gain of each way, a line for each image that did not fail."""
    lines = [
        f"| image | size | blurry (dB) | {' | '.join(f'{way} (dB) | gain (dB)' for way in ways)} |",
        f"|---|---|---|{'---|' * 2 * len(ways)}",
    ]
    for row in rows:
        if row.error is None:
            blurry = row.scores["blurry_psnr"]
            cells = [f"{blurry + gain(row, way):.2f} | {gain(row, way):+.2f}" for way in ways]
            lines.append(f"| {row.name} | {row.width}x{row.height} | {blurry:.2f} | {' | '.join(cells)} |")
    return lines


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


def cell(metric: str, values: Mapping[str, Any], sign: str = "") -> str:
    digits = 2 if metric == "psnr" else 4
    if values["mean"] is None:
        return f"infinite for {values['infinite']}" if values["infinite"] else "none"
    low, high = values["interval_95"]
    return f"{values['mean']:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


# The pictures


def gains_figure(rows: Sequence[Row], summary: Mapping[str, Any]) -> "Figure":
    """What each image gained, against how blurry it was."""
    scored = [row for row in rows if row.error is None]
    figure = empty_figure("What restoring gains on each blurry image", 4.2)
    axis = figure.subplots()
    styles = {"restored": ("tab:blue", "o"), "oracle": ("tab:red", "x")}
    for name, values in summary["gains"].items():
        mean = "" if values["mean"] is None else f", mean {values['mean']:+.2f} dB"
        label = {"restored": "restored", "oracle": "with the prior of stage 1, which sees the sharp image"}[name] + mean
        axis.scatter(
            [row.scores["blurry_psnr"] for row in scored],
            [gain(row, name) for row in scored],
            s=45,
            color=styles[name][0],
            marker=styles[name][1],
            alpha=0.8,
            label=label,
        )
    axis.axhline(0, color="black", linewidth=1)
    axis.set_xlabel("PSNR of the blurry image, dB", fontsize=TEXT_SIZE)
    axis.set_ylabel("gain in PSNR, dB", fontsize=TEXT_SIZE)
    axis.tick_params(labelsize=TEXT_SIZE)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=TEXT_SIZE)
    return figure


def contact_sheet(job: Job, rows: Sequence[Row]) -> "Figure":
    """The images with the best, the median and the worst PSNR, restored once more; of as many as there are."""
    chosen = extremes(rows)
    pictures = [columns_of(job, row) for _, row in chosen]
    largest = max(1.0, *(float(images["error"].max()) for images in pictures))
    unit = "error, levels of 255" + (", not aligned" if job.protocol.name == "realblur" else "")
    rows_of_panels = [
        [Panel(titled(name, row), image, (0.0, largest), unit) for name, image in images.items()]
        for (_, row), images in zip(chosen, pictures, strict=True)
    ]
    sides = [f"{place}: {row.name}" for place, row in chosen]
    return sheet(rows_of_panels, "Best, median and worst image by PSNR", sides)


def titled(name: str, row: Row) -> str:
    """The name of a picture with its PSNR, where it has one."""
    psnr = row.scores.get({"restored": "psnr"}.get(name, f"{name}_psnr"))
    return name if psnr is None else f"{name}\n{psnr:.2f} dB"


def extremes(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Best, median and worst by PSNR; each image once."""
    ranked = sorted((row for row in rows if row.error is None), key=lambda row: (row.scores["psnr"], row.name))
    places = {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0]}
    chosen: dict[int, tuple[str, Row]] = {}
    for place, row in places.items():
        chosen.setdefault(row.index, (place, row))
    return list(chosen.values())


def columns_of(job: Job, row: Row) -> dict[str, np.ndarray]:
    """Name -> picture; last the error: mean absolute difference over the channels, in levels, before any alignment."""
    pair = job.pairs[row.index]
    restored, sharp = job.restore(pair), pair.read_sharp()
    blurry = {} if pair.read_blurry is None else {"blurry": pair.read_blurry()}
    others = {name: make(pair) for name, make in job.beside.items() if name != "blurry"}
    error = np.abs(restored.astype(np.float32) - sharp.astype(np.float32)).mean(axis=-1)
    return {**blurry, "restored": restored, **others, "sharp": sharp, "error": error}
