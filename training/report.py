"""The curves of one or more runs, side by side.

    python training/report.py runs/stage1 runs/stage2 --output curves.png

What a model is worth is told by `hidiff evaluate --model M --dataset PAIRS --beside blurry oracle --output OUT`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt


def lines_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that are whole; none if there is no such file."""
    file, lines = run / "metrics.jsonl", []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:  # cut short when the run was killed
            continue
    return lines


def plot_curves(runs: list[Path], file: Path) -> None:
    """Training loss (mean of each interval of the log) and validation PSNR of each run, side by side."""
    figure, axes = plt.subplots(1, len(runs), figsize=(5.5 * len(runs), 3.6), squeeze=False)
    for axis, run in zip(axes[0], runs, strict=True):
        lines = lines_of(run)
        axis.set(xlabel="step", ylabel="L1", title=run.name)
        losses = [(line["step"], line["image"]) for line in lines if "image" in line]
        if losses:
            steps, values = np.array(losses).T
            window = max(1, len(values) // 40)
            axis.plot(steps, values, color="0.8", linewidth=0.8, label="L1 of the image")
            smooth = np.convolve(values, np.ones(window) / window, "valid")
            axis.plot(steps[window - 1 :], smooth, color="tab:blue", label="running mean")
            axis.set_ylim(0, np.percentile(values, 99))
            axis.legend(loc="lower left", fontsize=8)
        scores = [(line["step"], line["validation_psnr"]) for line in lines if "validation_psnr" in line]
        if scores:
            right = axis.twinx()
            right.plot(*np.array(scores).T, "o-", color="tab:red", markersize=3)
            right.set_ylabel("validation PSNR, dB", color="tab:red")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a training run")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.png", help="picture to write")
    options = parser.parse_args(arguments)
    for run in options.runs:
        if not (run / "metrics.jsonl").exists():
            parser.error(f"RUN must be a folder with metrics.jsonl, got {str(run)!r}.")
    plot_curves(options.runs, options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
