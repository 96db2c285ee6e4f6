"""Options: a file gives values, flags override, and what cannot work is refused before anything loads."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from training_runs import flags

from config import Stage1Config, Stage2Config, parse_config

CONFIGS = Path(__file__).parents[2] / "training" / "configs"


def test_a_config_file_gives_values_and_a_flag_overrides_one(tmp_path):
    (tmp_path / "run.yaml").write_text("resolution: 64\nlearning_rate: 1.0e-3\nlr_min: 0\ntransformer: {dim: 8}\n")
    config = parse_config(
        Stage1Config,
        flags(config=tmp_path / "run.yaml", resolution=96, output_dir="out", train_data_dir="photos"),
    )
    assert (config.resolution, config.learning_rate, config.transformer) == ([96], 1e-3, {"dim": 8})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"resolution": 50}, "`resolution` must be a multiple of 8, got 50"),
        ({"train_batch_size": 0}, "`train_batch_size` must be positive, got 0"),
        ({"max_train_steps": 5, "lr_constant_steps": 6}, "`lr_constant_steps` must lie between 0 and"),
        ({"mixed_precision": "int8"}, "`mixed_precision` must be 'no', 'bf16' or 'fp16', got 'int8'"),
        ({"report_to": "paper"}, "`report_to` must be 'tensorboard', 'wandb' or 'none', got 'paper'"),
        ({"adam_beta1": 1.0}, "`adam_beta1` must be at least 0 and less than 1, got 1.0"),
        ({"lr_min": 1.0}, "`lr_min` must not exceed `learning_rate`=0.0002, got 1.0"),
        ({"seed": -1}, "`seed` must not be negative, got -1"),
        ({"phase_steps": [100, 100]}, "`phase_steps` must add up to `max_train_steps`=300000, got .* which is 200"),
        ({"resolution": [64, 96]}, "`resolution` must be one number or one per phase"),
        ({"train_pairs_dir": "pairs"}, "Give either `train_data_dir`, photographs to blur, or `train_pairs_dir`"),
        ({"dataset_name": "user/pairs"}, "Give either `train_data_dir`.* got train_data_dir='nowhere', .*'user/pairs'"),
        ({"train_tile_size": 512}, "`train_tile_size` must be left out with `train_data_dir`"),
        ({"train_data_dir": None, "train_pairs_dir": "a", "frames_dir": "b"}, "`frames_dir` must be left out without"),
        (
            {"train_data_dir": None, "train_pairs_dir": "a", "blur": '{"max_tilt": 0.1}'},
            "`blur` must be left out without",
        ),
        ({"streaming": True}, "`streaming` must be left out without `dataset_name`"),
        ({"shuffle_buffer_size": 0}, "`shuffle_buffer_size` must be positive, got 0"),
        ({"photo_cache_megabytes": -1}, "`photo_cache_megabytes` must not be negative, got -1"),
        ({"blur": '{"defocus": 0.1}'}, "`blur` must hold arguments among min_extent, .*, got defocus"),
        ({"blur": '{"defocus_probability": 1.5}'}, "`defocus_probability` must be at least 0 and at most 1, got 1.5"),
        ({"transformer": json.dumps({"dims": 8})}, "`transformer` must hold arguments among .*, got dims"),
        ({"encoder": json.dumps({"in_channels": 3})}, "`encoder` must hold arguments among .*, got in_channels"),
    ],
)
def test_impossible_values_are_refused_before_anything_loads(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_config(Stage1Config, flags(**{"output_dir": "out", "train_data_dir": "nowhere"} | values))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("resolutoin: 64", "holds unknown keys: resolutoin"),
        ("seed: 1\nseed: 2", "repeats keys: seed"),
        ("learning_rate: 1e-3", "`learning_rate` must be of type float, got '1e-3' .*write 1.0e-3"),
        ("seed: '5'", "`seed` must be of type int, got '5'"),
        ("seed: true", "`seed` must be of type int, got True"),
        ("use_ema: 'yes'", "`use_ema` must be of type bool, got 'yes'"),
        ("resolution: [64, '96']", "`resolution` must be of type int, got '96'"),
        ("transformer: [8]", "`transformer` must be of type dict"),
    ],
)
def test_mistakes_in_a_config_file_are_refused(tmp_path, text, sentence):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        parse_config(Stage1Config, flags(config=tmp_path / "run.yaml", output_dir="out", train_data_dir="photos"))


@pytest.mark.skipif(find_spec("wandb") is not None, reason="what is said where wandb is missing")
def test_a_tracker_that_is_not_installed_is_refused():
    with pytest.raises(ValueError, match="`report_to` 'wandb' needs a package that is missing: pip install wandb"):
        parse_config(Stage1Config, flags(output_dir="out", train_data_dir="photos", report_to="wandb"))


def test_a_repeated_flag_is_refused():
    with pytest.raises(ValueError, match="Each option may be given once, got --seed again"):
        parse_config(Stage1Config, ["--seed", "1", "--seed=2", *flags(output_dir="out", train_data_dir="photos")])


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "Give either `stage1_dir` or `pretrained_model_name_or_path`"),
        ({"stage1_dir": "nowhere"}, "`stage1_dir` must be the output folder of stage 1"),
        ({"pretrained_model_name_or_path": "a/b", "denoiser_type": "unet"}, "`denoiser_type` must be 'mixer' or 'mlp'"),
        ({"pretrained_model_name_or_path": "a/b", "scheduler": '{"beta_end": 0.9}'}, "must be left out with"),
    ],
)
def test_impossible_values_of_stage_2_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_config(Stage2Config, flags(**{"output_dir": "out", "train_data_dir": "photos"} | values))


@pytest.mark.parametrize(
    ("scheduler", "sentence"),
    [
        ({"beta_end": 1.5}, "`scheduler` must have 0 < beta_start <= beta_end < 1, got 0.1 and 1.5"),
        ({"num_train_timesteps": 0}, "`scheduler` must have num_train_timesteps of at least 1"),
        ({"steps": 8}, "`scheduler` must hold arguments among .*, got steps"),
    ],
)
def test_impossible_noise_schedules_are_refused(tmp_path, scheduler, sentence):
    (tmp_path / "transformer").mkdir()
    options = {"output_dir": "out", "train_data_dir": "photos", "stage1_dir": tmp_path}
    with pytest.raises(ValueError, match=sentence):
        parse_config(Stage2Config, flags(scheduler=json.dumps(scheduler), **options))


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_that_comes_along_is_accepted(tmp_path, file):
    (tmp_path / "transformer").mkdir()
    start = {"stage1_dir": tmp_path} if "stage2" in file.stem else {"pretrained_model_name_or_path": "a/b"}
    config_class = Stage1Config if "stage1" in file.stem else Stage2Config
    start = {} if "stage1" in file.stem else start
    data = "train_data_dir" if file.stem.startswith(("small", "tiny")) else "train_pairs_dir"
    config = parse_config(config_class, flags(config=file, output_dir="out", **{data: "data"}, **start))
    for name, value in yaml.safe_load(file.read_text()).items():
        found = getattr(config, name)
        assert (found if isinstance(value, list) or not isinstance(found, list) else found[0]) == value
