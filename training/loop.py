"""What both stages do around their step: set up, go on, batches, optimiser, logs, validation, checkpoints, the result."""

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, ProjectConfiguration, gather_object, send_to_device
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import EMAModel
from torch import Tensor

from checkpoints import Checkpoints
from config import TrainingConfig
from data import Phase, TrainingData
from diffusers_hidiff.utils.allocator import keep_freed_memory
from estimate import Estimate, describe_run
from interrupt import Interrupt
from journal import Journal
from objective import Objective
from optimisation import adamw, constant_then_cosine, follow_options
from publish import model_card, upload
from report import lines_of, plot_curves
from result import Result
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
        self.accelerator = accelerator_of(config)
        self.data = TrainingData(config, self.accelerator.process_index, self.accelerator.num_processes)
        self.phases = self.data.phases
        self.validation: Validation | None = None
        if config.validation_dir is not None:
            self.validation = Validation(
                self.accelerator, config.validation_dir, config.max_validation_samples, self.output_dir / "samples"
            )
        if self.accelerator.is_main_process:
            print(describe_run(config, objective, self.phases, str(self.data), self.validation))

        self.result = Result(self.accelerator, objective, self.output_dir)
        self.prepare(objective)
        self.journal = Journal(self.accelerator, self.output_dir)
        self.checkpoints = Checkpoints(self.accelerator, self.output_dir, config.checkpoints_total_limit)
        self.interrupt = Interrupt()
        self.step = 0  # done
        self.saved_step = -1
        self.best_psnr = -math.inf
        self.skipped_in_a_row = 0
        self.begin_step()
        if not config.dry_run:
            self.begin()

    def prepare(self, objective: Objective) -> None:
        """Precision, optimiser, learning rate, average, processes."""
        config = self.config
        if config.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        for network in objective.children():
            if config.gradient_checkpointing and isinstance(network, ModelMixin):
                network.enable_gradient_checkpointing()
            if config.compile:
                network.compile()  # in place: the names of the weights stay
        optimizer = adamw(objective, config)
        self.lr_scheduler = constant_then_cosine(optimizer, config)  # not prepared: it would step once per process
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:  # it sees no data loader to ask
            plugin = self.accelerator.state.deepspeed_plugin
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = self.phases[0].batch_size
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.ema: EMAModel | None = None
        if config.use_ema:
            if self.result.sharded:
                raise ValueError(
                    "`use_ema` must be off with FSDP and DeepSpeed, which hold a part of each weight per process."
                )
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
        self.journal.go_on_from(self.step)
        if self.accelerator.is_main_process and config.push_to_hub:
            upload(config)  # a missing permission shows now, not after a week
        if config.report_to != "none":
            options = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in asdict(config).items()}
            logging_dir = self.output_dir / config.logging_dir
            logging_dir.mkdir(exist_ok=True)  # else wandb would write to the folder we were called from
            self.accelerator.init_trackers("hidiff", config=options, init_kwargs={"wandb": {"dir": str(logging_dir)}})

    def resume(self, folder: Path) -> None:
        """Loads a checkpoint. Learning rate, AdamW's settings and data follow the options of this run.

        Raises:
            ValueError: The checkpoint is of other networks.
        """
        now = asdict(self.config)
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
        self.lr_scheduler = follow_options(self.lr_scheduler.optimizer, self.config, self.step)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Batches of `blurry`, `sharp` and `index` from the current step to the last, under a progress bar."""
        if self.config.dry_run:
            yield from self.timed_batches()
            return
        with ExitStack() as stack:
            stack.enter_context(self.journal.progress(self.config.max_train_steps))
            stack.enter_context(self.interrupt)
            for phase in self.phases:
                if self.step < phase.last_step:
                    yield from self.batches_of(phase)

    def batches_of(self, phase: Phase) -> Iterator[dict[str, Tensor]]:
        for batch in self.data.batches(phase, max(self.step, phase.first_step)):
            yield send_to_device(batch, self.accelerator.device, non_blocking=True)

    def timed_batches(self) -> Iterator[dict[str, Tensor]]:
        """Three steps of each phase, the fastest of them counts; then the estimate is printed."""
        estimate = Estimate(self.accelerator.device)
        for phase in self.phases:
            batches = self.batches_of(phase)
            seconds = []
            for _ in range(min(3, phase.num_steps)):
                start = time.perf_counter()
                yield from islice(batches, self.config.gradient_accumulation_steps)
                seconds.append(time.perf_counter() - start)
            estimate.add(phase, min(seconds))
        if self.accelerator.is_main_process:
            print(estimate)

    def begin_step(self) -> None:
        """Forgets the batches of the step before."""
        self.loss = torch.zeros((), device=self.accelerator.device)
        self.parts: dict[str, Tensor] = {}
        self.indices: list[int] = []  # samples

    def after_backward(self, loss: Tensor, parts: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        """Once the gradients of a step are there: clips, steps, forgets them; then logs, validates, saves."""
        self.loss = self.loss + loss.detach()
        self.indices += batch["index"].tolist()
        for name, part in parts.items():
            self.parts[name] = self.parts.get(name, 0) + part / self.config.gradient_accumulation_steps
        if not self.accelerator.sync_gradients:
            return
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.config.max_grad_norm)
        finite, stopping = self.agree(norm)
        if finite or self.accelerator.scaler is not None:  # fp16's scaler skips by itself and needs to know
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        self.step += 1
        if finite and self.ema is not None:
            self.ema.step(self.accelerator.unwrap_model(self.objective).parameters())
        if not self.config.dry_run:
            self.after_step(finite, stopping)
        self.begin_step()

    def agree(self, norm: Tensor | float | None) -> tuple[bool, bool]:
        """Whether loss and gradients of every process are finite, and whether any was asked to stop."""
        health = self.loss.float() + (0.0 if norm is None else norm)
        news = torch.stack([health, torch.tensor(float(self.interrupt.asked), device=health.device)])
        health, asked = self.accelerator.reduce(news, "sum").tolist()
        return math.isfinite(health), asked > 0

    def after_step(self, finite: bool, stopping: bool) -> None:
        """Logs, validates, saves: each at its own interval."""
        config, step = self.config, self.step
        last = step == config.max_train_steps
        self.journal.count(len(self.indices) * self.accelerator.num_processes)
        if finite:
            self.skipped_in_a_row = 0
            self.journal.add_losses(self.parts)
        else:
            self.after_skipped_step()
        if step % config.logging_steps == 0 or last or stopping:
            self.journal.log_losses(float(self.lr_scheduler.get_last_lr()[0]))
        if self.validation is not None and (step % config.validation_steps == 0 or last):
            self.validate(self.validation)
        if step % config.checkpointing_steps == 0 or last or stopping:
            self.save()
        if stopping and not last:
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
        skipped = {"skipped_in_a_row": self.skipped_in_a_row, "samples": indices, "files": files}
        self.journal.log(skipped)
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            last = self.checkpoints.folders()[-1].name if self.checkpoints.folders() else "none"
            raise FloatingPointError(
                f"Loss or gradient was not finite in {self.skipped_in_a_row} steps in a row, the last being {self.step}."
                f" The last checkpoint is {last}."
            )

    def validate(self, validation: Validation) -> None:
        """PSNR and SSIM over the validation pairs; the best networks by PSNR so far are kept in best/."""
        self.result.refresh(self.objective, self.ema)
        scores = validation.scores(self.result.objective, self.step, shared=not self.result.sharded)
        self.journal.log(scores, shown=tuple(scores))
        if self.accelerator.is_main_process:
            plot_curves([self.output_dir], self.output_dir / "curves.png")
        if scores["validation_psnr"] > self.best_psnr:
            self.best_psnr = scores["validation_psnr"]
            if self.accelerator.is_main_process:
                self.result.save("best", self.card())
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        """A checkpoint of this step, unless there is one."""
        if self.saved_step == self.step:
            return
        data = gather_object([self.data.state(self.step)])
        self.checkpoints.save(self.step, {"best_psnr": self.best_psnr, "data": data, "config": asdict(self.config)})
        self.saved_step = self.step

    def card(self) -> str:
        return model_card(self.config, lines_of(self.output_dir), self.phases)

    def finish(self, name: str) -> None:
        """Writes the result to the folder `name` of `output_dir`, uploads it if asked to, and ends the trackers."""
        if not self.config.dry_run:
            self.result.refresh(self.objective, self.ema)
            if self.accelerator.is_main_process:
                self.result.save(name, self.card())
                plot_curves([self.output_dir], self.output_dir / "curves.png")
                if self.config.push_to_hub:
                    upload(self.config, self.output_dir / name)
        self.accelerator.end_training()


def accelerator_of(config: TrainingConfig) -> Accelerator:
    """Processes, device and precision.

    Raises:
        ValueError: An option does not fit the device or accelerate's own config.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(config.output_dir, str(Path(config.output_dir) / config.logging_dir)),
    )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("`mixed_precision` must be 'no' or 'bf16' on a CPU, where accelerate ignores it, got 'fp16'.")
    if accelerator.gradient_accumulation_steps != config.gradient_accumulation_steps:
        raise ValueError(
            f"`gradient_accumulation_steps` must be what accelerate's config file says,"
            f" {accelerator.gradient_accumulation_steps}, got {config.gradient_accumulation_steps}."
        )
    return accelerator
