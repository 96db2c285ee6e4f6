import inspect

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from tiny import tiny_condition_encoder, tiny_latent_encoder, tiny_mixer_denoiser, tiny_mlp_denoiser, tiny_transformer

from diffusers_hidiff import HIDiffPipeline, HIDiffScheduler

RNG = np.random.default_rng(0)


def photo(height, width):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(generators) > 1 else generators[0]


@pytest.fixture(params=["gopro_pipeline", "realblur_pipeline"])
def pipeline(request):
    return request.getfixturevalue(request.param)


def test_the_pipeline_is_condition_then_chain_then_transformer(pipeline):
    image = torch.rand(1, 3, 16, 24)
    latents = torch.randn(1, 16, 16)
    scheduler, sample = pipeline.scheduler, latents
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    with torch.no_grad():
        condition = pipeline.condition_encoder(image).sample
        for t in scheduler.timesteps:
            sample = scheduler.step(pipeline.denoiser(sample, t, condition).sample, t, sample).prev_sample
        expected = pipeline.transformer(image, sample).sample
    assert torch.equal(pipeline(image, latents=latents, output_type="latent").images, sample)
    assert torch.allclose(pipeline(image, latents=latents, output_type="pt").images, expected.clamp(0, 1), atol=1e-6)
    assert pipeline.num_timesteps == scheduler.config.num_train_timesteps


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 3000), (7, 9), (16, 16), (33, 20)])
def test_any_size_comes_back_at_its_size(gopro_pipeline, height, width):
    restored = gopro_pipeline(photo(height, width), generator=seeded(0)).images[0]
    assert restored.size == (width, height)


def test_padding_does_not_show_in_an_image_whose_size_needs_none(gopro_pipeline):
    image = torch.rand(3, 20, 30)
    padded = torch.nn.functional.pad(image[None], (0, 2, 0, 4), mode="reflect")
    latents = torch.randn(1, 16, 16)
    small = gopro_pipeline(image, latents=latents, output_type="pt").images
    large = gopro_pipeline(padded, latents=latents, output_type="pt").images
    assert torch.allclose(small, large[..., :20, :30], atol=1e-6)


def test_a_list_of_different_sizes_gives_each_image_what_it_gets_alone(pipeline):
    images = [photo(16, 24), photo(9, 30), photo(16, 24), photo(40, 8)]
    together = pipeline(images, generator=seeded(1, 2, 3, 4), output_type="np").images
    for seed, image, restored in zip((1, 2, 3, 4), images, together, strict=True):
        alone = pipeline(image, generator=seeded(seed), output_type="np").images[0]
        assert np.abs(alone - restored).max() < 1e-5


