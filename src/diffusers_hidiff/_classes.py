"""The classes that the package shows, and diffusers' base classes, which it looks for beside them when it loads one."""

from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .models.denoiser import HIDiffMixerDenoiser, HIDiffMLPDenoiser
from .models.latent_encoder import HIDiffLatentEncoder
from .models.transformer_hidiff import HIDiffTransformer
from .pipelines.pipeline_hidiff import HIDiffPipeline, HIDiffPipelineOutput
from .schedulers.scheduling_hidiff import HIDiffScheduler

__all__ = [
    "HIDiffLatentEncoder",
    "HIDiffMLPDenoiser",
    "HIDiffMixerDenoiser",
    "HIDiffPipeline",
    "HIDiffPipelineOutput",
    "HIDiffScheduler",
    "HIDiffTransformer",
    "ModelMixin",
    "SchedulerMixin",
]
