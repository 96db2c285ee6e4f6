"""What a run tells its owner: metrics.jsonl, the progress bar, the tracker."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from report import lines_of


class Journal:
    """The log of a run. Every process calls each method at the same time; the first one writes.

    Args:
        accelerator: Its trackers are told everything, and its processes' losses are averaged.
        output_dir: Where metrics.jsonl is.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path) -> None:
        self.accelerator = accelerator
        self.file = output_dir / "metrics.jsonl"
        self.step = 0  # done
        self.sums: dict[str, Tensor] = {}  # of the losses since the last line
        self.num_summed = 0
        self.images_seen = 0
        self.shown: dict[str, float] = {}  # beside the bar

    def go_on_from(self, step: int) -> None:
        """Drops the lines of later steps, which the run will write again, and a last one that was cut short."""
        self.step = step
        if self.accelerator.is_main_process:
            kept = [json.dumps(line) + "\n" for line in lines_of(self.file.parent) if line["step"] <= step]
            temporary = self.file.with_name(f".{self.file.name}.incomplete")
            temporary.write_text("".join(kept))
            os.replace(temporary, self.file)

    @contextmanager
    def progress(self, max_train_steps: int) -> Iterator[None]:
        """A bar with steps, elapsed and remaining time, loss, validation PSNR and images per second."""
        self.started, self.images_seen = time.perf_counter(), 0
        disabled = not self.accelerator.is_local_main_process
        with tqdm(total=max_train_steps, initial=self.step, disable=disabled, mininterval=5) as self.bar:
            yield

    def count(self, num_images: int) -> None:
        """A step more, with so many images of all processes."""
        self.step += 1
        self.images_seen += num_images
        self.bar.update(1)

    def add_losses(self, parts: dict[str, Tensor]) -> None:
        """The losses of a step: they are averaged over steps and processes when they are logged."""
        self.sums = {name: self.sums.get(name, 0) + part for name, part in parts.items()}
        self.num_summed += 1

    def log_losses(self, learning_rate: float) -> None:
        """Logs the mean losses since the last time, if there were any."""
        if self.num_summed:
            means = {name: self.accelerator.reduce(total, "mean").item() for name, total in self.sums.items()}
            means = {name: total / self.num_summed for name, total in means.items()}
            self.log({"lr": learning_rate, "loss": sum(means.values()), **means}, shown=("loss",))
            self.sums, self.num_summed = {}, 0

    def log(self, values: dict[str, Any], shown: tuple[str, ...] = ()) -> None:
        """A line of metrics.jsonl, and the numbers in it to the tracker.

        Args:
            values: By name.
            shown: Which of them stand beside the progress bar from now on.
        """
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=self.step)
        if not self.accelerator.is_main_process:
            return
        rate = self.images_seen / (time.perf_counter() - self.started)
        self.shown |= {name: numbers[name] for name in shown}
        postfix = {name.removeprefix("validation_"): value for name, value in self.shown.items()} | {"images/s": rate}
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in postfix.items()}, refresh=False)
        with open(self.file, "a") as file:
            file.write(json.dumps({"step": self.step, **values}) + "\n")