def test_the_same_seed_gives_the_same_picture_and_another_another(pipeline):
    image = photo(16, 16)
    first, again, other = (pipeline(image, generator=seeded(s), output_type="latent").images for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_prior_skips_the_diffusion(gopro_pipeline):
    image, latents = photo(16, 16), torch.randn(1, 16, 16)
    prior = gopro_pipeline(image, latents=latents, output_type="latent").images
    expected = gopro_pipeline(image, latents=latents, output_type="np").images
    gopro_pipeline.denoiser.forward = None  # would fail if called
    assert np.array_equal(gopro_pipeline(image, prior=prior, output_type="np").images, expected)
    assert gopro_pipeline.num_timesteps == 0


def test_output_types_and_the_tuple(gopro_pipeline):
    image, options = photo(16, 16), {"latents": torch.randn(1, 16, 16)}
    as_pil = gopro_pipeline(image, **options).images
    as_np = gopro_pipeline(image, output_type="np", **options).images
    as_pt = gopro_pipeline(image, output_type="pt", return_dict=False, **options)[0]
    assert isinstance(as_pil[0], PIL.Image.Image)
    assert as_np.shape == (1, 16, 16, 3)
    assert torch.equal(torch.from_numpy(as_np).permute(0, 3, 1, 2), as_pt)
    assert np.array_equal(np.asarray(as_pil[0]), (as_np[0] * 255).round().astype(np.uint8))


def test_the_callback_sees_every_step_and_may_replace_the_latents(pipeline):
    steps = []

    def callback(pipe, index, timestep, kwargs):
        steps.append((index, int(timestep)))
        last = index == pipe.num_timesteps - 1
        return {"latents": torch.zeros_like(kwargs["latents"])} if last else kwargs

    prior = pipeline(photo(8, 8), num_inference_steps=4, callback_on_step_end=callback, output_type="latent").images
    assert [index for index, _ in steps] == [0, 1, 2, 3]
    assert steps[0][1] == pipeline.scheduler.config.num_train_timesteps - 1
    assert not prior.any()


def test_chosen_timesteps_are_taken(gopro_pipeline):
    seen = []
    gopro_pipeline(
        photo(8, 8),
        timesteps=[7, 4, 0],
        callback_on_step_end=lambda pipe, index, timestep, kwargs: seen.append(int(timestep)) or kwargs,
    )
    assert seen == [7, 4, 0]


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_schedulers_of_diffusers_drop_in(pipeline, name):
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    prior = pipeline(photo(8, 8), num_inference_steps=4, output_type="latent", generator=seeded(0)).images
    assert prior.isfinite().all()
    if pipeline.scheduler.config.get("clip_sample"):
        assert prior.abs().max() <= 1 + 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_same_picture(pipeline, dtype):
    image, latents = photo(32, 32), torch.randn(1, 16, 16)
    exact = pipeline(image, latents=latents, output_type="np").images
    prior = pipeline.to(dtype)(image, latents=latents, output_type="latent").images
    half = pipeline(image, latents=latents, output_type="np").images
    assert prior.dtype == torch.float32
    assert np.abs(half - exact).mean() < 0.01


def test_saving_and_loading_changes_nothing(pipeline, tmp_path):
    image, latents = photo(16, 16), torch.randn(1, 16, 16)
    expected = pipeline(image, latents=latents, output_type="np").images
    pipeline.save_pretrained(tmp_path)
    loaded = HIDiffPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    # Not to the bit: MKL rounds differently where the file's layout puts a weight at another alignment.
    np.testing.assert_allclose(loaded(image, latents=latents, output_type="np").images, expected, atol=1e-6)
    index = HIDiffPipeline.load_config(tmp_path)
    assert index["transformer"] == ["diffusers_hidiff", "HIDiffTransformer"]


def test_variants_shards_and_dtype_load(gopro_pipeline, tmp_path):
    gopro_pipeline.to(torch.float16).save_pretrained(tmp_path, variant="fp16", max_shard_size="60KB")
    assert len(list((tmp_path / "transformer").glob("*.fp16*.safetensors"))) > 1
    loaded = HIDiffPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert {component.dtype for component in (loaded.transformer, loaded.denoiser)} == {torch.float16}


def test_components_are_shared_by_from_pipe_and_components(gopro_pipeline):
    again = HIDiffPipeline(**gopro_pipeline.components)
    assert again.transformer is gopro_pipeline.transformer
    assert set(gopro_pipeline.components) == {"condition_encoder", "denoiser", "scheduler", "transformer"}


def test_the_call_has_the_promised_signature():
    assert list(inspect.signature(HIDiffPipeline.__call__).parameters)[1:] == [
        *("image", "num_inference_steps", "timesteps", "generator", "latents", "prior", "output_type", "return_dict"),
        *("callback_on_step_end", "callback_on_step_end_tensor_inputs", "num_priors", "average", "self_ensemble"),
        *("tile", "tile_overlap"),
    ]


ZEROS = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"output_type": "jpg"}, ValueError, r"`output_type` must be one of .*, got 'jpg'"),
        ({"num_inference_steps": 9}, ValueError, "`num_inference_steps` must lie between 1 and .*=8, got 9"),
        ({"num_inference_steps": 0}, ValueError, "`num_inference_steps` must lie between 1"),
        ({"num_inference_steps": 2.5}, TypeError, "`num_inference_steps` must be an integer, got 2.5"),
        ({"num_inference_steps": 2, "timesteps": [7]}, ValueError, "Only one of `num_inference_steps` and `timesteps`"),
        ({"timesteps": [7, 7]}, ValueError, r"`timesteps` must descend, got \[7, 7\]"),
        ({"timesteps": [0, 7]}, ValueError, "`timesteps` must descend"),
        ({"timesteps": [8, 1]}, ValueError, "`timesteps` must lie between 0 and 7"),
        ({"timesteps": [5, 1]}, ValueError, "`timesteps` must begin at 7"),
        ({"timesteps": []}, ValueError, "`timesteps` must lie between 0 and 7, got"),
        ({"generator": [torch.Generator()] * 2}, ValueError, "one per image, got 2 for 1 image"),
        ({"latents": torch.zeros(1, 16, 8)}, ValueError, r"`latents` must have shape \(1, 16, 16\), got \(1, 16, 8\)"),
        ({"latents": torch.full((1, 16, 16), torch.nan)}, ValueError, "`latents` must be finite"),
        ({"prior": torch.zeros(2, 16, 16)}, ValueError, r"`prior` must have shape \(1, 16, 16\)"),
        ({"prior": [1]}, TypeError, "`prior` must be a tensor, got list"),
        ({"prior": torch.zeros(1, 16, 16), "latents": torch.zeros(1, 16, 16)}, ValueError, "Only one of `latents`"),
        ({"callback_on_step_end": 3}, TypeError, "`callback_on_step_end` must be callable, got int"),
        (
            {"callback_on_step_end_tensor_inputs": ["noise"]},
            ValueError,
            r"must be among \['latents'\], got \['noise'\]",
        ),
        ({"image": []}, ValueError, "`image` must hold at least one image"),
    ],
)
def test_bad_arguments_are_refused_before_any_network_runs(gopro_pipeline, arguments, error, sentence):
    for network in (gopro_pipeline.condition_encoder, gopro_pipeline.denoiser, gopro_pipeline.transformer):
        network.forward = None
    with pytest.raises(error, match=sentence):
        gopro_pipeline(**{"image": ZEROS} | arguments)


