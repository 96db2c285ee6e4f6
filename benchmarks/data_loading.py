"""How fast training data is made, for each kind of source, beside how fast the small model consumes it.

    python benchmarks/data_loading.py [--train_data_dir PHOTOS --frames_dir FRAMES] [--num_workers 1 2] [--output table.md]

Where no folder is given, pictures of the usual sizes are made up. Patches per CPU second are those of one process without
workers, in its own processor time: what one core gives, also on a machine that is busy. The model is `hidiff-small` in
stage 2, on the GPU in bfloat16 if there is one.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import cv2
import datasets
import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from measure import show

from config import Stage2Config
from data import TrainingData, noise_of_samples
from diffusers_hidiff import HIDIFF_SMALL
from diffusers_hidiff.data.pair_shards import Patches, prepare_shards
from diffusers_hidiff.data.paired_images import image_files
from diffusers_hidiff.image_files import write_image
from diffusers_hidiff.utils.allocator import keep_freed_memory
from train_stage2 import stage2

NUM_PHOTOS = 64  # few enough to be in memory soon where they are kept there
GPU_GOAL = 500  # patches of 128 pixels a second, the order of magnitude of the small model on a GPU


def made_up_picture(height: int, width: int, seed: int) -> np.ndarray:
    """Noise at several scales, which packs about as well as a photograph."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for scale, contrast in ((1, 1), (4, 8), (16, 16), (64, 32)):
        coarse = rng.normal(size=(height // scale + 2, width // scale + 2, 3)).astype(np.float32)
        total += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * contrast
    return np.clip(total + 128, 0, 255).astype(np.uint8)


def made_up(folder: Path, number: int, height: int, width: int, suffix: str) -> Path:
    """A folder of made-up pictures."""
    folder.mkdir(parents=True)
    for i in range(number):
        write_image(folder / f"{i:04}{suffix}", made_up_picture(height, width, i))
    return folder


def sources(options: argparse.Namespace, scratch: Path) -> dict[str, dict]:
    """Kind of source -> the options of training that name it."""
    photos = scratch / "photos"
    if options.train_data_dir is None:
        made_up(photos, NUM_PHOTOS, 320, 320, ".webp")
    else:
        photos.mkdir()
        for file in image_files(options.train_data_dir)[:NUM_PHOTOS]:
            (photos / file.name).symlink_to(file.resolve())
    frames = options.frames_dir or made_up(scratch / "frames", 15, 480, 640, ".webp")
    pairs = options.train_pairs_dir
    if pairs is None:
        pairs = scratch / "pairs"
        for name in ("blurry", "sharp"):
            made_up(pairs / name, 8, 720, 1280, ".png")
    shards = scratch / "shards"
    prepare_shards(pairs, shards, Patches(pairs_per_shard=4), num_workers=1)
    return {
        "photographs, blur synthesised": {"train_data_dir": str(photos)},
        "the same, photographs kept in memory": {"train_data_dir": str(photos), "photo_cache_megabytes": 1024},
        "averages of frames": {"train_data_dir": str(photos), "frames_dir": str(frames), "frames_probability": 1.0},
        "files of pairs": {"train_pairs_dir": str(pairs)},
        "table of 512-pixel patches": {"dataset_name": str(shards)},
        "stream of 512-pixel patches": {"dataset_name": str(shards), "streaming": True, "shuffle_buffer_size": 16},
    }


def config_of(options: argparse.Namespace, num_workers: int, **source) -> Stage2Config:
    return Stage2Config(
        output_dir="",
        pretrained_model_name_or_path=str(HIDIFF_SMALL),
        resolution=[options.resolution],
        train_batch_size=[options.batch_size],
        dataloader_num_workers=num_workers,
        **source,
    )


def batches_of(config: Stage2Config) -> Iterator[dict[str, torch.Tensor]]:
    data = TrainingData(config)
    return iter(data.batches(data.phases[0], 0))


def patches_per_second(config: Stage2Config, seconds: float) -> float:
    """Of the wall clock with workers, of this process's own time without; after what was made beforehand is used up."""
    clock = time.perf_counter if config.dataloader_num_workers else time.process_time
    batches = batches_of(config)
    warm_up = 1 + 2 * config.dataloader_num_workers
    if config.photo_cache_megabytes:
        warm_up += 4 * NUM_PHOTOS * max(1, config.dataloader_num_workers) // config.train_batch_size[0]
    for _ in islice(batches, warm_up):
        pass
    start, number = clock(), 0
    while clock() < start + seconds:
        number += len(next(batches)["index"])
    return number / (clock() - start)


def consumed_per_second(options: argparse.Namespace, device: torch.device) -> float:
    """Patches that training steps of `hidiff-small` take in, data at hand; the median of several."""
    keep_freed_memory()
    shape = (options.batch_size, 3, options.resolution, options.resolution)
    objective = stage2(config_of(options, 0, train_data_dir="none")).to(device)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad])
    blurry, sharp = torch.rand(2, *shape, device=device)
    noise = noise_of_samples(torch.arange(options.batch_size, device=device), objective.prior_shape, 0)
    seconds = []
    for _ in range(options.steps + 1):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, _ = objective(blurry, sharp, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - start)
    return options.batch_size / float(np.median(seconds[1:]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train_data_dir", type=Path, help="folder of photographs")
    add("--frames_dir", type=Path, help="folder of consecutive frames")
    add("--train_pairs_dir", type=Path, help="folder of pairs")
    add("--num_workers", type=int, nargs="+", default=[1, 2], help="numbers of workers to try")
    add("--resolution", type=int, default=128, help="of the patches")
    add("--batch_size", type=int, default=8, help="of the model and of the loader")
    add("--seconds", type=float, default=5.0, help="for each measurement")
    add("--steps", type=int, default=5, help="training steps to time")
    add("--output", type=Path, help="write the table to this file as well")
    options = parser.parse_args(arguments)
    datasets.disable_progress_bars()

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, source in tqdm(sources(options, Path(scratch)).items(), desc="source"):
            numbers = [0, *options.num_workers]
            rates = [patches_per_second(config_of(options, n, **source), options.seconds) for n in numbers]
            rows.append(f"| {name} | {' | '.join(f'{rate:.0f}' for rate in rates)} | {GPU_GOAL / rates[0]:.1f} |")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    consumed = consumed_per_second(options, device)
    place = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    workers = " | ".join(f"a second, {n} worker{'s' if n > 1 else ''}" for n in options.num_workers)
    size = f"{options.resolution}x{options.resolution}"
    table = "\n".join(
        [
            f"Patches of {size}, batches of {options.batch_size}, torch {torch.__version__}.",
            "",
            f"| source | a CPU second, one core | {workers} | cores for {GPU_GOAL} a second |",
            f"|---|{'---|' * (len(options.num_workers) + 2)}",
            *rows,
            "",
            f"hidiff-small, stage 2, takes in {consumed:.1f} such patches a second on {place}.",
            *(["GPUs are untried here."] if device.type == "cpu" else []),
        ]
    )
    show(table, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
