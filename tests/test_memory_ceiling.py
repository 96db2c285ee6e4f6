"""Pictures whose features do not fit are restored below a ceiling that the system enforces.

What is limited and measured is memory that the system cannot take back: the process's private memory. Pages of the files
that hold the features are not counted, as the system may write them out and drop them whenever it needs the room; a
process's resident set (VmHWM, ru_maxrss) counts them as long as nobody else wants it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA and /proc are Linux")

MB = 2**20
PROGRAM = r"""
import json, re, resource, sys, threading, time
from pathlib import Path
import numpy as np, PIL.Image, torch
from tiny import tiny_condition_encoder, tiny_mixer_denoiser, tiny_transformer
from diffusers_hidiff import HIDiffPipeline, HIDiffScheduler
from diffusers_hidiff.models.memory import used_memory

CPU, MB = torch.device("cpu"), 2**20
transformer = tiny_transformer(dim=16, num_blocks=[1, 0, 0, 1], num_refinement_blocks=0, ffn_expansion_factor=1.0)
pipe = HIDiffPipeline(tiny_condition_encoder(), tiny_mixer_denoiser(), HIDiffScheduler(), transformer)
pipe.set_progress_bar_config(disable=True)

def restore(height, room):
    # Returns the private memory that it takes at most and the picture; its features are 224 bytes a pixel.
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, 1024, 3), np.uint8))
    before, most, working = used_memory(CPU), 0, True
    pipe.limit_memory(before + room)
    def watch():
        nonlocal most
        while working:
            most = max(most, used_memory(CPU) - before)
            time.sleep(0.002)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        (picture,) = pipe(image).images
    except (RuntimeError, MemoryError):
        picture = None
    working = False
    watcher.join()
    return most, picture

restore(256, 128 * MB)  # starts threads, loads kernels
peaks = [restore(height, 128 * MB)[0] for height in (1024, 2048)]

data = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (data + 256 * MB, resource.RLIM_INFINITY))
careful = restore(2048, 128 * MB)[1]
careless = restore(2048, 2**40)[1]  # last: what fails leaves the heap in pieces
print(json.dumps({
    "peaks": peaks,
    "careless": careless is not None,
    "careful": careful is not None and careful.size == (1024, 2048) and bool(np.asarray(careful).std() > 10),
}))
"""


@pytest.fixture(scope="module")
def found():
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{PROGRAM}"
    return json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)


def test_a_picture_is_restored_below_the_ceiling_where_its_features_do_not_fit(found):
    assert found["careful"]


def test_without_the_limit_the_same_ceiling_is_too_low(found):
    assert not found["careless"]


def test_twice_the_pixels_take_little_more_than_the_picture_itself(found):
    once, twice = found["peaks"]
    assert twice < 128 * MB
    assert twice - once < 96 * MB  # for one megapixel more: its features take 224 MB, picture and result 6
