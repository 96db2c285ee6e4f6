"""Time and memory of one case, and the rate of matrix products that bounds them, each in a fresh process."""

import functools
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cases import DTYPES, Case, build, pipeline_of

from diffusers_hidiff.cli import first_line
from diffusers_hidiff.cli.facts import cost
from diffusers_hidiff.export import export_pipeline

SHAPES = ((4096, 1024, 1024), (16384, 384, 1024), (65536, 96, 256))  # rows, inner and outer width of matrix products
MAX_PASSES_SECONDS = 60.0  # no further pass is begun after so long
COMPARED_PIXELS = 512 * 512  # of larger pictures the difference is not computed


def show(table: str, output: Path | None) -> None:
    """Prints a table and, if asked to, writes it to a file as well."""
    print(table)
    if output is not None:
        output.write_text(table + "\n")


def peak_megabytes() -> float:
    """The largest memory that this process ever occupied, or since `forget_peak`."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 if platform.system() == "Linux" else 1024**2)  # kilobytes there, bytes on macOS


def forget_peak() -> None:
    """Begins the peak anew where the system can: what compiling or loading took does not count."""
    if platform.system() == "Linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not in every container
            return


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


@torch.no_grad()
def measure(
    case: Case, repeats: int, graph_file: Path | None = None, official_spec: str | None = None
) -> dict[str, Any]:
    """Seconds and megabytes of `case`, in a process that did nothing else."""
    run = build(case, graph_file, official_spec)
    if case.variant == "compiled":
        small = Case(case.network, case.variant, 64, 96, case.dtype, case.device, case.threads)
        run(*small.inputs())  # compiles
    blurry, noise = case.inputs()
    on_cpu = case.device == "cpu"
    if on_cpu:
        forget_peak()
        before = peak_megabytes()
    else:
        torch.cuda.reset_peak_memory_stats(case.device)
        before = torch.cuda.memory_allocated(case.device) / 2**20
    restored = run(blurry, noise)  # the first pass tells the memory and warms up
    peak = peak_megabytes() if on_cpu else torch.cuda.max_memory_allocated(case.device) / 2**20

    seconds: list[float] = []
    while len(seconds) < repeats and (not seconds or sum(seconds) < MAX_PASSES_SECONDS):
        synchronize(case.device)
        start = time.perf_counter()
        run(blurry, noise)
        synchronize(case.device)
        seconds.append(time.perf_counter() - start)
    figures = {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "passes": len(seconds),
        "before_mb": before,
        "added_mb": peak - before,
    }
    if case.height * case.width <= COMPARED_PIXELS:
        reference = Case(case.network, "ours", case.height, case.width, "float32", case.device, case.threads)
        error = restored.float() - build(reference)(blurry, noise)
        figures["difference"] = error.abs().max().item()
        figures["psnr"] = -10 * error.double().square().mean().clamp(min=1e-20).log10().item()
    return figures


@torch.no_grad()
def gemm_rate(dtype: str, device: str) -> float:
    """Multiply-adds per second in 10⁹: the best of matrix products and 1x1 convolutions of several shapes."""

    def rate(product: Callable[[], object], multiply_adds: int) -> float:
        best = float("inf")
        for _ in range(6):
            synchronize(device)
            start = time.perf_counter()
            product()
            synchronize(device)
            best = min(best, time.perf_counter() - start)
        return multiply_adds / best / 1e9

    rates = []
    for rows, inner, outer in SHAPES:
        left = torch.randn(rows, inner, dtype=DTYPES[dtype], device=device)
        right = torch.randn(outer, inner, dtype=DTYPES[dtype], device=device)
        image = left.view(1, -1, 64, inner).permute(0, 3, 1, 2)  # channels last
        kernel = right[:, :, None, None]
        for product in (functools.partial(F.linear, left, right), functools.partial(F.conv2d, image, kernel)):
            rates.append(rate(product, rows * inner * outer))
    return max(rates)


def gmacs(network: str, height: int, width: int) -> float:
    """Multiply-adds of one image, in 10⁹, as `hidiff info` counts them."""
    return cost(pipeline_of(network), width, height)["gmacs"]["total"]


def export_onnx(case: Case, graph_file: Path) -> None:
    export_pipeline(pipeline_of(case.network), graph_file, "onnx", (case.height, case.width))


def limit_memory() -> None:
    """Lets this process have four fifths of the machine's memory: it fails then, rather than the machine."""
    if platform.system() == "Linux":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        resource.setrlimit(resource.RLIMIT_DATA, (memory * 4 // 5, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _answer(connection: Connection, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        limit_memory()
        torch.set_num_threads(threads)
        connection.send((function(*arguments), None))
    except Exception as error:  # of any library
        connection.send((None, f"{type(error).__name__}: {first_line(error)}"))


def in_child(function: Callable[..., Any], *arguments: Any, threads: int, limit: float) -> tuple[Any, str | None]:
    """What `function` returns in a fresh process, or None and why it did not.

    Args:
        function: At the top of a module.
        arguments: Its arguments.
        threads: For PyTorch.
        limit: Seconds after which it is stopped.
    """
    context = multiprocessing.get_context("forkserver")  # has the libraries loaded, but has computed nothing
    context.set_forkserver_preload(["measure"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, threads, function, arguments), daemon=False)
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit):
            return None, f"longer than {limit:g} s"
        answer = ours.recv()
        process.join(10)  # so that it cleans up after itself
        return answer
    except EOFError:
        process.join()
        return None, f"the process ended with status {process.exitcode}, probably for want of memory"
    finally:
        process.kill()
        process.join()
