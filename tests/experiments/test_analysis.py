import diffusers
import numpy as np
import pytest
import torch
from tiny import tiny_latent_encoder

from diffusers_hidiff.cli.main import main
from diffusers_hidiff.experiments.attention_maps import LEVELS, attention_maps, attention_sheet
from diffusers_hidiff.experiments.latent_chain import chain_figure, follow_chain
from diffusers_hidiff.experiments.prior_sensitivity import priors_to_try, sensitivity_sheet
from diffusers_hidiff.image_files import write_image
from diffusers_hidiff.utils.panels import encoded

RNG = np.random.default_rng(0)
BLURRY, SHARP, OTHER = RNG.integers(0, 256, (3, 20, 28, 3), dtype=np.uint8)
PNG, JPEG = b"\x89PNG", b"\xff\xd8\xff"


@pytest.fixture(params=["gopro_pipeline", "realblur_pipeline"])
def pipeline(request):
    return request.getfixturevalue(request.param)


def test_the_chain_ends_in_the_picture_of_the_pipeline(pipeline):
    followed = follow_chain(pipeline, BLURRY, seed=5)
    generator = torch.Generator().manual_seed(5)
    expected = pipeline(BLURRY, generator=generator).images[0]
    assert [step.timestep for step in followed] == list(range(len(followed) - 1, -1, -1))
    assert np.array_equal(followed[-1].image, np.asarray(expected))
    assert len(follow_chain(pipeline, BLURRY, steps=2)) == 2
    assert encoded(chain_figure(followed, BLURRY, SHARP), ".png").startswith(PNG)
    assert encoded(chain_figure(followed, BLURRY, None), ".jpg").startswith(JPEG)


def test_a_scheduler_without_a_clean_estimate_cannot_be_followed(gopro_pipeline):
    config = gopro_pipeline.scheduler.config
    gopro_pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config)
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler does not return the clean estimate"):
        follow_chain(gopro_pipeline, BLURRY)


def test_the_attention_of_a_pixel_sums_to_one_at_every_level(pipeline):
    maps = attention_maps(pipeline, BLURRY)
    assert tuple(maps) == LEVELS
    shapes = {"encoder1": (16, 24, 32), "encoder2": (4, 12, 16), "encoder3": (4, 6, 8), "refinement": (16, 24, 32)}
    for level, shape in shapes.items():
        assert maps[level].shape == shape
    for level in LEVELS:
        np.testing.assert_allclose(maps[level].sum(axis=0), 1, atol=1e-5)
    assert encoded(attention_sheet(maps["encoder3"], BLURRY), ".png").startswith(PNG)


def test_looking_at_attention_leaves_no_trace(gopro_pipeline):
    gopro_pipeline.transformer.enable_slicing(megabytes=2)
    attention_maps(gopro_pipeline, BLURRY)
    assert gopro_pipeline.transformer.tile_megabytes == 2
    assert not any(module._forward_pre_hooks for module in gopro_pipeline.transformer.modules())


def test_every_prior_but_its_own_changes_the_picture(realblur_pipeline):
    encoder = tiny_latent_encoder(wide_head=True, activation="leaky_relu")
    priors = priors_to_try(realblur_pipeline, BLURRY, OTHER, SHARP, encoder)
    names = ["its own", "another seed", "tokens shuffled", "another image's", "zero", "oracle (sees sharp)"]
    assert list(priors) == names
    picture, means = sensitivity_sheet(realblur_pipeline, BLURRY, priors, SHARP)
    assert means["its own"] == 0
    assert all(means[name] > 0 for name in ("tokens shuffled", "another image's", "zero", "oracle (sees sharp)"))
    assert encoded(picture, ".png").startswith(PNG)
    assert list(priors_to_try(realblur_pipeline, BLURRY)) == ["its own", "another seed", "tokens shuffled", "zero"]


@pytest.mark.parametrize("question", ["chain", "attention", "sensitivity"])
def test_the_command_writes_a_picture(realblur_pipeline, tmp_path, question, capsys):
    realblur_pipeline.save_pretrained(tmp_path / "model")
    write_image(tmp_path / "blurry.png", BLURRY)
    write_image(tmp_path / "sharp.png", SHARP)
    arguments = [question, str(tmp_path / "blurry.png"), "--sharp", str(tmp_path / "sharp.png")]
    output = tmp_path / "new" / "picture.png"
    assert main(["analyse", *arguments, "--model", str(tmp_path / "model"), "--output", str(output)]) == 0
    assert output.read_bytes().startswith(PNG)
    assert "Written" in capsys.readouterr().out


def test_a_sharp_image_of_another_size_is_refused(realblur_pipeline, tmp_path, capsys):
    write_image(tmp_path / "blurry.png", BLURRY)
    write_image(tmp_path / "sharp.png", SHARP[:10])
    arguments = ["chain", str(tmp_path / "blurry.png"), "--sharp", str(tmp_path / "sharp.png")]
    assert main(["analyse", *arguments, "--output", str(tmp_path / "picture.png")]) == 2
    assert "--sharp must have the size of the image" in capsys.readouterr().err
    assert not (tmp_path / "picture.png").exists()


def test_another_kind_of_picture_is_refused_before_any_work(tmp_path, capsys):
    assert main(["analyse", "chain", str(tmp_path / "none.png"), "--output", str(tmp_path / "picture.gif")]) == 2
    assert "--output must be a .png or .jpg file" in capsys.readouterr().err
