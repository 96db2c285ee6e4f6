import csv
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scored import noise, write, write_pairs
from tiny import tiny_condition_encoder, tiny_latent_encoder, tiny_mixer_denoiser, tiny_transformer

from diffusers_hidiff import HIDiffPipeline, HIDiffScheduler
from diffusers_hidiff.cli.main import main
from diffusers_hidiff.metrics.psnr import psnr_of_arrays

LAUNCH = ("-m", "torch.distributed.run", "--nproc_per_node", "3", "--master_port")
HIDIFF = ("-m", "diffusers_hidiff", "evaluate")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny pipeline that changes an image a little, as a trained one does."""
    transformer = tiny_transformer()
    with torch.no_grad():
        transformer.conv_out.weight.mul_(0.05)
    pipeline = HIDiffPipeline(tiny_condition_encoder(), tiny_mixer_denoiser(), HIDiffScheduler(), transformer)
    folder = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the pairs `data`."""
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "data", 5)
    return tmp_path


@pytest.fixture
def evaluate(folder, model, capsys):
    """Runs `hidiff evaluate` on the tiny pipeline; returns the exit status, what it prints, and what it complains of."""

    def run(*arguments, output="out", dataset="data"):
        status = main(["evaluate", "--dataset", dataset, *options(model, output), *arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def options(model, output):
    return ["--model", model, "--output", output, "--device", "cpu", "--workers", "0"]


def table(output="out"):
    with open(f"{output}/metrics.csv") as file:
        return {line["name"]: line for line in csv.DictReader(file)}


def summary(output="out"):
    """Strict JSON, without what may differ from run to run."""
    values = json.loads(Path(output, "summary.json").read_text(), parse_constant=pytest.fail)
    del values["timings"]
    return values


def rows(output="out"):
    return {file.name: file.stat().st_mtime_ns for file in Path(output, "rows").glob("[0-9]*.json")}


def test_figures_are_those_of_the_files_that_deblur_writes(evaluate, model):
    assert evaluate("--seed", "3")[0] == 0
    main(["deblur", "data/blurry", "--output", "restored", "--model", model, "--device", "cpu", "--seed", "3"])
    main(["score", "restored", "data/sharp", "--output", "scored", "--workers", "0"])
    assert summary()["metrics"] == summary("scored")["metrics"]
    assert [line["ssim"] for line in table().values()] == [line["ssim"] for line in table("scored").values()]


def test_every_image_has_a_line_with_what_it_was_made_with(evaluate):
    evaluate("--steps", "4", "--scheduler", "ddim", "--seed", "2")
    line = table()["03"]
    assert (line["width"], line["height"], line["steps"], line["seed"]) == ("24", "16", "4", "2")
    assert line["scheduler"] == "DDIMScheduler"
    assert float(line["seconds"]) > 0


def test_the_summary_tells_model_versions_and_device(evaluate, model):
    status, printed, _ = evaluate()
    assert status == 0
    assert printed.startswith("| data (gopro protocol) | PSNR (dB) | SSIM | images |")
    told = summary()
    assert told["model"]["name"] == model
    assert told["model"]["revision"] is None
    assert len(told["model"]["sha256"]) == 64
    assert told["versions"]["torch"] == torch.__version__
    assert (told["device"], told["dtype"], told["steps"], told["scored"]) == ("cpu", "float32", 8, 5)
    assert Path("out", "sheet.jpg").stat().st_size > 0


def test_blurry_images_and_the_prior_of_stage_1_are_scored_beside(evaluate, model, folder):
    shutil.copytree(model, "with encoder")
    encoder = tiny_latent_encoder()
    encoder.save_pretrained(folder / "with encoder" / "latent_encoder")
    status, printed, _ = evaluate("--model", "with encoder", "--beside", "blurry", "oracle")
    assert status == 0
    line = table()["02"]
    blurry, sharp = noise(16, 24, 4), noise(16, 24, 5)
    assert float(line["blurry_psnr"]) == pytest.approx(psnr_of_arrays(blurry, sharp), abs=1e-5)
    pipeline = HIDiffPipeline.from_pretrained(model)
    with torch.no_grad():
        prior = encoder(*(torch.tensor(image).permute(2, 0, 1)[None] / 255 for image in (blurry, sharp))).sample
    restored = np.asarray(pipeline(blurry, prior=prior).images[0])
    assert float(line["oracle_psnr"]) == pytest.approx(psnr_of_arrays(restored, sharp), abs=1e-5)
    gains = [float(line["psnr"]) - float(line["blurry_psnr"]) for line in table().values()]
    assert summary()["gains"]["restored"]["mean"] == pytest.approx(np.mean(gains), abs=1e-5)
    assert "| with the prior of stage 1, which sees the sharp image |" in printed
    assert printed.count("| 24x16 |") == 5
    assert Path("out", "gains.png").read_bytes().startswith(b"\x89PNG")


def test_the_oracle_needs_the_encoder_of_stage_1(evaluate):
    status, _, complaint = evaluate("--beside", "oracle")
    assert (status, complaint.count("\n")) == (2, 1)
    assert "--beside oracle needs a model in a folder that holds latent_encoder/" in complaint


def test_what_stands_beside_does_not_change_the_figures_or_depend_on_the_processes_that_score(evaluate):
    evaluate()
    evaluate("--beside", "blurry", "--workers", "2", output="beside")
    assert {name: summary("beside")["metrics"][name] for name in ("psnr", "ssim")} == summary()["metrics"]
    assert [line["psnr"] for line in table().values()] == [line["psnr"] for line in table("beside").values()]


def test_a_named_data_set_is_shown_beside_the_paper(evaluate, folder):
    for scene in range(12):
        write(folder / "realblur" / f"scene{scene}" / "blur" / "blur_1.png", noise(32, 40, 2 * scene))
        write(folder / "realblur" / f"scene{scene}" / "gt" / "gt_1.png", noise(32, 40, 2 * scene))
    status, printed, _ = evaluate("--data_dir", "realblur", dataset="realblur_r")
    assert status == 0
    assert "trained on RealBlur-R | 41.01 | 0.978 | 980 |" in printed
    assert "12 of 12" in printed


def test_another_protocol_than_the_data_sets_is_refused(evaluate):
    status, _, complaint = evaluate("--data_dir", "data", "--protocol", "gopro", dataset="realblur_r")
    assert (status, complaint) == (2, "hidiff: RealBlur-R is scored by --protocol realblur, got 'gopro'.\n")


def test_images_of_any_size_are_scored_and_damaged_ones_named(evaluate, folder):
    for name in ("blurry", "sharp"):
        write(folder / "data" / name / "one pixel.png", noise(1, 1))
        write(folder / "data" / name / "small.png", noise(5, 3))
    write(folder / "data" / "blurry" / "01.png", noise(16, 25))
    (folder / "data" / "blurry" / "02.png").write_bytes(b"no image")
    status, printed, complaints = evaluate()
    assert status == 1
    assert "5 scored, 2 failed" in printed
    assert "01: The restored image is 25x16 pixels, the sharp one 24x16." in complaints
    assert [failure["name"] for failure in summary()["failed"]] == ["01", "02"]
    assert table()["one pixel"]["error"] == ""
    finite = [float(line["psnr"]) for line in table().values() if line["psnr"]]
    assert summary()["metrics"]["psnr"]["mean"] == pytest.approx(np.mean(finite), abs=1e-5)


@pytest.mark.parametrize(
    ("changed", "said"),
    [(("--seed", "1"), "seed is 1 and was 0"), (("--steps", "2"), "steps is 2 and was 8")],
)
def test_a_changed_setting_in_the_same_folder_is_refused(changed, said, evaluate):
    evaluate()
    before = summary()
    status, _, complaint = evaluate(*changed)
    assert status == 2
    assert complaint.count("\n") == 1
    assert said in complaint
    assert summary() == before


def test_other_weights_under_the_same_name_are_refused(evaluate, model, folder):
    pipeline = HIDiffPipeline.from_pretrained(model)
    pipeline.save_pretrained(folder / "mine")
    evaluate("--model", "mine")
    with torch.no_grad():
        pipeline.transformer.conv_out.weight.mul_(0.9)
    pipeline.save_pretrained(folder / "mine")
    status, _, complaint = evaluate("--model", "mine")
    assert status == 2
    assert "(model.sha256 is" in complaint


def test_a_data_set_that_is_none_is_one_sentence(evaluate):
    status, _, complaint = evaluate(dataset="gopro")
    assert (status, complaint) == (
        2,
        "hidiff: --dataset gopro needs --data_dir, the folder where your copy of it lies.\n",
    )


# Other processes


def test_three_processes_give_the_summary_of_one(evaluate, folder, model):
    (folder / "data" / "blurry" / "02.png").write_bytes(b"no image")
    assert evaluate(output="one")[0] == 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, *LAUNCH, port, *HIDIFF, "--dataset", "data", *options(model, "three")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "4 scored, 1 failed" in done.stdout, done.stderr
    assert json.loads(Path("three", "summary.json").read_text())["timings"]["processes"] == 3
    assert summary("three") == summary("one")
    assert [line["psnr"] for line in table("three").values()] == [line["psnr"] for line in table("one").values()]


def test_a_killed_evaluation_goes_on_where_it_was(evaluate, folder, model):
    write_pairs(folder / "data", 30, 48, 64)
    command = [sys.executable, *HIDIFF, "--dataset", "data", *options(model, "out")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        deadline = time.monotonic() + 300
        while len(rows()) < 3:
            assert killed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        killed.kill()
    before = rows()
    assert 3 <= len(before) < 30
    assert not Path("out", "summary.json").exists()

    assert evaluate()[0] == 0
    after = rows()
    assert len(after) == 30
    assert before.items() <= after.items()  # none was made again
    assert evaluate(output="at once")[0] == 0
    assert summary() == summary("at once")


def test_help_says_what_is_expected(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    printed = capsys.readouterr().out
    for expected in ("test/SEQUENCE/blur/ and sharp/", "RealBlur_J_test_list.txt", "untried on the real data"):
        assert expected in printed
