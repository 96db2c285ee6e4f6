"""A picture whose features do not fit is restored below a ceiling that the system enforces.

What is limited and measured is memory that the system cannot take back: the process's private memory. Pages of the files
that hold the features are not counted, as the system may write them out and drop them whenever it needs the room; a
process's resident set (VmHWM, ru_maxrss) counts them as long as nobody else wants it.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA and /proc are Linux")

PREPARE = """
import re, resource, sys, threading, time
from pathlib import Path
import numpy as np, PIL.Image, torch
from tiny import tiny_condition_encoder, tiny_mixer_denoiser, tiny_transformer
from diffusers_hidiff import HIDiffPipeline, HIDiffScheduler
from diffusers_hidiff.models.memory import used_memory

CPU, MB = torch.device("cpu"), 2**20
torch.set_num_threads(2)
transformer = tiny_transformer(dim=16, num_refinement_blocks=0)  # features: 224 bytes a pixel
pipe = HIDiffPipeline(tiny_condition_encoder(), tiny_mixer_denoiser(), HIDiffScheduler(), transformer)
pipe.set_progress_bar_config(disable=True)

def picture(width, height):
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))

pipe(picture(256, 256))  # starts threads, loads kernels
"""

CEILING = """
image = picture(2600, 1700)  # 4.4 megapixels, 990 MB of features
data = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (data + 256 * MB, resource.RLIM_INFINITY))
pipe.limit_memory(used_memory(CPU) + 160 * MB if sys.argv[1] == "limited" else "1TB")
try:
    restored = pipe(image).images[0]
except (RuntimeError, MemoryError) as error:
    print("out of memory")
else:
    print(restored.size, np.asarray(restored).std() > 10)
"""

GROWTH = """
def peak(height):
    image, most, working = picture(1024, height), 0, True
    before = used_memory(CPU)
    pipe.limit_memory(before + 128 * MB)
    def watch():
        nonlocal most
        while working:
            most = max(most, used_memory(CPU) - before)
            time.sleep(0.002)
    watcher = threading.Thread(target=watch)
    watcher.start()
    pipe(image)
    working = False
    watcher.join()
    return most
peak(1024)
print(peak(1024), peak(2048))
"""


def output_of(program: str, *arguments: str) -> str:
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{program}",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_picture_is_restored_below_the_ceiling_where_its_features_do_not_fit():
    assert output_of(PREPARE + CEILING, "limited") == "(2600, 1700) True"


def test_without_the_limit_the_same_ceiling_is_too_low():
    assert output_of(PREPARE + CEILING, "unlimited") == "out of memory"


def test_twice_the_pixels_take_little_more_than_the_picture_itself():
    once, twice = map(int, output_of(PREPARE + GROWTH).split())
    assert twice < 128 * 2**20
    assert twice - once < 24 * 1024 * 1024  # bytes a pixel: 6 for the picture and the result; their features are 224
