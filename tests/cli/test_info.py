import json
import os
import runpy
import subprocess
import sys

import diffusers
import pytest
import torch
from tiny import NUM_TOKENS, PRIOR_DIM, tiny_condition_encoder, tiny_mlp_denoiser, tiny_transformer

import diffusers_hidiff
from diffusers_hidiff import HIDiffPipeline, HIDiffScheduler
from diffusers_hidiff.cli import facts as told
from diffusers_hidiff.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny pipeline of the RealBlur family."""
    scheduler = HIDiffScheduler(16, beta_schedule="scaled_linear", prediction_type="sample", clip_sample=False)
    encoder = tiny_condition_encoder(activation="leaky_relu", wide_head=True)
    folder = tmp_path_factory.mktemp("model")
    HIDiffPipeline(encoder, tiny_mlp_denoiser(), scheduler, tiny_transformer()).save_pretrained(folder)
    return str(folder)


def facts(capsys, *arguments):
    assert main(["info", *arguments, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_tells_components_scheduler_versions_and_devices(model, capsys):
    told = facts(capsys, model, "--size", "64x32")
    parameters = sum(p.numel() for p in tiny_transformer().parameters())
    assert told["model"] == model
    assert told["components"]["transformer"] == {"class": "HIDiffTransformer", "parameters": parameters}
    assert told["components"]["denoiser"]["class"] == "HIDiffMLPDenoiser"
    assert told["scheduler"]["num_train_timesteps"] == len(told["scheduler"]["betas"]) == 16
    assert told["scheduler"]["prediction_type"] == "sample"
    assert (told["scheduler"]["betas"][0], told["scheduler"]["betas"][-1]) == (0.1, 0.99)
    assert told["versions"]["diffusers_hidiff"] == diffusers_hidiff.__version__
    assert told["versions"]["diffusers"] == diffusers.__version__
    assert told["versions"]["torch"] == torch.__version__
    assert told["devices"][-1]["device"] == "cpu"
    assert told["devices"][-1]["memory_gib"] > 0


def test_the_denoiser_costs_its_layers_times_the_steps(model, capsys):
    told = facts(capsys, model, "--size", "64x32")
    layers = (2 * PRIOR_DIM + 1) * PRIOR_DIM + 2 * PRIOR_DIM * PRIOR_DIM  # multiply-adds of a token
    assert told["cost"]["gmacs"]["denoiser"] == pytest.approx(16 * NUM_TOKENS * layers / 1e9)


def test_the_cost_is_that_of_the_padded_image_and_grows_with_its_pixels(model, capsys):
    odd, padded, double = (facts(capsys, model, "--size", size)["cost"] for size in ("61x27", "64x32", "64x64"))
    assert odd["padded_size"] == [64, 32]
    assert odd["gmacs"] == padded["gmacs"]
    assert padded["gmacs"]["total"] == pytest.approx(sum(padded["gmacs"].values()) / 2)
    ratio = double["gmacs"]["transformer"] / padded["gmacs"]["transformer"]
    assert 1.8 < ratio < 2  # but for what the prior costs


def test_text_tells_the_same_in_a_table(model, capsys):
    assert main(["info", model, "--size", "64x32"]) == 0
    text = capsys.readouterr().out
    for expected in ("HIDiffTransformer", "total", "num_train_timesteps: 16", "diffusers_hidiff: ", "64x32", "cpu: "):
        assert expected in text


def test_a_size_that_is_none_is_refused(capsys):
    for size in ("1280", "0x5", "axb"):
        with pytest.raises(SystemExit) as stopped:
            main(["info", "--size", size])
        assert stopped.value.code == 2
        assert "must be width x height such as 1280x720" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path, capsys):
    assert main(["info", str(tmp_path)]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith(f"hidiff: The model {str(tmp_path)!r} cannot be loaded: ")
    assert complaint.count("\n") == 1


def test_a_graphics_card_is_told_with_its_memory(monkeypatch):
    class Card:
        total_memory = 8 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    assert told.devices()[0] == {"device": "cuda:0", "name": "Card", "memory_gib": 8.0}


def test_a_reader_that_leaves_is_no_error_to_tell(model):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "diffusers_hidiff", "info", model, "--size", "8x8"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hidiff", "--version"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("diffusers_hidiff", run_name="__main__")
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"hidiff {diffusers_hidiff.__version__}\n"


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
