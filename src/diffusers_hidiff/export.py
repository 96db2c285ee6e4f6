"""The whole pipeline as one graph, for programs without diffusers or without Python: blurry image and noise -> restored.

B images · H, W pixels · N prior tokens · D prior width

The steps of the reverse chain are unrolled. The noise is an input, so that who runs the graph decides what is random.
"""

import copy
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .pipelines.pipeline_hidiff import HIDiffPipeline
from .sampling import sample_prior
from .schedulers.compatibility import check_scheduler
from .schedulers.scheduling_hidiff import HIDiffScheduler

Format = Literal["onnx", "torch_export", "aotinductor"]
Run = Callable[[Tensor, Tensor], Tensor]  # blurry [B, 3, H, W], noise [B, N, D] -> restored [B, 3, H, W]

SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch_export": ".pt2", "aotinductor": ".pt2"}
TOLERANCE = 1e-4
OPEN_SIZES = ((64, 96), (104, 40))  # where height and width are left open: that of the trace, and another for the check

LOADING: dict[Format, str] = {
    "onnx": """\
import onnxruntime
session = onnxruntime.InferenceSession({path!r}, providers=["CPUExecutionProvider"])
(restored,) = session.run(None, {{"blurry": blurry, "noise": noise}})  # NumPy, float32""",
    "torch_export": """\
import torch
restored = torch.export.load({path!r}).module()(blurry, noise)""",
    "aotinductor": """\
import torch
restored = torch._inductor.aoti_load_package({path!r})(blurry, noise)""",
}


class ExportError(Exception):
    """The exported graph does not compute what the pipeline does."""


class UnrolledScheduler(HIDiffScheduler):
    """A scheduler whose tables are Python numbers: what is traced through it holds arithmetic, no look-ups or branches."""

    @classmethod
    def of(cls, scheduler: HIDiffScheduler, num_inference_steps: int) -> "UnrolledScheduler":
        """The same steps as `scheduler` takes."""
        unrolled: UnrolledScheduler = cls.from_config(scheduler.config)
        unrolled.set_timesteps(num_inference_steps)
        unrolled.timesteps = unrolled.timesteps.tolist()
        unrolled.alphas_cumprod = unrolled.alphas_cumprod.tolist()
        unrolled.one = 1.0
        return unrolled

    def previous_timestep(self, timestep: int) -> int:
        return max((other for other in self.timesteps if other < timestep), default=-1)


class PipelineGraph(nn.Module):
    """Condition encoder, reverse chain and transformer as one module; it owns copies of the networks.

    Args:
        pipeline: Its scheduler is a `HIDiffScheduler`.
        num_inference_steps: Steps of the reverse chain; None for all.
    Raises:
        ValueError: The pipeline cannot be unrolled like that; the message says why.
    """

    def __init__(self, pipeline: HIDiffPipeline, num_inference_steps: int | None = None) -> None:
        super().__init__()
        if type(pipeline.scheduler) is not HIDiffScheduler:
            raise ValueError(f"`scheduler` must be a HIDiffScheduler, got {type(pipeline.scheduler).__name__}.")
        steps = pipeline.scheduler.config.num_train_timesteps if num_inference_steps is None else num_inference_steps
        check_scheduler(pipeline.scheduler, steps)
        self.condition_encoder, self.denoiser, self.transformer = (
            copy.deepcopy(network).eval().requires_grad_(False)
            for network in (pipeline.condition_encoder, pipeline.denoiser, pipeline.transformer)
        )
        self.scheduler = UnrolledScheduler.of(pipeline.scheduler, steps)

    def forward(self, blurry: Tensor, noise: Tensor) -> Tensor:
        """What the pipeline returns for `output_type="pt"`.

        Args:
            blurry: [B, 3, H, W] float32, RGB in [0, 1]; H and W multiples of 8.
            noise: Standard normal, [B, N, D] float32; the pipeline's `latents`.
        Returns:
            [B, 3, H, W] in [0, 1].
        """
        condition = self.condition_encoder(blurry.to(self.condition_encoder.dtype), return_dict=False)[0]  # [B, N, D]
        prior = sample_prior(self.denoiser, self.scheduler, condition.to(self.denoiser.dtype), noise)
        return self.transformer(blurry, prior.to(self.transformer.dtype), return_dict=False)[0].clamp(0, 1)


