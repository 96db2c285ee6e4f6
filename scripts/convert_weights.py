"""Original checkpoint files -> a pipeline folder that diffusers loads, and back.

    python scripts/convert_weights.py CHECKPOINT_DIR OUTPUT_DIR [--dtype float16 --variant fp16]
    python scripts/convert_weights.py PIPELINE_DIR OUTPUT_DIR --to_official

CHECKPOINT_DIR holds net_g*.pth, net_le_dm*.pth and net_d*.pth; a net_le*.pth, the teacher of stage 2, is saved beside
the pipeline as latent_encoder/. Nothing is written unless every key of every network is known and of the right shape.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from torch import Tensor

import diffusers_hidiff
from diffusers_hidiff import HIDiffPipeline
from diffusers_hidiff.conversion import (
    COMPONENTS,
    ConversionError,
    family_of,
    networks_from_original,
    scheduler_of,
    to_original,
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OPTIONAL = "net_le"


def find_checkpoints(folder: Path) -> dict[str, Path]:
    """The original file of each network."""
    files = {}
    for network in COMPONENTS:
        found = sorted(folder.glob(f"{network}*.pth"))
        if network == "net_le":
            found = [file for file in found if not file.name.startswith("net_le_dm")]
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ConversionError(f"{folder} must hold one file for {network}, holds several: {names}.")
        if found:
            files[network] = found[0]
        elif network != OPTIONAL:
            raise ConversionError(f"{folder} holds no {network}*.pth.")
    return files


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """The state dict in an original file, which is `{"params": state_dict}`."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of half a dozen kinds, by where the file is damaged
        reason = str(error).split("\n")[0]
        raise ConversionError(f"{file} cannot be read, it is damaged or no PyTorch checkpoint: {reason}") from error
    parameters = content.get("params") if isinstance(content, Mapping) else None
    if not isinstance(parameters, Mapping) or not all(isinstance(value, Tensor) for value in parameters.values()):
        raise ConversionError(f"{file} must hold a state dict under 'params'.")
    return dict(parameters)


