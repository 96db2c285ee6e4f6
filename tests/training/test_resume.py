"""A run that is stopped in any way goes on as if nothing had happened."""

import json
import os
import resource
import signal
import warnings
from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny import tiny_latent_encoder, tiny_transformer
from torch import nn
from training_runs import (
    assert_same_weights,
    log,
    stage1,
    stage1_flags,
    start,
    train,
    train_and_kill,
    wait_for_lines,
)

import train_stage1
from checkpoints import Checkpoints
from result import Result

# Eight steps in two phases, each step of two accumulated batches, with an average of the weights.
EVERYTHING = {
    **{"max_train_steps": 8, "lr_constant_steps": 4, "phase_steps": [4, 4], "resolution": [32, 16]},
    **{"train_batch_size": [1, 2], "gradient_accumulation_steps": 2, "use_ema": True, "checkpoints_total_limit": 9},
}


@pytest.fixture(scope="module")
def whole_runs(folders, tmp_path_factory):
    """The folder of a run that nobody disturbed, by the number of its processes."""
    runs = {}

    def run(world_size):
        if world_size not in runs:
            runs[world_size] = tmp_path_factory.mktemp("whole")
            options = stage1_flags(folders, runs[world_size], **EVERYTHING)
            assert train(world_size, options) == [0] * world_size
        return runs[world_size]

    return run


def assert_same_run(first, second):
    """Result, averaged; last checkpoint: weights, moments, random numbers; and log: bit by bit."""
    assert_same_weights(first, second)
    assert log(first) == log(second)
    checkpoints = [folder / "checkpoint-8" for folder in (first, second)]
    names = [sorted(file.name for file in folder.iterdir()) for folder in checkpoints]
    assert names[0] == names[1]
    for name in ("model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl"):
        weights = [load(folder / name) for folder in checkpoints]
        torch.testing.assert_close(*weights, rtol=0, atol=0)


def load(file):
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file)


@pytest.mark.parametrize(
    ("world_size", "checkpointing_steps"),
    [(1, 3), (2, 4)],
    ids=["goes on in the first phase", "goes on at the border of the phases"],
)
def test_a_run_killed_and_resumed_ends_in_bit_identical_weights(
    folders, tmp_path, whole_runs, world_size, checkpointing_steps
):
    options = EVERYTHING | {"checkpointing_steps": checkpointing_steps, "resume_from_checkpoint": "latest"}
    killed = stage1_flags(folders, tmp_path, **options)
    train_and_kill(world_size, killed, tmp_path, num_lines=5)
    assert not (tmp_path / "transformer").exists()
    assert train(world_size, killed) == [0] * world_size
    assert_same_run(whole_runs(world_size), tmp_path)


@pytest.mark.parametrize("moment", ["save_state", "seal", "put_in_place"])
def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(folders, tmp_path, whole_runs, moment):
    options = EVERYTHING | {"checkpointing_steps": 3, "resume_from_checkpoint": "latest"}
    killed = stage1_flags(folders, tmp_path, **options)
    assert train(1, killed, dies_after=(moment, 2)) == [-signal.SIGKILL]
    left = {path.name for path in tmp_path.iterdir() if "checkpoint" in path.name}
    assert left == {"checkpoint-3", "checkpoint-6" if moment == "put_in_place" else ".checkpoint-6.incomplete"}
    assert train(1, killed) == [0]
    assert_same_run(whole_runs(1), tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_the_log_of_a_resumed_run_has_every_step_once(folders, tmp_path):
    stage1(folders, tmp_path, checkpointing_steps=3)
    (tmp_path / "checkpoint-4").rename(tmp_path / "gone")  # as if it had been killed after step 4 was logged
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "ima')  # and while it wrote
    stage1(folders, tmp_path, checkpointing_steps=3, resume_from_checkpoint="latest")
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 4]


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(folders, tmp_path, caplog):
    stage1(folders, tmp_path / "whole", checkpointing_steps=1)
    stage1(folders, tmp_path / "damaged", checkpointing_steps=1, max_train_steps=4)
    weights = tmp_path / "damaged" / "checkpoint-4" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit
    weights.write_bytes(content)
    stage1(folders, tmp_path / "damaged", checkpointing_steps=1, resume_from_checkpoint="latest")
    assert "checkpoint-4 is damaged (model.safetensors has changed)" in caplog.text
    assert_same_weights(tmp_path / "whole", tmp_path / "damaged")
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged: model\.safetensors has changed"):
        stage1(folders, tmp_path / "damaged", resume_from_checkpoint=tmp_path / "damaged" / "checkpoint-4")


