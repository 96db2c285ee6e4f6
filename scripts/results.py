"""Makes the results of the model in docs/results/ anew, and the tables that are copied from there.

    python scripts/results.py DATA [--only synthetic real …]

DATA holds validation/synthetic and validation/real, each with blurry/ and sharp/. The work goes on in runs/results/ below a
name that changes with the weights: the same command carries on where it was stopped, and other weights begin anew. Of DATA
only figures and plots get into docs/; the pictures there are of docs/sample.
"""

import argparse
import csv
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from diffusers_hidiff import HIDIFF_SMALL, __version__
from diffusers_hidiff.image_files import write_whole

ROOT = Path(__file__).resolve().parent.parent
RESULTS, SAMPLE, README, CARD = (
    ROOT / "docs/results",
    ROOT / "docs/sample",
    ROOT / "README.md",
    HIDIFF_SMALL / "README.md",
)
OPTIONS = {
    "none": "",
    "self_ensemble": "--self_ensemble",
    "num_priors_8": "--num_priors 8",
    "num_priors_4_image": "--num_priors 4 --average image",
    "local_96": "--local_statistics 96",
    "local_192": "--local_statistics 192",
    "local_384": "--local_statistics 384",
    "self_ensemble_local_192": "--self_ensemble --local_statistics 192",
}
STUDY_PAIRS = 6  # of the synthetic ones, evenly spaced; with the real crops


@dataclass(frozen=True)
class Step:
    """One result.

    Args:
        title: Its heading.
        text: What it shows, a sentence or two.
        commands: What makes it, in the words of the command line, run in the work folder. There lie `validation` of DATA,
            `photo`, which is docs/sample, and `pairs`, see `prepare`.
        finish: Writes what is kept to `RESULTS`, from the work folder.
        shown: Files in `RESULTS` that its section shows, in order.
    """

    title: str
    text: str
    commands: Sequence[str]
    finish: Callable[[Path], None]
    shown: Sequence[str]


def keep(name: str, files: Sequence[str]) -> Callable[[Path], None]:
    """A `finish` that copies files of a folder of the work to the same folder of the results."""

    def finish(work: Path) -> None:
        (RESULTS / name).mkdir(parents=True, exist_ok=True)
        for file in files:
            write_whole(RESULTS / name / file, (work / name / file).read_bytes())

    return finish


def evaluation(name: str, title: str, text: str) -> Step:
    files = ("table.md", "gains.png", "metrics.csv", "summary.json")
    command = f"hidiff evaluate --dataset validation/{name} --beside blurry oracle --output {name}"
    return Step(title, text, [command], keep(name, files), [f"{name}/table.md", f"{name}/gains.png"])


def finish_options(work: Path) -> None:
    (RESULTS / "options").mkdir(parents=True, exist_ok=True)
    rows = [row for option in OPTIONS for row in rows_of_option(work / "options" / option, option)]
    stream = [",".join(rows[0])] + [",".join(str(value) for value in row.values()) for row in rows]
    write_whole(RESULTS / "options" / "options.csv", ("\n".join(stream) + "\n").encode())
    write_whole(RESULTS / "options" / "table.md", table_of_options(rows).encode())


def rows_of_option(folder: Path, option: str) -> list[dict[str, object]]:
    """Mean PSNR, SSIM and seconds of each size of image in each data set."""
    rows: list[dict[str, object]] = []
    for name in ("synthetic", "real"):
        with (folder / name / "metrics.csv").open() as file:
            lines = list(csv.DictReader(file))
        for size in dict.fromkeys((line["width"], line["height"]) for line in lines):
            chosen = [line for line in lines if (line["width"], line["height"]) == size]
            means = {key: np.mean([float(line[key]) for line in chosen]) for key in ("psnr", "ssim", "seconds")}
            rows.append(
                {
                    **{"option": option, "set": name, "size": "x".join(size), "images": len(chosen)},
                    **{key: f"{mean:.4f}" for key, mean in means.items()},
                }
            )
    return rows


