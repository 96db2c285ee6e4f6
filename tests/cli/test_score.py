import csv
import json

import numpy as np
import PIL.Image
import pytest
from scored import FIGURES, golden_pair, noise, write

from diffusers_hidiff.cli import CommandError, evaluate
from diffusers_hidiff.cli.main import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with restored/ and sharp/ of the golden pairs."""
    monkeypatch.chdir(tmp_path)
    for name in FIGURES:
        restored, sharp = golden_pair(name)
        write(tmp_path / "restored" / f"{name}.png", restored)
        write(tmp_path / "sharp" / f"{name}.png", sharp)
    return tmp_path


@pytest.fixture
def score(folder, capsys):
    """Runs `hidiff score`; returns the exit status, what it prints, and what it complains of."""

    def run(*arguments, output="out"):
        status = main(["score", "restored", "sharp", *arguments, "--output", output, "--workers", "0"])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def table(output="out"):
    with open(f"{output}/metrics.csv") as file:
        return {line["name"]: line for line in csv.DictReader(file)}


def summary(output="out"):
    with open(f"{output}/summary.json") as file:
        return json.load(file, parse_constant=pytest.fail)


@pytest.mark.parametrize(("protocol", "decibels", "ssim"), [("gopro", 1e-4, 1e-5), ("realblur", 0.01, 1e-3)])
def test_two_folders_get_the_published_figures(protocol, decibels, ssim, score):
    status, printed, _ = score("--protocol", protocol)
    assert status == 0
    assert "3 scored, 0 failed; in out" in printed
    for name, line in table().items():
        assert float(line["psnr"]) == pytest.approx(FIGURES[name][f"{protocol}_psnr"], abs=decibels)
        assert float(line["ssim"]) == pytest.approx(FIGURES[name][f"{protocol}_ssim"], abs=ssim)
        assert list(line) == ["name", "psnr", "ssim", "width", "height", "error"]
    mean = np.mean([figures[f"{protocol}_psnr"] for figures in FIGURES.values()])
    assert summary()["metrics"]["psnr"]["mean"] == pytest.approx(mean, abs=decibels)


def test_the_sheet_has_a_column_more_with_the_blurry_images(score, folder):
    score()
    for name in FIGURES:
        write(folder / "blurry" / f"{name}.png", golden_pair(name)[0])
    score("--blurry", "blurry", output="out2")
    sizes = []
    for output in ("out", "out2"):
        with PIL.Image.open(f"{output}/sheet.jpg") as sheet:
            sizes.append(sheet.size)
    assert sizes[0][0] == sizes[1][0] == 1650
    assert sizes[0][1] > sizes[1][1]  # more columns of the same total width: smaller pictures


def test_identical_images_are_inf_in_the_csv_and_a_count_in_the_summary(score, folder):
    write(folder / "restored" / "odd.png", golden_pair("odd")[1])
    assert score()[0] == 0
    assert table()["odd"]["psnr"] == "inf"
    assert summary()["metrics"]["psnr"] == {"mean": None, "interval_95": None, "infinite": 1}


def test_what_cannot_be_scored_is_named_and_the_rest_is_scored(score, folder):
    write(folder / "restored" / "odd.png", noise(20, 20))
    (folder / "restored" / "street.png").write_text("no image")
    write(folder / "sharp" / "zebra.png", noise())
    status, printed, complaints = score()
    assert status == 1
    assert "1 scored, 3 failed" in printed
    assert "Failed: odd, street, zebra." in printed
    assert "odd: The restored image is 20x20 pixels, the sharp one 203x149." in complaints
    assert "zebra: There is no restored image." in complaints
    assert summary()["metrics"]["psnr"]["mean"] == pytest.approx(FIGURES["people"]["gopro_psnr"], abs=1e-4)


def test_an_alignment_that_fails_and_a_tiny_image_are_named(score, folder):
    write(folder / "restored" / "odd.png", np.zeros_like(golden_pair("odd")[0]))
    write(folder / "restored" / "street.png", noise(8, 8))
    write(folder / "sharp" / "street.png", noise(8, 8))
    assert score("--protocol", "realblur")[0] == 1
    assert table()["odd"]["error"].startswith("The alignment does not converge")
    assert table()["street"]["error"]
    assert table()["people"]["error"] == ""


def test_the_same_command_scores_nothing_twice_and_changed_images_are_refused(score, folder):
    score()
    rows = {file: file.stat().st_mtime_ns for file in (folder / "out" / "rows").iterdir()}
    assert score()[0] == 0
    assert rows == {file: file.stat().st_mtime_ns for file in (folder / "out" / "rows").iterdir()}
    status, _, complaint = score("--protocol", "realblur")
    assert status == 2
    assert complaint.count("\n") == 1
    assert "protocol is 'realblur' and was 'gopro'" in complaint
    write(folder / "restored" / "odd.png", noise(149, 203))
    assert "images_sha256" in score()[2]


def test_folders_that_do_not_fit_are_one_sentence(score, folder):
    write(folder / "restored" / "other.png", noise())
    status, _, complaint = score()
    assert status == 2
    assert complaint.startswith("hidiff: Every image of 'restored' must have one of the same name in 'sharp'")


def test_an_output_that_is_a_file_is_one_sentence(score, folder):
    (folder / "out").write_text("")
    status, _, complaint = score()
    assert status == 2
    assert complaint == "hidiff: out/rows cannot be used: Not a directory.\n"


def test_without_pyiqa_extra_metrics_are_one_sentence(score):
    status, _, complaint = score("--extra_metrics", "lpips", "niqe")
    assert status == 2
    assert "needs pyiqa; install it with `pip install 'diffusers-hidiff[iqa]'`" in complaint


def test_a_library_that_is_missing_is_named_with_its_extra():
    evaluate.need_libraries(["matplotlib", "skimage"])
    with pytest.raises(CommandError, match=r"needs no_such_library; install it with .*diffusers-hidiff\[evaluate\]"):
        evaluate.need_libraries(["matplotlib", "no_such_library"])
