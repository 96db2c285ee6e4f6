import os
import shutil
import subprocess
import sys

import numpy as np
import psutil
import pytest
from accelerate import PartialState
from scored import noise, write_pairs

from diffusers_hidiff.evaluation import EvaluationError
from diffusers_hidiff.evaluation.datasets import load_pairs
from diffusers_hidiff.evaluation.protocols import PROTOCOLS, Protocol
from diffusers_hidiff.evaluation.report import write_report
from diffusers_hidiff.evaluation.runner import Job, default_workers, run


@pytest.fixture
def state():
    return PartialState(cpu=True)


@pytest.fixture
def job(tmp_path):
    """Makes a job of four pairs whose "network" returns the blurry image."""
    pairs = load_pairs(str(write_pairs(tmp_path / "data", 4)))

    def make(restore=lambda pair: pair.read_blurry(), protocol=PROTOCOLS["gopro"], workers=0, **settings):
        return Job(
            pairs, restore, protocol, tmp_path / "out", {"protocol": protocol.name, "images": 4, **settings}, workers
        )

    return make


def die(restored, sharp):
    os._exit(1)


def score_all_but_one(restored, sharp):
    if np.array_equal(restored, noise(seed=2)):
        raise ValueError("no figure")
    return PROTOCOLS["gopro"].score(restored, sharp)


def test_every_image_gets_the_scores_of_the_protocol(job, state):
    rows = run(job(), state)
    assert [row.name for row in rows] == ["00", "01", "02", "03"]
    assert rows[2].scores == PROTOCOLS["gopro"].score(noise(seed=4), noise(seed=5))
    assert (rows[2].width, rows[2].height) == (24, 16)


def test_other_processes_give_the_same_scores_and_failures(job, state, tmp_path):
    protocol = Protocol("picky", score_all_but_one)
    here = [(row.scores, row.error) for row in run(job(protocol=protocol), state)]
    assert [error for _, error in here] == [None, "no figure", None, None]
    shutil.rmtree(tmp_path / "out")
    assert [(row.scores, row.error) for row in run(job(protocol=protocol, workers=1), state)] == here


def test_what_is_done_is_not_done_again_and_what_failed_is_tried_again(job, state):
    seen = []

    def restore(pair):
        seen.append(pair.name)
        if pair.name == "02" and len(seen) < 5:
            raise RuntimeError("out of memory\nand a long story")
        return pair.read_blurry()

    rows = run(job(restore), state)
    assert [row.error for row in rows] == [None, None, "out of memory", None]
    rows = run(job(restore), state)
    assert [row.error for row in rows] == [None] * 4
    assert seen == ["00", "01", "02", "03", "02"]


def test_other_settings_in_the_same_folder_are_refused_with_one_sentence(job, state, tmp_path):
    run(job(seed=0, model={"name": "a", "sha256": "1"}), state)
    with pytest.raises(
        EvaluationError, match=r"\(model.sha256 is '2' and was '1'; seed is 1 and was 0\); choose another"
    ):
        run(job(seed=1, model={"name": "a", "sha256": "2"}), state)
    (tmp_path / "out" / "settings.json").write_text("{")
    with pytest.raises(EvaluationError, match="is damaged; choose another"):
        run(job(seed=0), state)


def test_an_image_of_another_size_is_a_failure_with_a_name(job, state, capsys):
    rows = run(job(lambda pair: pair.read_blurry()[:-1]), state)
    assert {row.error for row in rows} == {"The restored image is 24x15 pixels, the sharp one 24x16."}
    assert "03: The restored image is 24x15" in capsys.readouterr().err


def test_an_alignment_that_does_not_converge_is_a_failure(job, state):
    flat = np.full((16, 24, 3), 90, np.uint8)
    rows = run(job(lambda pair: flat if pair.name == "01" else pair.read_sharp(), PROTOCOLS["realblur"]), state)
    assert rows[1].error.startswith("The alignment does not converge")
    assert rows[0].scores["ssim"] == pytest.approx(1, abs=1e-3)


def test_a_scoring_process_that_dies_ends_the_run_with_one_sentence(job, state):
    with pytest.raises(EvaluationError, match="died, perhaps for lack of memory"):
        run(job(protocol=Protocol("deadly", die), workers=1), state)


def test_no_scoring_process_outlives_a_parent_that_was_killed(tmp_path):
    program = """
import os
from diffusers_hidiff.evaluation.runner import scoring_pool
pool = scoring_pool(1)
print(pool.submit(os.getpid).result(), flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    worker.wait(timeout=60)


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = default_workers()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert alone >= default_workers() == 1


def test_a_second_report_of_the_same_rows_is_the_same(job, state, tmp_path):
    first = write_report(job(), run(job(), state), {})
    pictures = (tmp_path / "out" / "sheet.jpg").read_bytes()
    assert write_report(job(), run(job(), state), {}) == first
    assert (tmp_path / "out" / "sheet.jpg").read_bytes() == pictures
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        *("metrics.csv", "rows", "settings.json", "sheet.jpg", "summary.json", "table.md")
    ]
