"""Shards of patches: nothing is lost unsaid, and a run that is killed goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import prepare_data
import pytest
from scored import noise, write

from diffusers_hidiff.data.paired_tables import TablePairs
from diffusers_hidiff.data.transforms import tile_starts

ROOT = Path(__file__).parents[2]
SMALL = ["--patch_size", "32", "--overlap", "16", "--validation_size", "16", "--num_workers", "2"]


@pytest.fixture
def gopro(tmp_path):
    """GoPro's own folders: 6 training pairs in two scenes, 2 test pairs, 48 pixels high and 80 wide."""
    seed = 0
    for split, scenes, number in (("train", ("GOPR1", "GOPR2"), 3), ("test", ("GOPR3",), 2)):
        for scene in scenes:
            for i in range(number):
                for name in ("blur", "blur_gamma", "sharp"):
                    file = tmp_path / "GOPRO" / split / scene / name / f"{i:06}.png"
                    write(file, noise(48, 80, seed := seed + 1))
    return tmp_path / "GOPRO"


def run(source, output, *options):
    return prepare_data.main([str(source), str(output), *SMALL, *options])


def report(output):
    return json.loads((output / "report.json").read_text())["splits"]


def test_gopros_images_have_eight_tiles_of_512():
    assert len(tile_starts(720, 512, 256)) * len(tile_starts(1280, 512, 256)) == 8


def test_patches_are_those_of_the_images_and_load_as_a_data_set(gopro, tmp_path, capsys):
    output = tmp_path / "patches"
    assert run(gopro, output, "--pairs_per_shard", "2") == 0
    assert "train: 6 of 6 pairs, 48 patches in 3 shards, 0 left out" in capsys.readouterr().out
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "data", "report.json"]
    train = datasets.load_dataset(str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(train) == 6 * 2 * 4
    assert {(row["name"], row["top"], row["left"]) for row in train} == {
        (f"GOPR{scene}/{i:06}", top, left)
        for scene in (1, 2)
        for i in range(3)
        for top in (0, 16)
        for left in (0, 16, 32, 48)
    }
    row = train[11]
    whole = datasets.Image().decode_example(
        {"path": str(gopro / "train" / row["name"].replace("/", "/blur/")) + ".png", "bytes": None}
    )
    box = (row["left"], row["top"], row["left"] + 32, row["top"] + 32)
    assert np.array_equal(np.asarray(row["blurry"]), np.asarray(whole.crop(box)))


def test_validation_has_the_central_crop_of_each_test_image(gopro, tmp_path):
    output = tmp_path / "patches"
    run(gopro, output)
    validation = datasets.load_dataset(str(output), split="validation", cache_dir=str(tmp_path / "cache"))
    assert {(row["top"], row["left"], row["sharp"].size) for row in validation} == {(16, 32, (16, 16))}
    assert len(validation) == 2


def test_shards_mix_the_scenes_and_do_not_depend_on_the_threads(gopro, tmp_path):
    for name, threads in (("one", "1"), ("four", "4")):
        run(gopro, tmp_path / name, "--pairs_per_shard", "3", "--num_workers", threads)
    for file in sorted((tmp_path / "one" / "data").iterdir()):
        first, second = (
            datasets.Dataset.from_parquet(str(tmp_path / n / "data" / file.name), cache_dir=str(tmp_path / n))
            for n in ("one", "four")
        )
        assert (
            first.cast_column("sharp", datasets.Image(decode=False))[:]
            == second.cast_column("sharp", datasets.Image(decode=False))[:]
        )
        if file.name.startswith("train"):
            assert len({name.split("/")[0] for name in first["name"]}) == 2


def test_what_is_missing_truncated_or_of_two_sizes_is_left_out_and_reported(gopro, tmp_path, capsys):
    scene = gopro / "train" / "GOPR1"
    (scene / "sharp" / "000000.png").unlink()
    truncated = scene / "blur" / "000001.png"
    truncated.write_bytes(truncated.read_bytes()[:-300])
    write(scene / "sharp" / "000002.png", noise(40, 80))
    assert run(gopro, tmp_path / "patches") == 0
    train = report(tmp_path / "patches")["train"]
    assert (train["pairs"], train["kept"], train["patches"]) == (5, 3, 24)
    reasons = {entry["file"]: entry["reason"] for entry in train["left_out"]}
    assert reasons["train/GOPR1/blur/000000.png"] == "has no partner in sharp/"
    assert "train/GOPR1/blur/000001.png' cannot be read as an image" in reasons["train/GOPR1/blur/000001.png"]
    assert "must have one size, got ['80x48', '80x40']" in reasons["train/GOPR1/blur/000002.png"]
    assert str(tmp_path) not in json.dumps(train)
    assert (
        "3 of 5 pairs, 24 patches in 1 shards, 3 left out\n  train/GOPR1/blur/000000.png: has no"
        in capsys.readouterr().out
    )


# Runs the script, and is killed when its third shard is written but has not got its name.
KILLED = """
import os, signal, sys
import prepare_data
replace = os.replace
def rename(old, new):
    if str(new).endswith("parquet"):
        rename.calls += 1
        if rename.calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    replace(old, new)
rename.calls = 0
os.replace = rename
prepare_data.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_keeps_what_is_whole_and_ends_as_if_it_had_not_been(gopro, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    incomplete = tmp_path / ".killed.incomplete"
    run(gopro, whole, "--pairs_per_shard", "1")
    command = [sys.executable, "-c", KILLED, str(gopro), str(killed), *SMALL, "--pairs_per_shard", "1"]
    path = os.pathsep.join([str(ROOT / "scripts"), *sys.path])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not killed.exists()
    assert len(list(incomplete.glob("data/*.part"))) == 1
    damaged, kept = sorted(incomplete.glob("data/*.parquet"))
    os.truncate(damaged, damaged.stat().st_size // 2)
    time_of_kept = kept.stat().st_mtime_ns

    assert run(gopro, killed, "--pairs_per_shard", "1") == 0
    assert (killed / "data" / kept.name).stat().st_mtime_ns == time_of_kept
    assert report(killed) == report(whole)
    files = [sorted((folder / "data").iterdir()) for folder in (whole, killed)]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    assert all(first.read_bytes() == second.read_bytes() for first, second in zip(*files, strict=True))


def test_what_cannot_be_made_is_refused_before_any_work(gopro, tmp_path, capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit):
            run(*arguments)
        return capsys.readouterr().err

    (tmp_path / "there").mkdir()
    assert "`output` must not exist yet" in refused(gopro, tmp_path / "there")
    assert "must hold blurry/ and sharp/" in refused(tmp_path / "there", tmp_path / "out")
    assert "`overlap` must be at least 0 and less than `size`=32" in refused(gopro, tmp_path / "out", "--overlap", "32")
    (tmp_path / ".out.incomplete" / "notes").mkdir(parents=True)
    (tmp_path / ".out.incomplete" / "notes" / "plan.json").write_text("{}")
    assert "was begun with other images or options" in refused(gopro, tmp_path / "out")


def test_a_folder_without_splits_gives_training_patches_only(tmp_path):
    for name in ("blurry", "sharp"):
        write(tmp_path / "pairs" / name / "a.png", noise(20, 50))
    run(tmp_path / "pairs", tmp_path / "out")
    assert list(report(tmp_path / "out")) == ["train"]
    pairs = TablePairs(str(tmp_path / "out"), "train")
    assert (
        sorted(pairs.read(i)[0].shape for i in range(len(pairs))) == [(20, 32, 3)] * 3
    )  # the short side is kept whole
