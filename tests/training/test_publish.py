"""What a run tells the world: trackers, and a repository on the Hub."""

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError
from receiving_hub import receive
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import log, stage1, stage2

from diffusers_hidiff import HIDiffPipeline

ONE_STEP = {"max_train_steps": 1, "lr_constant_steps": 0}


@pytest.fixture
def hub_at(monkeypatch):
    """Points huggingface_hub to an address. (It reads HF_ENDPOINT and HF_HUB_OFFLINE when it is imported.)"""

    def point(endpoint):
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_token")

    return point


def test_a_pushed_pipeline_arrives_whole_and_loads(folders, tmp_path, hub_at):
    (tmp_path / "hub").mkdir()
    stage1(folders, tmp_path / "one", **ONE_STEP)
    with receive(tmp_path / "hub") as endpoint:
        hub_at(endpoint)
        stage2(folders, tmp_path / "two", tmp_path / "one", push_to_hub=True, hub_model_id="someone/mine", **ONE_STEP)
    here, there = tmp_path / "two" / "pipeline", tmp_path / "hub" / "mine"
    files = {str(file.relative_to(here)): file for file in here.rglob("*") if file.is_file()}
    assert {"README.md", "model_index.json"} < files.keys()
    for name, file in files.items():
        assert (there / name).read_bytes() == file.read_bytes()
    assert HIDiffPipeline.from_pretrained(there)(folders / "photos" / "0.png").images[0].size == (48, 48)


def test_stage_1_is_pushed_without_checkpoints_and_samples(folders, tmp_path, hub_at):
    (tmp_path / "hub").mkdir()
    with receive(tmp_path / "hub") as endpoint:
        hub_at(endpoint)
        stage1(folders, tmp_path / "one", push_to_hub=True, validation_dir=folders / "pairs", **ONE_STEP)
    arrived = {file.name for file in (tmp_path / "hub" / "one").iterdir()}
    assert arrived == {"README.md", "curves.png", "latent_encoder", "metrics.jsonl", "transformer"}


def test_a_missing_permission_shows_before_the_first_step(folders, tmp_path, hub_at):
    with receive(tmp_path, allowed=False) as endpoint:
        hub_at(endpoint)
        with pytest.raises(HfHubHTTPError, match="403"):
            stage1(folders, tmp_path / "one", push_to_hub=True, **ONE_STEP)
    assert log(tmp_path / "one") == []


def test_tensorboard_is_told_losses_and_scores(folders, tmp_path):
    stage1(folders, tmp_path, report_to="tensorboard", validation_dir=folders / "pairs", validation_steps=2)
    events = EventAccumulator(str(tmp_path / "logs" / "hidiff")).Reload()
    for name in ("lr", "loss", "image", "validation_psnr", "validation_ssim"):
        written = {line["step"]: line[name] for line in log(tmp_path) if name in line}
        told = {event.step: event.value for event in events.Scalars(name)}
        assert told == pytest.approx(written, rel=1e-6)
