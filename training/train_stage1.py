"""Stage 1: latent encoder and transformer together (HI-Diff, arXiv:2305.12966, section 3.4).

    accelerate launch training/train_stage1.py --config training/configs/small_stage1.yaml \
        --train_data_dir PHOTOS --validation_dir PAIRS --output_dir runs/stage1 [--resume_from_checkpoint latest]
"""

from accelerate.utils import set_seed

from config import Stage1Config, parse_config
from diffusers_hidiff.losses import stage1_loss
from diffusers_hidiff.models.latent_encoder import HIDiffLatentEncoder
from diffusers_hidiff.models.transformer_hidiff import HIDiffTransformer
from loop import Run


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(Stage1Config, arguments)
    set_seed(config.seed)
    latent_encoder = HIDiffLatentEncoder(in_channels=6, **config.encoder)
    transformer = HIDiffTransformer(**config.transformer)

    run = Run(
        config,
        modules={"latent_encoder": latent_encoder, "transformer": transformer},
        restore=lambda blurry, sharp: transformer(blurry, latent_encoder(blurry, sharp)[0])[0],
    )
    for step, batch in enumerate(run.batches(), start=run.first_step + 1):
        loss = stage1_loss(**run.modules, blurry=batch["blurry"], sharp=batch["sharp"])
        run.accelerator.backward(loss.total)
        run.after_backward()
        run.after_step(step, loss.parts)

    if run.accelerator.is_main_process:
        for name, module in run.trained().items():
            module.save_pretrained(run.output_dir / name)
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
