import diffusers
import pytest
import torch
from conftest import realblur_scheduler

from diffusers_hidiff import HIDiffScheduler


def test_a_step_is_the_mean_of_the_posterior():
    scheduler = HIDiffScheduler(clip_sample=False, prediction_type="sample")
    scheduler.set_timesteps(8)
    betas = torch.linspace(0.1, 0.99, 8, dtype=torch.float64)
    bars = torch.cumprod(1 - betas, 0)
    clean, sample = torch.randn(2, 16, 4), torch.randn(2, 16, 4)
    for t in range(7, -1, -1):
        previous = bars[t - 1] if t else torch.tensor(1.0, dtype=torch.float64)
        expected = previous.sqrt() * betas[t] / (1 - bars[t]) * clean.double()
        expected += (1 - betas[t]).sqrt() * (1 - previous) / (1 - bars[t]) * sample.double()
        assert torch.allclose(scheduler.step(clean, t, sample).prev_sample.double(), expected, atol=1e-5)


def test_a_step_equals_ddpm_without_its_noise():
    ours = HIDiffScheduler()
    ddpm = diffusers.DDPMScheduler.from_config(ours.config)
    ddpm._get_variance = lambda *args, **kwargs: torch.tensor(0.0)
    ours.set_timesteps(8)
    ddpm.set_timesteps(8)
    prediction, sample = torch.randn(2, 16, 4), torch.randn(2, 16, 4)
    for t in ours.timesteps:
        a, b = ours.step(prediction, t, sample), ddpm.step(prediction, t, sample)
        assert torch.allclose(a.prev_sample, b.prev_sample, atol=1e-5)
        assert torch.allclose(a.pred_original_sample, b.pred_original_sample, atol=1e-5)


def test_a_step_draws_nothing_from_the_generator():
    scheduler, generator = HIDiffScheduler(), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(8)
    before = generator.get_state()
    scheduler.step(torch.zeros(1, 16, 4), 5, torch.zeros(1, 16, 4), generator=generator)
    assert torch.equal(before, generator.get_state())


def test_a_step_lets_gradients_through():
    scheduler = HIDiffScheduler(clip_sample=False)
    prediction, sample = (torch.randn(1, 16, 4, requires_grad=True) for _ in range(2))
    scheduler.step(prediction, 3, sample).prev_sample.sum().backward()
    assert prediction.grad.abs().min() > 0
    assert sample.grad.abs().min() > 0


def test_add_noise_then_the_whole_chain_with_the_true_noise_gives_the_clean_prior_back():
    scheduler = HIDiffScheduler()
    scheduler.set_timesteps(8)
    clean, noise = torch.rand(2, 16, 4) * 2 - 1, torch.randn(2, 16, 4)
    sample = scheduler.add_noise(clean, noise, torch.tensor([7, 7]))
    for t in scheduler.timesteps:
        bar = scheduler.alphas_cumprod[t]
        sample = scheduler.step((sample - bar.sqrt() * clean) / (1 - bar).sqrt(), t, sample).prev_sample
    assert torch.allclose(sample, clean, atol=1e-4)


@pytest.mark.parametrize(("steps", "expected"), [(1, [7]), (2, [7, 3]), (4, [7, 5, 3, 1]), (8, list(range(7, -1, -1)))])
def test_a_shorter_chain_begins_at_pure_noise(steps, expected):
    scheduler = HIDiffScheduler()
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == expected


def test_the_config_survives_saving(tmp_path):
    realblur_scheduler().save_pretrained(tmp_path)
    loaded = HIDiffScheduler.from_pretrained(tmp_path)
    assert (loaded.config.num_train_timesteps, loaded.config.beta_schedule) == (16, "scaled_linear")
    assert (loaded.config.prediction_type, loaded.config.clip_sample) == ("sample", False)
    assert torch.equal(loaded.betas, realblur_scheduler().betas)


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
@pytest.mark.parametrize("scheduler", [HIDiffScheduler(), realblur_scheduler()], ids=["gopro", "realblur"])
def test_swapping_there_and_back_keeps_every_value_and_warns_of_nothing(name, scheduler, warnings_of_diffusers):
    other = getattr(diffusers, name).from_config(scheduler.config)
    back = HIDiffScheduler.from_config(other.config)
    for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "clip_sample"):
        assert back.config[key] == scheduler.config[key]
        assert key not in other.config or other.config[key] == scheduler.config[key]
    assert torch.allclose(other.alphas_cumprod, scheduler.alphas_cumprod)
    assert not warnings_of_diffusers.records


def test_a_prediction_type_it_does_not_know_is_an_error():
    scheduler = HIDiffScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="`prediction_type` must be 'epsilon' or 'sample', got 'v_prediction'"):
        scheduler.step(torch.zeros(1, 16, 4), 0, torch.zeros(1, 16, 4))


def test_a_misspelt_option_is_an_error():
    with pytest.raises(TypeError, match="beta_strat"):
        HIDiffScheduler(beta_strat=0.1)
