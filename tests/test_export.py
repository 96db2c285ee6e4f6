"""The exported files compute what the pipeline does, at other sizes than those they were traced and checked at, too."""

import copy
import importlib.util

import export as script
import pytest
import torch
from conftest import realblur_scheduler
from tiny import (
    tiny_condition_encoder,
    tiny_images,
    tiny_mixer_denoiser,
    tiny_mlp_denoiser,
    tiny_prior,
    tiny_transformer,
)
from torch import nn

from diffusers_hidiff import HIDiffPipeline, HIDiffScheduler, export
from diffusers_hidiff.export import (
    ExportError,
    PipelineGraph,
    appearing_checked,
    check_installed,
    export_pipeline,
    load_graph,
    write,
)

# The loops over blocks are unrolled: what takes time in a trace is their number, not their width.
FEW_BLOCKS = {"num_blocks": [1, 0, 0, 1], "num_refinement_blocks": 0}


def gopro() -> HIDiffPipeline:
    parts = tiny_condition_encoder(), tiny_mixer_denoiser(), HIDiffScheduler(), tiny_transformer(**FEW_BLOCKS)
    return quiet(HIDiffPipeline(*parts))


def realblur() -> HIDiffPipeline:
    encoder = tiny_condition_encoder(activation="leaky_relu", wide_head=True)
    return quiet(HIDiffPipeline(encoder, tiny_mlp_denoiser(), realblur_scheduler(), tiny_transformer(**FEW_BLOCKS)))


def quiet(pipeline: HIDiffPipeline) -> HIDiffPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_against_pipeline(run, pipeline, size, batch_size=1, **options):
    blurry, noise = tiny_images(batch_size, *size), tiny_prior(batch_size)
    expected = pipeline(blurry, latents=noise, output_type="pt", **options).images
    torch.testing.assert_close(run(blurry, noise), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("family", [gopro, realblur])
@pytest.mark.parametrize("steps", [None, 1, 3])
def test_the_graph_computes_what_the_pipeline_does(family, steps):
    pipeline = family()
    graph = PipelineGraph(pipeline, steps)
    check_against_pipeline(graph, pipeline, (32, 40), batch_size=2, num_inference_steps=steps)


def test_onnx_of_open_size_takes_sizes_that_it_was_neither_traced_nor_checked_at(tmp_path, capsys):
    pipeline = realblur()
    pipeline.save_pretrained(tmp_path / "model")
    output = tmp_path / "new" / "graph.onnx"
    assert script.main([str(tmp_path / "model"), str(output), "--num_inference_steps", "2"]) == 0
    assert list(output.parent.iterdir()) == [output]
    run = load_graph(output, "onnx", threads=1)
    for size in ((16, 16), (24, 88), (120, 56)):
        check_against_pipeline(run, pipeline, size, num_inference_steps=2)

    lines = capsys.readouterr().out.split("Run it with\n")[1]
    blurry, noise = tiny_images(1, 24, 32), tiny_prior()
    names = {"blurry": blurry.numpy(), "noise": noise.numpy()}
    exec("\n".join(line.strip() for line in lines.splitlines()), names)
    assert torch.equal(torch.from_numpy(names["restored"]), run(blurry, noise))


def test_onnx_of_fixed_size_takes_a_batch(tmp_path, caplog):
    pipeline = gopro()
    pipeline.transformer.enable_slicing(megabytes=1e-6)  # tiles would be unrolled
    output = tmp_path / "graph.onnx"
    assert export_pipeline(pipeline, output, "onnx", (24, 40), batch_size=2, num_inference_steps=1) < 1e-4
    check_against_pipeline(load_graph(output, "onnx"), pipeline, (24, 40), batch_size=2, num_inference_steps=1)
    assert pipeline.transformer.tile_megabytes == 1e-6
    assert "constant folding" not in caplog.text


def test_a_torch_export_program_gives_the_pipelines_pictures(tmp_path, capsys):
    pipeline = gopro()
    pipeline.save_pretrained(tmp_path / "model")
    output = tmp_path / "graph.pt2"
    arguments = [str(tmp_path / "model"), str(output), "--format", "torch_export", "--height", "24", "--width", "40"]
    assert script.main(arguments) == 0
    check_against_pipeline(load_graph(output, "torch_export"), pipeline, (24, 40))
    assert f"torch.export.load({str(output)!r})" in capsys.readouterr().out


class Small(nn.Module):
    def forward(self, blurry: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return (blurry + noise.mean(dim=(1, 2))[:, None, None, None]).clamp(0, 1)


def test_an_aotinductor_package_is_compiled_and_runs(tmp_path):
    """A small graph: compiling the pipeline takes a C++ compiler minutes."""
    inputs = tiny_images(), tiny_prior()
    write(torch.export.export(Small(), inputs), tmp_path / "graph.pt2", "aotinductor")
    torch.testing.assert_close(load_graph(tmp_path / "graph.pt2", "aotinductor")(*inputs), Small()(*inputs))


def test_a_graph_that_differs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(ExportError, match=r"differs from the pipeline by .*; nothing was written"):
        export_pipeline(gopro(), tmp_path / "graph.pt2", "torch_export", (16, 24), num_inference_steps=1)
    assert not list(tmp_path.iterdir())


def test_a_file_that_could_not_be_finished_leaves_nothing_behind(tmp_path):
    def fail():
        with appearing_checked(tmp_path / "graph.onnx") as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "tensorrt"}, "`format` must be one of .*, got 'tensorrt'"),
        ({"format": "torch_export"}, "`output` must end in .pt2 for the format torch_export, got 'graph.onnx'"),
        ({"size": (24, 20)}, "`size` must be two positive multiples of 8, got 24x20"),
        ({"size": (0, 8)}, "`size` must be two positive multiples of 8, got 0x8"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"num_inference_steps": 9}, "`num_inference_steps` must lie between 1 and .*=8, got 9"),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        export_pipeline(gopro(), tmp_path / "graph.onnx", **changes)


def test_an_aotinductor_package_of_open_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`size` must be given for the format aotinductor"):
        export_pipeline(gopro(), tmp_path / "graph.pt2", "aotinductor")


def test_a_pipeline_that_cannot_be_exported_is_refused(tmp_path):
    output, pipeline = tmp_path / "graph.onnx", gopro()
    from diffusers import DDIMScheduler  # noqa: PLC0415

    other = copy.copy(pipeline)
    other.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="`scheduler` must be a HIDiffScheduler, got DDIMScheduler"):
        export_pipeline(other, output)
    pipeline.transformer.enable_local_statistics(window=16)
    with pytest.raises(ValueError, match=r"`transformer` must not have local statistics; call .*disable_local"):
        export_pipeline(pipeline, output)
    with pytest.raises(ValueError, match="`condition_encoder` must be float32"):
        export_pipeline(gopro().to(torch.bfloat16), output)
    output.touch()
    with pytest.raises(FileExistsError, match="exists; nothing is overwritten"):
        export_pipeline(gopro(), output)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"ONNX needs onnx, onnxruntime, onnxscript: pip install .*\[export\]"
    ):
        check_installed("onnx")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(FileNotFoundError, match="AOTInductor needs a C\\+\\+ compiler, found none of no-such-compiler"):
        check_installed("aotinductor")


def test_the_command_says_in_a_sentence_what_is_wrong(tmp_path, capsys):
    assert script.main([str(tmp_path / "missing"), str(tmp_path / "graph.onnx")]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(["model", "graph.onnx", "--height", "64"])
    assert "--height and --width must be given together" in capsys.readouterr().err
