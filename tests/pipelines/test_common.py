"""What diffusers' own tests ask of every pipeline, as far as a CPU can show it."""

import io
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import accelerate
import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_hidiff import HIDiffPipeline

RNG = np.random.default_rng(0)
NETWORKS = ("condition_encoder", "denoiser", "transformer")


@pytest.fixture
def inputs():
    return {"image": torch.rand(1, 3, 16, 24), "latents": torch.randn(1, 16, 16), "output_type": "pt"}


# Inputs


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_an_image_may_be_an_address(gopro_pipeline, inputs, tmp_path):
    photo = PIL.Image.fromarray(RNG.integers(0, 256, (9, 20, 3), dtype=np.uint8))
    photo.save(tmp_path / "photo.png")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=tmp_path)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/photo.png"
        fetched = gopro_pipeline(**inputs | {"image": address}).images
        server.shutdown()
    assert torch.equal(fetched, gopro_pipeline(**inputs | {"image": photo}).images)


def test_what_cannot_be_fetched_is_a_clear_error(gopro_pipeline, tmp_path):
    (tmp_path / "page.html").write_text("<p>not a picture</p>")
    whole = io.BytesIO()
    PIL.Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "PNG")
    (tmp_path / "torn.png").write_bytes(whole.getvalue()[:5000])
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=tmp_path)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_port}"
        for image in (f"{host}/page.html", f"{host}/missing.png", f"{host}/torn.png", str(tmp_path / "torn.png")):
            with pytest.raises(
                ValueError, match=f"`image` must be the path or URL of a readable image, got '{image}': "
            ):
                gopro_pipeline(image)
        server.shutdown()


def test_a_list_of_4d_tensors_is_one_batch(gopro_pipeline):
    images, latents = torch.rand(3, 3, 16, 24), torch.randn(3, 16, 16)
    batch = gopro_pipeline(images, latents=latents, output_type="pt").images
    for parts in (images.split(1), (images[:2], images[2:])):
        listed = gopro_pipeline(list(parts), latents=latents, output_type="pt").images
        assert torch.equal(listed, batch)


def test_the_progress_bar_counts_the_steps_and_can_be_switched_off(gopro_pipeline, inputs, capsys):
    gopro_pipeline.set_progress_bar_config(disable=False)
    gopro_pipeline(**inputs, num_inference_steps=4)
    assert "4/4" in capsys.readouterr().err
    gopro_pipeline.set_progress_bar_config(disable=True)
    gopro_pipeline(**inputs, num_inference_steps=4)
    assert capsys.readouterr().err == ""


# Files


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_pipeline_in_shards_gives_the_same_picture(gopro_pipeline, inputs, tmp_path, variant):
    expected = gopro_pipeline(**inputs).images
    gopro_pipeline.save_pretrained(tmp_path, max_shard_size="60KB", variant=variant)
    shards = list((tmp_path / "transformer").glob("*.safetensors"))
    assert len(shards) > 1
    assert all((variant is None) or (f".{variant}" in shard.name) for shard in shards)
    loaded = quiet(HIDiffPipeline.from_pretrained(tmp_path, variant=variant))
    assert torch.allclose(loaded(**inputs).images, expected, atol=1e-6)


def test_one_variant_does_not_stand_in_for_another(gopro_pipeline, tmp_path):
    gopro_pipeline.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(OSError, match="no file named"):
        HIDiffPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_is_that_of_every_network_and_of_no_prior(gopro_pipeline, inputs, tmp_path, name):
    expected = gopro_pipeline(**inputs).images
    gopro_pipeline.save_pretrained(tmp_path)
    loaded = quiet(HIDiffPipeline.from_pretrained(tmp_path, **{name: torch.bfloat16}))
    assert {getattr(loaded, network).dtype for network in NETWORKS} == {torch.bfloat16}
    assert (loaded(**inputs).images - expected).abs().mean() < 0.01
    assert loaded(**inputs | {"output_type": "latent"}).images.dtype == torch.float32


def test_a_part_may_be_given_instead_of_loaded(gopro_pipeline, tmp_path):
    gopro_pipeline.save_pretrained(tmp_path)
    loaded = HIDiffPipeline.from_pretrained(tmp_path, transformer=gopro_pipeline.transformer)
    assert loaded.transformer is gopro_pipeline.transformer
    assert loaded.denoiser is not gopro_pipeline.denoiser


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Offloading. The device that is offloaded from is the CPU itself here: the hooks run, and a pipeline that called anything
# but `forward`, or held on to a weight, would fail. How much memory it saves needs a GPU to show.


def test_networks_may_take_turns_on_the_device(gopro_pipeline, inputs):
    expected = gopro_pipeline(**inputs).images
    gopro_pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # the hooks are set again after a call
        assert torch.equal(gopro_pipeline(**inputs).images, expected)
    assert [hook.model for hook in gopro_pipeline._all_hooks] == [getattr(gopro_pipeline, name) for name in NETWORKS]


def test_weights_may_come_to_the_device_layer_by_layer(gopro_pipeline, inputs):
    """What `enable_sequential_cpu_offload` does. It calls the CPU cpu:0 itself, where Accelerate loses the parameters."""
    expected = gopro_pipeline(**inputs).images
    for name in NETWORKS:
        accelerate.cpu_offload(getattr(gopro_pipeline, name), torch.device("cpu"))
    for _ in range(2):
        assert torch.equal(gopro_pipeline(**inputs).images, expected)
    assert all(weight.is_meta for name in NETWORKS for weight in getattr(gopro_pipeline, name).parameters())


@pytest.mark.parametrize("options", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}])
def test_weights_may_come_to_the_device_group_by_group(gopro_pipeline, inputs, options):
    expected = gopro_pipeline(**inputs).images
    gopro_pipeline.enable_group_offload(torch.device("cpu"), **options)
    for _ in range(2):
        assert torch.equal(gopro_pipeline(**inputs).images, expected)


def test_weights_may_wait_on_the_disk(gopro_pipeline, inputs, tmp_path):
    """A folder for each network: diffusers names the files by modules, which the networks have alike."""
    expected = gopro_pipeline(**inputs).images
    for name in NETWORKS:
        (tmp_path / name).mkdir()
        getattr(gopro_pipeline, name).enable_group_offload(
            torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path / name)
        )
    assert torch.equal(gopro_pipeline(**inputs).images, expected)
