"""Which of diffusers' schedulers can take the place of `HIDiffScheduler`, and in how many steps.

With T = 8 or 16 training steps many of them run and return nonsense, without a word: they were made for a thousand.
What is refused here was measured with a perfect denoiser (tests/schedulers/test_compatibility.py).
"""

from collections.abc import Sequence

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

USE_INSTEAD = (
    "Use HIDiffScheduler, DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler or DPMSolverMultistepScheduler."
)
NEVER_ARRIVES = f"its last step does not reach a clean prior. {USE_INSTEAD}"
OTHER_NOISE = f"it is made for another kind of noise than the denoiser was trained on. {USE_INSTEAD}"
ONLY_EPSILON = f"it does not take a denoiser that predicts the clean prior. {USE_INSTEAD}"

REFUSED = {"DEISMultistepScheduler": NEVER_ARRIVES, "SASolverScheduler": NEVER_ARRIVES, "TCDScheduler": NEVER_ARRIVES}
NEEDS_EPSILON = (
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "PNDMScheduler",
    "DPMSolverSDEScheduler",
)
EVENLY_SPACED = ("DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler")
MULTISTEP = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler")
SIGMA_OPTIONS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def check_scheduler(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Refuses schedulers and numbers of steps that are known to give a wrong prior.

    Args:
        scheduler: Any scheduler of diffusers, or `HIDiffScheduler`.
        num_inference_steps: Steps of the reverse chain.
    Raises:
        ValueError: The combination is known to be wrong; the message says what to use instead.
    """
    name, config = type(scheduler).__name__, scheduler.config
    reason = REFUSED.get(name)
    if name.startswith(("EDM", "FlowMatch", "CogVideoX")) or not hasattr(scheduler, "alphas_cumprod"):
        reason = OTHER_NOISE
    elif name in NEEDS_EPSILON and config.prediction_type != "epsilon":
        reason = ONLY_EPSILON
    elif config.prediction_type not in ("epsilon", "sample"):
        reason = f"`prediction_type` must be 'epsilon' or 'sample', got {config.prediction_type!r}."
    elif name == "PNDMScheduler" and not (config.skip_prk_steps and config.set_alpha_to_one):
        reason = "with so few steps it needs `skip_prk_steps=True, set_alpha_to_one=True`."
    if reason is not None:
        raise ValueError(f"`scheduler` cannot be {name}: {reason}")

    num_train_timesteps = config.num_train_timesteps
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"`num_inference_steps` must lie between 1 and the scheduler's num_train_timesteps={num_train_timesteps},"
            f" got {num_inference_steps}."
        )
    if name in EVENLY_SPACED and num_train_timesteps % num_inference_steps:
        raise ValueError(
            f"`num_inference_steps` must divide num_train_timesteps={num_train_timesteps} with {name}, got"
            f" {num_inference_steps}: it would take the steps to be evenly spaced. Use HIDiffScheduler or DDPMScheduler."
        )
    if (
        name in MULTISTEP
        and config.get("timestep_spacing") == "linspace"
        and num_inference_steps >= num_train_timesteps
    ):
        raise ValueError(
            f"`num_inference_steps` must be less than num_train_timesteps={num_train_timesteps} with {name} and"
            f" timestep_spacing='linspace', got {num_inference_steps}: it would return NaN. Use timestep_spacing='trailing'."
        )
    if name in MULTISTEP and (chosen := [option for option in SIGMA_OPTIONS if config.get(option)]):
        raise ValueError(f"`{chosen[0]}` must be False with {name}: so few steps collapse into fewer timesteps.")
    if name == "LCMScheduler":
        original = config.original_inference_steps
        if original > num_train_timesteps or num_inference_steps > min(original, num_train_timesteps - 1):
            raise ValueError(
                f"LCMScheduler needs `original_inference_steps` of at most {num_train_timesteps} and"
                f" `num_inference_steps` of less than {num_train_timesteps} and no more than those,"
                f" got {original} and {num_inference_steps}."
            )


def check_timesteps(scheduler: SchedulerMixin, timesteps: Sequence[float] | torch.Tensor) -> None:
    """Refuses a chain that does not begin at pure noise or leaves the range that the denoiser knows.

    Raises:
        ValueError: Timesteps are missing, out of range, or do not begin at the last training step.
    """
    last = scheduler.config.num_train_timesteps - 1
    values = [float(timestep) for timestep in timesteps]
    if not values or not all(0 <= value <= last for value in values):  # NaN fails the comparison, too
        raise ValueError(f"`timesteps` must lie between 0 and {last}, got {values}.")
    if round(values[0]) != last:
        raise ValueError(
            f"`timesteps` must begin at {last}, where the prior is pure noise, got {values}."
            " Use timestep_spacing='trailing'."
        )
