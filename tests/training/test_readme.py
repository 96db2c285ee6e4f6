"""The README's own training commands, cut short."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import PIL.Image
from training_runs import log

from diffusers_hidiff.cli.main import main as hidiff

REPOSITORY = Path(__file__).parents[2]
SHORTER = ["--max_train_steps", "3", "--phase_steps", "3", "--resolution", "32", "--train_batch_size", "2"]
SHORTER += ["--lr_constant_steps", "1", "--dataloader_num_workers", "0"]


def commands():
    """Those under "See it work", each as a list of words."""
    block = re.search(r"See it work.*?```\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL).group(1)
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def test_the_tiny_recipe_goes_from_a_clone_to_a_deblurred_picture(tmp_path, monkeypatch):
    for name in ("docs", "training"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    for program, *arguments in commands():
        if program == "python":
            importlib.import_module(Path(arguments[0]).stem).main(arguments[1:] + SHORTER)
        elif program == "hidiff":
            assert hidiff(arguments) == 0
        elif program != "pip":
            subprocess.run([program, *arguments], check=True)
    assert all(log(tmp_path / "runs" / name)[-1]["validation_ssim"] > 0 for name in ("tiny1", "tiny2"))
    (picture,) = (tmp_path / "runs" / "sharper").glob("*.png")
    assert PIL.Image.open(picture).size == PIL.Image.open(REPOSITORY / "docs/sample/blurry.png").size
