import diffusers
import torch
from conftest import realblur_scheduler
from tiny import tiny_mixer_denoiser, tiny_mlp_denoiser, tiny_prior

from diffusers_hidiff import HIDiffScheduler
from diffusers_hidiff.sampling import clamp_clean_estimate, noise_level, sample_prior


def test_the_chain_is_the_scheduler_step_over_all_timesteps():
    denoiser, scheduler, condition, noise = (
        tiny_mixer_denoiser(),
        HIDiffScheduler(),
        tiny_prior(),
        torch.randn(1, 16, 16),
    )
    scheduler.set_timesteps(8)
    expected = noise
    for t in range(7, -1, -1):
        expected = scheduler.step(denoiser(expected, t, condition).sample, t, expected).prev_sample
    assert torch.equal(sample_prior(denoiser, scheduler, condition, noise), expected)


def test_the_chain_stays_in_float32_under_networks_in_bfloat16():
    denoiser, scheduler = tiny_mlp_denoiser().to(torch.bfloat16), realblur_scheduler()
    scheduler.set_timesteps(16)
    prior = sample_prior(denoiser, scheduler, tiny_prior().to(torch.bfloat16), torch.randn(1, 16, 16))
    assert prior.dtype == torch.float32


def test_gradients_reach_the_condition_and_every_parameter_through_all_steps():
    denoiser, scheduler = tiny_mlp_denoiser(), realblur_scheduler()
    condition = tiny_prior().requires_grad_()
    scheduler.set_timesteps(16)
    sample_prior(denoiser, scheduler, condition, torch.randn(1, 16, 16)).sum().backward()
    assert condition.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in denoiser.parameters())


def test_latents_that_the_callback_returns_take_the_place_of_the_chain_s():
    scheduler, seen = realblur_scheduler(), []
    scheduler.set_timesteps(4)

    def after_step(index, timestep, latents):
        seen.append((index, int(timestep)))
        return torch.zeros_like(latents) if index == 3 else latents

    prior = sample_prior(tiny_mlp_denoiser(), scheduler, tiny_prior(), torch.randn(1, 16, 16), after_step=after_step)
    assert seen == [(0, 15), (1, 11), (2, 7), (3, 3)]
    assert not prior.any()


def test_the_noise_level_between_two_timesteps_lies_between_theirs():
    scheduler = HIDiffScheduler()
    signal, noise = noise_level(scheduler, torch.tensor([3.0, 3.5, 4.0]))
    assert torch.allclose(signal[[0, 2]], scheduler.alphas_cumprod[[3, 4]].sqrt())
    assert signal[2] < signal[1] < signal[0]
    assert torch.allclose(signal**2 + noise**2, torch.ones(3))


def test_the_clamp_bounds_the_clean_estimate_and_leaves_a_small_one_alone():
    scheduler, sample, t = HIDiffScheduler(), torch.randn(2, 16, 4), torch.tensor(5)
    signal, noise = noise_level(scheduler, t)
    for clean in (torch.full_like(sample, 3.0), torch.full_like(sample, 0.5)):
        prediction = (sample - signal * clean) / noise
        clamped = clamp_clean_estimate(scheduler, prediction, sample, t)
        assert torch.allclose((sample - noise * clamped) / signal, clean.clamp(max=1.0), atol=1e-3)


def test_a_scheduler_that_knows_no_clamp_gets_one():
    """Without it the estimates of a GoPro denoiser reach into the hundreds."""
    euler = diffusers.EulerDiscreteScheduler.from_config(HIDiffScheduler().config)
    euler.set_timesteps(8)
    noise = torch.randn(1, 16, 16) * euler.init_noise_sigma
    prior = sample_prior(tiny_mixer_denoiser(), euler, tiny_prior(), noise)
    assert prior.abs().max() <= 1 + 1e-3
