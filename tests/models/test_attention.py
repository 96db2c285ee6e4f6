import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_hidiff.models.attention import (
    AttendedProjection,
    ChannelAttention,
    ChannelProducts,
    HierarchicalIntegration,
)
from diffusers_hidiff.models.slicing import WHOLE


def stirred(module: nn.Module) -> nn.Module:
    """Norms, biases and temperatures begin at 0 and 1, where many a mistake does not show."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


def attention_across_channels(query: Tensor, key: Tensor, temperature: Tensor) -> Tensor:
    """[B, P, C], [B, P, C] -> [B, h, c, c], summed in two pieces of unequal length."""
    first = query.shape[1] // 3
    pieces = (slice(0, first), slice(first, None))
    parts = [ChannelProducts.of(query[:, None, p], key[:, None, p], len(temperature)) for p in pieces]
    return ChannelProducts.sum(parts).attention(temperature)


def plain_attention_across_channels(query: Tensor, key: Tensor, temperature: Tensor) -> Tensor:
    """[P, c], [P, c] -> [c, c], one entry at a time."""
    width = query.shape[1]
    logits = torch.empty(width, width, dtype=query.dtype)
    for i in range(width):
        for j in range(width):
            cosine = (query[:, i] * key[:, j]).sum() / (query[:, i].norm() * key[:, j].norm())
            logits[i, j] = cosine * temperature
    return logits.exp() / logits.exp().sum(dim=1, keepdim=True)


def test_attention_across_channels_is_the_softmax_of_cosines():
    query, key = torch.randn(2, 30, 6).double(), torch.randn(2, 30, 6).double()
    temperature = torch.tensor([0.7, 1.9]).double().view(2, 1, 1)
    found = attention_across_channels(query, key, temperature)
    assert found.shape == (2, 2, 3, 3)
    for b in range(2):
        for h in range(2):
            part = slice(3 * h, 3 * h + 3)
            expected = plain_attention_across_channels(query[b, :, part], key[b, :, part], temperature[h, 0, 0])
            torch.testing.assert_close(found[b, h], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_across_channels_of_a_million_large_pixels_does_not_overflow(dtype):
    torch.manual_seed(0)
    query = 50 + 20 * torch.randn(1, 10**6, 4)  # sums of squares near 3e9; float16 ends at 65504
    key = query.flip(-1) - 40 * torch.randn(1, 10**6, 4)
    temperature = torch.full((2, 1, 1), 3.0)
    found = attention_across_channels(query.to(dtype), key.to(dtype), temperature.to(dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.float(), attention_across_channels(query, key, temperature), rtol=0, atol=0.01)


def test_attention_across_channels_of_black_is_even_and_has_finite_gradients():
    query = torch.zeros(1, 30, 4, requires_grad=True)
    found = attention_across_channels(query, query, torch.ones(2, 1, 1))
    assert torch.equal(found, torch.full((1, 2, 2, 2), 0.5))
    found.square().sum().backward()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("batch_size", [1, 2])
@torch.no_grad()
def test_the_attended_projection_applies_the_attention_and_then_itself(batch_size):
    projection = AttendedProjection(6, 6, bias=False)
    value, attention = torch.randn(batch_size, 5, 7, 6), torch.randn(batch_size, 3, 2, 2)
    heads = value.unflatten(-1, (3, 2))  # [B, H, W, h, c]
    attended = torch.einsum("bhde,bijhe->bijhd", attention, heads).flatten(3)
    torch.testing.assert_close(projection(value, attention), attended @ projection.weight.T)


@torch.no_grad()
def test_channel_attention_is_that_of_the_paper():
    module = stirred(ChannelAttention(dim=6, num_heads=2))
    image = torch.randn(2, 4, 5, 6).double()
    qkv = F.conv2d(image.permute(0, 3, 1, 2), module.to_qkv.weight[:, :, None, None])
    qkv = F.conv2d(qkv, module.depthwise.weight, padding=1, groups=18).flatten(2).transpose(1, 2)  # [B, P, 3C]
    expected = torch.empty(2, 20, 6).double()
    for b in range(2):
        for h in range(2):
            query, key, value = (qkv[b, :, start + 3 * h : start + 3 * h + 3] for start in (0, 6, 12))
            attention = plain_attention_across_channels(query, key, module.temperature[h, 0, 0])
            expected[b, :, 3 * h : 3 * h + 3] = value @ attention.T
    expected = image + (expected @ module.to_out.weight.T).view(image.shape)
    torch.testing.assert_close(module(image, nn.Identity(), WHOLE), expected)


@torch.no_grad()
def test_hierarchical_integration_lets_every_pixel_attend_to_the_prior():
    module = stirred(HierarchicalIntegration(dim=6, prior_dim=10, num_heads=2))
    image, prior = torch.randn(2, 2, 3, 6).double(), torch.randn(2, 5, 10).double()
    found = module(image, prior, WHOLE)
    for b in range(2):
        key, value = (module.norm_prior(prior[b]) @ module.to_kv.weight.T).chunk(2, dim=-1)  # [N, C] each
        for y in range(2):
            for x in range(3):
                query = module.to_q.weight @ module.norm(image[b, y, x])
                out = torch.empty(6).double()
                for part in (slice(0, 3), slice(3, 6)):
                    weights = torch.softmax(key[:, part] @ query[part] / 3**0.5, dim=0)  # [N]
                    out[part] = weights @ value[:, part]
                expected = image[b, y, x] + module.to_out.weight @ out + module.to_out.bias
                torch.testing.assert_close(found[b, y, x], expected)


def test_gradients_are_those_of_finite_differences():
    image = torch.randn(1, 2, 3, 4).double().requires_grad_()
    prior = torch.randn(1, 3, 5).double().requires_grad_()
    attention, integration = stirred(ChannelAttention(4, 2)), stirred(HierarchicalIntegration(4, 5, 2))
    assert torch.autograd.gradcheck(lambda image: attention(image, nn.Identity(), WHOLE), image)
    assert torch.autograd.gradcheck(lambda image, prior: integration(image, prior, WHOLE), (image, prior))


@pytest.mark.parametrize("build", [lambda: ChannelAttention(6, 4), lambda: HierarchicalIntegration(6, 16, 4)])
def test_heads_that_do_not_divide_the_channels_are_refused(build):
    with pytest.raises(ValueError, match="`dim` must be a multiple of `num_heads`, got dim=6 and num_heads=4"):
        build()