def export_pipeline(
    pipeline: HIDiffPipeline,
    output: Path,
    format: Format = "onnx",
    size: tuple[int, int] | None = None,
    batch_size: int = 1,
    num_inference_steps: int | None = None,
) -> float:
    """Writes the pipeline as one graph, and only if that graph computes what the pipeline does.

    Args:
        pipeline: In float32, with a `HIDiffScheduler`.
        output: File to write; it must not be there yet.
        format: "onnx"; "torch_export", a program for `torch.export.load`; or "aotinductor", a package compiled for the
            pipeline's device, for `torch._inductor.aoti_load_package` or a C++ program.
        size: Height and width of the images, multiples of 8; None leaves them open, from 16 pixels upwards, but not for
            "aotinductor".
        batch_size: Number B of images.
        num_inference_steps: Steps of the reverse chain; None for all.
    Returns:
        The largest difference to the pipeline's pictures, which lie in [0, 1].
    Raises:
        ValueError: An argument or a setting of the pipeline is not as said.
        ModuleNotFoundError, FileNotFoundError: What the format needs is not installed.
        FileExistsError: `output` is there.
        ExportError: The graph differs from the pipeline by more than 1e-4 somewhere.
    """
    check_arguments(pipeline, output, format, size, batch_size)
    check_installed(format)
    graph = PipelineGraph(pipeline, num_inference_steps)
    sizes = OPEN_SIZES if size is None else (size,)
    with torch.no_grad(), appearing_checked(output) as partial:
        program = trace(graph, *random_inputs(pipeline, batch_size, sizes[0]), dynamic=size is None)
        write(program, partial, format)
        run = load_graph(partial, format)
        difference = 0.0
        for one_size in sizes:
            blurry, noise = random_inputs(pipeline, batch_size, one_size)
            (expected,) = pipeline(blurry, num_inference_steps, latents=noise, output_type="pt", return_dict=False)
            difference = max(difference, (run(blurry, noise).cpu() - expected).abs().max().item())
        if not difference <= TOLERANCE:
            raise ExportError(
                f"The exported graph differs from the pipeline by {difference:.1e}, more than {TOLERANCE:g}; nothing was"
                " written."
            )
    return difference


