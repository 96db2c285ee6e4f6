"""The bundled checkpoint, the README's lines and the demo, as a new user meets them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import demo
import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_hidiff import HIDIFF_SMALL, HIDiffLatentEncoder, HIDiffPipeline
from diffusers_hidiff.cli.main import main
from diffusers_hidiff.metrics.psnr import psnr_of_arrays

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "docs" / "sample"


def test_the_checkpoint_fits_into_16_megabytes():
    assert sum(file.stat().st_size for file in HIDIFF_SMALL.rglob("*.safetensors")) <= 16e6


def test_the_bundled_model_beats_its_input_on_the_sample_photo():
    blurry, sharp = (np.asarray(PIL.Image.open(SAMPLE / f"{name}.png")) for name in ("blurry", "sharp"))
    pipeline = HIDiffPipeline.from_pretrained(HIDIFF_SMALL)
    pipeline.set_progress_bar_config(disable=True)
    restored = np.asarray(pipeline(blurry, generator=torch.Generator().manual_seed(0)).images[0])
    assert psnr_of_arrays(restored, sharp) > psnr_of_arrays(blurry, sharp) + 0.5


def test_with_the_transformer_in_bfloat16_the_picture_is_the_same_to_50_decibels():
    blurry = np.asarray(PIL.Image.open(SAMPLE / "blurry.png"))[100:228, 100:228]

    def restored(dtype: torch.dtype) -> np.ndarray:
        dtypes = {"transformer": dtype, "default": torch.float32}
        pipeline = HIDiffPipeline.from_pretrained(HIDIFF_SMALL, dtype=dtypes)
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline.transformer.dtype == dtype
        assert pipeline.denoiser.dtype == torch.float32
        return pipeline(blurry, generator=torch.Generator().manual_seed(0), output_type="np").images[0]

    error = restored(torch.bfloat16) - restored(torch.float32)
    assert -10 * np.log10(np.mean(error**2)) > 50  # measured: 64


def test_its_latent_encoder_loads_beside_it():
    encoder = HIDiffLatentEncoder.from_pretrained(HIDIFF_SMALL, subfolder="latent_encoder")
    assert encoder.config.in_channels == 6


def test_the_five_lines_of_the_readme_run(tmp_path):
    (program,) = re.findall(
        r"Five lines of Python:\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert len([line for line in program.splitlines() if line]) <= 5
    program = program.replace('"docs/', f'"{ROOT}/docs/')
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
    assert PIL.Image.open(tmp_path / "sharper.png").size == PIL.Image.open(SAMPLE / "blurry.png").size


def test_the_demo_prints_the_gain_and_writes_the_picture(tmp_path, capsys):
    assert demo.main(["--output", str(tmp_path), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    before, after = map(float, re.search(r"blurry (.*) dB -> restored (.*) dB", printed).groups())
    assert after > before
    width, height = PIL.Image.open(SAMPLE / "blurry.png").size
    picture = PIL.Image.open(tmp_path / "compare.png")
    assert picture.width > 2 * width
    assert picture.height > height


def test_the_command_line_uses_the_bundled_model_by_default(tmp_path, capsys):
    assert main(["deblur", str(SAMPLE / "blurry.png"), "--output", str(tmp_path), "--device", "cpu"]) == 0
    assert (tmp_path / "blurry.png").is_file()
    capsys.readouterr()
    assert main(["info", "--format", "json"]) == 0
    assert "HIDiffTransformer" in json.dumps(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("name", ["README.md", "curves.png", "model_index.json"])
def test_the_model_card_lies_beside_the_weights(name):
    assert (HIDIFF_SMALL / name).is_file()
