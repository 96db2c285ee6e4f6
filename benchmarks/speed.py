"""Time and memory of the whole pipeline, run in several ways, beside the floor that matrix products set: `make bench`.

    python benchmarks/speed.py [--output docs/results/speed] [--networks full small] [--variants literal ours …]
        [--sizes 256x256 …] [--dtypes float32 bfloat16] [--quick]

Each case is a process of its own. A row is written as soon as it is known, and a case that has one is not run again
(--again does), so a stopped run goes on. A case that takes longer than --time_limit is skipped and says so.
"""

import argparse
import csv
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cases import DTYPES, NETWORKS, VARIANTS, Case
from measure import export_onnx, gemm_rate, gmacs, in_child, measure

Row = dict[str, Any]
KEY = ("network", "variant", "size", "dtype", "device", "threads")
FIGURES = ("seconds", "fastest", "slowest", "passes", "before_mb", "added_mb", "difference", "psnr", "gmacs", "skipped")
SIZES = {
    "full": ((256, 256), (512, 512), (720, 1280)),
    "small": ((256, 256), (512, 512), (720, 1280), (2160, 3840)),
}
QUICK_SIZES, QUICK_VARIANTS = ((32, 32), (64, 64)), ("literal", "ours")


def parse_size(text: str) -> tuple[int, int]:
    """ "720x1280" as (720, 1280): height, width."""
    try:
        height, width = (int(side) for side in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be height x width such as 720x1280, got {text!r}") from None
    if height < 8 or width < 8 or height % 8 or width % 8:
        raise argparse.ArgumentTypeError(f"height and width must be multiples of 8, got {text}")
    return height, width


def parse_official(text: str) -> str:
    if text.count(":") != 2 or not Path(text.split(":", maxsplit=1)[0]).is_dir():
        raise argparse.ArgumentTypeError(f"must be DIR:MODULE:FUNCTION with an existing folder, got {text!r}")
    return text


def wanted(options: argparse.Namespace) -> list[Case]:
    """The cases that were asked for, the cheap ones first."""
    variants = [*options.variants, *(["official"] if options.official else [])]
    cases = [
        Case(network, variant, height, width, dtype, options.device, options.threads)
        for network in options.networks
        for dtype in options.dtypes
        for height, width in options.sizes or SIZES[network]
        for variant in variants
        if not (variant == "onnx" and (dtype != "float32" or options.device != "cpu"))  # what the export is for
        and not (variant == "official" and network != "full")
    ]
    return sorted(cases, key=lambda case: case.height * case.width)


def key_of(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def row_of(case: Case) -> Row:
    return {name: getattr(case, name) for name in KEY}


def read_rows(file: Path) -> dict[tuple[str, ...], Row]:
    """What is known already, by case; figures are numbers or None."""
    if not file.is_file():
        return {}
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        for name in FIGURES[:-1]:
            row[name] = float(row[name]) if row[name] else None  # type: ignore[assignment]
    return {key_of(row): row for row in rows}


def write_whole(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, file)


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    with partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*KEY, *FIGURES])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, file)


def run_case(case: Case, options: argparse.Namespace) -> Row:
    """The row of one case: its figures, or why it has none."""
    limits = {"threads": case.threads, "limit": options.time_limit}
    row: Row = {**row_of(case), **dict.fromkeys(FIGURES)}
    with tempfile.TemporaryDirectory() as folder:
        graph_file = Path(folder) / "graph.onnx"
        skipped = None
        if case.variant == "onnx":
            _, skipped = in_child(export_onnx, case, graph_file, **limits)
        if skipped is None:
            figures, skipped = in_child(measure, case, options.repeats, graph_file, options.official, **limits)
            row |= figures or {}
    row["skipped"] = skipped
    return row


