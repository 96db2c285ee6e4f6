import os
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on the network; read where huggingface_hub is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # a worker has a core; threads that wait for each other would take both
import torch
from diffusers.utils import logging as diffusers_logging

pytest.register_assert_rewrite("tiny")
from tiny import (  # noqa: E402
    tiny_condition_encoder,
    tiny_mixer_denoiser,
    tiny_mlp_denoiser,
    tiny_transformer,
)

from diffusers_hidiff import HIDiffPipeline, HIDiffScheduler  # noqa: E402

diffusers_logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def gopro_pipeline() -> HIDiffPipeline:
    """Tiny networks of the GoPro family: mixer denoiser that predicts the noise, T = 8."""
    return _quiet(
        HIDiffPipeline(tiny_condition_encoder(), tiny_mixer_denoiser(), HIDiffScheduler(), tiny_transformer())
    )


@pytest.fixture
def realblur_pipeline() -> HIDiffPipeline:
    """Tiny networks of the RealBlur family: MLP denoiser that predicts the clean prior, T = 16."""
    encoder = tiny_condition_encoder(activation="leaky_relu", wide_head=True)
    return _quiet(HIDiffPipeline(encoder, tiny_mlp_denoiser(), realblur_scheduler(), tiny_transformer()))


@pytest.fixture
def warnings_of_diffusers(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What diffusers warns about: its logger does not propagate by itself."""
    diffusers_logging.enable_propagation()
    yield caplog
    diffusers_logging.disable_propagation()


def realblur_scheduler() -> HIDiffScheduler:
    return HIDiffScheduler(
        num_train_timesteps=16, beta_schedule="scaled_linear", prediction_type="sample", clip_sample=False
    )


def _quiet(pipeline: HIDiffPipeline) -> HIDiffPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