def table_of_options(rows: Sequence[dict[str, object]]) -> str:
    """A line for each option: PSNR, its gain and SSIM of each group of images, and the time against that of none."""
    groups = list(dict.fromkeys((row["set"], row["size"], row["images"]) for row in rows))
    of = {(row["option"], row["set"], row["size"]): row for row in rows}

    def number(option: str, group: tuple, key: str) -> float:
        return float(str(of[option, group[0], group[1]][key]))

    def cell(option: str, group: tuple) -> str:
        psnr, before = number(option, group, "psnr"), number("none", group, "psnr")
        gain = "" if option == "none" else f" ({psnr - before:+.3f})"
        return f"{psnr:.3f}{gain}, {number(option, group, 'ssim'):.4f}"

    headings = [f"{name}, {images} of {size}" for name, size, images in groups]
    last = groups[-1]
    lines = [
        "PSNR in dB (gain), SSIM; seconds an image of the last kind.",
        "",
        f"| option | {' | '.join(headings)} | seconds |",
        f"|---|{'---|' * (len(groups) + 1)}",
    ]
    for option, flags in OPTIONS.items():
        cells = " | ".join(cell(option, group) for group in groups)
        seconds, once = number(option, last, "seconds"), number("none", last, "seconds")
        lines.append(f"| {f'`{flags}`' if flags else 'none'} | {cells} | {seconds:.1f} ({seconds / once:.1f}x) |")
    return "\n".join(lines) + "\n"


