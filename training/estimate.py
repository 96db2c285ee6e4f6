"""What a run will do, in print, before it does it: options, data, sizes, phases, memory, time."""

import resource
import sys
from dataclasses import asdict

import torch
import yaml

from config import TrainingConfig
from data import Phase
from objective import Objective
from validation import Validation


def describe_run(
    config: TrainingConfig, objective: Objective, phases: list[Phase], data: str, validation: Validation | None
) -> str:
    """Options, data found, parameters and phases, as text."""
    lines = ["Options:"] + [
        "  " + line for line in yaml.safe_dump(asdict(config), sort_keys=False, default_flow_style=None).splitlines()
    ]
    pairs = "none" if validation is None else f"{len(validation.pairs)} pairs in {config.validation_dir}"
    lines += [f"Data: {data}", f"Validation: {pairs}", "Parameters:"]
    for name, network in objective.named_children():
        learns = any(parameter.requires_grad for parameter in network.parameters())
        number = sum(parameter.numel() for parameter in network.parameters())
        lines.append(f"  {name}: {number / 1e6:.2f} M{'' if learns else ', frozen'}")
    lines.append("Phases:")
    accumulated = config.gradient_accumulation_steps
    for number, phase in enumerate(phases, start=1):
        lines.append(
            f"  {number}: {phase.num_steps} steps, {phase.resolution}x{phase.resolution} pixels,"
            f" global batch {phase.global_batch_size} = {phase.batch_size} per process"
            f" x {phase.batches_per_step // accumulated} processes x {accumulated} accumulated"
        )
    return "\n".join(lines)


def peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on a GPU since the last call, or of this whole process so far."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Estimate:
    """Memory and time of a run, from a few timed steps per phase. Validation and checkpoints come on top.

    Args:
        device: Where it trains.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rows: list[tuple[Phase, float, int]] = []

    def add(self, phase: Phase, seconds: float) -> None:
        """Notes how long a step of `phase` took, and the memory so far."""
        self.rows.append((phase, seconds, peak_memory(self.device)))

    def __str__(self) -> str:
        lines = ["Estimate from the fastest of up to three steps per phase:"]
        for number, (phase, seconds, memory) in enumerate(self.rows, start=1):
            lines.append(
                f"  {number}: {seconds:.3g} s/step, {seconds * phase.num_steps / 3600:.3g} h, {memory / 2**30:.2f} GiB"
            )
        total = sum(seconds * phase.num_steps for phase, seconds, _ in self.rows)
        memory = max(memory for _, _, memory in self.rows)
        return "\n".join([*lines, f"  in all: {total / 3600:.3g} h, at most {memory / 2**30:.2f} GiB per process"])
