"""The networks against tensors that the original code computed (tests/golden), from files through the converter.

Expected values: the authors' release at full size in float32, with the weights of official.py. Two tensors of the GoPro
family have a wider margin: its first reverse step divides by √ᾱ_7 = 1/174, which turns rounding into 1e-4.
"""

import json
from pathlib import Path

import convert_weights
import official
import pytest
import torch
from literal import LiteralTransformer
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusers_hidiff import HIDiffLatentEncoder, HIDiffPipeline
from diffusers_hidiff.export import PipelineGraph
from diffusers_hidiff.image_processor import pad_to_multiple
from diffusers_hidiff.metrics.psnr import psnr
from diffusers_hidiff.models.slicing import Slicing, SlicingMixin
from diffusers_hidiff.sampling import sample_prior
from train_stage1 import Stage1
from train_stage2 import Stage2

TENSORS = ["condition", "latents", "prior", "restored", "stage1_prior", "stage1_restored"]
TRAINING = json.loads((official.GOLDEN / "training.json").read_text())


class Released:
    """The networks of one family, converted by the script and loaded from its folder."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder = family, folder / "pipeline"
        checkpoint = official.write_checkpoint(family, folder / "original")
        assert convert_weights.main([str(checkpoint), str(self.folder), "--family", family]) == 0
        self.pipeline = HIDiffPipeline.from_pretrained(self.folder)
        self.pipeline.set_progress_bar_config(disable=True)
        self.latent_encoder = HIDiffLatentEncoder.from_pretrained(self.folder / "latent_encoder")

    @property
    def networks(self) -> dict[str, nn.Module]:
        names = ("condition_encoder", "denoiser", "transformer")
        return {"latent_encoder": self.latent_encoder} | {name: getattr(self.pipeline, name) for name in names}

    @torch.no_grad()
    def run(self, golden: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor of a golden file, computed by our networks."""
        blurry, sharp = (pad_to_multiple(golden[name]) for name in ("blurry", "sharp"))
        condition_encoder, denoiser, transformer = (
            self.networks[name] for name in ("condition_encoder", "denoiser", "transformer")
        )
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(scheduler.config.num_train_timesteps)
        latents: list[Tensor] = []

        def keep(index: int, timestep: Tensor, sample: Tensor) -> Tensor:
            latents.append(sample)
            return sample

        condition = condition_encoder(blurry).sample
        prior = sample_prior(denoiser, scheduler, condition, golden["noise"], after_step=keep)
        stage1_prior = self.latent_encoder(blurry, sharp).sample
        height, width = golden["blurry"].shape[-2:]
        return {
            "condition": condition,
            "latents": torch.stack(latents),
            "prior": prior,
            "restored": transformer(blurry, prior).sample[..., :height, :width],
            "stage1_prior": stage1_prior,
            "stage1_restored": transformer(blurry, stage1_prior).sample[..., :height, :width],
        }

    def train(self, golden: dict[str, Tensor]) -> dict[str, float]:
        """Losses and gradient norms of a step of both training scripts, by their names in training.json."""
        blurry, sharp = (pad_to_multiple(golden[name]) for name in ("blurry", "sharp"))
        figures = {}

        def gradient_norms(stage: str, *names: str) -> None:
            for name in names:
                gradients = [parameter.grad for parameter in self.networks[name].parameters()]
                figures[f"{stage}_grad_norm_{name}"] = torch.nn.utils.get_total_norm(gradients).item()
            for network in self.networks.values():
                network.zero_grad()

        loss, _ = Stage1(self.latent_encoder, self.pipeline.transformer)(blurry, sharp)
        loss.backward()
        figures["stage1_loss"] = loss.item()
        gradient_norms("stage1", "transformer", "latent_encoder")

        loss, parts = Stage2(self.latent_encoder, self.pipeline, seed=0)(blurry, sharp, golden["noise"])
        loss.backward()
        assert all(parameter.grad is None for parameter in self.latent_encoder.parameters())
        figures |= {f"stage2_loss_{part}": value.item() for part, value in parts.items()}
        gradient_norms("stage2", "transformer", "condition_encoder", "denoiser")
        self.latent_encoder.requires_grad_(True)  # it was a teacher, and learns again in the next test
        return figures


