"""The sheet shows the samples of the run whose options it is given."""

import numpy as np
import PIL.Image
import preview_data
import pytest
from scored import noise, write

NETWORKS = ["--transformer", '{"dim": 8}', "--scheduler", '{"beta_end": 0.9}', "--stage1_dir", "nowhere"]


@pytest.fixture
def pairs(tmp_path):
    for i in range(3):
        sharp = noise(24, 24, seed=i)
        write(tmp_path / "train" / "sharp" / f"picture{i}.png", sharp)
        write(tmp_path / "train" / "blurry" / f"picture{i}.png", 255 - sharp)
    return tmp_path


def sheet_of(folder, *options):
    file = folder / "sheets" / "sheet.png"
    flags = ["--sheet", str(file), "--train_batch_size", "2", "--dataloader_num_workers", "0"]
    code = preview_data.main([*flags, "--train_pairs_dir", str(folder), *options])
    return code, np.asarray(PIL.Image.open(file)) if file.exists() else None


def test_a_sheet_shows_blurry_beside_sharp_of_every_phase(pairs, capsys):
    phases = [
        "--resolution",
        "8",
        "16",
        "--phase_steps",
        "2",
        "3",
        "--max_train_steps",
        "5",
        "--lr_constant_steps",
        "0",
    ]
    code, sheet = sheet_of(pairs, *phases, *NETWORKS, "--num_pairs", "5", "--num_columns", "2")
    assert code == 0
    assert "9 pairs in" in capsys.readouterr().out  # four samples in the first phase, five asked for in the second
    margin, label = preview_data.MARGIN, preview_data.LABEL_HEIGHT
    heights = [rows * (size + label + margin) + margin for rows, size in ((2, 8), (3, 16))]
    assert sheet.shape == (sum(heights), 2 * (2 * 16 + 2 + margin) + margin, 3)
    blurry, sharp = (sheet[margin : margin + 8, left : left + 8].astype(int) for left in (margin, margin + 10))
    assert np.abs(blurry + sharp - 255).max() == 0
    assert sharp.std() > 30


def test_its_samples_are_those_of_the_run(pairs):
    config = preview_data.parse_config(
        preview_data.PreviewConfig,
        ["--train_pairs_dir", str(pairs), "--resolution", "8", "--first_pair", "3", "--num_pairs", "2"],
    )
    ((first, second),) = preview_data.examples_of(config)
    data = preview_data.TrainingData(config)
    for number, shown in ((3, first), (4, second)):
        expected = (data.dataset[number]["blurry"] * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(shown.blurry, expected)
        assert shown.label.startswith(f"{number}: ")
        assert shown.label.endswith(".png")


def test_a_label_that_is_too_long_is_shortened():
    draw = preview_data.PIL.ImageDraw.Draw(PIL.Image.new("RGB", (10, 10)))
    assert preview_data.shortened("short", 100, draw) == "short"
    shortened = preview_data.shortened("a label of many words", 60, draw)
    assert shortened.endswith("...")
    assert draw.textlength(shortened) <= 60


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--num_pairs", "0"], "`num_pairs` must be positive, got 0"),
        (["--first_pair", "-1"], "`first_pair` must not be negative, got -1"),
        (["--train_data_dir", "photos"], "Give either `train_data_dir`"),
        (["--resolution", "64"], "`size` must fit into the image, got size=64 and an image of 24x24"),
        (["--first_pair", "4", "--max_train_steps", "2", "--lr_constant_steps", "0"], "`first_pair` must lie within"),
    ],
)
def test_what_cannot_be_shown_is_told_in_a_sentence(pairs, options, sentence, capsys):
    code, sheet = sheet_of(pairs, *options)
    assert (code, sheet) == (2, None)
    assert sentence in capsys.readouterr().err
