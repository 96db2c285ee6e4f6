"""Stage 2: condition encoder, denoiser and transformer, taught by stage 1's latent encoder (HI-Diff, section 3.4).

    accelerate launch training/train_stage2.py --config training/configs/gopro_stage2.yaml --stage1_dir runs/stage1 \
        --train_pairs_dir GOPRO/train --validation_dir GOPRO/test --output_dir runs/stage2 \
        [--dry_run] [--resume_from_checkpoint latest]

The result, in OUTPUT_DIR/pipeline, is a folder for `HIDiffPipeline.from_pretrained`.
"""

from pathlib import Path

from accelerate.utils import set_seed
from torch import Tensor

from config import DENOISERS, Stage2Config, parse_config
from data import noise_of_samples
from diffusers_hidiff import HIDiffLatentEncoder, HIDiffPipeline, HIDiffScheduler, HIDiffTransformer
from diffusers_hidiff.losses import stage2_loss
from loop import Run
from objective import Objective


class Stage2(Objective):
    """The pipeline's networks learn; the latent encoder, which sees the sharp image, stays as it is.

    Args:
        latent_encoder: The teacher.
        pipeline: What learns.
        seed: Of the noise that validation begins with.
    """

    def __init__(self, latent_encoder: HIDiffLatentEncoder, pipeline: HIDiffPipeline, seed: int) -> None:
        super().__init__()
        self.latent_encoder = latent_encoder.requires_grad_(False)
        self.condition_encoder = pipeline.condition_encoder.train()
        self.denoiser = pipeline.denoiser.train()
        self.transformer = pipeline.transformer.train()
        self.scheduler = pipeline.scheduler
        self.seed = seed
        self.prior_shape = (self.transformer.config.num_prior_tokens, self.transformer.config.prior_dim)

    def forward(self, blurry: Tensor, sharp: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = stage2_loss(
            self.latent_encoder,
            self.condition_encoder,
            self.denoiser,
            self.transformer,
            self.scheduler,
            blurry=blurry,
            sharp=sharp,
            noise=noise,
        )
        return loss.total, loss.parts

    def pipeline(self) -> HIDiffPipeline:
        return HIDiffPipeline(self.condition_encoder, self.denoiser, self.scheduler, self.transformer)

    def restore(self, blurry: Tensor, sharp: Tensor) -> Tensor:
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        noise = noise_of_samples(blurry.new_zeros(1), self.prior_shape, self.seed)
        return pipeline(blurry, latents=noise, output_type="pt", return_dict=False)[0].to(blurry.device)

    def save(self, folder: Path) -> None:
        self.pipeline().save_pretrained(folder)
        self.latent_encoder.save_pretrained(folder / "latent_encoder")  # so that others can train it further


def stage2(config: Stage2Config) -> Stage2:
    """New networks on top of stage 1, or a whole pipeline that learns on."""
    if config.pretrained_model_name_or_path is not None:
        pipeline = HIDiffPipeline.from_pretrained(config.pretrained_model_name_or_path)
        teacher = HIDiffLatentEncoder.from_pretrained(config.pretrained_model_name_or_path, subfolder="latent_encoder")
        return Stage2(teacher, pipeline, config.seed)
    stage1_dir = Path(config.stage1_dir or "")
    teacher = HIDiffLatentEncoder.from_pretrained(stage1_dir / "latent_encoder")
    transformer = HIDiffTransformer.from_pretrained(stage1_dir / "transformer")
    condition_encoder = HIDiffLatentEncoder.from_config({**teacher.config, "in_channels": 3})
    denoiser = DENOISERS[config.denoiser_type](prior_dim=transformer.config.prior_dim, **config.denoiser)
    pipeline = HIDiffPipeline(condition_encoder, denoiser, HIDiffScheduler(**config.scheduler), transformer)
    return Stage2(teacher, pipeline, config.seed)


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(Stage2Config, arguments)
    set_seed(config.seed)
    objective = stage2(config)

    run = Run(config, objective)
    for batch in run.batches():
        noise = noise_of_samples(batch["index"], objective.prior_shape, config.seed)
        with run.accelerator.accumulate(run.objective):
            loss, parts = run.objective(batch["blurry"], batch["sharp"], noise)
            run.accelerator.backward(loss)
            run.after_backward(loss, parts, batch)
    run.finish("pipeline")


if __name__ == "__main__":
    main()
