"""Options of the two training scripts: a dataclass per stage, values from --config FILE.yaml, flags override.

python training/train_stage1.py --config training/configs/small_stage1.yaml --output_dir runs/stage1 --seed 1
"""

import argparse
import inspect
import json
import sys
import types
import typing
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

from diffusers_hidiff import (
    HIDiffLatentEncoder,
    HIDiffMixerDenoiser,
    HIDiffMLPDenoiser,
    HIDiffScheduler,
    HIDiffTransformer,
)
from diffusers_hidiff.data.blur_synthesis import BlurOptions

DENOISERS: dict[str, type] = {"mixer": HIDiffMixerDenoiser, "mlp": HIDiffMLPDenoiser}


@dataclass
class TrainingConfig:
    """What both stages share. Names are those of diffusers' example scripts.

    Args:
        output_dir: Where checkpoints, curves and the result go.
        train_data_dir: Folder of sharp photographs, from which blurry ones are synthesised.
        frames_dir: Folder of consecutive frames of one video; averages of them are real motion blur.
        frames_probability: Share of training patches that come from the frames.
        blur: Arguments of `BlurOptions`, as JSON on the command line: kinds and strengths of the synthetic blur.
        photo_cache_megabytes: Decoded photographs are kept in memory, so much in each process that makes patches.
        train_pairs_dir: Instead of photographs: a folder of real pairs (GoPro, HIDE, RealBlur, blurry/ and sharp/, input/
            and target/), or a text file that lists them.
        dataset_name: Or a data set with columns blurry and sharp: a repository of the Hub, a folder of the library
            `datasets`, or a folder of Parquet or Arrow shards, such as scripts/prepare_data.py makes.
        dataset_config_name: Its configuration, where it has several.
        dataset_split: Its split to train on.
        streaming: Whether to read it while training instead of downloading it first.
        shuffle_buffer_size: Rows of a stream that are shuffled among each other; twice as many are held in memory, encoded.
        train_tile_size: Patches of real pairs are drawn within tiles of this size, as GoPro is cut for training.
        train_tile_overlap: How far these tiles overlap.
        validation_dir: Folder of real pairs; none means no validation.
        max_validation_samples: How many pairs of it are used while training.
        resolution: Height and width of a training patch, a multiple of 8; one number, or one per phase.
        train_batch_size: Patches per process and step; one number, or one per phase.
        phase_steps: How many steps each phase lasts; together `max_train_steps`. None means one phase.
        max_train_steps: Steps of the optimiser.
        gradient_accumulation_steps: Batches whose gradients are added up before a step.
        learning_rate: Constant at first.
        lr_constant_steps: For so many steps; then one cosine.
        lr_min: Down to this.
        adam_beta1: AdamW.
        adam_beta2: AdamW.
        adam_weight_decay: AdamW.
        max_grad_norm: Gradients are clipped to this norm.
        max_skipped_steps: A step whose loss or gradient is not finite is skipped; after so many in a row training stops.
        seed: Of weights, patches, blur and noise.
        use_ema: Whether to keep a moving average of the weights, to validate it and to make it the result.
        ema_max_decay: Its largest decay.
        mixed_precision: "no", "bf16" or "fp16". The chain of latents stays in float32.
        allow_tf32: Whether a GPU may multiply float32 matrices in TF32.
        gradient_checkpointing: Whether to recompute activations in the backward pass to save memory.
        compile: Whether to compile the networks.
        dataloader_num_workers: Processes that make patches.
        logging_steps: Steps between two lines of metrics.jsonl.
        report_to: "tensorboard", "wandb" or "none"; metrics.jsonl and curves.png are written in any case.
        logging_dir: Where the tracker writes, within `output_dir`.
        validation_steps: Steps between two validations.
        checkpointing_steps: Steps between two checkpoints.
        checkpoints_total_limit: How many checkpoints are kept.
        resume_from_checkpoint: "latest" or a checkpoint-N folder.
        push_to_hub: Whether to upload the result.
        hub_model_id: To this repository; the name of `output_dir` if not given.
        dry_run: Whether to print options, data, sizes and estimates of memory and time, and leave.
    """

    output_dir: str
    train_data_dir: str | None = None
    frames_dir: str | None = None
    frames_probability: float = 0.1
    blur: dict = field(default_factory=dict)
    photo_cache_megabytes: int = 0
    train_pairs_dir: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_split: str = "train"
    streaming: bool = False
    shuffle_buffer_size: int = 256
    train_tile_size: int | None = None
    train_tile_overlap: int = 0
    validation_dir: str | None = None
    max_validation_samples: int = 12
    resolution: list[int] = field(default_factory=lambda: [128])
    train_batch_size: list[int] = field(default_factory=lambda: [8])
    phase_steps: list[int] = field(default_factory=list)
    max_train_steps: int = 300_000
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-4
    lr_constant_steps: int = 100_000
    lr_min: float = 1e-6
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-4
    max_grad_norm: float = 0.01
    max_skipped_steps: int = 10
    seed: int = 100
    use_ema: bool = False
    ema_max_decay: float = 0.9999
    mixed_precision: str = "no"
    allow_tf32: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    dataloader_num_workers: int = 1
    logging_steps: int = 10
    report_to: str = "none"
    logging_dir: str = "logs"
    validation_steps: int = 250
    checkpointing_steps: int = 250
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = None
    push_to_hub: bool = False
    hub_model_id: str | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        self.check_ranges()
        self.check_phases()
        self.check_choices()
        self.check_data()

    def check_ranges(self) -> None:
        positive = (
            *("resolution", "train_batch_size", "phase_steps", "max_train_steps", "gradient_accumulation_steps"),
            *("learning_rate", "max_grad_norm", "max_skipped_steps", "logging_steps", "validation_steps"),
            *("checkpointing_steps", "checkpoints_total_limit", "max_validation_samples", "shuffle_buffer_size"),
        )
        for name in positive:
            value = getattr(self, name)
            if not all(number > 0 for number in (value if isinstance(value, list) else [value])):
                raise ValueError(f"`{name}` must be positive, got {readable(value)}.")
        for name in (
            *("lr_min", "adam_weight_decay", "dataloader_num_workers", "seed", "train_tile_overlap"),
            "photo_cache_megabytes",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        for name in ("adam_beta1", "adam_beta2", "ema_max_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 0 and less than 1, got {getattr(self, name)}.")
        if not 0 <= self.frames_probability <= 1:
            raise ValueError(f"`frames_probability` must lie between 0 and 1, got {self.frames_probability}.")
        if self.lr_min > self.learning_rate:
            raise ValueError(f"`lr_min` must not exceed `learning_rate`={self.learning_rate}, got {self.lr_min}.")
        if not 0 <= self.lr_constant_steps <= self.max_train_steps:
            raise ValueError(
                f"`lr_constant_steps` must lie between 0 and `max_train_steps`={self.max_train_steps},"
                f" got {self.lr_constant_steps}."
            )

    def check_phases(self) -> None:
        if any(size % 8 for size in self.resolution):
            raise ValueError(f"`resolution` must be a multiple of 8, got {readable(self.resolution)}.")
        number = max(1, len(self.phase_steps))
        for name in ("resolution", "train_batch_size"):
            if len(getattr(self, name)) not in (1, number):
                raise ValueError(
                    f"`{name}` must be one number or one per phase of `phase_steps`={self.phase_steps},"
                    f" got {getattr(self, name)}."
                )
        if self.phase_steps and sum(self.phase_steps) != self.max_train_steps:
            raise ValueError(
                f"`phase_steps` must add up to `max_train_steps`={self.max_train_steps}, got {self.phase_steps},"
                f" which is {sum(self.phase_steps)}."
            )
        if self.train_tile_size is not None and not (
            self.train_tile_size >= max(self.resolution) and self.train_tile_size > self.train_tile_overlap
        ):
            raise ValueError(
                f"`train_tile_size` must be at least `resolution`={readable(self.resolution)} and more than"
                f" `train_tile_overlap`={self.train_tile_overlap}, got {self.train_tile_size}."
            )

    def check_choices(self) -> None:
        choices = {"mixed_precision": ("no", "bf16", "fp16"), "report_to": ("tensorboard", "wandb", "none")}
        for name, values in choices.items():
            if getattr(self, name) not in values:
                *most, last = map(repr, values)
                raise ValueError(f"`{name}` must be {', '.join(most)} or {last}, got {getattr(self, name)!r}.")
        if self.report_to != "none" and find_spec(self.report_to) is None:
            raise ValueError(
                f"`report_to` {self.report_to!r} needs a package that is missing: pip install {self.report_to}."
            )

    def check_data(self) -> None:
        sources = {name: getattr(self, name) for name in ("train_data_dir", "train_pairs_dir", "dataset_name")}
        if sum(value is not None for value in sources.values()) != 1:
            given = ", ".join(f"{name}={value!r}" for name, value in sources.items())
            raise ValueError(
                "Give either `train_data_dir`, photographs to blur, or `train_pairs_dir` or `dataset_name`, real pairs,"
                f" got {given}."
            )
        synthetic = {"frames_dir": self.frames_dir, "blur": self.blur}
        if self.train_data_dir is None and (needless := [name for name, value in synthetic.items() if value]):
            raise ValueError(
                f"`{needless[0]}` must be left out without `train_data_dir`: real pairs are blurry already."
            )
        if self.train_data_dir is not None and self.train_tile_size is not None:
            raise ValueError("`train_tile_size` must be left out with `train_data_dir`: only real pairs are tiled.")
        if self.dataset_name is None and (self.streaming or self.dataset_config_name is not None):
            name = "streaming" if self.streaming else "dataset_config_name"
            raise ValueError(f"`{name}` must be left out without `dataset_name`.")
        check_arguments("blur", self.blur, BlurOptions)
        BlurOptions(**self.blur)


@dataclass
class Stage1Config(TrainingConfig):
    """Stage 1: latent encoder and transformer together.

    Args:
        transformer: Arguments of `HIDiffTransformer`, as JSON on the command line.
        encoder: Arguments of `HIDiffLatentEncoder` but for `in_channels`.
    """

    transformer: dict = field(default_factory=dict)
    encoder: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_arguments("transformer", self.transformer, HIDiffTransformer)
        check_arguments("encoder", self.encoder, HIDiffLatentEncoder, without=("in_channels",))


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
        if self.denoiser_type not in DENOISERS:
            raise ValueError(f"`denoiser_type` must be 'mixer' or 'mlp', got {self.denoiser_type!r}.")
        check_arguments("denoiser", self.denoiser, DENOISERS[self.denoiser_type], without=("prior_dim",))
        check_arguments("scheduler", self.scheduler, HIDiffScheduler)
        if self.scheduler.get("num_train_timesteps", 1) < 1:
            raise ValueError(f"`scheduler` must have num_train_timesteps of at least 1, got {self.scheduler}.")
        start, end = self.scheduler.get("beta_start", 0.1), self.scheduler.get("beta_end", 0.99)
        if not 0 < start <= end < 1:
            raise ValueError(f"`scheduler` must have 0 < beta_start <= beta_end < 1, got {start} and {end}.")


def readable(value: Any) -> Any:
    """A list of one number as the number."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def check_arguments(name: str, values: dict, network: type, without: tuple[str, ...] = ()) -> None:
    """Refuses what the constructor of `network` does not take.

    Raises:
        ValueError: A key is no argument of it, or one that is filled in for the user.
    """
    known = [argument for argument in inspect.signature(network).parameters if argument not in without]
    if unknown := sorted(values.keys() - set(known)):
        raise ValueError(f"`{name}` must hold arguments among {', '.join(known)}, got {', '.join(unknown)}.")


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML whose mappings may not name a key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise ValueError(f"`--config` repeats keys: {', '.join(repeated)}.")
        return super().construct_mapping(node, deep)


def checked_value(name: str, value: Any, annotation: Any) -> Any:
    """A value of a YAML file as the option's type has it: a whole number may stand for a float, one number for a list.

    Raises:
        ValueError: The value is of another type, a number written as text for instance.
    """
    wanted = [annotation]
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        wanted = list(typing.get_args(annotation))
    if value is None and type(None) in wanted:
        return None
    kind = wanted[0]
    if typing.get_origin(kind) is list:
        values = value if isinstance(value, list) else [value]
        return [checked_value(name, item, typing.get_args(kind)[0]) for item in values]
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        hint = " (YAML takes 1e-3 for text; write 1.0e-3)" if kind in (int, float) and isinstance(value, str) else ""
        raise ValueError(f"`{name}` must be of type {kind.__name__}, got {value!r}{hint}.")
    return value


def read_values(file: Path, config_class: type[TrainingConfig]) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        ValueError: It holds an unknown or repeated key, or a value of the wrong type.
    """
    values = yaml.load(file.read_text(), UniqueKeyLoader) or {}
    annotations = typing.get_type_hints(config_class)
    if unknown := sorted(str(key) for key in values.keys() - annotations.keys()):
        raise ValueError(f"`--config` {file} holds unknown keys: {', '.join(unknown)}.")
    return {name: checked_value(name, value, annotations[name]) for name, value in values.items()}


Config = TypeVar("Config", bound=TrainingConfig)


def parse_config(config_class: type[Config], arguments: list[str] | None = None) -> Config:
    """Reads options from `--config FILE.yaml` and flags; flags win.

    Raises:
        ValueError: The file holds an unknown key or a value of the wrong type, a flag is repeated, or an option has an
            impossible value.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
    if repeated := sorted({flag for flag in flags if flags.count(flag) > 1}):
        raise ValueError(f"Each option may be given once, got {', '.join(repeated)} again.")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", help="YAML file with values for any of the options")
    known, rest = first.parse_known_args(arguments)
    parser = HfArgumentParser(config_class, allow_abbrev=False, parents=[first])  # type: ignore[arg-type]
    for action in parser._actions:
        if action.type is dict:
            action.type = json.loads
    if known.config:
        values = read_values(Path(known.config), config_class)
        for action in parser._actions:
            action.required = action.required and action.dest not in values
        parser.set_defaults(**values)
    options = vars(parser.parse_args(rest))
    return config_class(**{f.name: options[f.name] for f in fields(config_class)})
