import numpy as np

from diffusers_hidiff.cli.main import main
from diffusers_hidiff.image_files import write_image

RNG = np.random.default_rng(0)


def test_the_command_writes_table_figure_and_raw_figures_and_goes_on_where_it_was(realblur_pipeline, tmp_path, capsys):
    realblur_pipeline.save_pretrained(tmp_path / "model")
    for name in ("blurry", "sharp"):
        for number in range(3):
            (tmp_path / "pairs" / name).mkdir(parents=True, exist_ok=True)
            write_image(tmp_path / "pairs" / name / f"{number}.png", RNG.integers(0, 256, (20, 28, 3), dtype=np.uint8))
    arguments = ["--dataset", str(tmp_path / "pairs"), "--model", str(tmp_path / "model"), "--max_images", "2"]
    arguments += ["--schedulers", "hidiff", "ddim", "deis", "--steps", "2", "--seeds", "0", "--device", "cpu"]
    assert main(["compare-schedulers", *arguments, "--output", str(tmp_path / "out")]) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| ddim | 2 |" in table
    assert "* deis, 2 steps: `scheduler` cannot be DEISMultistepScheduler" in table
    assert len((tmp_path / "out" / "trials.csv").read_text().splitlines()) == 5
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "Written to" in capsys.readouterr().out
    rows = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "rows").iterdir()}
    assert len(rows) == 2
    next(iter(rows)).unlink()  # as if it had been stopped
    (tmp_path / "out" / "figure.png").unlink()
    assert main(["compare-schedulers", *arguments, "--output", str(tmp_path / "out")]) == 0
    again = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "rows").iterdir()}
    assert again.keys() == rows.keys()
    assert len(again.items() & rows.items()) == 1  # the other was not made again
    assert (tmp_path / "out" / "figure.png").exists()
    capsys.readouterr()
    arguments[arguments.index("--seeds") + 1] = "1"
    assert main(["compare-schedulers", *arguments, "--output", str(tmp_path / "out")]) == 2
    assert "holds results of other settings" in capsys.readouterr().err


def test_what_cannot_be_compared_is_told_in_a_sentence(tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    assert main(["compare-schedulers", "--dataset", "gopro", *output]) == 2
    assert capsys.readouterr().err.startswith("hidiff: --dataset gopro needs --data_dir")
    for name in ("blurry", "sharp"):
        (tmp_path / "pairs" / name).mkdir(parents=True)
        write_image(tmp_path / "pairs" / name / "a.png", np.zeros((8, 8, 3), np.uint8))
    nonsense = ["--dataset", str(tmp_path / "pairs"), "--schedulers", "nonsense"]
    assert main(["compare-schedulers", *nonsense, *output]) == 2
    assert "got 'nonsense'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
