import errno
import os
import subprocess
import sys

import pytest
import torch

from diffusers_hidiff.models import memory
from diffusers_hidiff.models.memory import empty, format_memory, free_memory, parse_memory

CPU = torch.device("cpu")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc of Linux")


@pytest.mark.parametrize(
    ("amount", "number"),
    [(12345, 12345), ("800MB", 800 * 2**20), ("1.5 GiB", 3 * 2**29), ("4gb", 2**32), ("2T", 2**41), ("100", 100)],
)
def test_an_amount_of_memory_is_read_as_people_write_it(amount, number):
    assert parse_memory(amount) == number


@pytest.mark.parametrize("amount", ["", "GB", "4 apples", "-1GB", 0, "0MB", "1e9", None, "4XB", "nan"])
def test_what_is_no_amount_of_memory_is_refused(amount):
    with pytest.raises(ValueError, match="`max_memory` must be an amount of memory such as '4GB' or '800MB', got"):
        parse_memory(amount)


def test_an_amount_that_is_written_is_enough_when_it_is_read():
    for amount in (1, 2**20, 2**20 + 1, 3 * 2**30 + 5, 11 * 2**30 + 1):
        assert amount <= parse_memory(format_memory(amount)) <= amount + 2**30


TAKES_MEMORY = """
import torch
from diffusers_hidiff.models.memory import empty, used_memory

CPU = torch.device("cpu")
before = used_memory(CPU)
taken = torch.ones(2**24)  # 64 MB
assert 2**25 < used_memory(CPU) - before < 2**27
del taken
before = used_memory(CPU)
mapped = empty((2**24,), torch.float32, CPU, "file").fill_(1)
assert used_memory(CPU) - before < 2**24
assert mapped.sum() == 2**24
"""


@linux
def test_memory_that_is_taken_counts_as_used_and_a_file_does_not():
    # In a process of its own: this one's heap may have room for it that counts already.
    subprocess.run([sys.executable, "-c", TAKES_MEMORY], check=True)


@linux
def test_some_memory_is_free():
    assert 0 < free_memory(CPU) < 2**60


def test_a_container_leaves_what_its_limit_does_not_count_as_used(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\nfile 150\nfile_dirty 9\n")
    assert memory._left_in_group(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._left_in_group(tmp_path) is None


@pytest.mark.parametrize("place", ["device", "host", "file"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_tensor_has_its_shape_and_keeps_what_is_written_wherever_it_lies(place, dtype):
    tensor = empty((2, 3, 5), dtype, CPU, place)
    assert (tensor.shape, tensor.dtype) == ((2, 3, 5), dtype)
    values = torch.arange(30).view(2, 3, 5).to(dtype)
    tensor.copy_(values)
    assert torch.equal(tensor, values)


@linux
def test_the_file_has_no_name_even_while_it_is_used(tmp_path):
    program = (
        "import os, torch; from diffusers_hidiff.models.memory import empty;"
        " kept = empty((1000,), torch.float32, torch.device('cpu'), 'file').fill_(1);"
        " print(os.listdir(os.environ['TMPDIR']), flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (-9, "[]")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="elsewhere room cannot be asked for")
def test_a_full_disk_is_told_in_a_sentence_before_any_work(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        OSError, match=r"4MB for a feature map do not fit into .* set TMPDIR to a folder with more room"
    ):
        empty((2**20,), torch.float32, CPU, "file")
