import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
import torch
from tiny import tiny_condition_encoder, tiny_mixer_denoiser, tiny_transformer

from diffusers_hidiff import HIDiffPipeline, HIDiffScheduler
from diffusers_hidiff.cli import jobs, pipeline, restorer
from diffusers_hidiff.cli.main import main

RNG = np.random.default_rng(0)
SRGB = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
MAKE, ORIENTATION = 271, 274


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny pipeline that changes an image a little, as a trained one does."""
    transformer = tiny_transformer()
    with torch.no_grad():
        transformer.conv_out.weight.mul_(0.05)
    pipeline = HIDiffPipeline(tiny_condition_encoder(), tiny_mixer_denoiser(), HIDiffScheduler(), transformer)
    folder = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder, so that the paths in messages are short."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hidiff(model, capsys):
    """Runs `hidiff deblur` on the tiny pipeline; returns the exit status, what it prints, and what it complains of."""

    def run(*arguments, output="out"):
        capsys.readouterr()
        status = main(["deblur", *arguments, "--output", output, "--model", model, "--device", "cpu"])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def noise(channels=3, dtype=np.uint8, height=16, width=24):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def photo(file, *size):
    """Writes a random RGB image of `size` (height, width)."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(noise(3, np.uint8, *size)).save(file)
    return str(file)


def below(folder):
    return sorted(str(file.relative_to(folder)) for file in Path(folder).rglob("*") if file.is_file())


def pixels_of(file):
    with PIL.Image.open(file) as image:
        return np.asarray(image)


# Which files


def test_a_folder_is_mirrored(folder, hidiff):
    for name in ("a.png", "sub/b.JPG", "sub/deeper/c.webp", ".hidden/d.png", "._e.png"):
        photo(f"photos/{name}")
    Path("photos/notes.txt").write_text("not an image")
    status, printed, _ = hidiff("photos")
    assert status == 0
    assert below("out") == ["a.png", "sub/b.JPG", "sub/deeper/c.webp"]
    assert printed.startswith("3 restored, 0 skipped, 0 failed; in out (")
    assert "s per image" in printed


