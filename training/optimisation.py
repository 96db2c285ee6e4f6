"""AdamW and its learning rate, as published: constant, then one cosine."""

import warnings

import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, SequentialLR

from config import TrainingConfig


def adamw(objective: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """For all that learns."""
    return torch.optim.AdamW(
        [parameter for parameter in objective.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
    )


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


def follow_options(optimizer: torch.optim.Optimizer, config: TrainingConfig, step: int) -> SequentialLR:
    """The schedule of `config` after `step` steps, whatever settings `optimizer` brought along from a checkpoint."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = config.learning_rate
        group["betas"], group["weight_decay"] = (config.adam_beta1, config.adam_beta2), config.adam_weight_decay
    scheduler = constant_then_cosine(optimizer, config)
    with warnings.catch_warnings():  # about steps of the schedule without steps of the optimiser
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(step):
            scheduler.step()
    return scheduler
