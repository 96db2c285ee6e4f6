import numpy as np
import PIL.Image
import pytest
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """photos/ and pairs/{blurry,sharp}/, two images of 48x48 each."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name in ("photos", "pairs/blurry", "pairs/sharp"):
        (root / name).mkdir(parents=True)
        for i in range(2):
            coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            PIL.Image.fromarray(coarse.repeat(8, axis=0).repeat(8, axis=1)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """accelerate keeps precision and processes for the whole interpreter; each test begins anew."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
