"""Which patches a step sees: phases of the recipe, the samples of each process, the data behind them.

Sample numbers count up through the run, so what a step learns from depends on the seed and the step alone, not on
workers, restarts, or how a batch is split over processes and accumulated batches.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from config import TrainingConfig
from diffusers_hidiff.data.blur_synthesis import SyntheticBlurDataset
from diffusers_hidiff.data.paired_patches import PairedPatchesDataset

TrainingSet = SyntheticBlurDataset | PairedPatchesDataset


@dataclass(frozen=True)
class Phase:
    """A stretch of steps with patches of one size.

    Args:
        resolution: Height and width of its patches.
        batch_size: Patches per process and batch.
        batches_per_step: Batches of all processes whose gradients make one step.
        first_step: Steps done before it.
        num_steps: Its length.
        first_sample: Number of its first patch.
    """

    resolution: int
    batch_size: int
    batches_per_step: int
    first_step: int
    num_steps: int
    first_sample: int

    @property
    def global_batch_size(self) -> int:
        """Patches per step."""
        return self.batch_size * self.batches_per_step

    @property
    def last_step(self) -> int:
        return self.first_step + self.num_steps


def phases_of(config: TrainingConfig, num_processes: int) -> list[Phase]:
    """The phases of the options, in order."""
    all_steps = config.phase_steps or [config.max_train_steps]
    sizes, batches = (
        values * len(all_steps) if len(values) == 1 else values
        for values in (config.resolution, config.train_batch_size)
    )
    phases: list[Phase] = []
    step = sample = 0
    batches_per_step = num_processes * config.gradient_accumulation_steps
    for size, batch_size, steps in zip(sizes, batches, all_steps, strict=True):
        phases.append(Phase(size, batch_size, batches_per_step, step, steps, sample))
        step, sample = step + steps, sample + steps * phases[-1].global_batch_size
    return phases


@dataclass(frozen=True)
class SamplesOfProcess:
    """Sample numbers of the batches of one process, from `first_step` to the end of the phase; a batch sampler.

    The processes take turns: batch after batch of a step, process after process, so that two processes, or one that
    accumulates two batches, see what one process with a batch of twice the size sees.
    """

    phase: Phase
    first_step: int
    process_index: int
    num_processes: int

    def __len__(self) -> int:
        return (self.phase.last_step - self.first_step) * self.phase.batches_per_step // self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        phase = self.phase
        for step in range(self.first_step, phase.last_step):
            start = phase.first_sample + (step - phase.first_step) * phase.global_batch_size
            for batch in range(self.process_index, phase.batches_per_step, self.num_processes):
                first = start + batch * phase.batch_size
                yield list(range(first, first + phase.batch_size))


def training_set(config: TrainingConfig, phase: Phase) -> TrainingSet:
    """The patches of a phase.

    Raises:
        ValueError: The folders hold none.
    """
    length = phase.first_sample + phase.num_steps * phase.global_batch_size
    if config.train_pairs_dir is not None:
        return PairedPatchesDataset(
            config.train_pairs_dir,
            phase.resolution,
            length,
            config.seed,
            tile_size=config.train_tile_size,
            tile_overlap=config.train_tile_overlap,
        )
    return SyntheticBlurDataset(
        config.train_data_dir or "",
        phase.resolution,
        length,
        config.seed,
        frames_dir=config.frames_dir,
        frames_probability=config.frames_probability,
    )


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the workers leave the answer to the process that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def training_batches(dataset: TrainingSet, samples: SamplesOfProcess, num_workers: int) -> DataLoader:
    """Batches of `blurry` and `sharp` [B, 3, H, W] in [0, 1], and `index` [B]."""
    return DataLoader(
        dataset,
        batch_sampler=samples,  # type: ignore[arg-type]
        num_workers=num_workers,
        worker_init_fn=ignore_interrupts,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # drawing from the global one would make a restart visible in it
    )


def describe_data(config: TrainingConfig) -> str:
    """One line on what was found.

    Raises:
        ValueError: The folders hold nothing.
    """
    dataset = training_set(config, phases_of(config, 1)[0])
    if isinstance(dataset, PairedPatchesDataset):
        return f"{len(dataset.pairs)} pairs in {config.train_pairs_dir}"
    frames = f", {len(dataset.frames)} frames in {config.frames_dir}" if config.frames_dir is not None else ""
    return f"{len(dataset.files)} photographs in {config.train_data_dir}{frames}"


def noise_of_samples(index: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal noise that depends on the sample alone, not on batch size, process or restart.

    Args:
        index: Number of each sample, [B].
        shape: Of one sample's noise.
        seed: Of the run.
    Returns:
        [B, *shape], on the device of `index`.
    """
    generators = [torch.Generator().manual_seed(seed * 2**32 + int(i)) for i in index]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(index.device)
