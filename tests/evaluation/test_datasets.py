import datasets
import numpy as np
import PIL.Image
import pytest
from scored import noise, write, write_pairs

from diffusers_hidiff.evaluation import EvaluationError
from diffusers_hidiff.evaluation.datasets import (
    NAMED_DATASETS,
    fingerprint,
    load_pairs,
    pairs_of_folders,
    pairs_of_table,
)


def names(pairs):
    return [pair.name for pair in pairs]


def test_a_folder_gives_its_pairs_sorted(tmp_path):
    pairs = load_pairs(str(write_pairs(tmp_path, 3)))
    assert names(pairs) == ["00", "01", "02"]
    assert np.array_equal(pairs[1].read_blurry(), noise(seed=2))
    assert np.array_equal(pairs[1].read_sharp(), noise(seed=3))


def test_gopro_lies_in_sequences_of_a_split(tmp_path):
    for split, sequence in (("test", "GOPR2"), ("test", "GOPR1"), ("train", "GOPR3")):
        for i, folder in enumerate(("blur", "blur_gamma", "sharp")):
            write(tmp_path / split / sequence / folder / "000001.png", noise(seed=i))
    pairs = load_pairs("gopro", tmp_path)
    assert names(pairs) == ["GOPR1/000001", "GOPR2/000001"]
    assert np.array_equal(pairs[0].read_blurry(), noise(seed=0))
    assert np.array_equal(pairs[0].read_sharp(), noise(seed=2))
    assert names(load_pairs("gopro", tmp_path, "train")) == ["GOPR3/000001"]


def test_hide_has_its_sharp_images_in_one_folder(tmp_path):
    write(tmp_path / "test" / "test-close-ups" / "b.png", noise(seed=0))
    write(tmp_path / "test" / "test-long-shot" / "a.png", noise(seed=1))
    write(tmp_path / "GT" / "a.png", noise(seed=2))
    with pytest.raises(EvaluationError, match=r"b\.png has no partner in GT/"):
        load_pairs("hide", tmp_path)
    write(tmp_path / "GT" / "b.png", noise(seed=3))
    pairs = load_pairs("hide", tmp_path)
    assert names(pairs) == ["test-close-ups/b", "test-long-shot/a"]
    assert np.array_equal(pairs[1].read_sharp(), noise(seed=2))


def test_realblur_follows_its_list_and_without_one_its_scenes(tmp_path):
    for scene in ("scene001", "scene002"):
        for kind in ("blur", "gt"):
            write(tmp_path / "RealBlur-J" / scene / kind / f"{kind}_7.png", noise())
    assert names(load_pairs("realblur_j", tmp_path / "RealBlur-J")) == ["scene001/7", "scene002/7"]
    line = "RealBlur-J/scene002/gt/gt_7.png RealBlur-J/scene002/blur/blur_7.png \n"
    (tmp_path / "RealBlur_J_test_list.txt").write_text(line)
    assert names(load_pairs("realblur_j", tmp_path)) == ["RealBlur-J/scene002/7"]


@pytest.mark.parametrize("name", NAMED_DATASETS)
def test_every_named_data_set_may_lie_as_input_and_target(name, tmp_path):
    write(tmp_path / "test" / "input" / "1.png", noise(seed=0))
    write(tmp_path / "test" / "target" / "1.png", noise(seed=1))
    (pair,) = load_pairs(name, tmp_path)
    assert pair.name == "1"
    assert np.array_equal(pair.read_sharp(), noise(seed=1))


def test_another_split_is_never_taken_for_the_one_that_is_missing(tmp_path):
    write_pairs(tmp_path / "train" / "scene", 1)
    with pytest.raises(EvaluationError, match=r"has train/ but no test/\. For GoPro is expected: test/SEQUENCE/"):
        load_pairs("gopro", tmp_path)


def test_what_is_missing_is_said_in_a_sentence(tmp_path):
    with pytest.raises(EvaluationError, match="--dataset gopro needs --data_dir"):
        load_pairs("gopro")
    with pytest.raises(EvaluationError, match="--data_dir must be a folder"):
        load_pairs("gopro", tmp_path / "none")
    with pytest.raises(EvaluationError, match="--data_dir goes with gopro, hide"):
        load_pairs(str(tmp_path), tmp_path)
    with pytest.raises(EvaluationError, match="must hold blurry/ and sharp/"):
        load_pairs(str(tmp_path))
    with pytest.raises(EvaluationError, match="'no/data-set' cannot be loaded"):
        load_pairs("no/data-set")


@pytest.mark.parametrize("columns", [("blurry", "sharp"), ("blur", "sharp"), ("input", "target")])
def test_a_table_gives_its_rows(columns, tmp_path):
    rows = {
        column: [PIL.Image.fromarray(noise(seed=2 * row + i)) for row in range(2)] for i, column in enumerate(columns)
    }
    features = datasets.Features({column: datasets.Image() for column in columns})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    pairs = load_pairs(str(tmp_path))
    assert names(pairs) == ["000000", "000001"]
    assert np.array_equal(pairs[1].read_blurry(), noise(seed=2))
    assert np.array_equal(pairs[1].read_sharp(), noise(seed=3))


def test_a_table_without_the_columns_or_without_rows_is_refused():
    with pytest.raises(EvaluationError, match=r"must have columns blurry and sharp, or .*, got image"):
        pairs_of_table(datasets.Dataset.from_dict({"image": [1]}))
    with pytest.raises(EvaluationError, match="no rows"):
        pairs_of_table(datasets.Dataset.from_dict({"blurry": [], "sharp": []}))


def test_two_folders_are_paired_by_name_below_them_whatever_the_suffix(tmp_path):
    write(tmp_path / "restored" / "a" / "1.jpg", noise())
    write(tmp_path / "sharp" / "a" / "1.png", noise())
    write(tmp_path / "sharp" / "2.png", noise())
    pairs, restored = pairs_of_folders(tmp_path / "restored", tmp_path / "sharp")
    assert names(pairs) == ["2", "a/1"]
    assert list(restored) == ["a/1"]
    assert pairs[0].read_blurry is None


def test_a_restored_image_without_a_sharp_one_is_refused(tmp_path):
    write(tmp_path / "restored" / "1.png", noise())
    write(tmp_path / "sharp" / "2.png", noise())
    with pytest.raises(EvaluationError, match="1 have none, the first is '1'"):
        pairs_of_folders(tmp_path / "restored", tmp_path / "sharp")
    with pytest.raises(EvaluationError, match="lacks 1 images, the first is '2'"):
        pairs_of_folders(tmp_path / "sharp", tmp_path / "sharp", tmp_path / "restored")
    with pytest.raises(EvaluationError, match="is no folder"):
        pairs_of_folders(tmp_path / "restored", tmp_path / "none")
    write(tmp_path / "sharp" / "2.jpg", noise())
    with pytest.raises(EvaluationError, match="bear the same name"):
        pairs_of_folders(tmp_path / "sharp", tmp_path / "sharp")


def test_the_fingerprint_changes_with_the_images(tmp_path):
    folder = str(write_pairs(tmp_path, 2))
    before = fingerprint(load_pairs(folder))
    assert fingerprint(load_pairs(folder)) == before
    write(tmp_path / "sharp" / "01.png", noise(seed=9))
    assert fingerprint(load_pairs(folder)) != before
