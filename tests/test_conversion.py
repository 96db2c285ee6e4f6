from collections.abc import Mapping
from pathlib import Path

import convert_weights
import official
import pytest
import tiny
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from diffusers_hidiff import HIDiffLatentEncoder, HIDiffPipeline, HIDiffTransformer
from diffusers_hidiff.conversion import (
    COMPONENTS,
    ConversionError,
    expansion_factor,
    from_original,
    scheduler_of,
    to_original,
)

StateDicts = dict[str, dict[str, Tensor]]


def small_networks(family: str = "gopro") -> dict[str, ModelMixin]:
    """Tiny networks by original name."""
    encoder = {} if family == "gopro" else {"activation": "leaky_relu", "wide_head": True}
    return {
        "net_g": tiny.tiny_transformer(),
        "net_le_dm": tiny.tiny_condition_encoder(**encoder),
        "net_d": tiny.tiny_mixer_denoiser() if family == "gopro" else tiny.tiny_mlp_denoiser(),
        "net_le": tiny.tiny_latent_encoder(**encoder),
    }


def small_state_dicts(family: str = "gopro") -> StateDicts:
    return {network: to_original(model) for network, model in small_networks(family).items()}


def write(state_dicts: Mapping[str, Mapping[str, Tensor]], folder: Path) -> Path:
    folder.mkdir()
    for network, state_dict in state_dicts.items():
        torch.save({"params": dict(state_dict)}, folder / f"{network}.pth")
    return folder


def convert(source: Path, output: Path, *options: str) -> int:
    return convert_weights.main([str(source), str(output), *options])


def assert_refused(capsys: pytest.CaptureFixture[str], source: Path, *options: str, because: str) -> str:
    """Converts in vain: status 2, one message that says why, and no trace on the disk. Returns the message."""
    before = sorted(source.parent.rglob("*"))
    assert convert(source, source.parent / "pipeline", *options) == 2
    message = capsys.readouterr().err
    assert because in message
    assert sorted(source.parent.rglob("*")) == before
    return message


def equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# The table of names


@pytest.mark.parametrize("family", official.FAMILIES)
@pytest.mark.parametrize("network", COMPONENTS)
def test_published_weights_come_back_bit_for_bit(family, network):
    expected = official.state_dict(family, network)
    assert equal(to_original(from_original(network, expected)), expected)


@pytest.mark.parametrize(
    ("network", "build", "settings"),
    [
        ("net_g", tiny.tiny_transformer, {"num_blocks": [1, 2, 3, 1], "num_refinement_blocks": 2}),
        ("net_g", tiny.tiny_transformer, {"num_heads": [2, 1, 4, 8], "prior_dim": 24, "num_prior_tokens": 36}),
        ("net_g", tiny.tiny_transformer, {"dim": 16, "ffn_expansion_factor": 2.0}),
        ("net_g", tiny.tiny_transformer, {"ffn_expansion_factor": 2.3}),
        ("net_le_dm", tiny.tiny_condition_encoder, {"embed_dim": 12, "num_blocks": 3, "grid_size": 6}),
        ("net_le", tiny.tiny_latent_encoder, {"num_blocks": 2, "wide_head": True, "activation": "leaky_relu"}),
        ("net_d", tiny.tiny_mixer_denoiser, {"prior_dim": 12, "num_prior_tokens": 36, "num_blocks": 3}),
        ("net_d", tiny.tiny_mlp_denoiser, {"prior_dim": 12, "num_layers": 5}),
    ],
)
def test_networks_of_any_size_are_recognised(network, build, settings):
    model = build(**settings)
    found = from_original(network, to_original(model))
    assert type(found) is type(model)
    assert tiny.public_config(found) == tiny.public_config(model)
    assert equal(found.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("factor", "dims"), [(2.66, (48, 96, 192, 384)), (2.0, (48, 96, 192, 384)), (2.3, (8, 16, 32, 64)), (1.5, (10,))]
)
def test_the_expansion_factor_is_read_from_the_widths(factor, dims):
    assert expansion_factor({dim: int(dim * factor) for dim in dims}) == factor


