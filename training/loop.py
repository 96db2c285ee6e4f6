"""What both stages do around their step: data, learning rate, logging, validation, checkpoints."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, SequentialLR
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from config import TrainingConfig
from diffusers_hidiff.data.blur_synthesis import SyntheticBlurDataset
from diffusers_hidiff.data.paired_images import paired_files, read_rgb
from diffusers_hidiff.metrics.psnr import psnr
from diffusers_hidiff.utils.allocator import keep_freed_memory


class Run:
    """One training run: its place on the disk, its step, and what happens between steps.

    Args:
        config: The options.
        modules: What learns, by name.
        restore: (blurry, sharp) -> restored, as validation asks for it; [B, 3, H, W] each.
    """

    def __init__(
        self,
        config: TrainingConfig,
        modules: dict[str, nn.Module],
        restore: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        keep_freed_memory()
        self.config = config
        self.restore = restore
        self.output_dir = Path(config.output_dir)
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision)
        self.modules = {name: self.accelerator.prepare(module) for name, module in modules.items()}
        self.parameters = [p for module in self.modules.values() for p in module.parameters()]
        self.optimizer = self.accelerator.prepare(
            torch.optim.AdamW(
                self.parameters,
                lr=config.learning_rate,
                betas=(config.adam_beta1, config.adam_beta2),
                weight_decay=config.adam_weight_decay,
            )
        )
        # Not prepared: accelerate would step it once per process.
        self.lr_scheduler = constant_then_cosine(self.optimizer.optimizer, config)
        self.accelerator.register_for_checkpointing(self.lr_scheduler)
        self.validation_pairs = []
        if config.validation_dir is not None:
            self.validation_pairs = paired_files(config.validation_dir)[: config.max_validation_samples]
        self.first_step = 0
        self.sums: dict[str, Tensor] = {}  # of the losses since the last line of the log
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        if config.resume_from_checkpoint is not None:
            self.resume(config.resume_from_checkpoint)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Batches of `blurry`, `sharp` and `index` from the current step to the last, under a progress bar."""
        config = self.config
        global_batch = config.train_batch_size * self.accelerator.num_processes
        dataset = SyntheticBlurDataset(
            config.train_data_dir,
            config.resolution,
            length=config.max_train_steps * global_batch,
            seed=config.seed,
            frames_dir=config.frames_dir,
            frames_probability=config.frames_probability,
        )
        rest = Subset(dataset, range(self.first_step * global_batch, len(dataset)))
        loader = DataLoader(rest, config.train_batch_size, num_workers=config.dataloader_num_workers)
        self.progress = tqdm(
            total=config.max_train_steps,
            initial=self.first_step,
            disable=not self.accelerator.is_local_main_process,
            mininterval=5,
        )
        yield from self.accelerator.prepare(loader)
        self.progress.close()

    def after_backward(self) -> None:
        """Clips, steps, forgets the gradients."""
        self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()

    def after_step(self, step: int, parts: dict[str, Tensor]) -> None:
        """Logs, validates, saves: each at its own interval. `step` counts from 1."""
        config = self.config
        self.progress.update(1)
        self.sums = {name: self.sums.get(name, 0) + part for name, part in parts.items()}
        if step % config.logging_steps == 0:
            means = {
                name: self.accelerator.reduce(total, "mean").item() / config.logging_steps
                for name, total in self.sums.items()
            }
            self.log({"step": step, "lr": self.lr_scheduler.get_last_lr()[0], **means})
            self.sums = {}
        last = step == config.max_train_steps
        if self.validation_pairs and (step % config.validation_steps == 0 or last):
            self.log({"step": step, "validation_psnr": self.validate()})
        if step % config.checkpointing_steps == 0 or last:
            self.save(step)

    def log(self, values: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.progress.set_postfix({k: f"{v:.4g}" for k, v in values.items() if k != "step"}, refresh=False)
            with open(self.output_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps(values) + "\n")

    @torch.no_grad()
    def validate(self) -> float:
        """Mean PSNR over the validation pairs, on 8-bit images."""
        device, values = self.accelerator.device, []
        for module in self.modules.values():
            module.eval()
        for files in self.validation_pairs:
            blurry, sharp = (
                torch.tensor(read_rgb(file), device=device).permute(2, 0, 1)[None].float() / 255 for file in files
            )
            height, width = (size - size % 8 for size in blurry.shape[-2:])
            blurry, sharp = blurry[..., :height, :width], sharp[..., :height, :width]
            restored = (self.restore(blurry, sharp).clamp(0, 1) * 255).round() / 255
            values.append(psnr(restored, sharp))
        for module in self.modules.values():
            module.train()
        return torch.cat(values).mean().item()

    def save(self, step: int) -> None:
        """Writes `checkpoint-{step}`: under another name first, so that it appears whole or not at all."""
        final = self.output_dir / f"checkpoint-{step}"
        temporary = self.output_dir / f".checkpoint-{step}.incomplete"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            for old in self.checkpoints()[: -self.config.checkpoints_total_limit]:
                shutil.rmtree(old)

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        found = [folder for folder in self.output_dir.glob("checkpoint-*") if re.fullmatch(r"\d+", folder.name[11:])]
        return sorted(found, key=lambda folder: int(folder.name[11:]))

    def resume(self, name: str) -> None:
        if name == "latest":
            if not self.checkpoints():
                return
            folder = self.checkpoints()[-1]
        else:
            folder = Path(name)
            if not re.fullmatch(r"checkpoint-\d+", folder.name) or not folder.is_dir():
                raise ValueError(f"`resume_from_checkpoint` must be 'latest' or a checkpoint-N folder, got {name!r}.")
        self.accelerator.load_state(str(folder))
        self.first_step = int(folder.name[11:])

    def trained(self) -> dict[str, ModelMixin]:
        """The modules as they were before `prepare` wrapped them."""
        return {
            name: self.accelerator.unwrap_model(module, keep_torch_compile=False).eval()
            for name, module in self.modules.items()
        }


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