def check_arguments(
    pipeline: HIDiffPipeline, output: Path, format: Format, size: tuple[int, int] | None, batch_size: int
) -> None:
    """Refuses what cannot be exported, before any work is done."""
    if format not in SUFFIXES:
        raise ValueError(f"`format` must be one of {list(SUFFIXES)}, got {format!r}.")
    if output.suffix != SUFFIXES[format]:
        raise ValueError(f"`output` must end in {SUFFIXES[format]} for the format {format}, got {output.name!r}.")
    if output.exists():
        raise FileExistsError(f"{output} exists; nothing is overwritten.")
    if size is None and format == "aotinductor":
        raise ValueError("`size` must be given for the format aotinductor, whose pooling would keep that of the trace.")
    if size is not None and any(side < 8 or side % 8 for side in size):
        raise ValueError(f"`size` must be two positive multiples of 8, got {size[0]}x{size[1]}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    for name in ("condition_encoder", "denoiser", "transformer"):
        network = getattr(pipeline, name)
        if network.dtype != torch.float32:
            raise ValueError(f"`{name}` must be float32, which the check to {TOLERANCE:g} needs, got {network.dtype}.")
        if network.config.get("local_window") is not None:
            raise ValueError(f"`{name}` must not have local statistics; call its disable_local_statistics() first.")


def check_installed(format: Format) -> None:
    """
    Raises:
        ModuleNotFoundError: A library is missing.
        FileNotFoundError: A C++ compiler is missing.
    """
    libraries = ("onnx", "onnxruntime", "onnxscript") if format == "onnx" else ()
    if missing := [name for name in libraries if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(f'ONNX needs {", ".join(missing)}: pip install "diffusers-hidiff[export]".')
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "cl"]
    if format == "aotinductor" and not any(map(shutil.which, compilers)):
        raise FileNotFoundError(f"AOTInductor needs a C++ compiler, found none of {', '.join(compilers)}.")


@contextmanager
def appearing_checked(output: Path) -> Iterator[Path]:
    """A file to write, that takes the name `output` once nothing went wrong and vanishes otherwise."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.stem}.partial-{os.getpid()}{output.suffix}")
    try:
        yield partial
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)


def random_inputs(pipeline: HIDiffPipeline, batch_size: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """An image [B, 3, H, W] and noise [B, N, D] on the pipeline's device, always the same."""
    generator = torch.Generator().manual_seed(0)
    config = pipeline.transformer.config
    blurry = torch.rand(batch_size, 3, *size, generator=generator)
    noise = torch.randn(batch_size, config.num_prior_tokens, config.prior_dim, generator=generator)
    return blurry.to(pipeline.device), noise.to(pipeline.device)


def trace(graph: PipelineGraph, blurry: Tensor, noise: Tensor, dynamic: bool) -> ExportedProgram:
    """`graph` as a program of PyTorch's operators, for images like `blurry` or, if `dynamic`, of any height and width.

    Feature maps are whole: a loop over tiles would be unrolled for the size at hand.
    """
    graph.condition_encoder.disable_slicing()
    graph.transformer.disable_slicing()
    height, width = (8 * Dim(name, min=2) for name in ("height_by_8", "width_by_8"))
    shapes = {"blurry": {2: height, 3: width}, "noise": None} if dynamic else None
    return torch.export.export(graph, (blurry, noise), dynamic_shapes=shapes)


def write(program: ExportedProgram, path: Path, format: Format) -> None:
    if format == "onnx":
        names: dict[str, Any] = {"input_names": ["blurry", "noise"], "output_names": ["restored"]}
        table: dict[Any, Any] = {torch.ops.aten.adaptive_avg_pool2d.default: onnx_grid_means}
        logging.getLogger("onnxscript").setLevel(logging.ERROR)  # else a line for each Split that it does not fold
        exported = torch.onnx.export(program, dynamo=True, custom_translation_table=table, verbose=False, **names)
        assert exported is not None
        exported.save(path)
    elif format == "torch_export":
        torch.export.save(program, path)
    else:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def onnx_grid_means(features: Any, output_size: Sequence[int]) -> Any:
    """`adaptive_avg_pool2d` in operators of ONNX, which has none for it where height and width are open.

    The mean over a cell of the grid is one over its rows and one over its columns.

    Args:
        features: [B, C, h, w].
        output_size: Rows and columns of the grid.
    """
    from onnxscript import opset18 as op  # noqa: PLC0415

    def integers(*values: int) -> Any:
        return op.Constant(value_ints=values)

    for axis, cells in zip((2, 3), output_size, strict=True):
        length, means = op.Shape(features, start=axis, end=axis + 1), []
        for cell in range(cells):  # from ⌊cell · length / cells⌋ to ⌈(cell + 1) · length / cells⌉
            first = op.Div(op.Mul(length, integers(cell)), integers(cells))
            last = op.Div(op.Add(op.Mul(length, integers(cell + 1)), integers(cells - 1)), integers(cells))
            part = op.Slice(features, first, last, integers(axis))
            means.append(op.ReduceMean(part, integers(axis), keepdims=1))
        features = op.Concat(*means, axis=axis)
    return features


def load_graph(path: Path, format: Format, threads: int | None = None) -> Run:
    """An exported graph, ready to run on tensors.

    Args:
        path: The file.
        format: Its format.
        threads: Threads of ONNX Runtime; None leaves it the choice. The others take PyTorch's setting.
    """
    if format == "torch_export":
        return torch.export.load(path).module()
    if format == "aotinductor":
        return torch._inductor.aoti_load_package(str(path))
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(blurry: Tensor, noise: Tensor) -> Tensor:
        (restored,) = session.run(None, {"blurry": blurry.cpu().numpy(), "noise": noise.cpu().numpy()})
        return torch.from_numpy(restored)

    return run
