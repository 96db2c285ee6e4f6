from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from tiny import tiny_latent_encoder

from diffusers_hidiff import HIDiffScheduler
from diffusers_hidiff.evaluation.protocols import PROTOCOLS
from diffusers_hidiff.experiments.scheduler_study import (
    Trial,
    as_csv,
    as_markdown,
    conclusion,
    figure_of,
    run_trials,
    split_grid,
    summarise,
)
from diffusers_hidiff.utils.panels import encoded

RNG = np.random.default_rng(0)
PAIRS = [(name, *RNG.integers(0, 256, (2, 20, 28, 3), dtype=np.uint8)) for name in ("first", "second")]


@pytest.fixture
def schedulers(realblur_pipeline):
    config = realblur_pipeline.scheduler.config
    kinds = {"hidiff": HIDiffScheduler, "ddim": diffusers.DDIMScheduler, "deis": diffusers.DEISMultistepScheduler}
    return {name: kind.from_config(config) for name, kind in kinds.items()}


def trial(scheduler="hidiff", steps=4, image="a", seed=0, psnr=20.0, milliseconds=1.0):
    return Trial(image, scheduler, steps, seed, psnr, 0.5, 0.1, 0.2, milliseconds, 2 * milliseconds)


def test_what_cannot_run_is_named_with_its_reason(schedulers):
    good, refused = split_grid(schedulers, [4, 5, 99], torch.device("cpu"))
    assert good == [("hidiff", 4), ("hidiff", 5), ("ddim", 4)]
    reasons = {(name, steps): reason for name, steps, reason in refused}
    assert "must divide num_train_timesteps" in reasons["ddim", 5]
    assert "must lie between 1 and" in reasons["hidiff", 99]
    assert "DEISMultistepScheduler: its last step does not reach a clean prior" in reasons["deis", 4]


def test_the_models_own_scheduler_in_all_steps_is_the_reference(realblur_pipeline, schedulers):
    encoder = tiny_latent_encoder(wide_head=True, activation="leaky_relu")
    total = realblur_pipeline.scheduler.config.num_train_timesteps
    grid = [("hidiff", total), ("hidiff", 1)]
    score = PROTOCOLS["gopro"].score
    trials = [
        trial
        for pair in PAIRS
        for trial in run_trials(realblur_pipeline, schedulers, grid, [3, 4], pair, score, encoder)
    ]
    assert len(trials) == 8
    for one in trials:
        assert (one.to_full == 0) == (one.steps == total)
        assert one.to_oracle > 0
    blurry, sharp = PAIRS[1][1:]
    generator = torch.Generator().manual_seed(4)
    restored = np.asarray(realblur_pipeline(blurry, generator=generator).images[0])
    expected = PROTOCOLS["gopro"].score(restored, sharp)
    (found,) = [one for one in trials if (one.image, one.steps, one.seed) == ("second", total, 4)]
    assert (found.psnr, found.ssim) == pytest.approx((expected["psnr"], expected["ssim"]))


def test_without_the_latent_encoder_there_is_no_distance_to_the_oracle(realblur_pipeline, schedulers):
    trials = list(run_trials(realblur_pipeline, schedulers, [("ddim", 2)], [0], PAIRS[0], PROTOCOLS["gopro"].score))
    assert np.isnan(trials[0].to_oracle)
    assert np.isnan(summarise(trials)[0].spread)


def test_a_cell_averages_over_images_and_its_spread_is_over_the_seeds_of_an_image():
    trials = [
        *(trial(image="a", seed=0, psnr=20.0), trial(image="a", seed=1, psnr=22.0, milliseconds=3.0)),
        *(trial(image="b", seed=0, psnr=40.0), trial(image="b", seed=1, psnr=40.0), trial("ddim", 2)),
    ]
    first, second = summarise(trials)
    assert (first.scheduler, first.steps, second.scheduler, second.steps) == ("hidiff", 4, "ddim", 2)
    assert first.psnr == 30.5
    assert first.spread == pytest.approx(2**0.5 / 2)
    assert (first.chain_ms, first.whole_ms) == (1.0, 2.0)


def test_table_figure_and_raw_figures_are_written():
    trials = [trial(seed=seed, steps=steps) for seed in (0, 1) for steps in (1, 2, 4)]
    cells = summarise(trials)
    table = as_markdown(cells, [("pndm", 3, "it cannot.")], "Heading.")
    assert table.startswith("Heading.\n\n| scheduler | steps |")
    assert "| hidiff | 2 | 20.000 |" in table
    assert "* pndm, 3 steps: it cannot." in table
    lines = as_csv(trials).splitlines()
    assert lines[0].startswith("image,scheduler,steps,seed,psnr,ssim")
    assert len(lines) == 7
    assert encoded(figure_of(cells), ".png").startswith(b"\x89PNG")


@pytest.mark.parametrize("psnr", [3.0, float("inf"), float("nan")])
def test_what_fails_leaves_the_figure_so_that_the_others_are_told_apart(psnr):
    cells = summarise([trial(steps=steps) for steps in (1, 2, 4)] + [trial(scheduler="heun", steps=2)])
    cells = [replace(cell, psnr=psnr) if cell.scheduler == "heun" else cell for cell in cells]
    low, high = figure_of(cells).axes[0].get_ylim()
    assert high - low < 2.5
    assert low < 20 < high


def test_the_reasons_are_listed_once_for_all_steps():
    table = as_markdown(
        [], [("pndm", 3, "it cannot."), ("pndm", 5, "it cannot."), ("pndm", 9, "too many.")], "Heading."
    )
    assert table.endswith("* pndm, 3 5 steps: it cannot.\n* pndm, 9 steps: too many.\n")


def test_the_conclusion_says_how_few_steps_how_much_a_seed_and_which_schedulers():
    values = {("hidiff", 1): 28.0, ("hidiff", 2): 29.995, ("hidiff", 4): 30.0, ("euler", 4): 30.004, ("lcm", 4): 25.5}
    trials = [
        trial(name, steps, seed=seed, psnr=psnr + 0.001 * seed)
        for (name, steps), psnr in values.items()
        for seed in (0, 1)
    ]
    few, seeds, safe = conclusion(summarise(trials), "hidiff")
    assert (
        few == "From 2 of 4 steps on, hidiff stays within 0.01 dB of all of them; the worst choice, 1, loses 2.00 dB."
    )
    assert seeds.startswith("Another seed moves the PSNR of an image by 0.0007 dB")
    assert safe == "In 4 steps these are within 0.01 dB of hidiff: hidiff, euler; these are not: lcm (-4.50 dB)."
    assert conclusion(summarise(trials), "ddim") == []
    assert len(conclusion(summarise(trials[::2]), "hidiff")) == 2  # one seed tells nothing of seeds
