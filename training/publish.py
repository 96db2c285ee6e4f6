"""The result as others get it: a model card, no paths of this machine, a repository on the Hub."""

import json
import subprocess
from dataclasses import asdict
from math import nan
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import create_repo, upload_folder

from config import TrainingConfig
from data import Phase

PATHS = (
    *("output_dir", "train_data_dir", "train_pairs_dir", "frames_dir", "validation_dir", "stage1_dir"),
    *("pretrained_model_name_or_path", "resume_from_checkpoint", "logging_dir", "dataset_name"),
)
NOT_RECIPE = (
    *(
        "max_validation_samples",
        "photo_cache_megabytes",
        "max_skipped_steps",
        "dataloader_num_workers",
        "logging_steps",
        "report_to",
    ),
    *("validation_steps", "checkpointing_steps", "checkpoints_total_limit", "push_to_hub", "hub_model_id", "dry_run"),
)

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: image-to-image
tags: [image-restoration, deblurring, hi-diff]
---
# HI-Diff, {stage}

Removes motion blur from photographs ([arXiv:2305.12966](https://arxiv.org/abs/2305.12966)). {usage}

## Figures

{figures}

## Data

{data}

## Recipe

{phases}

```yaml
{recipe}```

Made with commit {commit} of diffusers-hidiff, torch {torch}.
"""


def commit() -> str:
    """The commit of the training scripts, marked if they have been changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def model_card(config: TrainingConfig, metrics: list[dict[str, Any]], phases: list[Phase]) -> str:
    """Recipe, data, figures and commit, as the README.md of a model.

    Args:
        config: Of the run; folders are named, their place on this machine is not.
        metrics: The lines of metrics.jsonl.
        phases: Of the run.
    """
    options = asdict(config)
    scores = [line for line in metrics if "validation_psnr" in line]
    figures = "Not validated while training."
    if scores:
        last, best = (
            f"{line['validation_psnr']:.2f} dB / {line.get('validation_ssim', nan):.4f} after {line['step']} steps"
            for line in (scores[-1], max(scores, key=lambda line: line["validation_psnr"]))
        )
        figures = (
            f"Mean PSNR / SSIM over up to {config.max_validation_samples} whole validation images, 8 bits, without alignment,"
            f" SSIM as published for GoPro (of the image as a volume): {last}; the best PSNR was {best}."
        )
    folders = [f"* `{name}`: {Path(options[name]).name}" for name in PATHS if options.get(name) and "_dir" in name]
    if config.dataset_name is not None:
        is_local = Path(config.dataset_name).exists()
        folders.append(f"* `dataset_name`: {Path(config.dataset_name).name if is_local else config.dataset_name}")
    recipe = {name: value for name, value in options.items() if name not in (*PATHS, *NOT_RECIPE)}
    stage2 = "scheduler" in options
    return CARD.format(
        stage="trained in two stages" if stage2 else "stage 1",
        usage="Load it with `HIDiffPipeline.from_pretrained`." if stage2 else "This is the first of two stages.",
        figures=figures,
        data="\n".join(line for line in folders if "output_dir" not in line and "logging_dir" not in line),
        phases="\n".join(
            f"* {phase.num_steps} steps of {phase.global_batch_size} patches of {phase.resolution}x{phase.resolution}"
            for phase in phases
        ),
        recipe=yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None),
        commit=commit(),
        torch=torch.__version__,
    )


def strip_local_paths(folder: Path) -> None:
    """Drops from every config in `folder` where its network was loaded from."""
    for file in folder.rglob("*.json"):
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def upload(config: TrainingConfig, folder: Path | None = None) -> None:
    """Makes the repository on the Hub if there is none, and uploads `folder` if given, checkpoints and logs aside."""
    repo_id = create_repo(config.hub_model_id or Path(config.output_dir).name, exist_ok=True).repo_id
    if folder is not None:
        ignore = ["checkpoint-*", ".*", "best/*", "samples/*", f"{config.logging_dir}/*"]
        upload_folder(repo_id=repo_id, folder_path=folder, commit_message="End of training", ignore_patterns=ignore)
