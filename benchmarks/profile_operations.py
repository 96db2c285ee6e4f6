"""Where the time of one pass goes, by kind of operation, as torch.profiler sees it.

    python benchmarks/profile_operations.py [--output docs/results/profile.md] [--cases full:256x256 small:2160x3840 …]

The pipeline is the default one, eager; the pass before the profiled one warms up.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from cases import DTYPES, NETWORKS, Case, build
from speed import parse_size, write_whole
from torch.profiler import ProfilerActivity, profile

KINDS = {  # by parts of the operators' names; convolutions are told apart by their weights
    "norms": ("layer_norm",),
    "attention's and prior's products, softmax": ("mm", "matmul", "einsum", "softmax"),
    "activations": ("gelu", "leaky_relu", "clamp"),
    "sums and products": ("add", "mul", "div", "sub", "sum", "square", "pow", "sqrt"),
    "copies": ("copy", "clone", "cat", "contiguous", "pad", "shuffle", "to", "empty", "zeros"),
}
CONVOLUTIONS = ("1x1 products", "depthwise convolutions", "3x3 convolutions")
DEFAULT = ("full:256x256", "full:720x1280", "small:256x256", "small:720x1280", "small:2160x3840")


def kind_of(name: str, shapes: Sequence[Sequence[int]]) -> str:
    """The kind of an operator.

    Args:
        name: Such as "aten::mkldnn_convolution".
        shapes: Of its inputs.
    """
    name = name.removeprefix("aten::")
    if "conv" in name and len(shapes) > 1 and len(shapes[1]) == 4:
        out_channels, in_channels, height, _ = shapes[1]
        if height == 1:
            return CONVOLUTIONS[0]
        return CONVOLUTIONS[1 if in_channels == 1 < out_channels else 2]
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "rest")


@torch.no_grad()
def milliseconds(case: Case) -> Counter[str]:
    """What each kind of operation takes in one pass."""
    run, inputs = build(case), case.inputs()
    run(*inputs)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if case.device != "cpu" else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        run(*inputs)
    spent: Counter[str] = Counter()
    for event in profiler.key_averages(group_by_input_shape=True):
        time = event.self_cpu_time_total if case.device == "cpu" else event.self_device_time_total
        spent[kind_of(event.key, event.input_shapes)] += time / 1000
    return spent


def table(spent: dict[str, Counter[str]], heading: str) -> str:
    kinds = [*CONVOLUTIONS, *KINDS, "rest"]
    lines = [
        heading,
        "",
        f"| milliseconds | {' | '.join(spent)} |",
        "|---" * (1 + len(spent)) + "|",
    ]
    for kind in kinds:
        cells = [f"{of[kind]:.1f} ({of[kind] / of.total():.0%})" for of in spent.values()]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    lines.append(f"| total | {' | '.join(f'{of.total():.1f}' for of in spent.values())} |")
    return "\n".join(lines) + "\n"


def parse_case(text: str) -> tuple[str, tuple[int, int]]:
    network, _, size = text.partition(":")
    if network not in NETWORKS:
        raise argparse.ArgumentTypeError(f"must be NETWORK:HxW with a network of {list(NETWORKS)}, got {text!r}")
    return network, parse_size(size)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results/profile.md"), help="file for the table")
    parser.add_argument(
        "--cases", nargs="+", type=parse_case, default=[*map(parse_case, DEFAULT)], metavar="NETWORK:HxW"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (untried)")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    spent = {}
    for network, (height, width) in options.cases:
        case = Case(network, "ours", height, width, options.dtype, options.device, threads)
        spent[f"{network}, {case.size}"] = milliseconds(case)
        print(f"{network}, {case.size}: {spent[f'{network}, {case.size}'].total():.0f} ms", flush=True)
    heading = f"{options.dtype}, {options.device}, {threads} thread(s), torch {torch.__version__}; profiling included."
    text = table(spent, heading)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.output, text)
    print("\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