def test_widths_that_no_one_expansion_factor_gives_are_refused():
    with pytest.raises(ConversionError, match="No one expansion factor"):
        expansion_factor({48: 127, 96: 300})


def test_the_dtype_of_the_checkpoint_is_kept():
    state_dict = {name: value.to(torch.bfloat16) for name, value in to_original(tiny.tiny_mlp_denoiser()).items()}
    assert from_original("net_d", state_dict).dtype == torch.bfloat16


def test_the_families_have_their_published_noise_schedules():
    gopro, realblur = scheduler_of("gopro").config, scheduler_of("realblur").config
    names = ("num_train_timesteps", "beta_schedule", "prediction_type", "clip_sample")
    assert [gopro[name] for name in names] == [8, "linear", "epsilon", True]
    assert [realblur[name] for name in names] == [16, "scaled_linear", "sample", False]
    assert [(config["beta_start"], config["beta_end"]) for config in (gopro, realblur)] == [(0.1, 0.99)] * 2


# The script


@pytest.mark.parametrize("family", official.FAMILIES)
def test_a_converted_folder_loads_and_turns_back_bit_for_bit(tmp_path, capsys, family):
    networks, state_dicts = small_networks(family), small_state_dicts(family)
    assert convert(write(state_dicts, tmp_path / "original"), tmp_path / "pipeline", "--family", family) == 0
    printed = capsys.readouterr().out
    pipeline = HIDiffPipeline.from_pretrained(tmp_path / "pipeline")
    latent_encoder = HIDiffLatentEncoder.from_pretrained(tmp_path / "pipeline" / "latent_encoder")
    loaded = pipeline.components | {"latent_encoder": latent_encoder}
    for network, model in networks.items():
        assert equal(loaded[COMPONENTS[network]].state_dict(), model.state_dict())
        assert f"{model.num_parameters():,} parameters" in printed
    assert pipeline.scheduler.config.num_train_timesteps == {"gopro": 8, "realblur": 16}[family]
    assert f"the {family} family" in printed
    assert f'HIDiffPipeline.from_pretrained("{tmp_path / "pipeline"}")' in printed

    assert convert(tmp_path / "pipeline", tmp_path / "back", "--to_official") == 0
    assert {file.name for file in (tmp_path / "back").iterdir()} == {f"{network}.pth" for network in networks}
    for network, expected in state_dicts.items():
        assert equal(torch.load(tmp_path / "back" / f"{network}.pth", weights_only=True)["params"], expected)


def test_inference_alone_needs_no_latent_encoder(tmp_path):
    state_dicts = small_state_dicts()
    del state_dicts["net_le"]
    assert convert(write(state_dicts, tmp_path / "original"), tmp_path / "pipeline") == 0
    assert not (tmp_path / "pipeline" / "latent_encoder").exists()
    assert convert(tmp_path / "pipeline", tmp_path / "back", "--to_official") == 0
    assert not (tmp_path / "back" / "net_le.pth").exists()


def test_file_names_may_go_on_and_keys_may_have_a_module_prefix(tmp_path):
    source = tmp_path / "original"
    source.mkdir()
    for network, state_dict in small_state_dicts().items():
        parameters = {f"module.{name}": value for name, value in state_dict.items()}
        torch.save({"params": parameters}, source / f"{network}_300000.pth")
    assert convert(source, tmp_path / "pipeline") == 0
    assert equal(
        HIDiffTransformer.from_pretrained(tmp_path / "pipeline", subfolder="transformer").state_dict(),
        tiny.tiny_transformer().state_dict(),
    )


def test_an_empty_output_folder_is_used(tmp_path):
    (tmp_path / "pipeline").mkdir()
    assert convert(write(small_state_dicts(), tmp_path / "original"), tmp_path / "pipeline") == 0
    assert (tmp_path / "pipeline" / "model_index.json").is_file()


