"""Which patches a step sees: phases of the recipe, the samples of each process, the data behind them.

Sample numbers count up through the run, so what a step learns from depends on the seed and the step alone, not on
workers, restarts, or how a batch is split over processes and accumulated batches.
"""

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from config import TrainingConfig
from diffusers_hidiff.data.blur_synthesis import BlurOptions
from diffusers_hidiff.data.paired_images import FilePairs
from diffusers_hidiff.data.paired_patches import PairedPatchesDataset, PatchCutter
from diffusers_hidiff.data.paired_tables import TablePairs
from diffusers_hidiff.data.streamed_patches import PairStream, Row, StreamedPatchesDataset
from diffusers_hidiff.data.synthetic_patches import Frames, Photos, SyntheticPatchesDataset

TrainingSet = SyntheticPatchesDataset | PairedPatchesDataset | StreamedPatchesDataset


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


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the workers leave the answer to the process that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True)
class StreamedBatches:
    """Sample numbers of the batches of one process, each with its row of the stream; a batch sampler.

    Args:
        samples: The numbers.
        stream: The rows.
        first_row: Rows of this process that came before.
    """

    samples: SamplesOfProcess
    stream: PairStream
    first_row: int

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[list[tuple[int, Row]]]:
        rows = self.stream.rows(self.first_row)
        for batch in self.samples:
            yield [(index, next(rows)) for index in batch]


class TrainingData:
    """What a run learns from: photographs to blur, files of pairs, a table of pairs, or a stream of them.

    Args:
        config: The options.
        process_index: Which of the processes this is.
        num_processes: How many there are.
    Raises:
        ValueError: There is no data where the options say.
    """

    def __init__(self, config: TrainingConfig, process_index: int = 0, num_processes: int = 1) -> None:
        self.config = config
        self.process_index, self.num_processes = process_index, num_processes
        self.phases = phases_of(config, num_processes)
        self.photos: Photos | None = None
        self.frames: Frames | None = None
        self.pairs: FilePairs | TablePairs | None = None
        self.stream: PairStream | None = None
        table = (config.dataset_name or "", config.dataset_split, config.dataset_config_name)
        if config.train_data_dir is not None:
            self.photos = Photos(config.train_data_dir, config.photo_cache_megabytes)
            self.frames = None if config.frames_dir is None else Frames(config.frames_dir)
        elif config.train_pairs_dir is not None:
            self.pairs = FilePairs(config.train_pairs_dir, "train")
        elif config.streaming:
            self.stream = PairStream(*table, config.seed, config.shuffle_buffer_size, process_index, num_processes)
        else:
            self.pairs = TablePairs(*table)
        self.dataset = self.patches(self.phases[0])

    def __str__(self) -> str:
        """What was found, in one line."""
        config = self.config
        if self.stream is not None:
            return f"a stream of pairs from {config.dataset_name}, split {config.dataset_split}"
        if self.pairs is not None:
            place = config.train_pairs_dir or f"{config.dataset_name}, split {config.dataset_split}"
            return f"{len(self.pairs)} pairs in {place}"
        assert self.photos is not None
        frames = "" if self.frames is None else f", {len(self.frames)} frames in {config.frames_dir}"
        return f"{len(self.photos)} photographs in {config.train_data_dir}{frames}"

    def patches(self, phase: Phase) -> TrainingSet:
        """The patches of a phase."""
        config = self.config
        length = phase.first_sample + phase.num_steps * phase.global_batch_size
        cutter = PatchCutter(phase.resolution, config.seed, config.train_tile_size, config.train_tile_overlap)
        if self.stream is not None:
            return StreamedPatchesDataset(self.stream, cutter)
        if self.pairs is not None:
            return PairedPatchesDataset(self.pairs, cutter, length)
        assert self.photos is not None
        return SyntheticPatchesDataset(
            self.photos,
            phase.resolution,
            length,
            config.seed,
            BlurOptions(**config.blur),
            self.frames,
            config.frames_probability,
        )

    def batches(self, phase: Phase, first_step: int) -> DataLoader:
        """Batches of `blurry` and `sharp` [B, 3, H, W] in [0, 1], and `index` [B], from a step to the end of its phase."""
        self.dataset = self.patches(phase)
        samples = SamplesOfProcess(phase, first_step, self.process_index, self.num_processes)
        sampler: Iterable = samples
        if self.stream is not None:
            # A dry run looks into every phase without the data of those before.
            first_row = 0 if self.config.dry_run else self.rows_before(first_step)
            sampler = StreamedBatches(samples, self.stream, first_row)
        return loader(self.dataset, sampler, self.config.dataloader_num_workers)

    def source(self, index: int) -> str:
        """Where a sample of this phase comes from."""
        return self.dataset.source(index)

    def rows_before(self, step: int) -> int:
        """Samples of this process in the steps before `step`."""
        phase = next(phase for phase in self.phases if step <= phase.last_step)
        samples = phase.first_sample + (step - phase.first_step) * phase.global_batch_size
        return samples // self.num_processes

    def state(self, step: int) -> dict[str, Any] | None:
        """What `load` needs to go on after `step` steps, as JSON; None where a sample depends on its number alone."""
        return None if self.stream is None else self.stream.state(self.rows_before(step))

    def load(self, states: list[dict[str, Any] | None]) -> None:
        """Goes on where the processes of an earlier run were.

        Args:
            states: What `state` gave in each of them.
        Raises:
            ValueError: The data was streamed, and there were more or fewer processes, or another seed; or it is streamed
                only now.
        """
        if self.stream is None:
            return
        if len(states) != self.num_processes:
            raise ValueError(
                f"A stream can go on only in as many processes as it was begun in, {len(states)}, got"
                f" {self.num_processes}."
            )
        state = states[self.process_index]
        if state is None:
            raise ValueError("`streaming` must stay as in the checkpoint, off, got it on.")
        self.stream.load(state)


def loader(dataset: Dataset, sampler: Iterable, num_workers: int) -> DataLoader:
    """Batches of `dataset` as `sampler` names them."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,  # type: ignore[arg-type]
        num_workers=num_workers,
        worker_init_fn=ignore_interrupts,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # drawing from the global one would make a restart visible in it
    )


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