def test_a_pattern_is_mirrored_below_its_fixed_part(folder, hidiff):
    for name in ("a.png", "x/b.png", "x/c.jpg"):
        photo(f"photos/{name}")
    assert hidiff("photos/**/*.png")[0] == 0
    assert below("out") == ["a.png", "x/b.png"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(folder, hidiff):
    photo("a[1].png")
    assert hidiff("a[1].png")[0] == 0
    assert below("out") == ["a[1].png"]


def test_what_stands_in_the_output_folder_is_no_input(folder, hidiff):
    photo("photos/a.png")
    hidiff("photos", output="photos/sharp")
    _, printed, _ = hidiff("photos", output="photos/sharp")
    assert printed.startswith("0 restored, 1 skipped (already there), 0 failed")
    assert below("photos") == ["a.png", "sharp/a.png"]


def test_the_output_folder_may_lie_around_the_inputs(folder, hidiff):
    photo("photos/raw/a.png")
    assert hidiff("photos/raw", output="photos")[0] == 0
    assert below("photos") == ["a.png", "raw/a.png"]


def test_a_file_that_is_named_twice_is_restored_once(folder, hidiff):
    photo("photos/a.png")
    assert hidiff("photos", "photos/a.png", "photos/*.png")[1].startswith("1 restored")


@pytest.mark.parametrize(
    ("name", "file_format", "expected"),
    [
        ("a.JPG", "same", "a.JPG"),
        ("a.tif", "same", "a.tif"),
        ("a.gif", "same", "a.png"),
        ("a.bmp", "same", "a.png"),
        ("a.jpeg", "jpg", "a.jpeg"),
        ("a.b.png", "jpg", "a.b.jpg"),
        ("a.jpg", "tiff", "a.tiff"),
    ],
)
def test_a_name_changes_only_where_the_format_does(name, file_format, expected):
    assert jobs.output_name(Path("x", name), file_format) == Path("x", expected)


def test_two_images_for_one_output_are_refused(folder, hidiff):
    photo("x/a.jpg"), photo("y/a.png")
    status, _, complaint = hidiff("x", "y", "--format", "png")
    assert status == 2
    assert complaint == "hidiff: x/a.jpg and y/a.png would both be written to out/a.png; restore them separately.\n"
    assert not Path("out").exists()


def test_an_original_is_never_overwritten(folder, hidiff):
    photo("photos/a.png")
    before = Path("photos/a.png").read_bytes()
    for output in ("photos", "link"):
        if output == "link":
            Path("link").symlink_to("photos")
        status, _, complaint = hidiff("photos/a.png", "--overwrite", output=output)
        assert status == 2
        assert (
            complaint
            == f"hidiff: {output}/a.png is itself an input, and originals are never overwritten; choose another --output.\n"
        )
    assert Path("photos/a.png").read_bytes() == before


def test_nothing_to_restore_is_an_error(folder, hidiff):
    Path("empty").mkdir()
    status, _, complaint = hidiff("empty", "missing.png", "*.jpg")
    assert status == 2
    assert complaint.startswith("hidiff: There is nothing to restore: empty: no image in it (.png")
    assert complaint.endswith("missing.png: no such file; *.jpg: no such file.\n")


# What is kept


@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_a_picture_does_not_depend_on_its_company(folder, hidiff, batch_size):
    for name, size in (("a", (16, 24)), ("b", (24, 16)), ("c", (16, 24)), ("d", (16, 24)), ("e", (13, 21))):
        photo(f"photos/{name}.png", *size)
    hidiff("photos/c.png", output="alone")
    _, printed, _ = hidiff("photos", "--batch_size", batch_size, output="together")
    assert printed.startswith("5 restored")
    alone, together = pixels_of("alone/c.png"), pixels_of("together/c.png")
    assert np.abs(alone.astype(int) - together).max() <= 1  # rounding may differ with the batch


def test_the_seed_matters(folder, hidiff):
    photo("a.png")
    hidiff("a.png", output="first")
    hidiff("a.png", "--seed", "1", output="second")
    assert (pixels_of("first/a.png") != pixels_of("second/a.png")).any()


@pytest.mark.parametrize(
    "options",
    [
        ("--num_priors", "3"),
        ("--num_priors", "3", "--average", "image"),
        ("--self_ensemble",),
        ("--local_statistics", "16"),
        ("--tile", "32", "--tile_overlap", "8"),
    ],
)
def test_ways_to_a_better_picture_change_it(folder, hidiff, options):
    photo("a.png", 40, 48)
    hidiff("a.png", output="plain")
    status, *_ = hidiff("a.png", *options, output="better")
    assert status == 0
    assert (pixels_of("plain/a.png") != pixels_of("better/a.png")).any()


def test_a_limit_of_memory_changes_nothing_and_a_slow_image_tells_how_far_it_is(folder, hidiff, monkeypatch):
    monkeypatch.setattr(restorer, "PROGRESS_SECONDS", 0)
    photo("a.png", 40, 48)
    hidiff("a.png", output="plain")
    status, _, err = hidiff("a.png", "--max_memory", "20GB", output="limited")
    assert status == 0
    assert (pixels_of("plain/a.png") == pixels_of("limited/a.png")).all()
    assert "% of this image" in err


def test_local_statistics_of_the_model_can_be_switched_off(folder, hidiff, model):
    photo("a.png", 40, 48)
    hidiff("a.png", output="plain")
    pipeline = HIDiffPipeline.from_pretrained(model)
    pipeline.transformer.enable_local_statistics(16)
    pipeline.save_pretrained("local")
    for output, *options in (("windows",), ("off", "--local_statistics", "0")):
        arguments = ["a.png", "--model", "local", "--device", "cpu", "--output", output, *options]
        assert main(["deblur", *arguments]) == 0
    assert (pixels_of("windows/a.png") != pixels_of("plain/a.png")).any()
    assert (pixels_of("off/a.png") == pixels_of("plain/a.png")).all()


def transparent_palette():
    image = PIL.Image.fromarray(noise()).quantize(16)
    image.info["transparency"] = 3
    return image


@pytest.mark.parametrize(
    ("image", "name", "output", "mode"),
    [
        (PIL.Image.fromarray(noise(4)), "a.png", "a.png", "RGBA"),
        (PIL.Image.fromarray(noise(4)), "a.webp", "a.webp", "RGBA"),
        (PIL.Image.fromarray(noise(4)), "a.tiff", "a.tiff", "RGBA"),
        (PIL.Image.fromarray(noise(2)), "a.png", "a.png", "LA"),
        (PIL.Image.fromarray(noise(1)), "a.png", "a.png", "L"),
        (PIL.Image.fromarray(noise(1)), "a.jpg", "a.jpg", "L"),
        (PIL.Image.fromarray(noise(1)).convert("1"), "a.png", "a.png", "L"),
        (PIL.Image.fromarray(noise()).quantize(16), "a.png", "a.png", "RGB"),
        (PIL.Image.fromarray(noise()).quantize(16), "a.gif", "a.png", "RGB"),
        (transparent_palette(), "a.png", "a.png", "RGBA"),
        (transparent_palette(), "a.gif", "a.png", "RGBA"),
        (PIL.Image.fromarray(noise()).convert("CMYK"), "a.jpg", "a.jpg", "RGB"),
        (PIL.Image.fromarray(noise()), "a.bmp", "a.png", "RGB"),
        (PIL.Image.fromarray(noise(1, np.uint16)), "a.png", "a.png", "I;16"),
        (PIL.Image.fromarray(noise(1, np.uint16)), "a.tiff", "a.tiff", "I;16"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.mode,
)
def test_an_image_keeps_its_kind(folder, hidiff, image, name, output, mode):
    image.save(name)
    assert hidiff(name)[0] == 0
    with PIL.Image.open(f"out/{output}") as restored:
        assert (restored.mode, restored.size) == (mode, image.size)
    if mode in ("RGBA", "LA") and image.mode in ("RGBA", "LA"):
        assert np.array_equal(pixels_of(f"out/{output}")[..., -1], np.asarray(image)[..., -1])  # alpha


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
@pytest.mark.parametrize("channels", [3, 4])
def test_16_bits_of_colour_stay_16_bits(folder, hidiff, name, channels):
    blurry = noise(channels, np.uint16)
    cv2.imwrite(name, blurry)
    assert hidiff(name)[0] == 0
    restored = cv2.imread(f"out/{name}", cv2.IMREAD_UNCHANGED)
    assert (restored.dtype, restored.shape) == (np.uint16, blurry.shape)
    assert len(np.unique(restored)) > 256  # not 8 bits in a wider coat
    assert np.abs(restored.astype(int) - blurry).mean() < 0.1 * 65535
    if channels == 4:
        assert np.array_equal(restored[..., 3], blurry[..., 3])


@pytest.mark.parametrize("file_format", ["jpg", "webp"])
def test_16_bits_become_8_where_the_format_has_no_more(folder, hidiff, file_format):
    cv2.imwrite("a.png", noise(3, np.uint16))
    assert hidiff("a.png", "--format", file_format)[0] == 0
    assert pixels_of(f"out/a.{file_format}").dtype == np.uint8


def test_transparent_parts_become_white_in_jpeg(folder, hidiff):
    pixels = noise(4)
    pixels[..., 3] = 0
    PIL.Image.fromarray(pixels).save("a.png")
    assert hidiff("a.png", "--format", "jpg")[0] == 0
    assert (pixels_of("out/a.jpg") == 255).all()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
def test_exif_and_profile_are_kept_and_the_image_is_turned_upright(folder, hidiff, name):
    exif = PIL.Image.Exif()
    exif[MAKE], exif[ORIENTATION] = "Maker", 6  # to be turned by 90 degrees
    PIL.Image.fromarray(noise(3, np.uint8, 16, 40)).save(name, exif=exif, icc_profile=SRGB)
    assert hidiff(name)[0] == 0
    with PIL.Image.open(f"out/{name}") as restored:
        assert restored.size == (16, 40)
        assert restored.getexif()[MAKE] == "Maker"
        assert restored.getexif().get(ORIENTATION, 1) == 1
        assert restored.info["icc_profile"] == SRGB


# What goes wrong


def test_bad_files_are_told_and_the_rest_goes_on(folder, hidiff, monkeypatch):
    for name in ("good.png", "torn.png"):
        photo(f"photos/{name}")
    Path("photos/torn.png").write_bytes(Path("photos/torn.png").read_bytes()[:200])
    Path("notes.txt").write_text("not an image")
    photo("photos/bomb.png", 64, 64)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    status, printed, complaint = hidiff("photos", "notes.txt", "missing.png", "--batch_size", "2")
    assert status == 1
    assert printed.startswith("1 restored, 0 skipped, 4 failed; in out")
    assert below("out") == ["good.png"]
    lines = complaint.replace("\r", "\n").splitlines()
    assert "missing.png: no such file" in lines
    assert "notes.txt: not an image, or of an unknown kind" in lines
    assert any(line.startswith("photos/bomb.png: too large: Image size (4096 pixels) exceeds limit") for line in lines)
    assert any(line.startswith("photos/torn.png: damaged: ") for line in lines)
    assert "Traceback" not in complaint


def test_an_image_that_cannot_be_restored_does_not_spoil_its_batch(folder, hidiff, monkeypatch):
    photo("photos/a.png"), photo("photos/b.png", 24, 24), photo("photos/c.png")
    original = restorer.run_pipeline

    def short_of_memory(pipeline, images, *options):
        if any(getattr(image, "size", None) == (24, 24) for image in images):
            raise RuntimeError("out of memory\nand a page of advice")
        return original(pipeline, images, *options)

    monkeypatch.setattr(restorer, "run_pipeline", short_of_memory)
    status, printed, complaint = hidiff("photos", "--batch_size", "3")
    assert (status, below("out")) == (1, ["a.png", "c.png"])
    assert "photos/b.png: out of memory\n" in complaint
    assert printed.startswith("2 restored, 0 skipped, 1 failed")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--steps", "99"), "must lie between 1 and the scheduler's num_train_timesteps=8, got 99"),
        (("--steps", "3", "--scheduler", "ddim"), "must divide num_train_timesteps=8 with DDIMScheduler"),
        (("--scheduler", "nonsense"), "--scheduler must be one of ddim, ddpm, dpmsolver, "),
        (("--scheduler", "deis"), "--scheduler must be one of "),
        (
            ("--local_statistics", "20"),
            "--local_statistics cannot be so: `window` must be a positive multiple of 8, got 20.",
        ),
        (
            ("--max_memory", "lots"),
            "--max_memory cannot be so: `max_memory` must be an amount of memory such as '4GB' or '800MB', got 'lots'.",
        ),
        (("--max_memory", "9MB"), "The model does not run with these options: `max_memory` must be at least"),
        (
            ("--tile", "20"),
            "The model does not run with these options: `tile` must be a positive multiple of 8, got 20.",
        ),
        (("--device", "cuda"), "--device cuda cannot be used: PyTorch finds no such device on this machine."),
        (("--model", "no/such"), "The model 'no/such' cannot be loaded (it is no folder here"),
        (("--model", "photos"), "The model 'photos' cannot be loaded: "),
        (("--output", "a.png/out"), "The folder 'a.png/out' cannot be made: Not a directory"),
        (("--output", "/dev/fd"), "The folder '/dev/fd' cannot be written to: "),
    ],
)
def test_options_that_cannot_work_are_refused_before_any_image_is_touched(
    folder, model, capsys, monkeypatch, options, sentence
):
    photo("photos/a.png"), photo("a.png")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(restorer, "read_image", None)
    status = main(["deblur", "photos", "--output", "out", "--model", model, "--device", "cpu", *options])
    complaint = capsys.readouterr().err
    assert status == 2
    assert sentence in complaint
    assert complaint.startswith("hidiff: ")
    assert complaint.count("\n") == 1
    assert not Path("out").exists()


def test_only_schedulers_that_fit_the_model_are_offered():
    epsilon, sample = (
        pipeline.known_schedulers(HIDiffScheduler(prediction_type=kind)) for kind in ("epsilon", "sample")
    )
    assert {"hidiff", "ddpm", "ddim", "euler", "heun", "dpmsolver", "unipc"} <= set(sample) < set(epsilon)
    assert not {"deis", "edmeuler", "sasolver", "tcd"} & set(epsilon)
    assert "eulerancestral" in set(epsilon) - set(sample)


@pytest.mark.parametrize("name", ["euler", "DPMSolverMultistepScheduler", "DDIM"])
def test_another_scheduler_restores_almost_the_same(folder, hidiff, name):
    photo("a.png")
    hidiff("a.png", output="own")
    assert hidiff("a.png", "--scheduler", name, output="other")[0] == 0
    difference = np.abs(pixels_of("own/a.png").astype(int) - pixels_of("other/a.png"))
    assert difference.mean() < 8


def test_half_precision_restores_almost_the_same(folder, hidiff):
    photo("a.png")
    hidiff("a.png", output="single")
    assert hidiff("a.png", "--dtype", "bfloat16", output="half")[0] == 0
    assert np.abs(pixels_of("single/a.png").astype(int) - pixels_of("half/a.png")).mean() < 8


def test_a_model_that_returns_no_numbers_is_refused(folder, hidiff, monkeypatch):
    photo("a.png")
    monkeypatch.setattr(pipeline, "run_pipeline", lambda *_: [np.full((8, 8, 3), np.nan)])
    status, _, complaint = hidiff("a.png")
    assert (status, complaint) == (2, "hidiff: With --dtype float32 the model returns no numbers (NaN).\n")


def test_memory_is_not_kept_where_it_is_limited(folder, hidiff, monkeypatch):
    photo("a.png")
    monkeypatch.setattr(pipeline, "keep_freed_memory", lambda: pytest.fail("kept in pieces, it goes beyond the limit"))
    assert hidiff("a.png", "--max_memory", "20GB")[0] == 0


def test_memory_is_kept_before_the_model_is_loaded(folder, model, monkeypatch):
    photo("a.png")
    calls = []
    load = pipeline.load_pipeline
    monkeypatch.setattr(pipeline, "keep_freed_memory", lambda: calls.append("keep"))
    monkeypatch.setattr(pipeline, "load_pipeline", lambda *a, **k: calls.append("load") or load(*a, **k))
    main(["deblur", "a.png", "--output", "out", "--model", model, "--device", "cpu"])
    assert calls == ["keep", "load"]


# What is there already


def test_what_is_there_is_left_alone_unless_asked_for(folder, hidiff):
    photo("photos/a.png"), photo("photos/b.png")
    Path("out").mkdir()
    Path("out/a.png").write_text("mine")
    status, printed, _ = hidiff("photos")
    assert status == 0
    assert printed.startswith("1 restored, 1 skipped (already there), 0 failed")
    assert Path("out/a.png").read_text() == "mine"
    assert hidiff("photos", "--overwrite")[1].startswith("2 restored, 0 skipped, 0 failed")
    assert pixels_of("out/a.png").shape == (16, 24, 3)


def test_a_comparison_that_is_missing_is_added(folder, hidiff):
    photo("photos/a.png")
    Path("out").mkdir()
    Path("out/a.png").write_text("mine")
    assert hidiff("photos", "--compare")[1].startswith("1 restored")
    assert below("out") == ["a.compare.png", "a.png"]
    assert Path("out/a.png").read_text() == "mine"


def test_a_comparison_shows_both_images_under_their_names(folder, hidiff):
    photo("a.png", 48, 120)
    assert hidiff("a.png", "--compare")[0] == 0
    picture = pixels_of("out/a.compare.png")
    top, gap = 32, 8
    assert picture.shape == (top + 48 + gap, 2 * 120 + 3 * gap, 3)
    blurry, restored = picture[top : top + 48, gap : gap + 120], picture[top : top + 48, 2 * gap + 120 : -gap]
    assert np.array_equal(blurry, pixels_of("a.png"))
    assert np.array_equal(restored, pixels_of("out/a.png"))
    for half in np.split(picture[:top], 2, axis=1):
        assert (half.max(axis=2) < 64).sum() > 50  # dark pixels: a word
        assert (half == 255).mean() > 0.8


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_alpha_and_16_bits_can_be_compared(folder, hidiff, name):
    (transparent_palette() if name == "a.gif" else PIL.Image.fromarray(noise(1, np.uint16))).save(name)
    assert hidiff(name, "--compare")[0] == 0
    assert pixels_of("out/a.compare.png").shape[2] == 3


# At the same time


@pytest.fixture
def watched(monkeypatch):
    """Names of the files that were read, that went through the network and that were written, so far; each with a hook."""

    class Watched:
        read, restored, written = [], [], []
        at_work = staticmethod(lambda number: None)  # called in the network with the number of its image

    read, run, write = restorer.read_image, restorer.run_pipeline, restorer.write_image

    def read_image(file):
        Watched.read.append(file.name)
        return read(file)

    def run_pipeline(*arguments):
        Watched.at_work(len(Watched.restored))
        Watched.restored.append(None)
        return run(*arguments)

    def write_image(file, *arguments):
        write(file, *arguments)
        Watched.written.append(file.name)

    for function in (read_image, run_pipeline, write_image):
        monkeypatch.setattr(restorer, function.__name__, function)
    return Watched


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_next_image_is_read_and_the_last_one_written_while_the_network_runs(folder, hidiff, watched):
    for name in "abcd":
        photo(f"photos/{name}.png")
    watched.at_work = lambda number: wait_until(
        lambda: len(watched.read) >= min(number + 2, 4) and len(watched.written) >= number
    )
    assert hidiff("photos")[0] == 0
    assert below("out") == ["a.png", "b.png", "c.png", "d.png"]


@pytest.mark.parametrize("slow", ["network", "disk"])
def test_few_images_are_in_memory_at_a_time(folder, hidiff, watched, monkeypatch, slow):
    for number in range(16):
        photo(f"photos/{number:02}.png")
    ahead, behind = [], []

    def at_work(number):
        time.sleep(0.02 if slow == "network" else 0)
        ahead.append(len(watched.read) - number)
        behind.append(number - len(watched.written))

    write = restorer.write_image
    monkeypatch.setattr(restorer, "write_image", lambda *a: time.sleep(0.02 if slow == "disk" else 0) or write(*a))
    watched.at_work = at_work
    assert hidiff("photos")[0] == 0
    assert len(watched.written) == 16
    assert max(ahead) <= restorer.BATCHES_AHEAD + 1
    assert max(behind) <= restorer.IMAGES_BEHIND + 1


def test_large_images_pass_through_alone(folder, hidiff, watched, monkeypatch):
    monkeypatch.setattr(restorer, "MANY_PIXELS", 1000)
    for name in "abcd":
        photo(f"photos/{name}.png", 40, 48)
    seen = []
    watched.at_work = lambda number: seen.append((len(watched.read), len(watched.written)))
    assert hidiff("photos")[0] == 0
    assert seen == [(1, 0), (2, 1), (3, 2), (4, 3)]


def test_two_processes_share_the_files(folder, hidiff, model):
    for number in range(6):
        photo(f"photos/{number}.png")
    Path("photos/4.png").write_bytes(b"no image")
    photo("two/5.png")
    there = Path("two/5.png").read_bytes()
    hidiff("photos", output="one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["-m", "diffusers_hidiff", "deblur", "photos", "--output", "two", "--model", model, "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*launch, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("4 restored, 1 skipped (already there), 1 failed; in two (")
    assert done.stdout.count("restored") == 1
    assert done.stderr.count("photos/4.png: not an image") == 1
    assert below("two") == ["0.png", "1.png", "2.png", "3.png", "5.png"]
    assert Path("two/5.png").read_bytes() == there
    for number in range(4):
        assert np.array_equal(pixels_of(f"two/{number}.png"), pixels_of(f"one/{number}.png"))


# Stopping


def test_a_full_disk_stops_with_a_sentence_and_leaves_whole_files(folder, hidiff, monkeypatch):
    for name in "abc":
        photo(f"photos/{name}.png")
    write_bytes = Path.write_bytes
    written = []

    def disk_of_one_image(file, data):
        if written:
            write_bytes(file, data[:50])
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(file)
        return write_bytes(file, data)

    monkeypatch.setattr(Path, "write_bytes", disk_of_one_image)
    status, _, complaint = hidiff("photos")
    assert status == 1
    assert re.search(r"Stopped, no room left for out/[abc].png: 1 of 3 images were restored.\n$", complaint)
    assert len(os.listdir("out")) == 1


def test_a_file_that_cannot_be_written_is_told_and_the_rest_goes_on(folder, hidiff):
    photo("photos/sub/a.png"), photo("photos/b.png")
    Path("out").mkdir()
    Path("out/sub").write_text("in the way")
    status, _, complaint = hidiff("photos")
    assert (status, below("out")) == (1, ["b.png", "sub"])
    assert "photos/sub/a.png: cannot be written: file exists" in complaint


def test_ctrl_c_leaves_whole_files_and_says_how_many(folder, model):
    for i in range(300):
        photo(f"photos/{i:03}.png", 64, 64)
    # Where the tests themselves run in the background, Ctrl-C would be ignored.
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program += "; from diffusers_hidiff.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [
        sys.executable,
        "-c",
        program,
        "deblur",
        "photos",
        "--output",
        "out",
        "--model",
        model,
        "--device",
        "cpu",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    while process.poll() is None and not (Path("out").exists() and len(os.listdir("out")) > 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=300)
    assert process.returncode == 130
    done = os.listdir("out")
    assert complaint.endswith(f"Interrupted: {len(done)} of 300 images were restored.\n")
    assert 2 < len(done) < 300
    for name in done:
        assert pixels_of(f"out/{name}").shape == (64, 64, 3)
