"""Noisy prior, condition, timestep -> prediction. One class per published family.

B batch · N prior tokens · D prior width
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .layers import TokenMixer
from .outputs import HIDiffModelOutput


def time_column(timestep: Tensor | float | int, sample: Tensor) -> Tensor:
    """`timestep`, one number or one per image, as [B, N, 1] in the dtype of `sample` [B, N, D]."""
    time = torch.as_tensor(timestep, device=sample.device, dtype=sample.dtype)
    return time.reshape(-1, 1, 1).expand(*sample.shape[:2], 1)


class HIDiffMixerDenoiser(ModelMixin, ConfigMixin):
    """The denoiser of the GoPro release: MLP-Mixer blocks on the tokens of prior, time and condition.

    Args:
        prior_dim: Width D of a prior token.
        num_prior_tokens: Number N of prior tokens.
        num_blocks: Mixer blocks, of width 2·D.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TokenMixer"]
    _repeated_blocks = ["TokenMixer"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(self, prior_dim: int = 256, num_prior_tokens: int = 16, num_blocks: int = 2) -> None:
        super().__init__()
        self.time_scale = nn.Parameter(torch.full((1,), 1e-3))
        self.proj_in = nn.Linear(3 * prior_dim, 2 * prior_dim)
        self.blocks = nn.ModuleList(
            TokenMixer(num_prior_tokens, 2 * prior_dim, channel_expansion=2) for _ in range(num_blocks)
        )
        self.proj_out = nn.Linear(2 * prior_dim, prior_dim)
        self.gradient_checkpointing = False

    def forward(
        self, sample: Tensor, timestep: Tensor | float | int, condition: Tensor, return_dict: bool = True
    ) -> HIDiffModelOutput | tuple[Tensor]:
        """Predicts the noise in `sample` (or the clean prior, as the scheduler's `prediction_type` says).

        Args:
            sample: Noisy prior, [B, N, D].
            timestep: Index of the step, 0 … T-1, one number or [B]. The network sees 1 … T.
            condition: What the condition encoder says of the blurry image, [B, N, D].
            return_dict: Whether to return a `HIDiffModelOutput` or a tuple.
        Returns:
            [B, N, D].
        """
        time = ((time_column(timestep, sample) + 1) * self.time_scale).expand_as(sample)
        hidden_states = F.leaky_relu(self.proj_in(torch.cat((sample, time, condition), dim=-1)), 0.2)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
            hidden_states = F.gelu(hidden_states)
        prediction = F.gelu(self.proj_out(hidden_states))

        if not return_dict:
            return (prediction,)
        return HIDiffModelOutput(sample=prediction)


class HIDiffMLPDenoiser(ModelMixin, ConfigMixin):
    """The denoiser of the RealBlur releases: a plain MLP on each token.

    Args:
        prior_dim: Width D of a prior token.
        num_layers: Linear layers after the first.
        time_divisor: What the timestep is divided by. The release divides by 50 although T is 16.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: list[str] = []
    _repeated_blocks: list[str] = []

    @register_to_config
    def __init__(self, prior_dim: int = 256, num_layers: int = 4, time_divisor: float = 50.0) -> None:
        super().__init__()
        self.proj_in = nn.Linear(2 * prior_dim + 1, prior_dim)
        self.layers = nn.ModuleList(nn.Linear(prior_dim, prior_dim) for _ in range(num_layers))
        self.gradient_checkpointing = False

    def forward(
        self, sample: Tensor, timestep: Tensor | float | int, condition: Tensor, return_dict: bool = True
    ) -> HIDiffModelOutput | tuple[Tensor]:
        """Predicts the clean prior (or the noise, as the scheduler's `prediction_type` says).

        Args:
            sample: Noisy prior, [B, N, D].
            timestep: Index of the step, 0 … T-1, one number or [B].
            condition: What the condition encoder says of the blurry image, [B, N, D].
            return_dict: Whether to return a `HIDiffModelOutput` or a tuple.
        Returns:
            [B, N, D].
        """
        time = time_column(timestep, sample) / self.config.time_divisor
        hidden_states = F.leaky_relu(self.proj_in(torch.cat((condition, time, sample), dim=-1)), 0.1)
        for layer in self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(layer, hidden_states)
            else:
                hidden_states = layer(hidden_states)
            hidden_states = F.leaky_relu(hidden_states, 0.1)

        if not return_dict:
            return (hidden_states,)
        return HIDiffModelOutput(sample=hidden_states)
