"""`hidiff info`: what a model is made of, what it costs, and where it would run."""

import argparse
import json
import re
from typing import Any

from .. import HIDIFF_SMALL, __version__
from ..utils.versions import versions

LIBRARIES = ("torch", "diffusers", "transformers")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "info",
        description="Tells a model's components, size and cost, the versions of the libraries, and the devices.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or Hub id (default: the bundled checkpoint)")
    parser.add_argument("--size", type=image_size, default=(1280, 720), metavar="WxH", help="default: 1280x720")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints what `options` ask for; returns the exit status."""
    from .facts import components, cost, devices, scheduler_values  # noqa: PLC0415 - after the options are known to be right
    from .pipeline import load_pipeline  # noqa: PLC0415

    pipeline = load_pipeline(options.model)
    facts = {
        "model": str(HIDIFF_SMALL) if options.model is None else options.model,
        "components": components(pipeline),
        "scheduler": scheduler_values(pipeline),
        "cost": cost(pipeline, *options.size),
        "versions": {**versions(LIBRARIES), "diffusers_hidiff": __version__},
        "devices": devices(),
    }
    print(json.dumps(facts, indent=2) if options.format == "json" else as_text(facts))
    return 0


def image_size(text: str) -> tuple[int, int]:
    """ "1280x720" as (1280, 720): width, height."""
    match = re.fullmatch(r"(\d+)[x×](\d+)", text)
    if match is None or not int(match[1]) or not int(match[2]):
        raise argparse.ArgumentTypeError(f"must be width x height such as 1280x720, got {text!r}")
    return int(match[1]), int(match[2])


def as_text(facts: dict[str, Any]) -> str:
    """The same for reading."""
    cost, scheduler = facts["cost"], facts["scheduler"]
    size, padded = ("x".join(map(str, cost[name])) for name in ("size", "padded_size"))
    rows = [
        (name, part["class"], f"{part['parameters']:,}", f"{cost['gmacs'][name]:,.3f}")
        for name, part in facts["components"].items()
    ]
    total = sum(part["parameters"] for part in facts["components"].values())
    rows = [("component", "class", "parameters", "GMACs"), *rows]
    rows.append(("total", "", f"{total:,}", f"{cost['gmacs']['total']:,.3f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    table = [
        f"  {name:<{widths[0]}}  {kind:<{widths[1]}}  {parameters:>{widths[2]}}  {gmacs:>{widths[3]}}"
        for name, kind, parameters, gmacs in rows
    ]
    betas = " ".join(f"{beta:g}" for beta in scheduler["betas"])
    values = [f"  {name}: {value}" for name, value in scheduler.items() if name != "betas"]
    memory = [
        f"  {device['device']}: {device['name']}"
        + (f", {device['memory_gib']} GiB" if device["memory_gib"] is not None else "")
        for device in facts["devices"]
    ]
    return "\n".join(
        [
            f"Model {facts['model']}",
            f"GMACs for one image of {size}, padded to {padded}, in {cost['steps']} steps",
            *table,
            "Scheduler",
            *values,
            f"  betas: {betas}",
            "Versions",
            *(f"  {library}: {number}" for library, number in facts["versions"].items()),
            "Devices",
            *memory,
        ]
    )
