import pytest
import torch
import torch.nn.functional as F
from tiny import EveryModel, tiny_condition_encoder, tiny_images, tiny_latent_encoder
from torch import Tensor

from diffusers_hidiff import HIDiffLatentEncoder


def wide_latent_encoder() -> HIDiffLatentEncoder:
    return tiny_latent_encoder(num_blocks=2, wide_head=True, activation="leaky_relu")


class TestConditionEncoder(EveryModel):
    build = staticmethod(tiny_condition_encoder)
    inputs = (tiny_images(2),)


class TestLatentEncoder(EveryModel):
    build = staticmethod(wide_latent_encoder)
    inputs = (tiny_images(2), tiny_images(2, seed=7))


def mlp(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = F.gelu(F.linear(x, weights[f"{name}.0.weight"], weights[f"{name}.0.bias"]))
    return F.linear(x, weights[f"{name}.2.weight"], weights[f"{name}.2.bias"])


@torch.no_grad()
@pytest.mark.parametrize("wide", [False, True])
def test_it_computes_what_the_release_does_layer_by_layer(wide):
    act = (lambda x: F.leaky_relu(x, 0.1)) if wide else F.gelu
    model = wide_latent_encoder() if wide else tiny_latent_encoder(num_blocks=2)
    weights = model.state_dict()

    def conv(name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    blurry, sharp = tiny_images(2, 32, 48), tiny_images(2, 32, 48, seed=7)
    x = act(conv("conv_in", F.pixel_unshuffle(torch.cat((sharp, blurry), dim=1), 4)))
    for i in range(2):
        x = x + conv(f"blocks.{i}.conv2", act(conv(f"blocks.{i}.conv1", x)))
    if wide:
        for i in (0, 2, 4):
            x = act(conv(f"head.{i}", x))
    else:
        x = conv("head.0", x)
    rows = [row.split(3, dim=3) for row in x.split(2, dim=2)]  # 8x12 features make 4x4 cells of 2x3
    x = torch.stack([cell.mean(dim=(2, 3)) for row in rows for cell in row], dim=1)  # [B, 16, C]
    x = x + mlp(weights, "mixer.token_mlp", norm("mixer.norm1", x).transpose(1, 2)).transpose(1, 2)
    x = x + mlp(weights, "mixer.channel_mlp", norm("mixer.norm2", x))
    x = act(F.linear(x, weights["proj_out.weight"], weights["proj_out.bias"]))
    torch.testing.assert_close(model(blurry, sharp).sample, x)


@torch.no_grad()
def test_channels_last_gives_the_same_as_contiguous():
    model = tiny_condition_encoder()
    expected = model(tiny_images(2)).sample
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(tiny_images(2).contiguous(memory_format=torch.channels_last)).sample, expected)


@torch.no_grad()
def test_the_grid_gives_the_number_of_tokens():
    assert tiny_condition_encoder(grid_size=2)(tiny_images(3)).sample.shape == (3, 4, 16)


@torch.no_grad()
def test_an_image_smaller_than_the_grid_still_gives_all_tokens():
    assert tiny_condition_encoder()(tiny_images(1, 8, 4)).sample.shape == (1, 16, 16)


def test_a_latent_encoder_without_the_sharp_image_is_refused():
    with pytest.raises(ValueError, match="in_channels=6 needs `sharp`"):
        tiny_latent_encoder()(tiny_images())


def test_a_condition_encoder_with_a_sharp_image_is_refused():
    with pytest.raises(ValueError, match="in_channels=3 does not take `sharp`"):
        tiny_condition_encoder()(tiny_images(), tiny_images())


def test_sizes_that_are_no_multiple_of_4_are_refused():
    with pytest.raises(ValueError, match="`blurry` must have height and width that are multiples of 4"):
        tiny_condition_encoder()(tiny_images(1, 16, 18))


@pytest.mark.parametrize(("name", "value"), [("in_channels", 4), ("activation", "relu")])
def test_unknown_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        HIDiffLatentEncoder(**{name: value})
