import diffusers
import pytest

from diffusers_hidiff import HIDiffScheduler
from diffusers_hidiff.schedulers.names import SHORT_NAMES, named_classes, scheduler_class


def test_every_short_name_means_a_scheduler_of_that_class():
    assert {name: kind.__name__ for name, kind in named_classes()} == SHORT_NAMES


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("hidiff", HIDiffScheduler),
        ("HIDiffScheduler", HIDiffScheduler),
        ("DPM-Solver++", diffusers.DPMSolverMultistepScheduler),
        ("ddim", diffusers.DDIMScheduler),
        ("ddimparallelscheduler", diffusers.DDIMParallelScheduler),
    ],
)
def test_spelling_does_not_matter_and_class_names_are_known(name, kind):
    assert scheduler_class(name) is kind


@pytest.mark.parametrize("name", ["", "nonsense", "DiffusionPipeline", "UNet2DModel"])
def test_what_is_no_scheduler_is_none(name):
    assert scheduler_class(name) is None
