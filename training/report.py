"""What a model card needs: a table over validation pairs, a sheet of pictures, the curves of both stages.

    python training/report.py --model runs/stage2/pipeline --runs runs/stage1 runs/stage2 \
        --pairs synthetic=PAIRS real=PAIRS --output report
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from tqdm import tqdm

from diffusers_hidiff import HIDiffPipeline
from diffusers_hidiff.data.paired_images import paired_files, read_rgb
from diffusers_hidiff.metrics.psnr import psnr_of_arrays
from diffusers_hidiff.utils.allocator import keep_freed_memory

mpl.use("Agg")
from matplotlib import pyplot as plt


def validate(pipeline: HIDiffPipeline, folder: Path) -> list[dict[str, float | str]]:
    """One row per pair of `folder`: name, size, PSNR of the blurry and of the restored image, seconds. Seed 0 each."""
    rows: list[dict[str, float | str]] = []
    for blurry_file, sharp_file in tqdm(paired_files(folder), desc=folder.name):
        blurry, sharp = read_rgb(blurry_file), read_rgb(sharp_file)
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        restored = np.asarray(pipeline(blurry, generator=generator, return_dict=False)[0][0])
        rows.append(
            {
                "name": blurry_file.stem,
                "size": f"{blurry.shape[1]}x{blurry.shape[0]}",
                "blurry": psnr_of_arrays(blurry, sharp),
                "restored": psnr_of_arrays(restored, sharp),
                "seconds": time.perf_counter() - start,
            }
        )
    return rows


def table(sets: dict[str, list[dict[str, float | str]]]) -> str:
    """Markdown: means of each set, then every pair of sets of at most a dozen."""
    lines = ["| pairs | number | blurry, dB | restored, dB | gain, dB |", "|---|---|---|---|---|"]
    for name, rows in sets.items():
        blurry, restored = (np.mean([row[key] for row in rows]) for key in ("blurry", "restored"))
        lines.append(f"| {name} | {len(rows)} | {blurry:.2f} | {restored:.2f} | {restored - blurry:+.2f} |")
    for name, rows in sets.items():
        if len(rows) <= 12:
            lines += [
                "",
                f"| {name} | size | blurry, dB | restored, dB | gain, dB | seconds |",
                "|---|---|---|---|---|---|",
            ]
            for row in rows:
                gain = float(row["restored"]) - float(row["blurry"])
                lines.append(
                    f"| {row['name']} | {row['size']} | {row['blurry']:.2f} | {row['restored']:.2f}"
                    f" | {gain:+.2f} | {row['seconds']:.1f} |"
                )
    return "\n".join(lines) + "\n"


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
    parser.add_argument("--model", type=Path, required=True, help="folder of a pipeline")
    parser.add_argument("--pairs", nargs="+", default=[], metavar="NAME=DIR", help="folders with blurry/ and sharp/")
    parser.add_argument("--runs", nargs="+", default=[], type=Path, help="output folders of the training stages")
    parser.add_argument("--output", type=Path, required=True, help="where validation.md and curves.png go")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.runs:
        plot_curves(options.runs, options.output / "curves.png")
    if options.pairs:
        pipeline = HIDiffPipeline.from_pretrained(options.model)
        pipeline.set_progress_bar_config(disable=True)
        sets = {
            name: validate(pipeline, Path(folder)) for name, folder in (pair.split("=", 1) for pair in options.pairs)
        }
        (options.output / "validation.md").write_text(table(sets))
        print(table(sets))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
