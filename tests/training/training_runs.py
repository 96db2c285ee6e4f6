"""Runs of the two scripts with tiny networks: in this process, or in processes of their own that can be killed."""

import json
import multiprocessing
import os
import signal
import socket
import time

import torch
from safetensors.torch import load_file

NETWORKS = {
    "transformer": json.dumps(
        {"dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 0, "num_heads": [1, 2, 2, 4], "prior_dim": 16}
    ),
    "encoder": json.dumps({"embed_dim": 4, "num_blocks": 1}),
}
STEPS = {
    **{"resolution": 32, "train_batch_size": 2, "dataloader_num_workers": 0, "logging_steps": 1},
    **{"max_train_steps": 4, "lr_constant_steps": 2, "max_grad_norm": 0.1},
}
SERVER = multiprocessing.get_context("forkserver")
# Imported once, then forked for every process. (What is not installed, like the scripts, it would not find.)
SERVER.set_forkserver_preload(
    [
        "diffusers_hidiff",
        "transformers.hf_argparser",
        "accelerate",
        "datasets",
        "cv2",
        "matplotlib.pyplot",
        "torch._dynamo",
    ]
)


def flags(**values):
    """Options as on the command line; None leaves one out, True is a flag without a value."""
    parts = []
    for name, value in values.items():
        if value is not None:
            values_of = value if isinstance(value, list) else [value]
            parts += [f"--{name}"] + ([] if value is True else [str(item) for item in values_of])
    return parts


def stage1_flags(folders, output_dir, **values):
    data = {"train_data_dir": folders and folders / "photos", "output_dir": output_dir}
    return flags(**STEPS | NETWORKS | data | values)


def stage1(folders, output_dir, **values):
    import train_stage1  # noqa: PLC0415  (this module is imported in the processes that are killed, too)

    train_stage1.main(stage1_flags(folders, output_dir, **values))


def stage2(folders, output_dir, stage1_dir, **values):
    import train_stage2  # noqa: PLC0415

    data = {"train_data_dir": folders / "photos", "output_dir": output_dir, "stage1_dir": stage1_dir}
    train_stage2.main(flags(**STEPS | data | values))


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors") | {
        f"latent_encoder.{name}": value
        for name, value in load_file(folder / "latent_encoder" / "diffusion_pytorch_model.safetensors").items()
    }


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def run_process(rank, world_size, port, arguments, dies_after):
    """What torchrun does: one of `world_size` processes of stage 1."""
    import train_stage1  # noqa: PLC0415

    torch.set_num_threads(1)
    if dies_after is not None:
        kill_myself_after(*dies_after)
    if world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    train_stage1.main(arguments)


def kill_myself_after(moment, number):
    """SIGKILL as soon as that part of writing a checkpoint has ended for the `number`-th time."""
    from accelerate import Accelerator  # noqa: PLC0415

    import checkpoints  # noqa: PLC0415

    owner = {"save_state": Accelerator, "seal": checkpoints.Checkpoints, "put_in_place": checkpoints}[moment]
    part, calls = getattr(owner, moment), []

    def part_then_death(*arguments, **options):
        part(*arguments, **options)
        calls.append(moment)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, moment, part_then_death)


def start(world_size, arguments, dies_after=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        SERVER.Process(target=run_process, args=(rank, world_size, port, arguments, dies_after))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def train(world_size, arguments, dies_after=None):
    """Runs to the end; returns the exit codes."""
    processes = start(world_size, arguments, dies_after)
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def wait_for_lines(file, number, processes):
    """Until the log has so many lines."""
    while not file.exists() or len(file.read_text().splitlines()) < number:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.002)


def train_and_kill(world_size, arguments, output_dir, num_lines):
    """SIGKILLs every process as soon as the log has `num_lines` lines."""
    processes = start(world_size, arguments)
    wait_for_lines(output_dir / "metrics.jsonl", num_lines, processes)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
