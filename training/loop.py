"""What both stages do around their step: data, learning rate, logging, validation, checkpoints."""

import copy
import json
import math
import os
import shutil
import signal
import threading
import time
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, ProjectConfiguration, gather_object, send_to_device
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, SequentialLR
from tqdm import tqdm

from checkpoints import Checkpoints, put_in_place
from config import TrainingConfig
from data import Phase, TrainingData
from diffusers_hidiff.utils.allocator import keep_freed_memory
from estimate import Estimate, describe_run
from objective import Objective
from publish import model_card, strip_local_paths, upload
from report import lines_of, plot_curves
from validation import Validation

logger = get_logger(__name__)

# What a checkpoint cannot be loaded without.
FIXED_OPTIONS = ("transformer", "encoder", "denoiser_type", "denoiser", "scheduler", "use_ema", "mixed_precision")
# What may differ from the run that wrote the checkpoint without changing what is learnt.
FREE_OPTIONS = (
    *("output_dir", "train_data_dir", "train_pairs_dir", "frames_dir", "validation_dir", "max_validation_samples"),
    *("dataset_name", "photo_cache_megabytes"),
    *("stage1_dir", "pretrained_model_name_or_path", "max_skipped_steps", "allow_tf32", "gradient_checkpointing"),
    *("compile", "dataloader_num_workers", "logging_steps", "report_to", "logging_dir", "validation_steps"),
    *(
        "checkpointing_steps",
        "checkpoints_total_limit",
        "resume_from_checkpoint",
        "push_to_hub",
        "hub_model_id",
        "dry_run",
    ),
)


