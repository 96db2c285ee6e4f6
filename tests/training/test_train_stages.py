"""Both stages for real, on the CPU: tiny networks, a tiny folder of photographs."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

import train_stage1
import train_stage2
from config import Stage1Config, Stage2Config, parse_config
from diffusers_hidiff import HIDiffPipeline, HIDiffTransformer

NETWORKS = {
    "transformer": json.dumps(
        {"dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 0, "num_heads": [1, 2, 2, 4], "prior_dim": 16}
    ),
    "encoder": json.dumps({"embed_dim": 4, "num_blocks": 1}),
}
STEPS = {"resolution": 32, "train_batch_size": 2, "dataloader_num_workers": 0, "logging_steps": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name in ("photos", "pairs/blurry", "pairs/sharp"):
        (root / name).mkdir(parents=True)
        for i in range(2):
            coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            PIL.Image.fromarray(coarse.repeat(8, axis=0).repeat(8, axis=1)).save(root / name / f"{i}.png")
    return root


def flags(**values):
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def stage1(folders, output_dir, **values):
    data = {"train_data_dir": folders / "photos", "output_dir": output_dir}
    train_stage1.main(flags(**STEPS | NETWORKS | data | {"lr_constant_steps": 2, "max_train_steps": 4} | values))


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return HIDiffTransformer.from_pretrained(folder).state_dict()


def test_stage_1_then_stage_2_gives_a_pipeline_that_loads(folders, tmp_path):
    stage1(folders, tmp_path / "one", validation_dir=folders / "pairs", validation_steps=2)
    assert [line["step"] for line in log(tmp_path / "one") if "validation_psnr" in line] == [2, 4]
    train_stage2.main(
        flags(
            **STEPS,
            **{
                "train_data_dir": folders / "photos",
                "validation_dir": folders / "pairs",
                "output_dir": tmp_path / "two",
            },
            **{"stage1_dir": tmp_path / "one", "denoiser_type": "mlp", "max_train_steps": 2, "lr_constant_steps": 1},
            scheduler=json.dumps({"num_train_timesteps": 4, "prediction_type": "sample", "clip_sample": False}),
        )
    )
    assert {"image", "prior"} <= log(tmp_path / "two")[0].keys()
    before, after = weights(tmp_path / "one" / "transformer"), weights(tmp_path / "two" / "pipeline" / "transformer")
    assert not torch.equal(before["conv_in.weight"], after["conv_in.weight"])
    pipeline = HIDiffPipeline.from_pretrained(tmp_path / "two" / "pipeline")
    assert pipeline.scheduler.config.num_train_timesteps == 4
    assert pipeline(folders / "photos" / "0.png").images[0].size == (48, 48)


def test_a_resumed_run_ends_in_bit_identical_weights(folders, tmp_path):
    stage1(folders, tmp_path / "whole", checkpointing_steps=3)
    stage1(folders, tmp_path / "resumed", checkpointing_steps=3)
    for name in ("checkpoint-4", "transformer", "latent_encoder"):  # as if it had been killed after step 3
        (tmp_path / "resumed" / name).rename(tmp_path / f"gone-{name}")
    stage1(folders, tmp_path / "resumed", checkpointing_steps=3, resume_from_checkpoint="latest")
    whole, resumed = weights(tmp_path / "whole" / "transformer"), weights(tmp_path / "resumed" / "transformer")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_training_lowers_the_loss(folders, tmp_path):
    stage1(folders, tmp_path, max_train_steps=40, lr_constant_steps=40, learning_rate=3e-3, max_grad_norm=1.0)
    losses = [line["image"] for line in log(tmp_path)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_old_checkpoints_make_room_and_unfinished_ones_do_not_count(folders, tmp_path):
    (tmp_path / ".checkpoint-9.incomplete").mkdir(parents=True)
    stage1(folders, tmp_path, checkpointing_steps=1, checkpoints_total_limit=2, resume_from_checkpoint="latest")
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_the_learning_rate_is_constant_then_falls_to_its_least(folders, tmp_path):
    stage1(folders, tmp_path, max_train_steps=6, lr_constant_steps=2, learning_rate=1e-3, lr_min=1e-5)
    rates = [line["lr"] for line in log(tmp_path)]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] == pytest.approx(1e-5, rel=0.1)


def test_a_config_file_gives_values_and_a_flag_overrides_one(tmp_path):
    (tmp_path / "run.yaml").write_text("resolution: 64\nlearning_rate: 1.0e-3\ntransformer: {dim: 8}\n")
    config = parse_config(
        Stage1Config,
        flags(config=tmp_path / "run.yaml", resolution=96, output_dir="out", train_data_dir="photos"),
    )
    assert (config.resolution, config.learning_rate, config.transformer) == (96, 1e-3, {"dim": 8})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"resolution": 50}, "`resolution` must be a multiple of 8, got 50"),
        ({"train_batch_size": 0}, "`train_batch_size` must be positive, got 0"),
        ({"max_train_steps": 5, "lr_constant_steps": 6}, "`lr_constant_steps` must lie between 0 and"),
        ({"mixed_precision": "int8"}, "`mixed_precision` must be 'no', 'bf16' or 'fp16', got 'int8'"),
    ],
)
def test_impossible_values_are_refused_before_anything_loads(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_config(Stage1Config, flags(output_dir="out", train_data_dir="nowhere", **values))


def test_unknown_keys_of_a_config_file_are_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("resolutoin: 64\n")
    with pytest.raises(ValueError, match="holds unknown keys: resolutoin"):
        parse_config(Stage1Config, flags(config=tmp_path / "run.yaml", output_dir="out", train_data_dir="photos"))


def test_stage_2_needs_the_folder_of_stage_1(tmp_path):
    with pytest.raises(ValueError, match="`stage1_dir` must be the output folder of stage 1"):
        parse_config(Stage2Config, flags(output_dir="out", train_data_dir="photos", stage1_dir=tmp_path))


def test_a_checkpoint_that_is_none_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be 'latest' or a checkpoint-N folder"):
        stage1(folders, tmp_path, resume_from_checkpoint=tmp_path / "nothing")
