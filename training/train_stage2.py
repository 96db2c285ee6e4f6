"""Stage 2: condition encoder, denoiser and transformer, taught by stage 1's latent encoder (HI-Diff, section 3.4).

    accelerate launch training/train_stage2.py --config training/configs/small_stage2.yaml --stage1_dir runs/stage1 \
        --train_data_dir PHOTOS --validation_dir PAIRS --output_dir runs/stage2 [--resume_from_checkpoint latest]

The result, in OUTPUT_DIR/pipeline, is a folder for `HIDiffPipeline.from_pretrained`.
"""

from pathlib import Path

from accelerate.utils import set_seed
from torch import Tensor

from config import Stage2Config, parse_config
from diffusers_hidiff import (
    HIDiffLatentEncoder,
    HIDiffMixerDenoiser,
    HIDiffMLPDenoiser,
    HIDiffPipeline,
    HIDiffScheduler,
    HIDiffTransformer,
)
from diffusers_hidiff.losses import stage2_loss
from loop import Run, noise_of_samples

DENOISERS = {"mixer": HIDiffMixerDenoiser, "mlp": HIDiffMLPDenoiser}


def networks(config: Stage2Config) -> tuple[HIDiffPipeline, HIDiffLatentEncoder]:
    """The pipeline that learns and its frozen teacher: new on top of stage 1, or a whole pipeline that learns on."""
    if config.pretrained_model_name_or_path is not None:
        pipeline = HIDiffPipeline.from_pretrained(config.pretrained_model_name_or_path)
        teacher = HIDiffLatentEncoder.from_pretrained(config.pretrained_model_name_or_path, subfolder="latent_encoder")
        return pipeline, teacher.requires_grad_(False)
    stage1_dir = Path(config.stage1_dir or "")
    teacher = HIDiffLatentEncoder.from_pretrained(stage1_dir / "latent_encoder").requires_grad_(False)
    transformer = HIDiffTransformer.from_pretrained(stage1_dir / "transformer")
    condition_encoder = HIDiffLatentEncoder.from_config({**teacher.config, "in_channels": 3})
    denoiser = DENOISERS[config.denoiser_type](prior_dim=transformer.config.prior_dim, **config.denoiser)
    return HIDiffPipeline(condition_encoder, denoiser, HIDiffScheduler(**config.scheduler), transformer), teacher


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(Stage2Config, arguments)
    set_seed(config.seed)
    pipeline, latent_encoder = networks(config)
    condition_encoder, denoiser = pipeline.condition_encoder.train(), pipeline.denoiser.train()
    transformer, scheduler = pipeline.transformer.train(), pipeline.scheduler
    pipeline.set_progress_bar_config(disable=True)

    def restore(blurry: Tensor, sharp: Tensor) -> Tensor:
        noise = noise_of_samples(blurry.new_zeros(len(blurry)), prior_shape, config.seed)
        return pipeline(blurry, latents=noise, output_type="pt", return_dict=False)[0].to(blurry.device)

    prior_shape = (transformer.config.num_prior_tokens, transformer.config.prior_dim)
    run = Run(
        config,
        modules={"condition_encoder": condition_encoder, "denoiser": denoiser, "transformer": transformer},
        restore=restore,
    )
    latent_encoder.to(run.accelerator.device)
    for step, batch in enumerate(run.batches(), start=run.first_step + 1):
        noise = noise_of_samples(batch["index"], prior_shape, config.seed)
        loss = stage2_loss(
            latent_encoder,
            **run.modules,
            scheduler=scheduler,
            blurry=batch["blurry"],
            sharp=batch["sharp"],
            noise=noise,
        )
        run.accelerator.backward(loss.total)
        run.after_backward()
        run.after_step(step, loss.parts)

    if run.accelerator.is_main_process:
        run.trained()
        pipeline.save_pretrained(run.output_dir / "pipeline")
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