def cast(state_dict: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {name: value if dtype is None else value.to(dtype) for name, value in state_dict.items()}


def read_component(folder: Path, variant: str | None) -> ModelMixin:
    """One network of a pipeline folder, strictly and in the dtype that it is stored in."""
    file = folder / ".".join(filter(None, ("diffusion_pytorch_model", variant, "safetensors")))
    try:
        config = json.loads((folder / "config.json").read_text())
        with torch.device("meta"):
            model = getattr(diffusers_hidiff, config["_class_name"]).from_config(config)
        model.load_state_dict(load_file(file), strict=True, assign=True)
    except Exception as error:  # a missing or damaged file, another class, other keys
        raise ConversionError(f"{folder} cannot be read as a network of HI-Diff: {error}") from error
    return model


def find_components(folder: Path, variant: str | None) -> dict[str, ModelMixin]:
    """The networks of a pipeline folder, by original name."""
    if not (folder / "model_index.json").is_file():
        raise ConversionError(f"{folder} is no pipeline folder, it holds no model_index.json.")
    return {
        network: read_component(folder / component, variant)
        for network, component in COMPONENTS.items()
        if network != OPTIONAL or (folder / component).is_dir()
    }


def check_survives(models: Mapping[str, ModelMixin], state_dicts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuses networks that the original's format cannot express: what is read back must be the same networks."""

    def settings(model: ModelMixin) -> dict[str, object]:
        ignored = ("_", "ffn_expansion_factor")  # that factor only sets widths, which the shapes tell
        return {name: value for name, value in model.config.items() if not name.startswith(ignored)}

    read_back = networks_from_original(state_dicts)
    for network, model in models.items():
        after = settings(read_back[COMPONENTS[network]])
        lost = [f"{name}={value!r}" for name, value in settings(model).items() if after[name] != value]
        if lost:
            raise ConversionError(f"An original {network} cannot express {', '.join(lost)}.")


def common_family(networks: Mapping[str, ModelMixin], asked: str | None) -> str:
    """The family of networks that are known to fit one another."""
    family = next(filter(None, map(family_of, networks.values())))
    if asked not in (None, family):
        raise ConversionError(f"--family {asked} does not agree with the networks, which are of the {family} family.")
    return family


@contextmanager
def appearing_whole(output: Path) -> Iterator[Path]:
    """A folder to write into, that takes the name `output` once all is written and vanishes if anything fails."""
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if output.exists():  # it is empty
            output.rmdir()
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def convert_to_pipeline(options: argparse.Namespace) -> tuple[str, dict[str, ModelMixin]]:
    files = find_checkpoints(options.source)
    networks = networks_from_original(
        {name: cast(read_checkpoint(file), options.dtype) for name, file in files.items()}
    )
    family = common_family(networks, options.family)
    components = {name: model for name, model in networks.items() if name != COMPONENTS[OPTIONAL]}
    with appearing_whole(options.output) as folder:
        HIDiffPipeline(**components, scheduler=scheduler_of(family)).save_pretrained(folder, variant=options.variant)
        if latent_encoder := networks.get(COMPONENTS[OPTIONAL]):
            latent_encoder.save_pretrained(folder / COMPONENTS[OPTIONAL], variant=options.variant)
    return family, networks


def convert_to_official(options: argparse.Namespace) -> tuple[str, dict[str, ModelMixin]]:
    models = find_components(options.source, options.variant)
    networks = {COMPONENTS[network]: model for network, model in models.items()}
    state_dicts = {network: cast(to_original(model), options.dtype) for network, model in models.items()}
    check_survives(models, state_dicts)
    family = common_family(networks, options.family)
    with appearing_whole(options.output) as folder:
        for network, state_dict in state_dicts.items():
            torch.save({"params": state_dict}, folder / f"{network}.pth")
    return family, networks


def report(family: str, networks: Mapping[str, ModelMixin]) -> None:
    print(f"Recognised networks of the {family} family:")
    for name, model in networks.items():
        settings = ", ".join(f"{key}={value}" for key, value in model.config.items() if not key.startswith("_"))
        print(f"  {name}: {model.num_parameters():,} parameters, {type(model).__name__}({settings})")


def loading_lines(options: argparse.Namespace, networks: Mapping[str, ModelMixin]) -> str:
    """The Python that loads what was written."""
    if options.to_official:
        return f'torch.load("{options.output / "net_g.pth"}", weights_only=True)["params"]'
    dtype = networks["transformer"].dtype
    variant = f', variant="{options.variant}"' if options.variant else ""
    precision = "" if dtype == torch.float32 else f", dtype={dtype}"
    lines = [f'HIDiffPipeline.from_pretrained("{options.output}"{variant}{precision})']
    if (teacher := COMPONENTS[OPTIONAL]) in networks:
        lines.append(f'HIDiffLatentEncoder.from_pretrained("{options.output / teacher}"{variant}{precision})')
    return "\n  ".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="CHECKPOINT_DIR", help="original files, or a pipeline folder")
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR", help="a folder that is not there yet, or empty")
    parser.add_argument("--family", choices=["gopro", "realblur"], help="refuse networks of another family")
    parser.add_argument("--dtype", choices=DTYPES, help="store in this precision (default: as in the files)")
    parser.add_argument("--variant", help="part of the file names, such as fp16")
    parser.add_argument("--to_official", action="store_true", help="from a pipeline folder to original files")
    options = parser.parse_args(arguments)
    options.dtype = DTYPES.get(options.dtype)
    convert = convert_to_official if options.to_official else convert_to_pipeline
    try:
        if not options.source.is_dir():
            raise ConversionError(f"{options.source} is no folder.")
        if options.output.exists() and not (options.output.is_dir() and not any(options.output.iterdir())):
            raise ConversionError(f"{options.output} exists and is not empty; nothing is overwritten.")
        family, networks = convert(options)
    except (ConversionError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    report(family, networks)
    print(f"Written to {options.output}. Load it with\n  {loading_lines(options, networks)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
