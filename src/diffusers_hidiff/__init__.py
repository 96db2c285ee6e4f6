"""HI-Diff (arXiv:2305.12966) for diffusers: sharp photographs from blurry ones."""

from pathlib import Path

# A saved pipeline names its classes as ["diffusers_hidiff", "Class"] once the package is known here, and they load, from
# a folder or from the Hub, where diffusers finds its base classes beside them.
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .models.denoiser import HIDiffMixerDenoiser, HIDiffMLPDenoiser
from .models.latent_encoder import HIDiffLatentEncoder
from .models.transformer_hidiff import HIDiffTransformer
from .pipelines.pipeline_hidiff import HIDiffPipeline, HIDiffPipelineOutput
from .schedulers.scheduling_hidiff import HIDiffScheduler

LOADABLE_CLASSES.setdefault("diffusers_hidiff", {})

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
