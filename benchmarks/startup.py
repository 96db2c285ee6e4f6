"""What importing the package adds to importing diffusers, and how long `hidiff --help` takes.

    python benchmarks/startup.py [--repeats 5] [--output table.md]

Each figure is the best of so many fresh processes: wall-clock seconds, and seconds of processor time, which other programs
on the machine disturb less.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

from measure import show

# What we need of diffusers: the modules whose classes ours are made of.
DIFFUSERS = "diffusers.pipelines.pipeline_utils, diffusers.schedulers.scheduling_ddpm"
IMPORT = f"""
import time
import {DIFFUSERS}
wall, processor = time.perf_counter(), time.process_time()
from diffusers_hidiff import HIDiffPipeline
print(time.perf_counter() - wall, time.process_time() - processor)
"""
COMMAND = "import sys; from diffusers_hidiff.cli.main import main; sys.exit(main())"  # as the installed `hidiff` does


def import_time() -> tuple[float, float]:
    """Wall-clock and processor seconds that our import takes in a process that has imported diffusers."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    wall, processor = map(float, done.stdout.split())
    return wall, processor


def command_time(*arguments: str) -> tuple[float, float]:
    """Wall-clock and processor seconds of one `hidiff`, the interpreter's start included."""
    wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", COMMAND, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - wall, processor


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="file to write the table to as well")
    options = parser.parse_args(arguments)

    measures = {
        "importing diffusers_hidiff, beyond diffusers itself": import_time,
        "hidiff --help": lambda: command_time("--help"),
        "hidiff deblur --help": lambda: command_time("deblur", "--help"),
    }
    lines = ["| what | wall clock, s | processor, s |", "|---|---|---|"]
    for what, measure in measures.items():
        walls, processors = zip(*(measure() for _ in range(options.repeats)), strict=True)
        lines.append(f"| {what} | {min(walls):.3f} | {min(processors):.3f} |")
    show("\n".join(lines), options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
