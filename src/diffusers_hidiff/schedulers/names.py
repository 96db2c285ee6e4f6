"""Schedulers by the short names that people type."""

from collections.abc import Iterator

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .scheduling_hidiff import HIDiffScheduler

SHORT_NAMES = {
    "hidiff": "HIDiffScheduler",
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "eulerancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmsolver": "DPMSolverMultistepScheduler",
    "dpmsolversinglestep": "DPMSolverSinglestepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2ancestral": "KDPM2AncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
}


def scheduler_class(name: str) -> type[SchedulerMixin] | None:
    """The class that a short name or a class name of diffusers means, if any.

    Args:
        name: In any case; hyphens, underscores and plus signs do not count ("DPM-Solver++").
    """
    wanted = name.lower().translate(str.maketrans("", "", "-_+"))
    if wanted in ("hidiff", "hidiffscheduler"):
        return HIDiffScheduler
    full_name = SHORT_NAMES.get(wanted) or next((n for n in dir(diffusers) if n.lower() == wanted), "")
    kind = getattr(diffusers, full_name, None)
    return kind if isinstance(kind, type) and issubclass(kind, SchedulerMixin) else None


def named_classes() -> Iterator[tuple[str, type[SchedulerMixin]]]:
    """Every short name with its class."""
    for name in SHORT_NAMES:
        if (kind := scheduler_class(name)) is not None:
            yield name, kind
