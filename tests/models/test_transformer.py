import pytest
import torch
import torch.nn.functional as F
from literal import LiteralTransformer
from tiny import EveryModel, tiny_images, tiny_prior, tiny_transformer

from diffusers_hidiff import HIDiffTransformer
from diffusers_hidiff.conversion import to_original
from diffusers_hidiff.models.layers import Downsample, Modulation, Upsample


class TestTransformer(EveryModel):
    build = staticmethod(tiny_transformer)
    inputs = (tiny_images(2), tiny_prior(2))


@torch.no_grad()
def test_it_is_the_literal_transcription():
    blocks = {"num_blocks": [1, 2, 1, 2], "num_refinement_blocks": 2, "num_heads": [2, 1, 4, 8]}
    model = tiny_transformer(**blocks).double()
    literal = LiteralTransformer(dim=8, prior_dim=16, **blocks).double()
    literal.load_state_dict(to_original(model))
    blurry, prior = tiny_images(2).double(), tiny_prior(2).double()
    torch.testing.assert_close(model(blurry, prior).sample, literal(blurry, prior), rtol=0, atol=1e-12)


@torch.no_grad()
def test_channels_last_gives_the_same_as_contiguous():
    model = tiny_transformer()
    expected = model(tiny_images(2), tiny_prior(2)).sample
    model.to(memory_format=torch.channels_last)
    found = model(tiny_images(2).contiguous(memory_format=torch.channels_last), tiny_prior(2)).sample
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_the_image_may_be_float32_whatever_the_weights():
    model = tiny_transformer().bfloat16()
    restored = model(tiny_images(), tiny_prior().bfloat16()).sample
    assert restored.dtype == torch.float32
    expected = tiny_transformer()(tiny_images(), tiny_prior()).sample
    torch.testing.assert_close(restored, expected, rtol=0, atol=0.03)


@torch.no_grad()
def test_it_adds_to_the_blurry_image():
    model = tiny_transformer()
    model.conv_out.weight.zero_()
    assert torch.equal(model(tiny_images(), tiny_prior()).sample, tiny_images())


@torch.no_grad()
@pytest.mark.parametrize(
    "level", ["encoder1", "encoder2", "encoder3", "decoder3", "decoder2", "decoder1", "refinement"]
)
def test_the_prior_reaches_the_image_through_every_integration(level):
    model = tiny_transformer()
    before = model(tiny_images(), tiny_prior()).sample
    getattr(model, level).integration.to_out.weight.zero_()
    assert not torch.allclose(model(tiny_images(), tiny_prior()).sample, before)


@torch.no_grad()
def test_down_and_upsampling_are_a_convolution_and_a_pixel_shuffle():
    image = torch.randn(2, 8, 4, 6)
    for layer, shuffle in ((Downsample(8), F.pixel_unshuffle), (Upsample(8), F.pixel_shuffle)):
        found = layer(image.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(found, shuffle(layer.conv(image), 2))


@torch.no_grad()
def test_modulation_scales_and_shifts_every_channel_of_every_pixel():
    modulation = Modulation(prior_dim=5, dim=3)
    image, prior = torch.randn(2, 4, 6, 3), torch.randn(2, 5)
    found = modulation(image, prior)
    for b in range(2):
        scale, shift = modulation.scale(prior[b]), modulation.shift(prior[b])
        for y in range(4):
            for x in range(6):
                torch.testing.assert_close(found[b, y, x], image[b, y, x] * scale + shift)


@pytest.mark.parametrize("size", [(16, 20), (12, 16)])
def test_sizes_that_are_no_multiple_of_8_are_refused(size):
    with pytest.raises(ValueError, match="`blurry` must have height and width that are multiples of 8"):
        tiny_transformer()(tiny_images(1, *size), tiny_prior())


@pytest.mark.parametrize("name", ["num_blocks", "num_heads"])
def test_settings_of_another_number_of_levels_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must have four entries"):
        HIDiffTransformer(**{name: [1, 1, 1]})


def test_a_number_of_prior_tokens_that_is_no_multiple_of_4_is_refused():
    with pytest.raises(ValueError, match="`num_prior_tokens` must be a multiple of 4, got 9"):
        HIDiffTransformer(num_prior_tokens=9)


def test_a_misspelt_setting_is_an_error():
    with pytest.raises(TypeError, match="num_block"):
        HIDiffTransformer(num_block=[1, 1, 1, 1])