STEPS = {
    "synthetic": evaluation(
        "synthetic",
        "Synthetic pairs",
        "Camera shake of 6 to 30 pixels over photographs that were not trained on. With the prior of stage 1, which sees the"
        " sharp image, one learns what a better diffusion could still win.",
    ),
    "real": evaluation("real", "Real pairs", "Four whole frames and six crops of the GoPro data set."),
    "sample": Step(
        "The sample photo",
        "The pair of docs/sample, a crop of a GoPro frame; the pictures of the other pairs may not be shown.",
        ["hidiff evaluate --dataset pairs/sample --beside blurry oracle --output sample"],
        keep("sample", ["sheet.jpg", "table.md"]),
        ["sample/table.md", "sample/sheet.jpg"],
    ),
    "options": Step(
        "Options that may raise quality",
        "On both sets. The frames are several times larger than the patches of training (192 pixels in the end), and local"
        " statistics are meant for such.",
        [
            f"hidiff evaluate --dataset validation/{name} --output options/{option}/{name} {flags}".rstrip()
            for option, flags in OPTIONS.items()
            for name in ("synthetic", "real")
        ],
        finish_options,
        ["options/table.md"],
    ),
    "schedulers": Step(
        "Schedulers, steps, seeds",
        f"{STUDY_PAIRS} synthetic pairs, evenly spaced, and the real crops.",
        ["hidiff compare-schedulers --dataset pairs/study --seeds 0 1 2 --output schedulers"],
        keep("schedulers", ["table.md", "figure.png", "trials.csv"]),
        ["schedulers/figure.png", "schedulers/table.md"],
    ),
    "analysis": Step(
        "A look inside",
        "The chain of the sample photo step by step; where in it each prior token is looked at; what other priors would do to"
        " it (the other image is a GoPro frame, of which only the prior is used).",
        [
            "hidiff analyse chain photo/blurry.png --sharp photo/sharp.png --output analysis/chain.jpg",
            "hidiff analyse attention photo/blurry.png --output analysis/attention.jpg",
            "hidiff analyse sensitivity photo/blurry.png --sharp photo/sharp.png --output analysis/sensitivity.jpg"
            " --other validation/real/blurry/garden_path.png",
        ],
        keep("analysis", ["chain.jpg", "attention.jpg", "sensitivity.jpg"]),
        ["analysis/chain.jpg", "analysis/attention.jpg", "analysis/sensitivity.jpg"],
    ),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with validation/synthetic and validation/real")
    parser.add_argument("--only", nargs="+", choices=tuple(STEPS), default=list(STEPS), help="default: all")
    options = parser.parse_args(arguments)
    for name in ("synthetic", "real"):
        if not (options.data / "validation" / name).is_dir():
            parser.error(f"DATA must hold validation/{name}, got {str(options.data)!r} without.")

    work = ROOT / "runs" / "results" / weights_hash()
    prepare(work, options.data.resolve() / "validation")
    minutes = json.loads((work / "minutes.json").read_text()) if (work / "minutes.json").exists() else {}
    for name in options.only:
        if name not in minutes:
            start = time.perf_counter()
            for command in STEPS[name].commands:
                print(f"\n$ {command}", flush=True)
                if status := subprocess.run(as_process(command), cwd=work, check=False).returncode:
                    print(f"results: stopped, exit status {status}; the same command goes on here.", file=sys.stderr)
                    return status
            minutes[name] = (time.perf_counter() - start) / 60
            write_whole(work / "minutes.json", json.dumps(minutes).encode())
        STEPS[name].finish(work)
    write_pages(minutes)
    return 0


def weights_hash() -> str:
    """Another one for other weights or another scheduler."""
    digest = hashlib.sha256()
    for file in sorted((*HIDIFF_SMALL.rglob("*.safetensors"), *HIDIFF_SMALL.rglob("*config.json"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def prepare(work: Path, validation: Path) -> None:
    """Links in the work folder: what `Step.commands` names, pairs/sample, and pairs/study with pairs of both sets."""
    synthetic = sorted((validation / "synthetic" / "blurry").glob("*.png"))
    evenly = np.linspace(0, len(synthetic) - 1, min(STUDY_PAIRS, len(synthetic))).round().astype(int)
    study = [*(synthetic[i] for i in evenly), *sorted((validation / "real" / "blurry").glob("crop_*.png"))]
    links = {work / "validation": validation, work / "photo": SAMPLE}
    for kind in ("blurry", "sharp"):
        links[work / "pairs" / "sample" / kind / "sample.png"] = SAMPLE / f"{kind}.png"
        for file in study:
            folder = file.parent.parent
            links[work / "pairs" / "study" / kind / f"{folder.name}_{file.name}"] = folder / kind / file.name
    for link, target in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(target)


def as_process(command: str) -> list[str]:
    return [sys.executable, "-m", "diffusers_hidiff", *command.split()[1:]]


def write_pages(minutes: dict[str, float]) -> None:
    """docs/results/README.md, and the tables in the project's README and in the model card."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread(s)"
    lines = [
        "# Results of hidiff-small",
        "",
        f"Made by `make results DATA=…` with hidiff {__version__}, torch {torch.__version__}, {machine}. The",
        "commands that it runs (`scripts/results.py`) stand with each result, and how long they took.",
    ]
    lines += ["", "Speed and memory are measured by other commands: [speed](speed/table.md) by `make bench`,"]
    lines += ["[a training step](training_speed.md) by `benchmarks/training_speed.py`,"]
    lines += ["[large pictures](large_images.md) by `benchmarks/large_images.py`."]
    for name, step in STEPS.items():
        if name not in minutes:
            continue
        lines += ["", f"## {step.title}", "", f"{step.text} Made in {minutes[name]:.1f} minutes by"]
        lines += ["", "```", *step.commands, "```"]
        for file in step.shown:
            is_table = file.endswith(".md")
            lines += ["", (RESULTS / file).read_text().rstrip() if is_table else f"![{step.title}]({file})"]
    write_whole(RESULTS / "README.md", ("\n".join(lines) + "\n").encode())

    for page, name, files in (
        (README, "options", ["options/table.md"]),
        (README, "schedulers", ["schedulers/table.md"]),
        (CARD, "evaluation", ["synthetic/table.md", "real/table.md"]),
    ):
        if all((RESULTS / file).exists() for file in files):
            texts = [(RESULTS / file).read_text() for file in files]
            if name == "schedulers":
                texts = ["\n".join(line for line in texts[0].split("\n| ")[0].splitlines() if line.startswith("* "))]
            put_between(page, name, "\n".join(texts).strip())


def put_between(page: Path, name: str, text: str) -> None:
    """Replaces what stands between <!-- results: NAME --> and <!-- end --> of a page."""
    begin, end = f"<!-- results: {name} -->\n", "<!-- end -->"
    before, found, rest = page.read_text().partition(begin)
    if not found or end not in rest:
        print(f"{os.path.relpath(page)} has no place for the results of {name}.", file=sys.stderr)
        return
    write_whole(page, f"{before}{begin}\n{text}\n\n{end}{rest.partition(end)[2]}".encode())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on here.", file=sys.stderr)
        sys.exit(130)
