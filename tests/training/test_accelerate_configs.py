"""accelerate's own configs, as far as they can be tried without the machines they are for: files, commands, plugins."""

import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from config import Stage1Config, parse_config

REPOSITORY = Path(__file__).parents[2]
FILES = sorted((REPOSITORY / "training" / "configs" / "accelerate").glob("*.yaml"))


def launch_command(file):
    """The command in the comment on top of a config, as accelerate parses it."""
    comment = "\n".join(line.removeprefix("#") for line in file.read_text().splitlines() if line.startswith("#"))
    (command,) = re.findall(r"accelerate launch (--config_file .*?[^\\])$", comment, re.DOTALL | re.MULTILINE)
    return launch_command_parser().parse_args(shlex.split(command.replace("\\\n", " ")))


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def file(request, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    return request.param


def test_accelerate_accepts_the_file_and_knows_every_key_in_it(file):
    config = load_config_from_file(str(file))  # refuses unknown keys, but not those of the parts
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert {*config.fsdp_config, *config.deepspeed_config} <= known.keys()


def test_the_command_in_its_comment_names_it_and_is_accepted_by_accelerate_and_by_us(file):
    command = launch_command(file)
    assert command.config_file == str(file.relative_to(REPOSITORY))
    assert command.training_script == "training/train_stage1.py"
    assert parse_config(Stage1Config, command.training_script_args).train_pairs_dir == "GOPRO/train"
    launched, config, _ = _validate_launch_command(command)
    assert launched.use_fsdp == (config.distributed_type == DistributedType.FSDP)
    assert launched.use_deepspeed == (config.distributed_type == DistributedType.DEEPSPEED)


def test_the_global_batch_is_the_published_one(file):
    config = load_config_from_file(str(file))
    options = parse_config(Stage1Config, launch_command(file).training_script_args)
    assert config.num_processes * options.gradient_accumulation_steps == 4


def test_fsdp_shards_as_the_file_says(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    command, _, _ = _validate_launch_command(launch_command(FILES[[file.stem for file in FILES].index("fsdp")]))
    for name, value in prepare_multi_gpu_env(command).items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    for name in ("FSDP_SYNC_MODULE_STATES", "FSDP_CPU_RAM_EFFICIENT_LOADING"):  # these look for a GPU
        monkeypatch.setenv(name, "false")
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.sharding_strategy.name == "FULL_SHARD"
    assert plugin.use_orig_params
    assert plugin.min_num_params == 1_000_000
