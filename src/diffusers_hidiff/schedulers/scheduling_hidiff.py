"""Noise schedule and one reverse step: the posterior mean, no fresh noise.

B batch · N prior tokens · D prior width · T training steps
"""

from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, DDPMSchedulerOutput

# Loading looks for this name in the module that `model_index.json` points at.
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401
from torch import Tensor


class HIDiffScheduler(DDPMScheduler):
    """DDPM with the noise left out: each reverse step moves to the mean of the posterior (arXiv:2006.11239, eq. 7).

    The defaults are the GoPro release. The RealBlur releases have `num_train_timesteps=16,
    beta_schedule="scaled_linear", prediction_type="sample", clip_sample=False`.

    Args:
        num_train_timesteps: T, the steps of the schedule and, unless asked otherwise, of the reverse chain.
        beta_start: First β.
        beta_end: Last β.
        beta_schedule: "linear" in β or "scaled_linear", linear in √β.
        prediction_type: Whether the denoiser predicts the noise ("epsilon") or the clean prior ("sample").
        clip_sample: Whether the clean estimate is clamped to ±`clip_sample_range`.
        clip_sample_range: Its largest magnitude.
        timestep_spacing: Which steps a shorter chain visits. "trailing" begins at T - 1 whatever their number; with
            "leading" a chain of one step would take pure noise for a clean prior.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 8,
        beta_start: float = 0.1,
        beta_end: float = 0.99,
        beta_schedule: Literal["linear", "scaled_linear"] = "linear",
        prediction_type: Literal["epsilon", "sample"] = "epsilon",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        timestep_spacing: Literal["linspace", "leading", "trailing"] = "trailing",
    ) -> None:
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            prediction_type=prediction_type,
            clip_sample=clip_sample,
            clip_sample_range=clip_sample_range,
            timestep_spacing=timestep_spacing,
        )
        # Another scheduler made from this config would replace values marked as our defaults by defaults of its own
        # (a thousand timesteps), so none is marked.
        self.register_to_config(_use_default_values=[])

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of the reverse chain, differentiable.

        Args:
            model_output: What the denoiser predicts, [B, N, D].
            timestep: Index of the step, 0 … T - 1.
            sample: The noisy prior x_t, [B, N, D].
            generator: Not used, nothing is drawn; taken because the other schedulers take one.
            return_dict: Whether to return a `DDPMSchedulerOutput` or a tuple.
        Returns:
            `prev_sample`, the mean of q(x_{t-1} | x_t, x̂₀), and `pred_original_sample`, the clean estimate x̂₀.
        """
        previous = self.previous_timestep(timestep)
        alpha_prod = self.alphas_cumprod[timestep]
        alpha_prod_prev = self.alphas_cumprod[previous] if previous >= 0 else self.one
        alpha = alpha_prod / alpha_prod_prev  # α_t = 1 - β_t, over all the steps that this one spans

        if self.config.prediction_type == "epsilon":
            clean = (sample - (1 - alpha_prod) ** 0.5 * model_output) / alpha_prod**0.5
        elif self.config.prediction_type == "sample":
            clean = model_output
        else:
            raise ValueError(f"`prediction_type` must be 'epsilon' or 'sample', got {self.config.prediction_type!r}.")
        if self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)

        prev_sample = (
            alpha_prod_prev**0.5 * (1 - alpha) / (1 - alpha_prod) * clean
            + alpha**0.5 * (1 - alpha_prod_prev) / (1 - alpha_prod) * sample
        )
        if not return_dict:
            return (prev_sample, clean)
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=clean)
