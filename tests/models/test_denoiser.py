import pytest
import torch
import torch.nn.functional as F
from tiny import EveryModel, tiny_mixer_denoiser, tiny_mlp_denoiser, tiny_prior

SAMPLE, CONDITION = tiny_prior(2), tiny_prior(2, seed=7)
DENOISERS = pytest.mark.parametrize("build", [tiny_mixer_denoiser, tiny_mlp_denoiser])


class TestMixerDenoiser(EveryModel):
    build = staticmethod(tiny_mixer_denoiser)
    inputs = (SAMPLE, 3, CONDITION)


class TestMLPDenoiser(EveryModel):
    build = staticmethod(tiny_mlp_denoiser)
    inputs = (SAMPLE, 3, CONDITION)


@torch.no_grad()
def test_the_mixer_sees_time_counted_from_one_in_place_of_a_whole_token():
    model = tiny_mixer_denoiser()
    time = torch.full_like(SAMPLE, 4.0) * model.time_scale  # t = 3
    hidden_states = F.leaky_relu(model.proj_in(torch.cat((SAMPLE, time, CONDITION), dim=-1)), 0.2)
    for block in model.blocks:
        hidden_states = F.gelu(block(hidden_states))
    expected = F.gelu(model.proj_out(hidden_states))
    torch.testing.assert_close(model(SAMPLE, 3, CONDITION).sample, expected)


@torch.no_grad()
def test_the_mlp_sees_time_over_fifty_as_one_more_channel():
    model = tiny_mlp_denoiser()
    time = torch.full((2, 16, 1), 3 / 50)
    hidden_states = F.leaky_relu(model.proj_in(torch.cat((CONDITION, time, SAMPLE), dim=-1)), 0.1)
    for layer in model.layers:
        hidden_states = F.leaky_relu(layer(hidden_states), 0.1)
    torch.testing.assert_close(model(SAMPLE, 3, CONDITION).sample, hidden_states)


@torch.no_grad()
@DENOISERS
@pytest.mark.parametrize("timestep", [3.0, torch.tensor(3), torch.tensor([3]), torch.tensor([3, 3])])
def test_a_timestep_may_be_a_number_or_a_tensor(build, timestep):
    model = build()
    assert torch.equal(model(SAMPLE, timestep, CONDITION).sample, model(SAMPLE, 3, CONDITION).sample)


@torch.no_grad()
@DENOISERS
def test_every_image_may_have_its_own_timestep(build):
    model = build()
    found = model(SAMPLE, torch.tensor([1, 6]), CONDITION).sample
    torch.testing.assert_close(found[0], model(SAMPLE, 1, CONDITION).sample[0])
    torch.testing.assert_close(found[1], model(SAMPLE, 6, CONDITION).sample[1])
    assert not torch.allclose(found[1], model(SAMPLE, 1, CONDITION).sample[1])


@torch.no_grad()
def test_the_divisor_of_time_is_a_setting_of_the_mlp():
    found = tiny_mlp_denoiser(time_divisor=16.0)(SAMPLE, 16, CONDITION).sample
    torch.testing.assert_close(found, tiny_mlp_denoiser()(SAMPLE, 50, CONDITION).sample)