def test_a_variant_is_part_of_the_file_names_and_loads(tmp_path, capsys):
    source = write(small_state_dicts(), tmp_path / "original")
    assert convert(source, tmp_path / "pipeline", "--dtype", "float16", "--variant", "fp16") == 0
    files = sorted(file.relative_to(tmp_path / "pipeline") for file in tmp_path.glob("pipeline/**/*.safetensors"))
    assert files == [Path(name, "diffusion_pytorch_model.fp16.safetensors") for name in sorted(COMPONENTS.values())]
    assert 'variant="fp16", dtype=torch.float16)' in capsys.readouterr().out
    pipeline = HIDiffPipeline.from_pretrained(tmp_path / "pipeline", variant="fp16", dtype=torch.float16)
    assert equal(pipeline.transformer.state_dict(), tiny.tiny_transformer().half().state_dict())

    assert convert(tmp_path / "pipeline", tmp_path / "back", "--to_official", "--variant", "fp16") == 0
    back = torch.load(tmp_path / "back" / "net_g.pth", weights_only=True)["params"]
    assert equal(back, to_original(tiny.tiny_transformer().half()))


def test_what_is_wrong_with_all_networks_is_listed_together(tmp_path, capsys):
    state_dicts = small_state_dicts()
    del state_dicts["net_g"]["decoder_level2.him.proj.bias"]
    state_dicts["net_d"]["blocks.0.0.surplus"] = torch.zeros(1)
    state_dicts["net_le_dm"]["end.0.bias"] = torch.zeros(17)
    state_dicts["net_le"].pop("conv1.0.weight")
    message = assert_refused(capsys, write(state_dicts, tmp_path / "original"), because="net_g does not fit")
    assert "missing: decoder_level2.him.proj.bias" in message
    assert "unknown: blocks.0.0.surplus" in message
    assert "shape: end.0.bias is (17,), must be (16,)" in message
    assert "net_le lacks 'conv1.0.weight'" in message


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("patch_embed.proj.weight", (8,)),
        ("patch_embed.proj.weight", (0, 3, 3, 3)),
        ("latent.blocks.0.attn.temperature", (7, 1, 1)),
        ("encoder_level1.blocks.0.ffn.project_out.weight", (8, 100, 1, 1)),
        ("down_1.1.weight", (4, 15)),
    ],
)
def test_shapes_that_no_network_can_have_are_refused(tmp_path, capsys, name, shape):
    state_dicts = small_state_dicts()
    state_dicts["net_g"][name] = torch.zeros(shape)
    assert_refused(capsys, write(state_dicts, tmp_path / "original"), because="net_g has shapes that contradict")


def test_another_family_than_asked_for_is_refused(tmp_path, capsys):
    source = write(small_state_dicts(), tmp_path / "original")
    assert_refused(capsys, source, "--family", "realblur", because="--family realblur does not agree")


def test_networks_of_different_families_are_refused(tmp_path, capsys):
    state_dicts = small_state_dicts() | {"net_d": to_original(tiny.tiny_mlp_denoiser())}
    message = assert_refused(capsys, write(state_dicts, tmp_path / "original"), because="different families")
    assert "condition_encoder gopro, denoiser realblur" in message


def test_a_published_transformer_goes_only_with_its_family(tmp_path, capsys):
    with torch.device("meta"):
        published = HIDiffTransformer(prior_dim=16)
    weights = {name: torch.zeros(value.shape) for name, value in to_original(published).items()}
    source = write(small_state_dicts("realblur") | {"net_g": weights}, tmp_path / "original")
    assert_refused(capsys, source, because="different families: transformer gopro, condition_encoder realblur")


@pytest.mark.parametrize(
    ("network", "build", "settings", "because"),
    [
        ("net_d", tiny.tiny_mixer_denoiser, {"prior_dim": 32}, "different prior widths"),
        ("net_g", tiny.tiny_transformer, {"num_prior_tokens": 36}, "different numbers of prior tokens"),
        ("net_le", tiny.tiny_latent_encoder, {"embed_dim": 8}, "different prior widths"),
        ("net_le_dm", tiny.tiny_latent_encoder, {}, "condition_encoder must take 3 channels, takes 6"),
        ("net_le", tiny.tiny_condition_encoder, {}, "latent_encoder must take 6 channels, takes 3"),
    ],
)
def test_networks_that_do_not_fit_one_another_are_refused(tmp_path, capsys, network, build, settings, because):
    state_dicts = small_state_dicts() | {network: to_original(build(**settings))}
    assert_refused(capsys, write(state_dicts, tmp_path / "original"), because=because)


