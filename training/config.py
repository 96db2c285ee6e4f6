"""Options of the two training scripts: a dataclass per stage, values from --config FILE.yaml, flags override.

python training/train_stage1.py --config training/configs/small_stage1.yaml --output_dir runs/stage1 --seed 1
"""

import argparse
import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar

import yaml
from transformers import HfArgumentParser


@dataclass
class TrainingConfig:
    """What both stages share. Names are those of diffusers' example scripts.

    Args:
        output_dir: Where checkpoints, curves and the result go.
        train_data_dir: Folder of sharp photographs, from which blurry ones are synthesised.
        frames_dir: Folder of consecutive frames of one video; averages of them are real motion blur.
        frames_probability: Share of training patches that come from the frames.
        validation_dir: Folder with blurry/ and sharp/; none means no validation.
        max_validation_samples: How many pairs of it are used while training.
        resolution: Height and width of a training patch, a multiple of 8.
        train_batch_size: Patches per process and step.
        max_train_steps: Steps of the optimiser.
        learning_rate: Constant at first.
        lr_constant_steps: For so many steps; then one cosine.
        lr_min: Down to this.
        adam_beta1: AdamW.
        adam_beta2: AdamW.
        adam_weight_decay: AdamW.
        max_grad_norm: Gradients are clipped to this norm.
        seed: Of weights, patches, blur and noise.
        mixed_precision: "no", "bf16" or "fp16".
        dataloader_num_workers: Processes that make patches.
        logging_steps: Steps between two lines of metrics.jsonl.
        validation_steps: Steps between two validations.
        checkpointing_steps: Steps between two checkpoints.
        checkpoints_total_limit: How many checkpoints are kept.
        resume_from_checkpoint: "latest" or a checkpoint-N folder.
    """

    output_dir: str
    train_data_dir: str
    frames_dir: str | None = None
    frames_probability: float = 0.1
    validation_dir: str | None = None
    max_validation_samples: int = 12
    resolution: int = 128
    train_batch_size: int = 8
    max_train_steps: int = 300_000
    learning_rate: float = 2e-4
    lr_constant_steps: int = 100_000
    lr_min: float = 1e-6
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-4
    max_grad_norm: float = 0.01
    seed: int = 100
    mixed_precision: str = "no"
    dataloader_num_workers: int = 1
    logging_steps: int = 10
    validation_steps: int = 250
    checkpointing_steps: int = 250
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = None

    def __post_init__(self) -> None:
        positive = (
            *("resolution", "train_batch_size", "max_train_steps", "learning_rate", "max_grad_norm"),
            *("logging_steps", "validation_steps", "checkpointing_steps", "checkpoints_total_limit"),
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.resolution % 8:
            raise ValueError(f"`resolution` must be a multiple of 8, got {self.resolution}.")
        if not 0 <= self.lr_constant_steps <= self.max_train_steps:
            raise ValueError(
                f"`lr_constant_steps` must lie between 0 and `max_train_steps`={self.max_train_steps},"
                f" got {self.lr_constant_steps}."
            )
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"`mixed_precision` must be 'no', 'bf16' or 'fp16', got {self.mixed_precision!r}.")


@dataclass
class Stage1Config(TrainingConfig):
    """Stage 1: latent encoder and transformer together.

    Args:
        transformer: Arguments of `HIDiffTransformer`, as JSON on the command line.
        encoder: Arguments of `HIDiffLatentEncoder` but for `in_channels`.
    """

    transformer: dict = field(default_factory=dict)
    encoder: dict = field(default_factory=dict)


@dataclass
class Stage2Config(TrainingConfig):
    """Stage 2: condition encoder, denoiser and transformer, taught by stage 1's latent encoder.

    Args:
        stage1_dir: The output folder of stage 1.
        pretrained_model_name_or_path: Start from this pipeline instead, folder or Hub id, to train it further: its networks
            and scheduler, and its subfolder latent_encoder/ as the teacher.
        denoiser_type: "mixer" (GoPro) or "mlp" (RealBlur).
        denoiser: Arguments of the denoiser, as JSON on the command line.
        scheduler: Arguments of `HIDiffScheduler`.
    """

    stage1_dir: str | None = None
    pretrained_model_name_or_path: str | None = None
    denoiser_type: str = "mixer"
    denoiser: dict = field(default_factory=dict)
    scheduler: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.stage1_dir is None) == (self.pretrained_model_name_or_path is None):
            raise ValueError(
                "Give either `stage1_dir` or `pretrained_model_name_or_path`,"
                f" got {self.stage1_dir!r} and {self.pretrained_model_name_or_path!r}."
            )
        if self.stage1_dir is not None and not (Path(self.stage1_dir) / "transformer").is_dir():
            raise ValueError(f"`stage1_dir` must be the output folder of stage 1, got {self.stage1_dir!r}.")
        if self.pretrained_model_name_or_path is not None and (self.denoiser or self.scheduler):
            raise ValueError(
                "`denoiser` and `scheduler` must be left out with `pretrained_model_name_or_path`, which brings its own,"
                f" got {self.denoiser} and {self.scheduler}."
            )
        if self.denoiser_type not in ("mixer", "mlp"):
            raise ValueError(f"`denoiser_type` must be 'mixer' or 'mlp', got {self.denoiser_type!r}.")


Config = TypeVar("Config", bound=TrainingConfig)


def parse_config(config_class: type[Config], arguments: list[str] | None = None) -> Config:
    """Reads options from `--config FILE.yaml` and flags; flags win.

    Raises:
        ValueError: The file holds an unknown key, or an option has an impossible value.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", help="YAML file with values for any of the options")
    known, rest = first.parse_known_args(arguments)
    parser = HfArgumentParser(config_class, allow_abbrev=False, parents=[first])  # type: ignore[arg-type]
    for action in parser._actions:
        if action.type is dict:
            action.type = json.loads
    if known.config:
        values = yaml.safe_load(Path(known.config).read_text()) or {}
        if unknown := sorted(values.keys() - {f.name for f in fields(config_class)}):
            raise ValueError(f"`--config` {known.config} holds unknown keys: {', '.join(unknown)}.")
        for action in parser._actions:
            action.required = action.required and action.dest not in values
        parser.set_defaults(**values)
    options = vars(parser.parse_args(rest))
    options.pop("config")
    return config_class(**options)