@pytest.fixture(scope="module", params=official.FAMILIES)
def released(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Released:
    return Released(request.param, tmp_path_factory.mktemp(request.param))


def golden_file(released: Released, case: str) -> dict[str, Tensor]:
    return load_file(official.GOLDEN / f"{released.family}_{case}.safetensors")


@pytest.fixture(scope="module", params=["aligned", "odd_batch2"])
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def golden(released: Released, case: str) -> dict[str, Tensor]:
    return golden_file(released, case)


@pytest.fixture(scope="module")
def computed(released: Released, golden: dict[str, Tensor]) -> dict[str, Tensor]:
    return released.run(golden)


def check(name: str, family: str, found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    difference = (found - expected).abs()
    if family == "gopro" and name in ("latents", "prior"):
        assert difference.max() < 1e-3
        assert difference.mean() < 1e-5
    else:
        assert difference.max() < 1e-5


def check_training(found: dict[str, float], family: str, case: str) -> None:
    expected = TRAINING[f"{family}_{case}"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        margin = {"rel": 1e-3} if "grad_norm" in name else {"rel": 0, "abs": 1e-5}
        assert found[name] == pytest.approx(value, **margin), name


@pytest.mark.parametrize("name", TENSORS)
def test_every_tensor_is_that_of_the_original(released, golden, computed, name):
    check(name, released.family, computed[name], golden[name])


def test_the_pipeline_gives_the_original_prior_and_image(released, golden):
    arguments = {"image": golden["blurry"], "latents": golden["noise"]}
    check("prior", released.family, released.pipeline(**arguments, output_type="latent").images, golden["prior"])
    images = released.pipeline(**arguments, output_type="pt").images
    check("restored", released.family, images, golden["restored"].clamp(0, 1))


@torch.no_grad()
def test_the_graph_for_export_gives_the_original_image(released, golden):
    height, width = golden["blurry"].shape[-2:]
    restored = PipelineGraph(released.pipeline)(pad_to_multiple(golden["blurry"]), golden["noise"])
    check("restored", released.family, restored[..., :height, :width], golden["restored"].clamp(0, 1))


@torch.no_grad()
def test_with_the_transformer_in_bfloat16_the_image_is_near_the_original(released):
    """Measured: 43.6 and 47.6 dB. The stand-in weights change the image by 0.14 on average, more than deblurring does."""
    golden, graph = golden_file(released, "aligned"), PipelineGraph(released.pipeline)
    graph.transformer.to(torch.bfloat16)
    restored = graph(golden["blurry"], golden["noise"])
    assert restored.dtype == torch.float32
    assert psnr(restored, golden["restored"].clamp(0, 1)).item() > 42


def test_losses_and_gradient_norms_are_those_of_the_original(released, golden, case):
    check_training(released.train(golden), released.family, case)


def test_gradient_checkpointing_changes_neither_losses_nor_gradients(released):
    for network in released.networks.values():
        network.enable_gradient_checkpointing()
    try:
        found = released.train(golden_file(released, "aligned"))
    finally:
        for network in released.networks.values():
            network.disable_gradient_checkpointing()
    check_training(found, released.family, "aligned")


def test_the_literal_transcription_gives_the_original_image(released, golden, computed):
    literal = LiteralTransformer(expansion=released.pipeline.transformer.config.ffn_expansion_factor)
    literal.load_state_dict(official.state_dict(released.family, "net_g"))
    with torch.no_grad():
        restored = literal(pad_to_multiple(golden["blurry"]), golden["prior"])
    restored = restored[..., : golden["blurry"].shape[-2], : golden["blurry"].shape[-1]]
    check("restored", released.family, restored, golden["restored"])
    check("restored", released.family, restored, computed["restored"])


def test_the_converted_folder_turns_back_into_the_original_files_bit_for_bit(released, tmp_path):
    assert convert_weights.main([str(released.folder), str(tmp_path / "back"), "--to_official"]) == 0
    for network in official.KEYS[released.family]:
        expected = official.state_dict(released.family, network)
        found = torch.load(tmp_path / "back" / f"{network}.pth", weights_only=True)["params"]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_channels_last_models_give_the_same_tensors(released):
    golden = golden_file(released, "aligned")  # needs no padding, which would make new memory
    images = {name: golden[name].contiguous(memory_format=torch.channels_last) for name in ("blurry", "sharp")}
    for network in released.networks.values():
        network.to(memory_format=torch.channels_last)
    try:
        found = released.run(golden | images)
    finally:
        for network in released.networks.values():
            network.to(memory_format=torch.contiguous_format)
    for name in TENSORS:
        check(name, released.family, found[name], golden[name])


@pytest.mark.parametrize("place", ["device", "file"])
def test_tiles_and_files_give_the_same_tensors(released, golden, place, monkeypatch):
    smallest_tiles = Slicing(1, device=torch.device("cpu"), place=place)
    for network in released.networks.values():
        if isinstance(network, SlicingMixin):
            monkeypatch.setattr(network, "slicing_for", lambda blurry: smallest_tiles)
    found = released.run(golden)
    for name in TENSORS:
        check(name, released.family, found[name], golden[name])
