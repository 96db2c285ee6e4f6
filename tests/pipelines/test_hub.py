"""Loading from a repository of the Hub's shape, in a process of its own: the endpoint is read at import."""

import subprocess
import sys

from fakehub import environment, serve

PROGRAM = """
import diffusers_hidiff, torch
pipe = diffusers_hidiff.HIDiffPipeline.from_pretrained("someone/hidiff-tiny")
pipe.set_progress_bar_config(disable=True)
print(type(pipe.transformer).__name__, pipe(torch.zeros(3, 8, 8), prior=torch.zeros(1, 16, 16)).images[0].size)
"""


def load(endpoint, cache, offline):
    command = [sys.executable, "-c", PROGRAM]
    variables = environment(endpoint, cache, offline)
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_repository_loads_and_loads_again_from_the_cache_without_a_network(gopro_pipeline, tmp_path):
    gopro_pipeline.save_pretrained(tmp_path / "repository")
    with serve("someone/hidiff-tiny", tmp_path / "repository") as endpoint:
        assert load(endpoint, tmp_path / "cache", offline=False) == "HIDiffTransformer (8, 8)"
    assert load(endpoint, tmp_path / "cache", offline=True) == "HIDiffTransformer (8, 8)"
