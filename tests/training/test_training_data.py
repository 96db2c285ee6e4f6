"""Every source of data trains, and a run that is stopped goes on in the same samples."""

import json

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from training_runs import assert_same_weights, flags, log, stage1

from config import Stage1Config, parse_config
from data import TrainingData


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three Parquet shards of three pairs each, 48x48."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    features = datasets.Features({"blurry": datasets.Image(), "sharp": datasets.Image()})
    for i in range(3):
        images = [PIL.Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)) for _ in range(3)]
        table = datasets.Dataset.from_dict({"blurry": images, "sharp": images[::-1]}, features=features)
        table.to_parquet(folder / f"train-{i:05}-of-00003.parquet")
    return folder


def data_of(process_index=0, num_processes=1, **values):
    config = parse_config(
        Stage1Config, flags(**{"output_dir": "out", "resolution": 16, "train_batch_size": 2} | values)
    )
    return TrainingData(config, process_index, num_processes)


STREAM = {"streaming": True, "shuffle_buffer_size": 4, "dataloader_num_workers": 0}


def samples(data, first_step, last_step):
    """The blurry patches of the steps, in order."""
    found = []
    for phase in data.phases:
        for step, batch in enumerate(
            data.batches(phase, max(first_step, phase.first_step)), max(first_step, phase.first_step)
        ):
            if step == last_step:
                return torch.cat(found)
            found.append(batch["blurry"])
    return torch.cat(found)


def test_a_run_on_a_stream_goes_on_in_bit_identical_weights(shards, tmp_path):
    """Six steps in two phases; the second run is stopped after the fourth, in the middle of a block and of a phase."""
    options = {"train_data_dir": None, "dataset_name": shards, "max_train_steps": 6, "phase_steps": [3, 3], **STREAM}
    options |= {"resolution": [16, 24], "checkpointing_steps": 2}
    stage1(None, tmp_path / "whole", **options)
    stage1(None, tmp_path / "stopped", **options)
    (tmp_path / "stopped" / "checkpoint-6").rename(tmp_path / "gone")
    options["dataloader_num_workers"] = 2
    stage1(None, tmp_path / "stopped", resume_from_checkpoint="latest", **options)
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert log(tmp_path / "whole") == log(tmp_path / "stopped")
    state = json.loads((tmp_path / "whole" / "checkpoint-4" / "state.json").read_text())["data"]
    assert [(block["first"], block["epoch"]) for block in state] == [(4, 0)]  # the next one was not begun
    card = (tmp_path / "whole" / "README.md").read_text()
    assert f"* `dataset_name`: {shards.name}" in card
    assert str(shards) not in card


def test_a_streams_samples_do_not_depend_on_workers_and_go_on_across_phases(shards):
    options = {"dataset_name": shards, "max_train_steps": 7, "lr_constant_steps": 0, "phase_steps": [3, 4], **STREAM}
    whole = samples(data_of(**options), 0, 7)
    assert torch.equal(samples(data_of(**options | {"dataloader_num_workers": 2}), 0, 7), whole)
    before = data_of(**options)
    samples(before, 0, 6)
    after = data_of(**options)
    after.load([before.state(5)])
    assert torch.equal(samples(after, 5, 7), whole[10:])


def test_a_stream_refuses_to_go_on_in_more_processes_or_from_other_data(shards):
    states = [data_of(i, 2, dataset_name=shards, **STREAM).state(0) for i in range(2)]
    with pytest.raises(ValueError, match="only in as many processes as it was begun in, 2, got 1"):
        data_of(dataset_name=shards, **STREAM).load(states)
    with pytest.raises(ValueError, match="`streaming` must stay as in the checkpoint, off, got it on"):
        data_of(dataset_name=shards, **STREAM).load([None])


def test_two_processes_read_what_their_numbers_say(shards):
    """Each process has its own rows; the numbers of the samples are those of one process with the whole batch."""
    options = {"dataset_name": shards, "max_train_steps": 2, "lr_constant_steps": 0, **STREAM}
    numbers = [
        [index for batch in data.batches(data.phases[0], 0) for index in batch["index"].tolist()]
        for data in (data_of(i, 2, **options) for i in range(2))
    ]
    assert numbers == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_a_table_is_sampled_like_files_and_described(shards, folders):
    table = data_of(dataset_name=shards)
    assert str(table) == f"9 pairs in {shards}, split train"
    assert str(data_of(dataset_name=shards, **STREAM)) == f"a stream of pairs from {shards}, split train"
    assert str(data_of(train_pairs_dir=folders / "pairs")) == f"2 pairs in {folders / 'pairs'}"
    batch = next(iter(table.batches(table.phases[0], 0)))
    assert batch["blurry"].shape == (2, 3, 16, 16)
    assert table.source(0).endswith(f"of {shards}")


def test_a_dry_run_looks_into_every_phase_of_a_stream(shards, tmp_path, capsys):
    options = {
        "train_data_dir": None,
        "dataset_name": shards,
        "max_train_steps": 900,
        "phase_steps": [400, 500],
        **STREAM,
    }
    stage1(None, tmp_path / "out", dry_run=True, **options)
    assert "2: 500 steps" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_blur_options_reach_the_patches(folders):
    plain, defocused = (
        data_of(train_data_dir=folders / "photos", blur=json.dumps({"noise_probability": 0.0} | blur))
        for blur in ({}, {"defocus_probability": 1.0, "max_defocus_radius": 9.0})
    )
    roughness = [
        np.mean([np.abs(np.diff(data.dataset[i]["blurry"].numpy(), axis=-1)).mean() for i in range(20)])
        for data in (plain, defocused)
    ]
    assert roughness[1] < 0.8 * roughness[0]
