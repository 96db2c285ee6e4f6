import csv
import re
import time
from pathlib import Path

import PIL.Image
import profile_operations
import pytest
import roofline
import speed
import torch
from cases import Case, build, pipeline_of
from measure import gmacs, in_child

TESTS = Path(__file__).parents[1]


def wait_for(seconds: float) -> None:
    time.sleep(seconds)


def fail(message: str) -> None:
    raise ValueError(message)


def test_the_quick_benchmark_writes_table_figures_and_plot_and_goes_on_where_it_stopped(tmp_path, capsys):
    assert speed.main(["--quick", "--repeats", "1", "--threads", "1", "--output", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "speed.csv").open()))
    assert [(row["variant"], row["size"]) for row in rows] == [
        (variant, size) for size in ("32x32", "64x64") for variant in ("literal", "ours")
    ]
    assert all(float(row["seconds"]) > 0 and float(row["added_mb"]) > 0 and float(row["gmacs"]) > 0 for row in rows)
    assert all(float(row["difference"]) < 1e-5 for row in rows)
    written = (tmp_path / "table.md").read_text()
    assert written.count("| 64x64 |") == 2
    assert PIL.Image.open(tmp_path / "plot.png").width > 800

    capsys.readouterr()
    assert speed.main(["--quick", "--repeats", "1", "--threads", "1", "--output", str(tmp_path)]) == 0
    assert not re.search(r"\[\d/4\]", capsys.readouterr().out)
    assert (tmp_path / "table.md").read_text() == written


def test_a_case_that_takes_too_long_or_fails_says_so():
    assert in_child(wait_for, 60.0, threads=1, limit=2.0) == (None, "longer than 2 s")
    assert in_child(fail, "no\nmore", threads=1, limit=300.0) == (None, "ValueError: no")


def test_a_skipped_case_has_its_reason_in_the_table():
    row = {**dict.fromkeys(speed.FIGURES), **dict.fromkeys(speed.KEY, "cpu"), "network": "full", "variant": "literal"}
    row |= {"size": "720x1280", "dtype": "float32", "threads": "1", "skipped": "longer than 9 s"}
    facts = {"processor": "x", "torch": "2", "gmacs_per_second": {}}
    assert "| 720x1280 | literal | skipped: longer than 9 s |" in speed.table([row], facts)


@torch.no_grad()
def test_the_authors_network_is_whatever_a_function_returns():
    case = Case("full", "official", 16, 24, "float32", "cpu", 1)
    (blurry, noise), ours = case.inputs(), Case("full", "ours", 16, 24, "float32", "cpu", 1)
    found = build(case, official_spec=f"{TESTS}:literal:LiteralTransformer")(blurry, noise)
    torch.testing.assert_close(found, build(ours)(blurry, noise), rtol=0, atol=1e-5)


def test_fewer_multiply_adds_are_counted_than_the_142_6_of_the_method_as_published():
    assert 0.9 * 142.6 < gmacs("full", 256, 256) < 142.6


def test_the_profile_names_every_kind_of_operation(tmp_path):
    output = tmp_path / "profile.md"
    assert profile_operations.main(["--cases", "small:64x64", "--output", str(output)]) == 0
    for kind in (*profile_operations.CONVOLUTIONS, *profile_operations.KINDS):
        assert not re.search(rf"\| {re.escape(kind)} \| 0\.0 ", output.read_text()), kind


def test_the_floor_of_bytes_is_below_what_operators_move_and_grows_with_the_pixels():
    fused, eager = roofline.numbers_moved(pipeline_of("small").transformer, 64, 64)
    assert 0 < fused < eager
    weights = sum(parameter.numel() for parameter in pipeline_of("small").transformer.parameters())
    twice, _ = roofline.numbers_moved(pipeline_of("small").transformer, 64, 128)
    assert twice - weights == 2 * (fused - weights)


@pytest.mark.parametrize("text", ["256", "20x32", "axb", "0x8"])
def test_a_size_that_cannot_be_is_refused(text):
    with pytest.raises(speed.argparse.ArgumentTypeError, match="must be"):
        speed.parse_size(text)
