"""What runs in place of HIDiffScheduler, asserted with a denoiser that knows the answer."""

import diffusers
import pytest
import torch
from conftest import realblur_scheduler
from torch import nn

from diffusers_hidiff import HIDiffScheduler
from diffusers_hidiff.sampling import noise_level, sample_prior
from diffusers_hidiff.schedulers.compatibility import check_scheduler, check_timesteps

GOPRO, REALBLUR = HIDiffScheduler(), realblur_scheduler()
PNDM = {"skip_prk_steps": True, "set_alpha_to_one": True}


class Oracle(nn.Module):
    """Predicts the noise, or the clean prior, without error."""

    def __init__(self, scheduler, clean):
        super().__init__()
        self.scheduler, self.clean = scheduler, clean

    def forward(self, sample, timestep, condition, return_dict=True):
        if self.scheduler.config.prediction_type == "sample":
            return (self.clean,)
        signal, noise = noise_level(self.scheduler, timestep)
        return ((sample - signal * self.clean) / noise,)


def error_with_a_perfect_denoiser(scheduler, num_inference_steps):
    check_scheduler(scheduler, num_inference_steps)
    scheduler.set_timesteps(num_inference_steps)
    check_timesteps(scheduler, scheduler.timesteps)
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(2, 16, 8, generator=generator) * 2 - 1
    noise = torch.randn(clean.shape, generator=generator) * scheduler.init_noise_sigma
    prior = sample_prior(Oracle(scheduler, clean), scheduler, torch.zeros_like(clean), noise, generator)
    return (prior - clean).abs().max().item()


# name, other settings, largest error, the numbers of steps that run of 1 … 8 (GoPro) and of 1 2 4 8 16 (RealBlur)
ALL, DIVISORS = tuple(range(1, 9)), (1, 2, 4, 8)
POWERS = (1, 2, 4, 8, 16)
RUNS = [
    ("HIDiffScheduler", {}, 1e-3, ALL, POWERS),
    ("DDPMScheduler", {}, 1e-3, ALL, POWERS),
    ("DDPMParallelScheduler", {}, 1e-3, ALL, POWERS),
    ("DDIMScheduler", {}, 1e-3, DIVISORS, POWERS),
    ("DDIMParallelScheduler", {}, 1e-3, DIVISORS, POWERS),
    ("EulerDiscreteScheduler", {}, 1e-3, ALL, POWERS),
    ("EulerAncestralDiscreteScheduler", {}, 1e-3, ALL, ()),
    ("HeunDiscreteScheduler", {}, 1e-3, ALL, POWERS),
    ("KDPM2DiscreteScheduler", {}, 1e-3, ALL, ()),
    ("KDPM2AncestralDiscreteScheduler", {}, 1e-3, ALL, ()),
    ("DPMSolverMultistepScheduler", {}, 1e-3, ALL, POWERS),
    ("DPMSolverSinglestepScheduler", {}, 1e-3, ALL, POWERS),
    ("UniPCMultistepScheduler", {}, 1e-3, ALL, POWERS),
    ("PNDMScheduler", PNDM, 1e-2, DIVISORS, ()),
    ("LCMScheduler", {"original_inference_steps": 8}, 1e-2, ALL[:-1], (1, 2, 4, 8)),
    ("DEISMultistepScheduler", {}, 0, (), ()),
    ("SASolverScheduler", {}, 0, (), ()),
    ("TCDScheduler", {"original_inference_steps": 8}, 0, (), ()),
    ("EDMEulerScheduler", {}, 0, (), ()),
    ("EDMDPMSolverMultistepScheduler", {}, 0, (), ()),
    ("FlowMatchEulerDiscreteScheduler", {}, 0, (), ()),
    ("FlowMatchHeunDiscreteScheduler", {}, 0, (), ()),
]


def swapped(name, settings, scheduler):
    cls = HIDiffScheduler if name == "HIDiffScheduler" else getattr(diffusers, name)
    return cls.from_config(scheduler.config, **settings)


@pytest.mark.parametrize(("name", "settings", "tolerance", "gopro", "realblur"), RUNS, ids=[row[0] for row in RUNS])
def test_the_table_of_schedulers_that_run(name, settings, tolerance, gopro, realblur):
    for scheduler, asked, runs in ((GOPRO, ALL, gopro), (REALBLUR, POWERS, realblur)):
        for steps in asked:
            candidate = swapped(name, settings, scheduler)
            if steps in runs:
                assert error_with_a_perfect_denoiser(candidate, steps) < tolerance, (name, steps)
            else:
                with pytest.raises(ValueError, match=r"must|cannot|needs"):
                    error_with_a_perfect_denoiser(candidate, steps)


@pytest.mark.parametrize(
    ("name", "settings", "steps", "sentence"),
    [
        ("DDIMScheduler", {}, 3, "`num_inference_steps` must divide num_train_timesteps=8"),
        ("DDIMScheduler", {}, 9, "`num_inference_steps` must lie between 1 and .*=8, got 9"),
        ("HIDiffScheduler", {}, 0, "`num_inference_steps` must lie between 1 and .*=8, got 0"),
        ("UniPCMultistepScheduler", {"timestep_spacing": "linspace"}, 8, "it would return NaN"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 8, "`use_karras_sigmas` must be False"),
        ("HIDiffScheduler", {"timestep_spacing": "leading"}, 1, "`timesteps` must begin at 7"),
        (
            "DDIMScheduler",
            {"timestep_spacing": "leading", "steps_offset": 1},
            8,
            "`timesteps` must lie between 0 and 7",
        ),
        ("PNDMScheduler", {}, 4, "it needs `skip_prk_steps=True, set_alpha_to_one=True`"),
        ("DEISMultistepScheduler", {}, 4, "does not reach a clean prior. Use HIDiffScheduler"),
        ("EDMEulerScheduler", {}, 4, "another kind of noise"),
        ("LCMScheduler", {}, 4, "needs `original_inference_steps` of at most 8"),
    ],
)
def test_a_combination_that_would_be_wrong_is_refused_with_the_way_out(name, settings, steps, sentence):
    with pytest.raises(ValueError, match=sentence):
        error_with_a_perfect_denoiser(swapped(name, settings, GOPRO), steps)


def test_schedulers_that_need_epsilon_are_refused_for_the_family_that_predicts_the_prior():
    for name in ("EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler"):
        with pytest.raises(ValueError, match="does not take a denoiser that predicts the clean prior"):
            check_scheduler(swapped(name, {}, REALBLUR), 4)