class Run:
    """One training run: its place on the disk, its step, and what happens between steps.

        for batch in run.batches():
            with run.accelerator.accumulate(run.objective):
                loss, parts = run.objective(batch["blurry"], batch["sharp"])
                run.accelerator.backward(loss)
                run.after_backward(loss, parts, batch)
        run.finish("pipeline")

    Args:
        config: The options.
        objective: What learns.
    Raises:
        ValueError: The data is not there, the folder holds another run, or an option fits neither this machine nor the
            checkpoint.
    """

    def __init__(self, config: TrainingConfig, objective: Objective) -> None:
        keep_freed_memory()
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=None if config.report_to == "none" else config.report_to,
            project_config=ProjectConfiguration(config.output_dir, str(self.output_dir / config.logging_dir)),
        )
        if self.accelerator.gradient_accumulation_steps != config.gradient_accumulation_steps:
            raise ValueError(
                f"`gradient_accumulation_steps` must be what accelerate's config file says,"
                f" {self.accelerator.gradient_accumulation_steps}, got {config.gradient_accumulation_steps}."
            )
        # FSDP and DeepSpeed split the weights up: only their own calls can put them together.
        self.sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if config.use_ema and self.sharded:
            raise ValueError(
                "`use_ema` must be off with FSDP and DeepSpeed, which hold a part of each weight per process."
            )
        self.data = TrainingData(config, self.accelerator.process_index, self.accelerator.num_processes)
        self.phases = self.data.phases
        self.validation: Validation | None = None
        if config.validation_dir is not None:
            self.validation = Validation(
                self.accelerator, config.validation_dir, config.max_validation_samples, self.output_dir / "samples"
            )
        if self.accelerator.is_main_process:
            print(describe_run(config, objective, self.phases, str(self.data), self.validation))

        self.prepare(objective)
        self.step = 0  # done
        self.sums: dict[str, Tensor] = {}  # of the losses since the last line of the log
        self.num_summed = 0
        self.parts: dict[str, Tensor] = {}  # of the losses of this step
        self.loss = torch.zeros((), device=self.accelerator.device)
        self.indices: list[int] = []  # samples of this step
        self.skipped_in_a_row = 0
        self.best_psnr = -math.inf
        self.last_psnr = math.nan
        self.asked_to_stop = False  # this process, at any moment
        self.stopping = False  # all of them, after the same step
        self.saved_step = -1
        self.checkpoints = Checkpoints(self.accelerator, self.output_dir, config.checkpoints_total_limit)
        if not config.dry_run:
            self.begin()

    def prepare(self, objective: Objective) -> None:
        """Precision, optimiser, learning rate, average, processes."""
        config = self.config
        if config.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        # Whole, in float32 and never compiled: what is validated and saved.
        self.snapshot = copy.deepcopy(objective).eval().requires_grad_(False).to(self.accelerator.device)
        for network in objective.children():
            if config.gradient_checkpointing and isinstance(network, ModelMixin):
                network.enable_gradient_checkpointing()
            if config.compile:
                network.compile()  # in place: the names of the weights stay
        optimizer = torch.optim.AdamW(
            [parameter for parameter in objective.parameters() if parameter.requires_grad],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
        )
        self.lr_scheduler = constant_then_cosine(optimizer, config)  # not prepared: it would step once per process
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:  # it sees no data loader to ask
            plugin = self.accelerator.state.deepspeed_plugin
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = self.phases[0].batch_size
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.ema: EMAModel | None = None
        if config.use_ema:
            parameters = list(self.accelerator.unwrap_model(self.objective).parameters())
            self.ema = EMAModel(parameters, decay=config.ema_max_decay)
            self.ema.to(self.accelerator.device)
            self.accelerator.register_for_checkpointing(self.ema)

    def begin(self) -> None:
        """Makes the folder, or goes on where a checkpoint left off."""
        config = self.config
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        self.checkpoints.tidy()
        if config.resume_from_checkpoint is not None:
            folder = self.checkpoints.find(config.resume_from_checkpoint)
            if folder is not None:
                self.resume(folder)
        elif self.checkpoints.folders():
            raise ValueError(
                f"`output_dir` {config.output_dir!r} holds checkpoints: go on with `--resume_from_checkpoint latest`, or"
                " choose another folder."
            )
        if self.accelerator.is_main_process:
            keep_lines_until(self.output_dir / "metrics.jsonl", self.step)
            if config.push_to_hub:
                upload(config)  # a missing permission shows now, not after a week
        if config.report_to != "none":
            options = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in asdict(config).items()}
            self.accelerator.init_trackers("hidiff", config=options)

    def resume(self, folder: Path) -> None:
        """Loads a checkpoint. Learning rate, AdamW's settings and data follow the options of this run.

        Raises:
            ValueError: The checkpoint is of other networks.
        """
        config, now = self.config, asdict(self.config)
        before = json.loads((folder / "state.json").read_text())["config"]
        changed = [name for name in now if before.get(name) != now[name] and name not in FREE_OPTIONS]
        if fixed := [name for name in changed if name in FIXED_OPTIONS]:
            was = ", ".join(f"{name}={before.get(name)}" for name in fixed)
            raise ValueError(f"`resume_from_checkpoint` needs the options that {folder} was made with: {was}.")
        if changed:
            logger.warning(f"From here on, other than in {folder}: {', '.join(f'{n}={now[n]}' for n in changed)}.")
        state = self.checkpoints.load(folder)
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
        self.step = self.saved_step = state["step"]
        self.best_psnr = state["best_psnr"]
        self.data.load(state.get("data", [None]))
        optimizer = self.lr_scheduler.optimizer
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = config.learning_rate
            group["betas"], group["weight_decay"] = (config.adam_beta1, config.adam_beta2), config.adam_weight_decay
        self.lr_scheduler = constant_then_cosine(optimizer, config)
        with warnings.catch_warnings():  # about steps of the schedule without steps of the optimiser
            warnings.simplefilter("ignore", UserWarning)
            for _ in range(self.step):
                self.lr_scheduler.step()

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Batches of `blurry`, `sharp` and `index` from the current step to the last, under a progress bar."""
        if self.config.dry_run:
            yield from self.timed_batches()
            return
        with (
            tqdm(
                total=self.config.max_train_steps,
                initial=self.step,
                disable=not self.accelerator.is_local_main_process,
                mininterval=5,
            ) as self.progress,
            self.saving_on_interrupt(),
        ):
            self.started, self.images_seen = time.perf_counter(), 0
            for phase in self.phases:
                if self.step < phase.last_step:
                    yield from self.batches_of(phase)

    def batches_of(self, phase: Phase) -> Iterator[dict[str, Tensor]]:
        for batch in self.data.batches(phase, max(self.step, phase.first_step)):
            yield send_to_device(batch, self.accelerator.device, non_blocking=True)

    def timed_batches(self) -> Iterator[dict[str, Tensor]]:
        """Two steps of each phase, the second of them timed; then the estimate is printed."""
        estimate = Estimate(self.accelerator.device)
        for phase in self.phases:
            batches = self.batches_of(phase)
            for _ in range(min(2, phase.num_steps)):
                start = time.perf_counter()
                yield from islice(batches, self.config.gradient_accumulation_steps)
                seconds = time.perf_counter() - start
            estimate.add(phase, seconds)
        if self.accelerator.is_main_process:
            print(estimate)

    def after_backward(self, loss: Tensor, parts: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        """Once the gradients of a step are there: clips, steps, forgets them; then logs, validates, saves."""
        self.loss = self.loss + loss.detach()
        self.indices += batch["index"].tolist()
        for name, part in parts.items():
            self.parts[name] = self.parts.get(name, 0) + part / self.config.gradient_accumulation_steps
        if not self.accelerator.sync_gradients:
            return
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.config.max_grad_norm)
        finite = self.agree(norm)
        if finite or self.accelerator.scaler is not None:  # fp16's scaler skips by itself and needs to know
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        self.step += 1
        if finite and self.ema is not None:
            self.ema.step(self.accelerator.unwrap_model(self.objective).parameters())
        if not self.config.dry_run:
            self.after_step(finite)
        self.loss, self.parts, self.indices = torch.zeros_like(self.loss), {}, []

    def agree(self, norm: Tensor | float | None) -> bool:
        """Whether loss and gradients of every process are finite; also spreads the word of an interrupt."""
        health = self.loss.float() + (0.0 if norm is None else norm)
        news = torch.stack([health, torch.tensor(float(self.asked_to_stop), device=health.device)])
        health, asked = self.accelerator.reduce(news, "sum").tolist()
        self.stopping = asked > 0
        return math.isfinite(health)

    def after_step(self, finite: bool) -> None:
        """Logs, validates, saves: each at its own interval."""
        config, step = self.config, self.step
        last = step == config.max_train_steps
        self.progress.update(1)
        self.images_seen += len(self.indices) * self.accelerator.num_processes
        if finite:
            self.skipped_in_a_row = 0
            self.sums = {name: self.sums.get(name, 0) + part for name, part in self.parts.items()}
            self.num_summed += 1
        else:
            self.after_skipped_step()
        if self.num_summed and (step % config.logging_steps == 0 or last or self.stopping):
            means = {name: self.accelerator.reduce(total, "mean").item() for name, total in self.sums.items()}
            means = {name: total / self.num_summed for name, total in means.items()}
            self.log({"lr": self.lr_scheduler.get_last_lr()[0], **means})
            self.sums, self.num_summed = {}, 0
        if self.validation is not None and (step % config.validation_steps == 0 or last):
            self.validate(self.validation)
        if step % config.checkpointing_steps == 0 or last or self.stopping:
            self.save()
        if self.stopping and not last:
            logger.warning(
                f"Stopped after step {step}. The same command with `--resume_from_checkpoint latest` goes on."
            )
            raise SystemExit(128 + signal.SIGINT)

    def after_skipped_step(self) -> None:
        """Names what was skipped; gives up after too many in a row."""
        self.skipped_in_a_row += 1
        indices = gather_object(self.indices)
        files = sorted({self.data.source(index) for index in indices})
        logger.warning(f"Step {self.step} skipped: its loss or gradient is not finite. Samples {indices} of {files}.")
        self.log({"skipped_in_a_row": self.skipped_in_a_row, "samples": indices, "files": files})
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            last = self.checkpoints.folders()[-1].name if self.checkpoints.folders() else "none"
            raise FloatingPointError(
                f"Loss or gradient was not finite in {self.skipped_in_a_row} steps in a row, the last being {self.step}."
                f" The last checkpoint is {last}."
            )

    def log(self, values: dict[str, Any]) -> None:
        """A line of metrics.jsonl, the progress bar, the tracker."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=self.step)
        if not self.accelerator.is_main_process:
            return
        rate = self.images_seen / (time.perf_counter() - self.started)
        scores = {} if math.isnan(self.last_psnr) else {"psnr": self.last_psnr}
        shown = scores | numbers | {"images/s": rate}
        self.progress.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
        with open(self.output_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": self.step, **values}) + "\n")

    def refresh_snapshot(self) -> bool:
        """Copies the weights (or their average) into `snapshot`; False where this process does not get them."""
        state = self.accelerator.get_state_dict(self.objective)
        if self.sharded and not self.accelerator.is_main_process:
            return False
        self.snapshot.load_state_dict(state)
        if self.ema is not None:
            self.ema.copy_to(self.snapshot.parameters())
        return True

    def validate(self, validation: Validation) -> None:
        """PSNR over the validation pairs; the best networks so far are kept in best/."""
        self.refresh_snapshot()
        self.last_psnr = validation.psnr(self.snapshot, self.step, shared=not self.sharded)
        self.log({"validation_psnr": self.last_psnr})
        if self.accelerator.is_main_process:
            plot_curves([self.output_dir], self.output_dir / "curves.png")
        if self.last_psnr > self.best_psnr:
            self.best_psnr = self.last_psnr
            if self.accelerator.is_main_process:
                self.save_networks("best")
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        """A checkpoint of this step, unless there is one."""
        if self.saved_step == self.step:
            return
        data = gather_object([self.data.state(self.step)])
        self.checkpoints.save(self.step, {"best_psnr": self.best_psnr, "data": data, "config": asdict(self.config)})
        self.saved_step = self.step

    def save_networks(self, name: str) -> None:
        """Writes `snapshot` with its model card to the folder `name` of `output_dir`, or to `output_dir` itself for ".".

        Parts appear whole, in the place of what was there.
        """
        temporary = self.output_dir / f".{name}.incomplete"
        shutil.rmtree(temporary, ignore_errors=True)
        self.snapshot.save(temporary)
        strip_local_paths(temporary)
        (temporary / "README.md").write_text(model_card(self.config, lines_of(self.output_dir), self.phases))
        parts = [temporary] if name != "." else [*temporary.iterdir()]
        for part in parts:
            put_in_place(part, self.output_dir / (name if name != "." else part.name))
        shutil.rmtree(temporary, ignore_errors=True)

    def finish(self, name: str) -> None:
        """Writes the result to the folder `name` of `output_dir`, uploads it if asked to, and ends the trackers."""
        if not self.config.dry_run:
            self.refresh_snapshot()
            if self.accelerator.is_main_process:
                self.save_networks(name)
                plot_curves([self.output_dir], self.output_dir / "curves.png")
                if self.config.push_to_hub:
                    upload(self.config, self.output_dir / name)
        self.accelerator.end_training()

    @contextmanager
    def saving_on_interrupt(self) -> Iterator[None]:
        """Lets the step in progress end when Ctrl-C or SIGTERM comes; a second Ctrl-C stops at once.

        A signal that is ignored, as by nohup, stays ignored.
        """

        def note(number: int, frame: types.FrameType | None) -> None:
            self.asked_to_stop = True
            signal.signal(number, before[number])

        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
        before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def constant_then_cosine(optimizer: torch.optim.Optimizer, config: TrainingConfig) -> SequentialLR:
    """The learning rate of the recipe: constant for `lr_constant_steps`, then one cosine down to `lr_min`."""
    cosine_steps = max(1, config.max_train_steps - config.lr_constant_steps)
    return SequentialLR(
        optimizer,
        [
            ConstantLR(optimizer, factor=1.0, total_iters=config.lr_constant_steps),
            CosineAnnealingLR(optimizer, T_max=cosine_steps, eta_min=config.lr_min),
        ],
        milestones=[config.lr_constant_steps],
    )


def keep_lines_until(file: Path, step: int) -> None:
    """Drops the lines of a log that a resumed run will write again, and a last one that was cut short."""
    kept = [json.dumps(line) + "\n" for line in lines_of(file.parent) if line["step"] <= step]
    temporary = file.with_name(f".{file.name}.incomplete")
    temporary.write_text("".join(kept))
    os.replace(temporary, file)
