"""scripts/results.py: what it runs, and what it writes where."""

import re

import numpy as np
import pytest
import results
from scored import write, write_pairs

from diffusers_hidiff.cli.main import make_parser


@pytest.fixture
def data(tmp_path):
    """DATA with 30 synthetic and 2 real pairs, a crop among them."""
    write_pairs(tmp_path / "data" / "validation" / "synthetic", 30, 8, 8)
    for name in ("crop_0", "garden_path"):
        for kind in ("blurry", "sharp"):
            write(tmp_path / "data" / "validation" / "real" / kind / f"{name}.png", np.zeros((8, 8, 3), np.uint8))
    return tmp_path / "data"


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A project with the pages that tables are copied to."""
    for name in ("README", "CARD"):
        page = tmp_path / f"{name}.md"
        page.write_text("Before.\n<!-- results: options -->\nold\n<!-- end -->\nAfter.\n")
        monkeypatch.setattr(results, name, page)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    return tmp_path


def test_every_command_is_one_that_the_command_line_takes():
    for step in results.STEPS.values():
        for command in step.commands:
            make_parser(command.split()[1]).parse_args(command.split()[1:])


def test_no_two_commands_write_to_the_same_place():
    commands = [command for step in results.STEPS.values() for command in step.commands]
    outputs = [re.search(r"--output (\S+)", command)[1] for command in commands]
    assert len(set(outputs)) == len(outputs)


def test_the_study_has_pairs_of_both_sets_and_no_whole_frame(data, tmp_path):
    results.prepare(tmp_path / "work", data / "validation")
    names = sorted(file.name for file in (tmp_path / "work" / "pairs" / "study" / "sharp").iterdir())
    assert len(names) == results.STUDY_PAIRS + 1
    assert names[0] == "real_crop_0.png"
    assert names[-1] == "synthetic_29.png"
    results.prepare(tmp_path / "work", data / "validation")  # a second time


def test_options_are_compared_with_none_in_each_group_of_images(pages):
    for option in results.OPTIONS:
        gain = 0.5 if option == "self_ensemble" else 0.0
        for name, lines in {"synthetic": [("a", 20, 8, 1)], "real": [("b", 30, 8, 1), ("c", 40, 64, 4)]}.items():
            rows = [f"{n},{psnr + gain},0.5,{side},{side},{(8 if gain else 1) * s}" for n, psnr, side, s in lines]
            file = pages / "work" / "options" / option / name / "metrics.csv"
            file.parent.mkdir(parents=True)
            file.write_text("\n".join(["name,psnr,ssim,width,height,seconds", *rows]) + "\n")
    results.finish_options(pages / "work")
    table = (pages / "results" / "options" / "table.md").read_text()
    assert "| option | synthetic, 1 of 8x8 | real, 1 of 8x8 | real, 1 of 64x64 | seconds |" in table
    assert "| none | 20.000, 0.5000 | 30.000, 0.5000 | 40.000, 0.5000 | 4.0 (1.0x) |" in table
    assert "| `--self_ensemble` | 20.500 (+0.500), 0.5000 |" in table
    assert "| 32.0 (8.0x) |" in table
    assert len((pages / "results" / "options" / "options.csv").read_text().splitlines()) == 1 + 3 * len(results.OPTIONS)


def test_tables_get_into_the_pages_between_their_marks(pages, capsys):
    (pages / "results" / "options").mkdir(parents=True)
    (pages / "results" / "options" / "table.md").write_text("| new |\n")
    for _ in range(2):
        results.write_pages({"options": 1.25})
        assert (pages / "README.md").read_text() == (
            "Before.\n<!-- results: options -->\n\n| new |\n\n<!-- end -->\nAfter.\n"
        )
    written = (pages / "results" / "README.md").read_text()
    assert "Made in 1.2 minutes by\n\n```\nhidiff evaluate --dataset validation/synthetic" in written
    assert "| new |" in written
    assert "Schedulers, steps, seeds" not in written  # not made yet
    results.put_between(pages / "CARD.md", "evaluation", "text")
    assert "has no place for the results of evaluation" in capsys.readouterr().err


def test_a_folder_without_the_pairs_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        results.main([str(tmp_path)])
    assert "DATA must hold validation/synthetic" in capsys.readouterr().err
