"""Small models for tests, and the tests that all of them share.

Their widths fit one another: 16 prior tokens of width 16.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import accelerate
import pytest
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.checkpoint import checkpoint

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


def public_config(model: ModelMixin) -> dict[str, Any]:
    """The settings of a model, without what diffusers notes about them."""
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


class EveryModel:
    """What diffusers may ask of each network. A test class per network inherits these tests and says which it is."""

    build: Callable[..., ModelMixin]
    inputs: tuple[Any, ...]  # of `forward`, in order

    def run(self, model: ModelMixin, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        arguments = [value.to(dtype) if isinstance(value, torch.Tensor) else value for value in self.inputs]
        return model(*arguments).sample

    @torch.no_grad()
    def test_config_and_weights_survive_saving_and_loading(self, tmp_path):
        model = self.build()
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert public_config(loaded) == public_config(model)
        assert torch.equal(self.run(loaded), self.run(model))

    @torch.no_grad()
    def test_a_variant_in_shards_gives_the_same(self, tmp_path):
        model = self.build()
        model.save_pretrained(tmp_path, max_shard_size="2KB", variant="fp16")
        assert len(list(tmp_path.glob("*.fp16*.safetensors"))) > 1
        assert torch.equal(self.run(type(model).from_pretrained(tmp_path, variant="fp16")), self.run(model))

    def test_an_average_over_training_follows_the_model_and_is_saved(self, tmp_path):
        model = self.build()
        average = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        average.step(model.parameters())
        average.save_pretrained(tmp_path)
        loaded = EMAModel.from_pretrained(tmp_path, type(model))
        for saved, kept in zip(loaded.shadow_params, average.shadow_params, strict=True):
            assert torch.equal(saved, kept)

    @torch.no_grad()
    def test_without_return_dict_it_returns_a_tuple_of_one(self):
        model = self.build()
        result = model(*self.inputs, return_dict=False)
        assert isinstance(result, tuple)
        assert len(result) == 1
        assert torch.equal(result[0], self.run(model))

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_near_single_precision(self, dtype):
        expected = self.run(self.build())
        found = self.run(self.build().to(dtype), dtype)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.03 * expected.abs().max().item())

    @torch.no_grad()
    def test_double_precision_is_near_single_precision(self):
        found = self.run(self.build().double(), torch.float64)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found.float(), self.run(self.build()), rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_an_image_does_not_depend_on_the_others_of_its_batch(self):
        model = self.build()
        arguments = [value[-1:] if isinstance(value, torch.Tensor) else value for value in self.inputs]
        torch.testing.assert_close(model(*arguments).sample, self.run(model)[-1:])

    def gradients(self, model: ModelMixin) -> dict[str, torch.Tensor]:
        self.run(model).square().sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    def test_every_parameter_takes_part(self):
        assert all(gradient.abs().max() > 0 for gradient in self.gradients(self.build()).values())

    def test_gradient_checkpointing_runs_every_block_and_gives_the_same_gradients(self):
        blocks = []

        def recompute(block: nn.Module, *arguments: torch.Tensor) -> torch.Tensor:
            blocks.append(block)
            return checkpoint(block, *arguments, use_reentrant=False)

        model = self.build()
        model.enable_gradient_checkpointing(recompute)
        torch.testing.assert_close(self.gradients(model), self.gradients(self.build()))
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        assert len(blocks) == sum(map(len, lists)) > 0

    @torch.no_grad()
    def test_weights_may_be_fetched_module_by_module(self):
        """Sequential offloading: a weight exists only while the module that owns it runs."""
        model = self.build()
        expected = self.run(model)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(self.run(model), expected)

    @torch.no_grad()
    @pytest.mark.parametrize("options", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}])
    def test_group_offloading_gives_the_same(self, options):
        model = self.build()
        expected = self.run(model)
        model.enable_group_offload(torch.device("cpu"), **options)
        assert torch.equal(self.run(model), expected)

    @torch.no_grad()
    @pytest.mark.parametrize("share", [0.6, 0.2])
    def test_weights_that_memory_has_no_room_for_stay_on_the_disk(self, share, tmp_path):
        model = self.build()
        model.save_pretrained(tmp_path / "model")
        memory = {"cpu": int(share * sum(parameter.nbytes for parameter in model.parameters()))}
        places = {"device_map": "auto", "max_memory": memory, "offload_folder": tmp_path / "offloaded"}
        loaded = type(model).from_pretrained(tmp_path / "model", **places)
        assert "disk" in loaded.hf_device_map.values()
        assert torch.equal(self.run(loaded), self.run(model))

    @torch.no_grad()
    def test_weights_may_be_stored_in_eight_bits(self):
        model = self.build()
        expected = self.run(model)
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert any(parameter.dtype == torch.float8_e4m3fn for parameter in model.parameters())
        torch.testing.assert_close(self.run(model), expected, rtol=0, atol=0.2 * expected.abs().max().item())
