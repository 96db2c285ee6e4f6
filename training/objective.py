"""A stage of training as one module: what is prepared for several processes, averaged, validated and saved."""

from abc import ABC, abstractmethod
from pathlib import Path

from torch import Tensor, nn


class Objective(nn.Module, ABC):
    """The networks of a stage and what they are taught.

    One module rather than several, because DDP reduces the gradients of one forward pass (a denoiser that runs T times
    would be T), and FSDP and DeepSpeed take one. What must not learn does not require a gradient.

    `forward` takes the two images, [B, 3, H, W], RGB in [0, 1], and what else the stage needs, and returns the loss and
    what it is the sum of, by name.
    """

    @abstractmethod
    def restore(self, blurry: Tensor, sharp: Tensor) -> Tensor:
        """The restored image as validation judges it.

        Args:
            blurry: [1, 3, H, W], RGB in [0, 1], of any size.
            sharp: The same; only for a stage that cannot do without.
        Returns:
            [1, 3, H, W].
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the networks as others load them."""