def machine_facts(file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Where the figures come from and the rate of matrix products, measured now unless `file` has them."""
    facts = json.loads(file.read_text()) if file.is_file() and not options.again else {}
    facts |= {"torch": torch.__version__, "processor": processor()}
    rates = facts.setdefault("gmacs_per_second", {})
    for dtype in options.dtypes:
        name = f"{options.device}, {options.threads} thread(s), {dtype}"
        if name not in rates:
            rates[name], failed = in_child(
                gemm_rate, dtype, options.device, threads=options.threads, limit=options.time_limit
            )
            print(f"matrix products, {name}: {failed or f'{rates[name]:.0f} GMAC/s'}", flush=True)
    write_whole(file, json.dumps(facts, indent=2) + "\n")
    return facts


def processor() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def floor_of(row: Row, facts: dict[str, Any]) -> float | None:
    """The seconds that the multiply-adds of a row would take at the rate of matrix products."""
    rate = facts["gmacs_per_second"].get(f"{row['device']}, {row['threads']} thread(s), {row['dtype']}")
    return row["gmacs"] / rate if rate and row["gmacs"] else None


def megapixels(row: Row) -> float:
    height, width = map(int, row["size"].split("x"))
    return height * width / 1e6


def table(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """Markdown: a table for each network, precision, device and number of threads."""
    lines = [
        f"{facts['processor']}, torch {facts['torch']}. Seconds for one image through the whole pipeline: median (fastest to"
        " slowest). MB: what the first pass adds to the peak resident memory of a process that holds the weights.",
        "Floor: the multiply-adds of `ours` (`hidiff info`) at the machine's best rate of matrix products in this precision."
        " MP: 10⁶ pixels; a column of equal numbers is linear growth. PSNR: against `ours` in float32, up to 512x512."
        " bfloat16: the transformer alone.",
        "",
        *(f"* {name}: {VARIANTS[name]}" for name in dict.fromkeys(row["variant"] for row in rows)),
    ]
    by_key = {key_of(row): row for row in rows}
    groups = dict.fromkeys((row["network"], row["dtype"], row["device"], str(row["threads"])) for row in rows)
    for network, dtype, device, threads in groups:
        rate = facts["gmacs_per_second"].get(f"{device}, {threads} thread(s), {dtype}")
        floor = f"; matrix products: {rate:.0f} GMAC/s" if rate else ""
        lines += [
            *("", f"### {network} ({NETWORKS[network]}), {dtype}, {device}, {threads} thread(s){floor}", ""),
            "| size | variant | seconds | literal ÷ this | ÷ floor | s per MP | MB | MB per MP | PSNR, dB |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        chosen = [
            row
            for row in rows
            if (row["network"], row["dtype"], row["device"], str(row["threads"])) == (network, dtype, device, threads)
        ]
        order = list(VARIANTS)
        for row in sorted(chosen, key=lambda row: (megapixels(row), order.index(row["variant"]))):
            if row["skipped"]:
                lines.append(f"| {row['size']} | {row['variant']} | skipped: {row['skipped']} | | | | | | |")
                continue
            literal = by_key.get(key_of({**row, "variant": "literal"}), {}).get("seconds")
            floor_seconds = floor_of(row, facts)
            cells = [
                row["size"],
                row["variant"],
                f"{row['seconds']:.3f} ({row['fastest']:.3f} to {row['slowest']:.3f})",
                f"{literal / row['seconds']:.2f}" if literal else "",
                f"{row['seconds'] / floor_seconds:.2f}" if floor_seconds else "",
                f"{row['seconds'] / megapixels(row):.2f}",
                f"{row['added_mb']:.0f}",
                f"{row['added_mb'] / megapixels(row):.0f}",
                "" if row["psnr"] is None else f"{row['psnr']:.1f}" if row["difference"] else "identical",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], facts: dict[str, Any], file: Path) -> None:
    """Seconds and megabytes against pixels, float32, a row of panels for each network."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    rows = sorted((row for row in rows if row["dtype"] == "float32" and not row["skipped"]), key=megapixels)
    networks = [name for name in NETWORKS if any(row["network"] == name for row in rows)]
    if not networks:
        return
    figure, panels = plt.subplots(
        len(networks), 2, figsize=(9, 3.6 * len(networks)), squeeze=False, layout="constrained"
    )
    for network, (time_panel, memory_panel) in zip(networks, panels, strict=True):
        of_network = [row for row in rows if row["network"] == network]
        for variant in [name for name in VARIANTS if any(row["variant"] == name for row in of_network)]:
            line = [row for row in of_network if row["variant"] == variant]
            width = 2.5 if variant == "ours" else 1.2
            x = [megapixels(row) for row in line]
            time_panel.plot(x, [row["seconds"] for row in line], "o-", lw=width, ms=4, label=variant)
            memory_panel.plot(x, [max(row["added_mb"], 1) for row in line], "o-", lw=width, ms=4, label=variant)
        floors = {megapixels(row): floor_of(row, facts) for row in of_network if floor_of(row, facts)}
        time_panel.plot(list(floors), list(floors.values()), "k--", lw=1, label="floor")
        for panel, name in ((time_panel, "seconds"), (memory_panel, "MB added")):
            panel.set(xscale="log", yscale="log", title=f"{network}, float32", xlabel="megapixels", ylabel=name)
            panel.grid(alpha=0.3, which="both")
        time_panel.legend(fontsize=9)
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
    os.replace(partial, file)


def add_costs(rows: Sequence[Row], threads: int) -> None:
    """Fills in the multiply-adds of each row."""
    counted: dict[tuple[str, str], float | None] = {}
    for row in rows:
        place = row["network"], row["size"]
        if place not in counted:
            known = [other["gmacs"] for other in rows if (other["network"], other["size"]) == place and other["gmacs"]]
            height, width = map(int, row["size"].split("x"))
            counted[place] = (
                known[0] if known else in_child(gmacs, row["network"], height, width, threads=threads, limit=300)[0]
            )
        row["gmacs"] = counted[place]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results/speed"), help="folder of the results")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--variants", nargs="+", choices=[v for v in VARIANTS if v != "official"])
    parser.add_argument(
        "--sizes", nargs="+", type=parse_size, metavar="HxW", help="default: up to 720p, small up to 4K"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", default="cpu", help="cpu or cuda (untried)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help=f"default: {torch.get_num_threads()}"
    )
    parser.add_argument("--repeats", type=int, default=5, help="passes after the first, at most; default: 5")
    parser.add_argument("--time_limit", type=float, default=900, help="seconds for a case; default: 900")
    parser.add_argument(
        "--official", type=parse_official, metavar="DIR:MODULE:FUNCTION", help="the authors' network, too"
    )
    parser.add_argument("--again", action="store_true", help="run cases again that have a row")
    parser.add_argument("--quick", action="store_true", help="hidiff-small at two tiny sizes, in a minute")
    options = parser.parse_args(arguments)
    if options.quick:
        options.networks, options.sizes, options.dtypes = ["small"], QUICK_SIZES, ["float32"]
    if options.variants is None:
        options.variants = [v for v in (QUICK_VARIANTS if options.quick else VARIANTS) if v != "official"]

    options.output.mkdir(parents=True, exist_ok=True)
    rows = read_rows(options.output / "speed.csv")
    facts = machine_facts(options.output / "machine.json", options)
    cases = wanted(options)
    for number, case in enumerate(cases, start=1):
        if key_of(row_of(case)) in rows and not options.again:
            continue
        row = rows[key_of(row_of(case))] = run_case(case, options)
        add_costs(list(rows.values()), options.threads)
        write_rows(options.output / "speed.csv", list(rows.values()))
        result = f"skipped: {row['skipped']}" if row["skipped"] else f"{row['seconds']:.3f} s, {row['added_mb']:.0f} MB"
        print(f"[{number}/{len(cases)}] {' '.join(key_of(row)[:4])}: {result}", flush=True)

    text = table(list(rows.values()), facts)
    write_whole(options.output / "table.md", text)
    plot(list(rows.values()), facts, options.output / "plot.png")
    print("\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
