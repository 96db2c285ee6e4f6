from dataclasses import dataclass

from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class HIDiffModelOutput(BaseOutput):
    """What each of the four networks returns.

    Args:
        sample: Prior tokens [B, N, D] from an encoder or a denoiser, the restored image [B, 3, H, W] from the transformer.
    """

    sample: Tensor
