"""Both stages for real, on the CPU: tiny networks, a tiny folder of photographs."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_runs import log, stage1, stage2, weights

import train_stage1
from diffusers_hidiff import HIDiffPipeline


def test_stage_1_then_stage_2_gives_a_pipeline_that_loads(folders, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    stage1(folders, one, validation_dir=folders / "pairs", validation_steps=2)
    assert [line["step"] for line in log(one) if "validation_psnr" in line] == [2, 4]
    stage2(
        *(folders, two, one),
        **{"validation_dir": folders / "pairs", "denoiser_type": "mlp", "max_train_steps": 2, "lr_constant_steps": 1},
        scheduler=json.dumps(
            {"num_train_timesteps": 4, "beta_end": 0.9, "prediction_type": "sample", "clip_sample": False}
        ),
    )
    assert {"image", "prior"} <= log(two)[0].keys()
    before, after = weights(one), weights(two / "pipeline")
    assert not torch.equal(before["conv_in.weight"], after["conv_in.weight"])
    teacher = [name for name in before if name.startswith("latent_encoder.")]
    assert all(torch.equal(before[name], after[name]) for name in teacher)
    for folder in (two / "pipeline", two / "best"):
        pipeline = HIDiffPipeline.from_pretrained(folder)
        assert pipeline.scheduler.config.num_train_timesteps == 4
        assert pipeline(folders / "photos" / "0.png").images[0].size == (48, 48)
    check_what_a_run_leaves(two)


def check_what_a_run_leaves(folder):
    """Curves, sample pictures, a model card, and nothing that tells of this machine."""
    assert (folder / "curves.png").stat().st_size > 1000
    assert len(list(folder.glob("samples/*/0000002.png"))) == 2
    card = (folder / "pipeline" / "README.md").read_text()
    front, text = card.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front)["library_name"] == "diffusers"
    scores = log(folder)[-1]
    assert f"{scores['validation_psnr']:.2f} dB / {scores['validation_ssim']:.4f} after 2 steps" in text
    assert "train_data_dir`: photos" in text
    assert "beta_end: 0.9" in text
    for file in (folder / "pipeline").rglob("*"):
        if file.suffix in (".json", ".md"):
            assert "_name_or_path" not in file.read_text()
            assert str(folder.parent) not in file.read_text()


def test_stage_2_goes_on_from_a_whole_pipeline_with_the_other_denoiser(folders, tmp_path):
    stage1(folders, tmp_path / "one", max_train_steps=1, lr_constant_steps=0)
    stage2(folders, tmp_path / "two", tmp_path / "one", max_train_steps=1, lr_constant_steps=0, denoiser_type="mixer")
    further = {"max_train_steps": 1, "lr_constant_steps": 0}
    stage2(folders, tmp_path / "three", None, pretrained_model_name_or_path=tmp_path / "two" / "pipeline", **further)
    pipeline = HIDiffPipeline.from_pretrained(tmp_path / "three" / "pipeline")
    assert type(pipeline.denoiser).__name__ == "HIDiffMixerDenoiser"


def test_fifty_steps_of_the_tiny_networks_lower_the_loss_below_085_of_what_it_was(folders, tmp_path):
    """Mean of the last ten steps against the first ten; 0.68 in stage 1 and 0.78 in stage 2 when this was written."""
    options = {"max_train_steps": 50, "lr_constant_steps": 50, "learning_rate": 5e-3, "max_grad_norm": 1.0}
    stage1(folders, tmp_path / "one", **options)
    stage2(folders, tmp_path / "two", tmp_path / "one", **options)
    for name in ("one", "two"):
        losses = [line["loss"] for line in log(tmp_path / name)]
        assert len(losses) == 50
        assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


def test_training_on_real_pairs(folders, tmp_path):
    stage1(folders, tmp_path, train_data_dir=None, train_pairs_dir=folders / "pairs", train_tile_size=40)
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 4]


def test_the_learning_rate_is_constant_then_falls_to_its_least(folders, tmp_path):
    stage1(folders, tmp_path, max_train_steps=6, lr_constant_steps=2, learning_rate=1e-3, lr_min=1e-5)
    rates = [line["lr"] for line in log(tmp_path)]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] == pytest.approx(1e-5, rel=0.1)


def test_phases_change_size_and_batch_of_the_patches(folders, tmp_path, monkeypatch):
    seen = []

    class Watching(train_stage1.Stage1):
        def forward(self, blurry, sharp):
            seen.append(tuple(blurry.shape))
            return super().forward(blurry, sharp)

    monkeypatch.setattr(train_stage1, "Stage1", Watching)
    stage1(folders, tmp_path, phase_steps=[1, 1, 2], resolution=[16, 24, 32], train_batch_size=[3, 2, 1])
    assert seen == [(3, 3, 16, 16), (2, 3, 24, 24), (1, 3, 32, 32), (1, 3, 32, 32)]


def test_accumulated_batches_are_one_larger_batch_to_rounding(folders, tmp_path):
    stage1(folders, tmp_path / "large", train_batch_size=4)
    stage1(folders, tmp_path / "accumulated", train_batch_size=2, gradient_accumulation_steps=2)
    large, accumulated = weights(tmp_path / "large"), weights(tmp_path / "accumulated")
    assert all(torch.allclose(large[name], accumulated[name], atol=1e-5) for name in large)
    for first, second in zip(log(tmp_path / "large"), log(tmp_path / "accumulated"), strict=True):
        assert first == pytest.approx(second, rel=1e-5)


def test_gradient_checkpointing_trains_the_same_weights_to_rounding(folders, tmp_path):
    stage1(folders, tmp_path / "plain")
    stage1(folders, tmp_path / "recomputed", gradient_checkpointing=True)
    plain, recomputed = weights(tmp_path / "plain"), weights(tmp_path / "recomputed")
    assert all(torch.allclose(plain[name], recomputed[name], atol=1e-6) for name in plain)


def test_bf16_computes_in_half_precision_and_stores_in_single(folders, tmp_path):
    stage1(folders, tmp_path / "one", max_train_steps=1, lr_constant_steps=0, mixed_precision="bf16")
    scheduler = json.dumps({"num_train_timesteps": 8, "clip_sample": True})
    stage2(folders, tmp_path / "two", tmp_path / "one", mixed_precision="bf16", scheduler=scheduler, learning_rate=1e-3)
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "two" / "pipeline").values())
    assert all(line["image"] < 1 and line["prior"] < 10 for line in log(tmp_path / "two"))


def test_fp16_is_refused_where_it_cannot_run(folders, tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator, on which fp16 runs")
    with pytest.raises(ValueError, match=r"`mixed_precision` must be 'no' or 'bf16' on a CPU, .*, got 'fp16'"):
        stage1(folders, tmp_path, mixed_precision="fp16")


@pytest.fixture
def _without_a_compiler():
    """Everything of torch.compile but the code generator, which would take minutes for these networks."""
    torch.compiler.set_default_backend("aot_eager")
    yield
    torch.compiler.set_default_backend(None)
    torch.compiler.reset()


@pytest.mark.usefixtures("_without_a_compiler")
def test_compiled_networks_learn_go_on_and_are_saved_under_the_same_names(folders, tmp_path):
    stage1(folders, tmp_path / "plain", validation_dir=folders / "pairs")
    options = {"compile": True, "checkpointing_steps": 2, "validation_dir": folders / "pairs"}
    stage1(folders, tmp_path / "compiled", **options)
    (tmp_path / "compiled" / "checkpoint-4").rename(tmp_path / "gone")
    stage1(folders, tmp_path / "compiled", resume_from_checkpoint="latest", **options)
    plain, compiled = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    assert plain.keys() == compiled.keys()
    assert all(torch.allclose(plain[name], compiled[name], atol=1e-5) for name in plain)
    names = [load_file(tmp_path / name / "checkpoint-4" / "model.safetensors").keys() for name in ("plain", "compiled")]
    assert names[0] == names[1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_the_average_of_the_weights_is_validated_and_becomes_the_result(folders, tmp_path):
    """With a decay of 0 the average is the last weights; with one near 1 it lags behind them."""
    options = {"learning_rate": 1e-2, "max_grad_norm": 1.0, "use_ema": True}
    stage1(folders, tmp_path / "plain", **options | {"use_ema": None})
    stage1(folders, tmp_path / "last", ema_max_decay=0.0, **options)
    stage1(folders, tmp_path / "average", ema_max_decay=0.99, **options)
    plain, last, average = (weights(tmp_path / name) for name in ("plain", "last", "average"))
    assert all(torch.allclose(plain[name], last[name], atol=1e-6) for name in plain)
    assert not torch.allclose(plain["conv_in.weight"], average["conv_in.weight"], atol=1e-4)


def test_a_dry_run_prints_what_a_run_would_do_and_writes_nothing(folders, tmp_path, capsys):
    stage1(
        *(folders, tmp_path / "out"),
        **{"dry_run": True, "phase_steps": [1, 3], "resolution": [16, 24], "gradient_accumulation_steps": 2},
        validation_dir=folders / "pairs",
    )
    text = capsys.readouterr().out
    for line in (
        "learning_rate: 0.0002",
        "2 photographs in",
        "Validation: 2 pairs in",
        "transformer: 0.22 M",
        "1: 1 steps, 16x16 pixels, global batch 4 = 2 per process x 1 processes x 2 accumulated",
        "2: 3 steps, 24x24 pixels, global batch 4",
        "s/step",
        "GiB per process",
    ):
        assert line in text
    assert not (tmp_path / "out").exists()


def test_the_progress_bar_shows_loss_psnr_speed_and_remaining_time(folders, tmp_path, capsys):
    stage1(folders, tmp_path, validation_dir=folders / "pairs", validation_steps=2)
    bar = capsys.readouterr().err.split("\r")[-1]
    scores = log(tmp_path)[-1]
    loss = log(tmp_path)[-2]["loss"]
    assert re.search(r"4/4 \[\d\d:\d\d<\d\d:\d\d", bar)
    assert f"loss={loss:.4g}, psnr={scores['validation_psnr']:.4g}, ssim={scores['validation_ssim']:.4g}" in bar
    assert re.search(r"images/s=[\d.]+\]", bar)


class NotANumber(train_stage1.Stage1):
    """Loses its loss in the forward passes that `bad` names, counted from 1."""

    bad: tuple[int, ...] = ()

    def forward(self, blurry, sharp):
        self.calls = getattr(self, "calls", 0) + 1
        loss, parts = super().forward(blurry, sharp)
        return (loss * float("nan") if self.calls in self.bad else loss), parts


def test_a_step_that_is_not_finite_is_skipped_and_its_files_are_named(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(train_stage1, "Stage1", type("Once", (NotANumber,), {"bad": (2,)}))
    stage1(folders, tmp_path)
    skipped = [line for line in log(tmp_path) if "skipped_in_a_row" in line]
    assert [(line["step"], line["samples"]) for line in skipped] == [(2, [2, 3])]
    assert set(skipped[0]["files"]) <= {str(folders / "photos" / f"{i}.png") for i in range(2)}
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
    assert [line["step"] for line in log(tmp_path) if "image" in line] == [1, 3, 4]


def test_too_many_skipped_steps_in_a_row_stop_the_run_and_leave_the_last_checkpoint(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(train_stage1, "Stage1", type("Often", (NotANumber,), {"bad": (1, 3, 4)}))
    with pytest.raises(
        FloatingPointError, match=r"2 steps in a row, the last being 4.* The last checkpoint is checkpoint-3"
    ):
        stage1(folders, tmp_path, max_skipped_steps=2, checkpointing_steps=1)
    monkeypatch.undo()
    stage1(folders, tmp_path, resume_from_checkpoint="latest")
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


def test_the_best_networks_are_kept(folders, tmp_path):
    """A learning rate that wrecks the weights: the last validation is not the best."""
    stage1(
        *(folders, tmp_path),
        **{"learning_rate": 0.3, "max_grad_norm": 1e3, "validation_dir": folders / "pairs", "validation_steps": 1},
        **{"max_train_steps": 3, "checkpointing_steps": 1, "checkpoints_total_limit": 3},
    )
    scores = {line["step"]: line["validation_psnr"] for line in log(tmp_path) if "validation_psnr" in line}
    step = max(scores, key=scores.__getitem__)
    assert step < 3
    checkpoint = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    best = weights(tmp_path / "best")
    assert torch.equal(best["conv_in.weight"], checkpoint["transformer.conv_in.weight"])
    card = (tmp_path / "README.md").read_text()
    assert re.search(rf"the best PSNR was {scores[step]:.2f} dB / -?0\.\d{{4}} after {step} steps", card)
