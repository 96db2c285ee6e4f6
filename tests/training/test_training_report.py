import json

import pytest

import report


def test_the_curves_of_two_runs_are_drawn_and_a_line_cut_short_is_left_out(tmp_path):
    for name in ("stage1", "stage2"):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": step, "image": 1 / step, "validation_psnr": 20 + step}) for step in (1, 2, 3)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "ima']))
    assert [line["step"] for line in report.lines_of(tmp_path / "stage1")] == [1, 2, 3]
    output = tmp_path / "curves.png"
    assert report.main([str(tmp_path / "stage1"), str(tmp_path / "stage2"), "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main([str(tmp_path), "--output", str(tmp_path / "curves.png")])
    assert "must be a folder with metrics.jsonl" in capsys.readouterr().err
