"""What is imported when. Each program runs in a process of its own, which has imported nothing yet."""

import subprocess
import sys

import pytest
from fakehub import environment, serve

import diffusers_hidiff

HEAVY = ("accelerate", "diffusers", "torch", "transformers")
EXTRAS = ("cv2", "datasets", "matplotlib", "onnx", "onnxruntime", "pyiqa", "skimage")


def run(program, *arguments, **options):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


COMMAND_LINE = f"""
import sys
from diffusers_hidiff.cli.main import main
try:
    status = main(sys.argv[1:])
except SystemExit as stopped:  # argparse leaves like this
    status = stopped.code
print(status, [name for name in {HEAVY} if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["deblur", "--help"], 0),
        (["info", "--help"], 0),
        (["deblur", "a.png", "--output", "out", "--batch_size", "none"], 2),
        (["deblur", "no such file", "--output", "out"], 2),
    ],
)
def test_neither_help_nor_a_slip_waits_for_the_libraries(arguments, status):
    assert run(COMMAND_LINE, *arguments)[-1] == f"{status} []"


def test_the_package_needs_nothing_of_the_extras():
    commands = "analyse, compare_schedulers, deblur, evaluate, facts, info, jobs, main, pipeline, restorer, score"
    program = f"import sys; from diffusers_hidiff import *; from diffusers_hidiff.cli import {commands}; "
    assert run(program + f"print([name for name in {EXTRAS} if name in sys.modules])") == ["[]"]


def test_the_front_door_shows_every_class_and_nothing_else():
    program = """
import diffusers_hidiff, sys
assert "torch" not in sys.modules
print(set(diffusers_hidiff.__all__) <= set(dir(diffusers_hidiff)), hasattr(diffusers_hidiff, "HIDiffUNet"))
from diffusers_hidiff import *
print(all(getattr(diffusers_hidiff, name) is globals()[name] for name in diffusers_hidiff.__all__))
print(HIDiffTransformer.__module__, ModelMixin.__module__)
"""
    modules = "diffusers_hidiff.models.transformer_hidiff diffusers.models.modeling_utils"
    assert run(program) == ["True False", "True", modules]
    with pytest.raises(AttributeError, match="module 'diffusers_hidiff' has no attribute 'HIDiffUNet'"):
        _ = diffusers_hidiff.HIDiffUNet


ORDERS = ("import diffusers_hidiff, diffusers", "import diffusers, diffusers_hidiff")
LOAD = """
import sys, torch
for model in sys.argv[1:]:
    network = diffusers.AutoModel.from_pretrained(model, subfolder="transformer")  # looks for our classes by itself
    pipeline = diffusers_hidiff.HIDiffPipeline.from_pretrained(model)
    diffusers.HIDiffPipeline = diffusers_hidiff.HIDiffPipeline
    plain = diffusers.DiffusionPipeline.from_pretrained(model)
    half = diffusers_hidiff.HIDiffPipeline.from_pretrained(model, variant="fp16", dtype=torch.float16)
    print(*(type(part).__name__ for part in (network, pipeline, pipeline.denoiser, plain)), half.transformer.dtype)
"""


@pytest.mark.parametrize("order", ORDERS)
def test_diffusers_finds_the_classes_whichever_is_imported_first(gopro_pipeline, tmp_path, order):
    for variant in (None, "fp16"):
        gopro_pipeline.save_pretrained(tmp_path / "model", variant=variant, max_shard_size="60KB")
    with serve("someone/hidiff-tiny", tmp_path / "model") as endpoint:
        found = run(
            f"{order}\n{LOAD}",
            *("someone/hidiff-tiny", tmp_path / "model"),
            env=environment(endpoint, tmp_path / "cache"),
        )
    assert found == ["HIDiffTransformer HIDiffPipeline HIDiffMixerDenoiser HIDiffPipeline torch.float16"] * 2


def test_the_pipeline_alone_is_enough_to_load_from_the_hub(gopro_pipeline, tmp_path):
    gopro_pipeline.save_pretrained(tmp_path / "model")
    program = """
from diffusers_hidiff.pipelines.pipeline_hidiff import HIDiffPipeline
print(type(HIDiffPipeline.from_pretrained("someone/hidiff-tiny").transformer).__name__)
"""
    with serve("someone/hidiff-tiny", tmp_path / "model") as endpoint:
        assert run(program, env=environment(endpoint, tmp_path / "cache")) == ["HIDiffTransformer"]
