"""Training patches from pairs that are read while they are used, because they are larger than the disk.

One process reads the rows of its part of the stream one after another, encoded as they are, and hands them to the data
loader's workers inside the batches of sample numbers; the workers decode them and cut the patches. So the order of the rows
does not depend on the number of workers, and the place in the stream is known where checkpoints are written.
"""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .paired_patches import PatchCutter
from .paired_tables import decode_pair, load_table, pair_columns

Row = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """A stretch of rows that is read as one.

    Args:
        first: Rows of the run before it.
        epoch: How often the whole stream was read before.
        number: Blocks of this epoch before it.
        state: Of the stream where it begins, as `IterableDataset.state_dict` gives it; None at the stream's beginning.
    """

    first: int = 0
    epoch: int = 0
    number: int = 0
    state: dict[str, Any] | None = None


class PairStream:
    """The rows of a streamed data set that one process sees, in a shuffled order that can be taken up again anywhere.

    The stream is read in blocks, and each block is shuffled by (seed, epoch, number of the block). A shuffle buffer that
    mixes the rows of all blocks would have to be saved with every checkpoint; the place where a block begins is a few
    numbers. The order of the shards changes with every epoch.

    Args:
        name: As `load_table` takes it.
        split: Likewise.
        config_name: Likewise.
        seed: Of the order.
        block_size: Rows that are shuffled among each other. Two blocks are held in memory, encoded.
        process_index: Which part of the stream to read: of its shards where the number of processes divides theirs, else
            every so-manieth row.
        num_processes: How many parts there are.
    Raises:
        ValueError: It cannot be loaded, or has not the columns.
    """

    def __init__(
        self,
        name: str,
        split: str,
        config_name: str | None = None,
        seed: int = 0,
        block_size: int = 256,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        from datasets.distributed import split_dataset_by_node  # noqa: PLC0415  (an extra)

        table = load_table(name, split, config_name, streaming=True)
        self.title = name
        self.columns = pair_columns(table)
        self.table = split_dataset_by_node(table, process_index, num_processes)
        self.seed = seed
        self.block_size = block_size
        self.begin = Block()
        self.blocks: deque[Block] = deque()  # that were begun since the last `state`

    def rows(self, start: int) -> Iterator[Row]:
        """The rows from number `start` of this process on, without an end; the next block is read beforehand.

        Raises:
            ValueError: The stream has no rows for this process.
        """
        self.begin = self.block_of(start)
        self.blocks.clear()
        with closing(self._read_blocks(self.begin)) as blocks, ThreadPoolExecutor(1) as reader:
            coming = reader.submit(next, blocks)
            while True:
                block, rows = coming.result()
                coming = reader.submit(next, blocks)
                self.blocks.append(block)
                order = np.random.default_rng((self.seed, block.epoch, block.number)).permutation(len(rows))
                yield from (rows[place] for place in order[max(0, start - block.first) :])

    def _read_blocks(self, block: Block) -> Generator[tuple[Block, list[Row]], None, None]:
        while True:
            self.table.set_epoch(1 + self.seed + block.epoch)  # the library keeps the order of shards in epoch 0
            self.table.load_state_dict(block.state)
            stream = iter(self.table)
            while rows := list(islice(stream, self.block_size)):
                yield block, rows
                block = Block(block.first + len(rows), block.epoch, block.number + 1, self.table.state_dict())
            if block.number == 0:
                raise ValueError(f"The data set {self.title!r} has no rows for this process.")
            block = Block(block.first, block.epoch + 1)

    def block_of(self, position: int) -> Block:
        """The block that holds row number `position`; those before it are forgotten, so it may only grow."""
        while len(self.blocks) > 1 and self.blocks[1].first <= position:
            self.blocks.popleft()
        return self.blocks[0] if self.blocks else self.begin

    def state(self, position: int) -> dict[str, Any]:
        """What `load` needs so that `rows` goes on at row number `position`, as JSON."""
        return {"seed": self.seed, **asdict(self.block_of(position))}

    def load(self, state: dict[str, Any]) -> None:
        """Lets `rows` begin to read at the block that `state` tells of.

        Raises:
            ValueError: It was made with another seed.
        """
        seed, *block = (state[name] for name in ("seed", "first", "epoch", "number", "state"))
        if seed != self.seed:
            raise ValueError(f"`seed` must be {seed}, as in the checkpoint, for a stream to go on, got {self.seed}.")
        self.begin = Block(*block)


class StreamedPatchesDataset(torch.utils.data.Dataset):
    """Blurry/sharp patches of rows that come along with the numbers of the samples.

    Args:
        stream: Where the rows come from.
        cutter: Makes a patch of a pair.
    """

    def __init__(self, stream: PairStream, cutter: PatchCutter) -> None:
        self.columns, self.title = stream.columns, stream.title  # and not the stream: workers do not read it
        self.cutter = cutter

    def source(self, index: int) -> str:
        """Where item `index` comes from."""
        return f"sample {index} of the stream of {self.title}"

    def __getitem__(self, sample: tuple[int, Row]) -> dict[str, Tensor]:
        """`blurry` and `sharp`, [3, patch_size, patch_size], float32 in [0, 1], and `index`.

        Raises:
            ValueError: An image cannot be read or is smaller than a patch, or the images of a pair differ in size.
        """
        index, row = sample
        return self.cutter(decode_pair(row, self.columns, self.source(index)), index)
