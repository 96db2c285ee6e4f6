"""Stage 1: latent encoder and transformer together (HI-Diff, arXiv:2305.12966, section 3.4).

    accelerate launch training/train_stage1.py --config training/configs/gopro_stage1.yaml --train_pairs_dir GOPRO/train \
        --validation_dir GOPRO/test --output_dir runs/stage1 [--dry_run] [--resume_from_checkpoint latest]

The result, OUTPUT_DIR itself, is what stage 2 takes as `--stage1_dir`.
"""

from pathlib import Path

from accelerate.utils import set_seed
from torch import Tensor

from config import Stage1Config, parse_config
from diffusers_hidiff import HIDiffLatentEncoder, HIDiffTransformer
from diffusers_hidiff.image_processor import pad_to_multiple
from diffusers_hidiff.losses import stage1_loss
from loop import Run
from objective import Objective


class Stage1(Objective):
    """Both networks learn to restore the blurry image with a prior that has seen the sharp one."""

    def __init__(self, latent_encoder: HIDiffLatentEncoder, transformer: HIDiffTransformer) -> None:
        super().__init__()
        self.latent_encoder = latent_encoder
        self.transformer = transformer

    def forward(self, blurry: Tensor, sharp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = stage1_loss(self.latent_encoder, self.transformer, blurry, sharp)
        return loss.total, loss.parts

    def restore(self, blurry: Tensor, sharp: Tensor) -> Tensor:
        height, width = blurry.shape[-2:]
        blurry, sharp = pad_to_multiple(blurry), pad_to_multiple(sharp)
        prior = self.latent_encoder(blurry, sharp, return_dict=False)[0]
        return self.transformer(blurry, prior, return_dict=False)[0][..., :height, :width]

    def save(self, folder: Path) -> None:
        self.latent_encoder.save_pretrained(folder / "latent_encoder")
        self.transformer.save_pretrained(folder / "transformer")


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(Stage1Config, arguments)
    set_seed(config.seed)
    latent_encoder = HIDiffLatentEncoder(in_channels=6, **config.encoder)
    transformer = HIDiffTransformer(**config.transformer)

    run = Run(config, Stage1(latent_encoder, transformer))
    for batch in run.batches():
        with run.accelerator.accumulate(run.objective):
            loss, parts = run.objective(batch["blurry"], batch["sharp"])
            run.accelerator.backward(loss)
            run.after_backward(loss, parts, batch)
    run.finish(".")


if __name__ == "__main__":
    main()
