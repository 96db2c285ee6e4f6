"""HI-Diff (arXiv:2305.12966) for diffusers: sharp photographs from blurry ones.

The classes, and with them torch and diffusers, are imported when the first of them is asked for: they take seconds, which
`hidiff --help` and a misspelt option should not. Where diffusers is loaded already they come at once, for it may look for
them here.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

HIDIFF_SMALL = Path(__file__).parent / "weights" / "hidiff-small"
"""The bundled checkpoint, for `HIDiffPipeline.from_pretrained`."""

__all__ = [
    "HIDIFF_SMALL",
    "HIDiffLatentEncoder",
    "HIDiffMLPDenoiser",
    "HIDiffMixerDenoiser",
    "HIDiffPipeline",
    "HIDiffPipelineOutput",
    "HIDiffScheduler",
    "HIDiffTransformer",
    "ModelMixin",
    "SchedulerMixin",
    "__version__",
]

if TYPE_CHECKING or "diffusers" in sys.modules:
    from ._classes import (
        HIDiffLatentEncoder,
        HIDiffMixerDenoiser,
        HIDiffMLPDenoiser,
        HIDiffPipeline,
        HIDiffPipelineOutput,
        HIDiffScheduler,
        HIDiffTransformer,
        ModelMixin,
        SchedulerMixin,
    )
else:

    def __getattr__(name: str) -> Any:
        """What is not here yet (PEP 562)."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import _classes  # noqa: PLC0415

        return globals().setdefault(name, getattr(_classes, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