@pytest.mark.parametrize("kept", [0, 100, 3000])
def test_a_truncated_file_is_refused(tmp_path, capsys, kept):
    file = write(small_state_dicts(), tmp_path / "original") / "net_d.pth"
    file.write_bytes(file.read_bytes()[:kept])
    assert_refused(capsys, file.parent, because="net_d.pth cannot be read, it is damaged")


@pytest.mark.parametrize("content", [{"weights": {}}, [1, 2], {"params": [torch.zeros(1)]}, {"params": {"a": 1}}])
def test_a_file_without_a_state_dict_under_params_is_refused(tmp_path, capsys, content):
    source = write(small_state_dicts(), tmp_path / "original")
    torch.save(content, source / "net_d.pth")
    assert_refused(capsys, source, because="net_d.pth must hold a state dict under 'params'")


@pytest.mark.parametrize("network", ["net_g", "net_le_dm", "net_d"])
def test_a_missing_file_is_refused(tmp_path, capsys, network):
    source = write(small_state_dicts(), tmp_path / "original")
    (source / f"{network}.pth").unlink()
    assert_refused(capsys, source, because=f"holds no {network}*.pth")


@pytest.mark.parametrize("network", COMPONENTS)
def test_several_files_for_one_network_are_refused_by_name(tmp_path, capsys, network):
    source = write(small_state_dicts(), tmp_path / "original")
    (source / f"{network}_latest.pth").write_bytes(b"")
    because = f"must hold one file for {network}, holds several: {network}.pth, {network}_latest.pth."
    assert_refused(capsys, source, because=because)


def test_a_source_that_is_no_folder_is_refused(tmp_path, capsys):
    assert_refused(capsys, tmp_path / "nowhere", because="nowhere is no folder")


def test_nothing_is_overwritten(tmp_path, capsys):
    output = tmp_path / "pipeline"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    source = write(small_state_dicts(), tmp_path / "original")
    assert_refused(capsys, source, because="exists and is not empty")
    assert (output / "notes.txt").read_text() == "mine"


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "pipeline").write_text("mine")
    assert_refused(capsys, write(small_state_dicts(), tmp_path / "original"), because="exists and is not empty")
    assert (tmp_path / "pipeline").read_text() == "mine"


def test_a_write_that_fails_leaves_nothing(tmp_path, capsys, monkeypatch):
    def fail(self: HIDiffLatentEncoder, folder: Path, **options: object) -> None:
        raise OSError("No space left on device")

    source = write(small_state_dicts(), tmp_path / "original")
    monkeypatch.setattr(HIDiffLatentEncoder, "save_pretrained", fail)
    assert_refused(capsys, source, because="No space left on device")


# The way back


def save_pipeline(folder: Path, **changes: ModelMixin) -> Path:
    components = {
        "condition_encoder": tiny.tiny_condition_encoder(),
        "denoiser": tiny.tiny_mixer_denoiser(),
        "transformer": tiny.tiny_transformer(),
    }
    HIDiffPipeline(**components | changes, scheduler=scheduler_of("gopro")).save_pretrained(folder)
    return folder


def test_a_folder_that_is_no_pipeline_does_not_turn_back(tmp_path, capsys):
    source = write(small_state_dicts(), tmp_path / "original")
    assert_refused(capsys, source, "--to_official", because="is no pipeline folder")


def test_a_damaged_component_does_not_turn_back(tmp_path, capsys):
    source = save_pipeline(tmp_path / "saved")
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert_refused(capsys, source, "--to_official", because="transformer cannot be read")


def test_settings_that_the_original_format_cannot_express_do_not_turn_back(tmp_path, capsys):
    source = save_pipeline(
        tmp_path / "saved",
        condition_encoder=tiny.tiny_condition_encoder(wide_head=True, activation="leaky_relu"),
        denoiser=tiny.tiny_mlp_denoiser(time_divisor=16.0),
    )
    assert_refused(capsys, source, "--to_official", because="An original net_d cannot express time_divisor=16.0.")
