"""A stream gives the same samples however it is read and wherever it is taken up again."""

import io
import json
from itertools import islice

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_hidiff.data.paired_patches import PairedPatchesDataset, PatchCutter
from diffusers_hidiff.data.paired_tables import TablePairs, load_table
from diffusers_hidiff.data.streamed_patches import PairStream, StreamedPatchesDataset


def encoded(value, suffix="PNG"):
    file = io.BytesIO()
    PIL.Image.new("RGB", (24, 20), (value, 0, 0)).save(file, suffix)
    return {"bytes": file.getvalue(), "path": None}


def table(values):
    """A row for each value: blurry is an image of that red, sharp of the red above it."""
    features = datasets.Features(
        {"blurry": datasets.Image(), "sharp": datasets.Image(), "name": datasets.Value("string")}
    )
    rows = {
        "blurry": [encoded(v) for v in values],
        "sharp": [encoded(v + 1) for v in values],
        "name": [str(v) for v in values],
    }
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Five Parquet shards with 4, 4, 4, 4 and 3 rows."""
    folder = tmp_path_factory.mktemp("shards")
    for i in range(5):
        table(range(4 * i, min(4 * i + 4, 19))).to_parquet(folder / f"train-{i:05}-of-00005.parquet")
    return folder


def values(stream, start, number):
    """The red of the blurry image of each row."""
    rows = islice(stream.rows(start), number)
    return [PIL.Image.open(io.BytesIO(row["blurry"]["bytes"])).getpixel((0, 0))[0] for row in rows]


def test_every_row_comes_once_in_an_epoch_and_the_epochs_differ(shards):
    read = values(PairStream(str(shards), "train", block_size=6), 0, 57)
    epochs = [read[i : i + 19] for i in (0, 19, 38)]
    assert all(sorted(epoch) == list(range(19)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert values(PairStream(str(shards), "train", seed=1, block_size=6), 0, 19) != epochs[0]


@pytest.mark.parametrize("position", [0, 1, 5, 6, 13, 18, 19, 20, 41])
def test_a_stream_goes_on_anywhere_as_if_it_had_never_stopped(shards, position):
    whole = values(PairStream(str(shards), "train", block_size=6), 0, 60)
    before = PairStream(str(shards), "train", block_size=6)
    assert values(before, 0, min(60, position + 9)) == whole[: position + 9]  # the loader is ahead of the training
    state = json.loads(json.dumps(before.state(position)))
    after = PairStream(str(shards), "train", block_size=6)
    after.load(state)
    assert values(after, position, 60 - position) == whole[position:]
    assert values(before, position, 60 - position) == whole[position:]  # the next phase, in the same process


def test_what_is_read_again_to_go_on_is_less_than_a_block(shards):
    before = PairStream(str(shards), "train", block_size=6)
    values(before, 0, 45)
    state = before.state(44)
    assert 44 - state["first"] < 6
    assert state["epoch"] == 2


@pytest.mark.parametrize("num_processes", [2, 5])
def test_processes_share_the_rows_out(shards, num_processes):
    """Two do not divide five shards and take every second row; five take a shard each."""
    parts = [
        PairStream(str(shards), "train", process_index=i, num_processes=num_processes) for i in range(num_processes)
    ]
    for part in parts:
        part.table.set_epoch(1)  # that of the first pass
    read = [values(part, 0, len(list(part.table))) for part in parts]
    assert sorted(value for part in read for value in part) == list(range(19))


def test_another_seed_than_the_checkpoints_is_refused(shards):
    state = PairStream(str(shards), "train", seed=3).state(0)
    with pytest.raises(ValueError, match="`seed` must be 3, as in the checkpoint, for a stream to go on, got 4"):
        PairStream(str(shards), "train", seed=4).load(state)


def test_a_streamed_patch_is_the_one_that_a_file_would_give(shards):
    cutter = PatchCutter(8, seed=0)
    stream = PairStream(str(shards), "train")
    dataset = StreamedPatchesDataset(stream, cutter)
    row = next(stream.rows(0))
    item = dataset[(7, row)]
    assert item["blurry"].shape == item["sharp"].shape == (3, 8, 8)
    assert (item["sharp"][0] - item["blurry"][0]) * 255 == pytest.approx(np.ones((8, 8)), abs=1e-3)
    assert item["index"] == 7
    row["sharp"] = {"bytes": row["sharp"]["bytes"][:40], "path": None}
    with pytest.raises(ValueError, match=r"sample 7 of the stream of .* cannot be read as a pair of images"):
        dataset[(7, row)]


def test_a_stream_without_rows_is_refused(tmp_path):
    table([]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="has no rows for this process"):
        next(PairStream(str(tmp_path), "train").rows(0))


def save_parquet(rows, folder):
    rows.to_parquet(folder / "train.parquet")


def save_arrow(rows, folder):
    rows.save_to_disk(folder / "saved")
    for i, file in enumerate(sorted((folder / "saved").glob("*.arrow"))):
        file.rename(folder / f"train-{i}.arrow")
    for file in (folder / "saved").iterdir():
        file.unlink()
    (folder / "saved").rmdir()


def save_to_disk(rows, folder):
    rows.save_to_disk(folder)


def save_splits_to_disk(rows, folder):
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(folder)


def save_images(rows, folder):
    lines = []
    for i, row in enumerate(rows):
        for column in ("blurry", "sharp"):
            row[column].save(folder / f"{i}_{column}.png")
        lines.append(json.dumps({f"{c}_file_name": f"{i}_{c}.png" for c in ("blurry", "sharp")}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


SAVES = [save_parquet, save_arrow, save_to_disk, save_splits_to_disk, save_images]


@pytest.mark.parametrize("save", SAVES, ids=lambda save: save.__name__)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_folder_gives_its_pairs(tmp_path, save, streaming):
    save(table([10, 20, 30]), tmp_path)
    if streaming:
        stream = PairStream(str(tmp_path), "train")
        dataset = StreamedPatchesDataset(stream, PatchCutter(8, 0))
        items = [dataset[(i, row)] for i, row in enumerate(islice(stream.rows(0), 3))]
    else:
        dataset = PairedPatchesDataset(TablePairs(str(tmp_path), "train"), PatchCutter(8, 0), 3)
        items = [dataset[i] for i in range(3)]
    reds = sorted(
        (round(item["blurry"][0].mean().item() * 255), round(item["sharp"][0].mean().item() * 255)) for item in items
    )
    assert reds == [(10, 11), (20, 21), (30, 31)]


def test_a_table_that_cannot_be_read_is_told_in_a_sentence(tmp_path, shards):
    with pytest.raises(ValueError, match="data set 'no/where' cannot be loaded"):
        load_table("no/where", "train")
    with pytest.raises(ValueError, match=r"cannot be loaded: .*test"):
        load_table(str(shards), "test")
    save_splits_to_disk(table([1]), tmp_path / "saved")
    with pytest.raises(ValueError, match="has no split 'validation', but train, test"):
        load_table(str(tmp_path / "saved"), "validation")
    datasets.Dataset.from_dict({"image": [1]}).to_parquet(tmp_path / "other" / "train.parquet")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"must have columns blurry and sharp, or .*, got image"):
            load_table(str(tmp_path / "other"), "train", streaming=streaming)


def test_a_damaged_row_of_a_table_is_named(tmp_path):
    features = datasets.Features({"blurry": datasets.Image(), "sharp": datasets.Image()})
    rows = {"blurry": [{"bytes": b"no image", "path": None}], "sharp": [encoded(1)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"row 0 of .* cannot be read as a pair of images"):
        TablePairs(str(tmp_path), "train").read(0)


def test_items_of_a_table_do_not_depend_on_the_number_of_workers(shards):
    dataset = PairedPatchesDataset(TablePairs(str(shards), "train"), PatchCutter(8, 0), 12)
    alone, shared = (
        torch.cat([batch["blurry"] for batch in torch.utils.data.DataLoader(dataset, 3, num_workers=n)]) for n in (0, 2)
    )
    assert torch.equal(alone, shared)