def test_components_that_do_not_fit_are_refused():
    parts = (tiny_condition_encoder(), tiny_mixer_denoiser(), HIDiffScheduler())
    with pytest.raises(ValueError, match=r"priors of the same width, got .*'transformer': 32"):
        HIDiffPipeline(*parts, tiny_transformer(prior_dim=32))
    with pytest.raises(ValueError, match="priors of the same number of tokens"):
        HIDiffPipeline(*parts, tiny_transformer(num_prior_tokens=4))
    with pytest.raises(ValueError, match="`condition_encoder` must have in_channels=3"):
        HIDiffPipeline(tiny_latent_encoder(), tiny_mlp_denoiser(), HIDiffScheduler(), tiny_transformer())


def test_a_model_on_the_disk_is_not_changed_by_a_call(gopro_pipeline):
    before = {name: value.clone() for name, value in gopro_pipeline.transformer.state_dict().items()}
    gopro_pipeline(ZEROS)
    assert all(torch.equal(before[name], value) for name, value in gopro_pipeline.transformer.state_dict().items())
    assert all(p.grad is None for p in gopro_pipeline.transformer.parameters())


def test_several_priors_of_an_image_are_averaged(pipeline):
    image = photo(16, 24)
    generator = seeded(3)
    alone = [pipeline(image, generator=generator, output_type="latent").images for _ in range(3)]
    mean = torch.stack(alone).mean(dim=0)
    found = pipeline(image, generator=seeded(3), num_priors=3, output_type="latent").images
    torch.testing.assert_close(found, mean)
    expected = pipeline(image, prior=mean, output_type="pt").images
    torch.testing.assert_close(pipeline(image, generator=seeded(3), num_priors=3, output_type="pt").images, expected)


@pytest.fixture
def mild_pipeline(realblur_pipeline):
    """Its images stay within 0 and 1, so that no clamp stands between them and their mean."""
    with torch.no_grad():
        realblur_pipeline.transformer.conv_out.weight.mul_(0.01)
    return realblur_pipeline


def test_or_their_images_are(mild_pipeline):
    image = torch.rand(1, 3, 16, 24) / 2 + 0.25
    generator = seeded(3)
    alone = [mild_pipeline(image, generator=generator, output_type="pt").images for _ in range(3)]
    assert all(((one > 0) & (one < 1)).all() for one in alone)
    assert not torch.equal(alone[0], alone[1])
    found = mild_pipeline(image, generator=seeded(3), num_priors=3, average="image", output_type="pt").images
    torch.testing.assert_close(found, torch.stack(alone).mean(dim=0))


def test_a_scheduler_that_remembers_steps_begins_anew_for_every_prior(gopro_pipeline):
    config = gopro_pipeline.scheduler.config
    gopro_pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config)
    image, generator = photo(8, 8), seeded(3)
    alone = [gopro_pipeline(image, generator=generator, output_type="latent").images for _ in range(2)]
    found = gopro_pipeline(image, generator=seeded(3), num_priors=2, output_type="latent").images
    torch.testing.assert_close(found, torch.stack(alone).mean(dim=0))


def test_the_self_ensemble_is_the_mean_over_flips_and_rotations(mild_pipeline):
    image, latents = torch.rand(1, 3, 16, 24) / 2 + 0.25, torch.randn(1, 16, 16)
    total = torch.zeros_like(image)
    for flip in (False, True):
        for turns in range(4):
            turned = torch.rot90(image.flip(-1) if flip else image, turns, (2, 3))
            restored = mild_pipeline(turned, latents=latents, output_type="pt").images
            restored = torch.rot90(restored, -turns, (2, 3))
            total += (restored.flip(-1) if flip else restored) / 8
    found = mild_pipeline(image, latents=latents, self_ensemble=True, output_type="pt").images
    torch.testing.assert_close(found, total)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_priors": 0}, ValueError, "`num_priors` must be at least 1, got 0"),
        ({"num_priors": 1.5}, TypeError, "`num_priors` must be an integer, got 1.5"),
        ({"num_priors": 2, "latents": torch.zeros(1, 16, 16)}, ValueError, "`num_priors` must be 1 if"),
        ({"average": "mean"}, ValueError, "`average` must be 'prior' or 'image', got 'mean'"),
        ({"self_ensemble": True, "output_type": "latent"}, ValueError, "`self_ensemble` needs a prior for each"),
        ({"self_ensemble": True, "prior": torch.zeros(1, 16, 16)}, ValueError, "`self_ensemble` needs a prior for"),
    ],
)
def test_averages_that_make_no_sense_are_refused(gopro_pipeline, options, error, message):
    with pytest.raises(error, match=message):
        gopro_pipeline(photo(8, 8), **options)
