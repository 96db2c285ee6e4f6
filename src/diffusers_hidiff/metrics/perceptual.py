"""LPIPS, DISTS, NIQE and whatever else `pyiqa` has, where it is installed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class PerceptualMetrics:
    """Metrics of the library `pyiqa`, by the names it has for them.

    Args:
        names: Such as "lpips", "dists", "niqe"; metrics with and without a reference.
        device: Where they run.
    Raises:
        ImportError: `pyiqa` is not installed, or does not fit what is.
        ValueError: It has no metric of that name, or cannot make it.
    """

    def __init__(self, names: Sequence[str], device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.metrics: dict[str, Any] = {name: self._make(name) for name in names}

    def _make(self, name: str) -> Any:
        try:
            import pyiqa  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise ImportError(
                f"The metric {name!r} needs {error.name}; install it with `pip install 'diffusers-hidiff[iqa]'`."
            ) from error
        except Exception as error:  # a torchvision that was built for another torch raises a RuntimeError
            raise ImportError(f"The metric {name!r} needs pyiqa, which cannot be imported: {error}") from error
        if name not in pyiqa.list_models():
            raise ValueError(f"pyiqa has no metric {name!r}; `pyiqa.list_models()` names those it has.")
        try:
            return pyiqa.create_metric(name, device=self.device)
        except Exception as error:  # of the network that it fetches weights from, say
            raise ValueError(f"pyiqa cannot make the metric {name!r}: {error}") from error

    @torch.no_grad()
    def score(self, restored: np.ndarray, sharp: np.ndarray) -> dict[str, float]:
        """Name -> value for one image, uint8 [H, W, 3]; `sharp` is seen only by metrics that compare."""
        restored_pixels, sharp_pixels = self._pixels(restored), self._pixels(sharp)
        values = {}
        for name, metric in self.metrics.items():
            compares = metric.metric_mode == "FR"
            value = metric(restored_pixels, sharp_pixels) if compares else metric(restored_pixels)
            values[name] = float(value)
        return values

    def _pixels(self, image: np.ndarray) -> Tensor:
        """As [1, 3, H, W] in [0, 1]."""
        return torch.tensor(image, device=self.device).permute(2, 0, 1)[None].float() / 255