@contextmanager
def full_disk():
    """No file may grow beyond 20 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_clear_error_and_leaves_the_last_checkpoint_good(tmp_path):
    accelerator = Accelerator(cpu=True)
    network = accelerator.prepare(nn.Linear(100, 100))
    checkpoints = Checkpoints(accelerator, tmp_path, total_limit=1)
    checkpoints.save(1, {})
    with (
        full_disk(),  # the weights need 40 kB
        pytest.raises(OSError, match=r"could not be written to .* The last checkpoint is checkpoint-1\."),
    ):
        checkpoints.save(2, {})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    expected = network.weight.clone()
    nn.init.zeros_(network.weight)
    assert checkpoints.load(checkpoints.find("latest")) == {"step": 1}
    assert torch.equal(network.weight, expected)


def test_a_full_disk_leaves_the_best_networks_as_they_were(tmp_path):
    objective = train_stage1.Stage1(tiny_latent_encoder(), tiny_transformer())
    result = Result(Accelerator(cpu=True), objective, tmp_path)
    result.save("best", "first")
    with full_disk(), pytest.raises(OSError, match=r"The networks could not be written to '.*best'"):
        result.save("best", "second")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert (tmp_path / "best" / "README.md").read_text() == "first"


def test_old_checkpoints_make_room_and_unfinished_ones_do_not_count(folders, tmp_path):
    (tmp_path / ".checkpoint-9.incomplete").mkdir(parents=True)
    stage1(folders, tmp_path, checkpointing_steps=1, checkpoints_total_limit=2, resume_from_checkpoint="latest")
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_the_only_good_checkpoint_is_never_removed(tmp_path):
    checkpoints = Checkpoints(Accelerator(cpu=True), tmp_path, total_limit=1)
    (tmp_path / "checkpoint-9").mkdir()  # damaged: an earlier attempt got that far
    for step in (1, 2):
        checkpoints.save(step, {})
    assert [folder.name for folder in checkpoints.folders()] == ["checkpoint-2", "checkpoint-9"]
    assert checkpoints.find("latest") == tmp_path / "checkpoint-2"
    checkpoints.save(9, {})
    assert checkpoints.find("latest") == tmp_path / "checkpoint-9"


def test_with_a_limit_of_one_a_damaged_newest_checkpoint_does_not_cost_the_good_one(tmp_path):
    accelerator = Accelerator(cpu=True)
    network = accelerator.prepare(nn.Linear(2, 2))
    checkpoints = Checkpoints(accelerator, tmp_path, total_limit=1)
    checkpoints.save(1, {})
    good = network.weight.clone()
    (tmp_path / "checkpoint-2").mkdir()  # damaged
    assert checkpoints.find("latest") == tmp_path / "checkpoint-1"
    checkpoints.tidy()
    nn.init.zeros_(network.weight)
    assert checkpoints.load(checkpoints.find("latest")) == {"step": 1}
    assert torch.equal(network.weight, good)
    checkpoints.save(3, {})  # only now, with a better one in place, do both go
    assert checkpoints.folders() == [tmp_path / "checkpoint-3"]
    assert checkpoints.find("latest") == tmp_path / "checkpoint-3"


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    (tmp_path / "checkpoint-9").mkdir()
    with pytest.raises(ValueError, match="`resume_from_checkpoint` finds no whole checkpoint in"):
        Checkpoints(Accelerator(cpu=True), tmp_path, total_limit=1).find("latest")


def test_a_checkpoint_killed_between_two_renames_comes_back(tmp_path):
    checkpoints = Checkpoints(Accelerator(cpu=True), tmp_path, total_limit=1)
    checkpoints.save(1, {})
    (tmp_path / "checkpoint-1").rename(tmp_path / ".checkpoint-1.replaced")
    checkpoints.tidy()
    assert checkpoints.find("latest") == tmp_path / "checkpoint-1"


class StopsItself(train_stage1.Stage1):
    """Presses Ctrl-C in its third step."""

    def forward(self, blurry, sharp):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return super().forward(blurry, sharp)


def test_ctrl_c_saves_and_leaves_and_the_run_goes_on(folders, tmp_path, monkeypatch):
    stage1(folders, tmp_path / "whole")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
    with monkeypatch.context() as patch:
        patch.setattr(train_stage1, "Stage1", StopsItself)
        with pytest.raises(SystemExit) as stopped:
            stage1(folders, tmp_path / "stopped")
    assert stopped.value.code == 130
    assert (tmp_path / "stopped" / "checkpoint-3").is_dir()
    assert not (tmp_path / "stopped" / "transformer").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    stage1(folders, tmp_path / "stopped", resume_from_checkpoint="latest")
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_ctrl_c_in_one_of_two_processes_stops_both_after_the_same_step(folders, tmp_path):
    arguments = stage1_flags(folders, tmp_path, max_train_steps=1000)
    processes = start(2, arguments)
    wait_for_lines(tmp_path / "metrics.jsonl", 2, processes)
    os.kill(processes[1].pid, signal.SIGTERM)  # a background job of a shell would ignore SIGINT
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [130, 130]
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert int(checkpoint.name[11:]) == log(tmp_path)[-1]["step"]


def test_the_learning_rate_of_a_resumed_run_follows_its_options(folders, tmp_path):
    """The checkpoint's own schedule would have gone on to the end of the first run's cosine."""
    stage1(folders, tmp_path / "longer", max_train_steps=8, lr_constant_steps=6)
    stage1(folders, tmp_path / "extended", max_train_steps=4, lr_constant_steps=2, checkpointing_steps=2)
    (tmp_path / "extended" / "checkpoint-4").rename(tmp_path / "gone")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        stage1(
            *(folders, tmp_path / "extended"),
            **{"max_train_steps": 8, "lr_constant_steps": 6, "resume_from_checkpoint": "latest"},
        )
    assert [line["lr"] for line in log(tmp_path / "extended")] == [line["lr"] for line in log(tmp_path / "longer")]


def test_options_that_changed_at_resume_are_named(folders, tmp_path, caplog):
    stage1(folders, tmp_path, max_train_steps=2)
    stage1(folders, tmp_path, adam_beta2=0.9, resume_from_checkpoint="latest")
    assert "max_train_steps=4, adam_beta2=0.9" in caplog.text
    groups = torch.load(tmp_path / "checkpoint-4" / "optimizer.bin")["param_groups"]
    assert groups[0]["betas"] == (0.9, 0.9)


def test_other_networks_than_the_checkpoint_has_are_refused(folders, tmp_path):
    stage1(folders, tmp_path, max_train_steps=2)
    with pytest.raises(ValueError, match=r"needs the options that .*checkpoint-2 was made with: encoder="):
        stage1(
            folders, tmp_path, resume_from_checkpoint="latest", encoder=json.dumps({"embed_dim": 4, "num_blocks": 2})
        )


def test_a_folder_with_checkpoints_is_not_begun_anew(folders, tmp_path):
    stage1(folders, tmp_path)
    with pytest.raises(ValueError, match="holds checkpoints: go on with `--resume_from_checkpoint latest`"):
        stage1(folders, tmp_path)


def test_a_checkpoint_that_is_none_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be 'latest' or a checkpoint-N folder"):
        stage1(folders, tmp_path, resume_from_checkpoint=tmp_path / "nothing")
