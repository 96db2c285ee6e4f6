import csv
import json

import numpy as np
import pytest

from diffusers_hidiff.evaluation.report import (
    as_csv,
    as_table,
    bootstrap_interval,
    extremes,
    statistics,
    summarize,
)
from diffusers_hidiff.evaluation.runner import Row

SETTINGS = {
    "dataset": "gopro",
    "split": "test",
    "protocol": "gopro",
    "images": 4,
    "model": {"name": "mine"},
    "steps": 8,
    "scheduler": "HIDiffScheduler",
    "seed": 0,
}


def row(index, psnr, ssim=0.5):
    return Row(index, f"image {index}", 24, 16, 0.25, {"psnr": psnr, "ssim": ssim})


ROWS = [row(0, 30.0), Row(1, "image 1", error="damaged"), row(2, 32.0, 0.7), row(3, 31.0, 0.6)]


def test_an_image_that_failed_is_named_and_is_part_of_no_mean():
    summary = summarize(SETTINGS, ROWS, {})
    assert summary["metrics"]["psnr"]["mean"] == 31
    assert summary["metrics"]["ssim"]["mean"] == pytest.approx(0.6)
    assert summary["scored"] == 3
    assert summary["failed"] == [{"name": "image 1", "error": "damaged"}]


def test_an_infinite_psnr_leaves_no_mean_but_a_count_and_strict_json():
    summary = summarize(SETTINGS, [row(0, 30.0), row(1, float("inf"), 1.0)], {})
    assert summary["metrics"]["psnr"] == {"mean": None, "interval_95": None, "infinite": 1}
    assert summary["metrics"]["ssim"]["mean"] == 0.75
    json.dumps(summary, allow_nan=False)
    assert "infinite for 1" in as_table(summary)


def test_without_an_image_there_is_no_mean():
    summary = summarize(SETTINGS, [ROWS[1]], {})
    assert summary["metrics"]["psnr"] == {"mean": None, "interval_95": None, "infinite": 0}
    assert "| none |" in as_table(summary)


def test_the_interval_holds_95_percent_of_the_means_of_resampled_images():
    values = np.random.default_rng(1).normal(30, 2, 400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)
    assert statistics(list(values))["interval_95"] == [low, high]  # the same every time


def test_the_csv_has_a_line_per_image_with_inf_where_images_are_identical():
    lines = list(csv.DictReader(as_csv(SETTINGS, [*ROWS, row(4, float("inf"), 1.0)]).splitlines()))
    assert lines[0] == {
        "name": "image 0",
        "psnr": "30.000000",
        "ssim": "0.500000",
        "width": "24",
        "height": "16",
        "seconds": "0.2500",
        "steps": "8",
        "scheduler": "HIDiffScheduler",
        "seed": "0",
        "error": "",
    }
    assert (lines[1]["psnr"], lines[1]["error"]) == ("", "damaged")
    assert lines[4]["psnr"] == "inf"


def test_the_table_has_the_papers_figures_beside_ours():
    table = as_table(summarize(SETTINGS, ROWS, {}))
    assert "| HI-Diff (arXiv:2305.12966), trained on GoPro | 33.33 | 0.964 | 1111 |" in table
    assert "| mine, 8 steps of HIDiffScheduler | 31.00 [30.00, 32.00] | 0.6000 [0.5000, 0.7000] | 3 of 4 |" in table
    assert "means of 1111 images; ours, of 3" in table
    assert "Failed: image 1." in table


def test_realblur_is_compared_with_both_trainings_of_the_paper():
    summary = summarize(SETTINGS | {"dataset": "realblur_j", "protocol": "realblur"}, ROWS, {})
    assert [figures["psnr"] for figures in summary["paper"]] == [29.15, 33.70]


@pytest.mark.parametrize("other", [{"dataset": "photos"}, {"split": "train"}])
def test_the_paper_is_left_out_where_it_has_no_figure(other):
    assert "arXiv" not in as_table(summarize(SETTINGS | other, ROWS, {}))


def test_the_sheet_shows_best_median_and_worst_each_image_once():
    assert [(place, row.index) for place, row in extremes(ROWS)] == [("best", 2), ("median", 3), ("worst", 0)]
    assert [(place, row.index) for place, row in extremes(ROWS[:2])] == [("best", 0)]
