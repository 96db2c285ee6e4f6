"""Small models for tests. Their widths fit one another: 16 prior tokens of width 16."""

from typing import TypeVar

import torch
from torch import nn

from diffusers_hidiff.models.denoiser import HIDiffMixerDenoiser, HIDiffMLPDenoiser
from diffusers_hidiff.models.latent_encoder import HIDiffLatentEncoder
from diffusers_hidiff.models.transformer_hidiff import HIDiffTransformer

NUM_TOKENS, PRIOR_DIM = 16, 16

Model = TypeVar("Model", bound=nn.Module)


def stirred(model: Model) -> Model:
    """Moves every parameter off its initial value: a norm or a temperature that is never applied would go unnoticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def tiny_transformer(**changes: object) -> HIDiffTransformer:
    torch.manual_seed(0)
    config: dict = {
        "dim": 8,
        "num_blocks": [1, 1, 1, 1],
        "num_refinement_blocks": 1,
        "num_heads": [1, 2, 4, 8],
        "prior_dim": PRIOR_DIM,
        "num_prior_tokens": NUM_TOKENS,
    }
    return stirred(HIDiffTransformer(**config | changes))


def tiny_condition_encoder(**changes: object) -> HIDiffLatentEncoder:
    torch.manual_seed(1)
    config: dict = {"in_channels": 3, "embed_dim": PRIOR_DIM // 4, "num_blocks": 1}
    return stirred(HIDiffLatentEncoder(**config | changes))


def tiny_latent_encoder(**changes: object) -> HIDiffLatentEncoder:
    torch.manual_seed(2)
    config: dict = {"in_channels": 6, "embed_dim": PRIOR_DIM // 4, "num_blocks": 1}
    return stirred(HIDiffLatentEncoder(**config | changes))


def tiny_mixer_denoiser(**changes: object) -> HIDiffMixerDenoiser:
    torch.manual_seed(3)
    config: dict = {"prior_dim": PRIOR_DIM, "num_prior_tokens": NUM_TOKENS, "num_blocks": 1}
    return stirred(HIDiffMixerDenoiser(**config | changes))


def tiny_mlp_denoiser(**changes: object) -> HIDiffMLPDenoiser:
    torch.manual_seed(4)
    config: dict = {"prior_dim": PRIOR_DIM, "num_layers": 2}
    return stirred(HIDiffMLPDenoiser(**config | changes))


def tiny_images(batch_size: int = 1, height: int = 16, width: int = 24, seed: int = 5) -> torch.Tensor:
    """Random RGB in [0, 1], [B, 3, H, W]."""
    return torch.rand(batch_size, 3, height, width, generator=torch.Generator().manual_seed(seed))


def tiny_prior(batch_size: int = 1, seed: int = 6) -> torch.Tensor:
    """Random prior tokens, [B, N, D]."""
    return torch.randn(batch_size, NUM_TOKENS, PRIOR_DIM, generator=torch.Generator().manual_seed(seed))
