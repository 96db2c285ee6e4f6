"""HIDiffPipeline: a blurry photograph in, a sharp one out.

B images · H, W pixels, padded to multiples of 8 · N prior tokens · D prior width
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..image_processor import (
    OUTPUT_TYPES,
    ImageInput,
    OutputType,
    Picture,
    fill_padded,
    postprocess,
    preprocess,
)
from ..models.denoiser import HIDiffMixerDenoiser, HIDiffMLPDenoiser
from ..models.latent_encoder import HIDiffLatentEncoder
from ..models.memory import Place, empty
from ..models.transformer_hidiff import HIDiffTransformer
from ..sampling import sample_prior
from ..schedulers.compatibility import check_scheduler, check_timesteps
from .overlapping_tiles import check_tiles, restore_in_tiles

# A saved pipeline names its classes as ["diffusers_hidiff", "Class"] once the package is known here, and only then do they
# load from the Hub.
LOADABLE_CLASSES.setdefault("diffusers_hidiff", {})

StepCallback = Callable[["HIDiffPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor]]

VIEWS = [(turns, flip) for flip in (False, True) for turns in range(4)]  # the first is the image as it is


def turn(pixels: Tensor, turns: int, flip: bool) -> Tensor:
    """[B, C, H, W], mirrored if `flip`, then turned by so many quarters."""
    if not turns and not flip:
        return pixels  # `rot90` would make a copy
    return torch.rot90(pixels.flip(-1) if flip else pixels, turns, dims=(-2, -1))


def turn_back(pixels: Tensor, turns: int, flip: bool) -> Tensor:
    """The inverse of `turn`."""
    if not turns and not flip:
        return pixels
    pixels = torch.rot90(pixels, -turns, dims=(-2, -1))
    return pixels.flip(-1) if flip else pixels


def added(total: Tensor | None, image: Tensor) -> Tensor:
    """The sum, in the memory of `total`: images may be large."""
    return image if total is None else total.add_(image)


def averaged(total: Tensor, number: int) -> Tensor:
    """The image of a sum of so many, in [0, 1], in the memory of `total`."""
    return total.div_(number).clamp_(0, 1)


def check_averages(
    num_priors: int, average: str, self_ensemble: bool, latents: Tensor | None, prior: Tensor | None, output_type: str
) -> None:
    """Refuses averages that make no sense."""
    if isinstance(num_priors, bool) or not isinstance(num_priors, int | np.integer):
        raise TypeError(f"`num_priors` must be an integer, got {num_priors!r}.")
    if num_priors < 1:
        raise ValueError(f"`num_priors` must be at least 1, got {num_priors}.")
    if average not in ("prior", "image"):
        raise ValueError(f"`average` must be 'prior' or 'image', got {average!r}.")
    if num_priors > 1 and (latents is not None or prior is not None):
        raise ValueError(f"`num_priors` must be 1 if `latents` or `prior` is given, got {num_priors}.")
    if self_ensemble and (prior is not None or output_type == "latent"):
        raise ValueError("`self_ensemble` needs a prior for each flip and rotation: not with `prior` or 'latent'.")


@dataclass
class HIDiffPipelineOutput(BaseOutput):
    """What the pipeline returns.

    Args:
        images: Restored images as `output_type` says, or the prior [B, N, D] for "latent".
    """

    images: list[PIL.Image.Image] | np.ndarray | list[np.ndarray] | Tensor | list[Tensor]


class HIDiffPipeline(DiffusionPipeline):
    """Removes motion blur from photographs (HI-Diff, arXiv:2305.12966, Fig. 1).

    A small diffusion model draws a prior, a few tokens that say how the image is blurred; a regression transformer guided
    by it restores the image in one pass.

    Args:
        condition_encoder: Blurry image -> condition.
        denoiser: Noisy prior, condition, timestep -> prediction.
        scheduler: `HIDiffScheduler`, or one of diffusers' made `from_config` of it.
        transformer: Blurry image, prior -> restored image.
    Raises:
        ValueError: The components are made for priors of different shape.
    """

    model_cpu_offload_seq = "condition_encoder->denoiser->transformer"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        condition_encoder: HIDiffLatentEncoder,
        denoiser: HIDiffMixerDenoiser | HIDiffMLPDenoiser,
        scheduler: SchedulerMixin,
        transformer: HIDiffTransformer,
    ) -> None:
        super().__init__()
        widths = {
            "condition_encoder": 4 * condition_encoder.config.embed_dim,
            "denoiser": denoiser.config.prior_dim,
            "transformer": transformer.config.prior_dim,
        }
        tokens = {
            "condition_encoder": condition_encoder.config.grid_size**2,
            "denoiser": denoiser.config.get("num_prior_tokens", transformer.config.num_prior_tokens),
            "transformer": transformer.config.num_prior_tokens,
        }
        for what, values in (("width", widths), ("number of tokens", tokens)):
            if len(set(values.values())) > 1:
                raise ValueError(f"The components must be made for priors of the same {what}, got {values}.")
        if condition_encoder.config.in_channels != 3:
            raise ValueError(
                "`condition_encoder` must have in_channels=3; with 6 it is the latent encoder, which needs the sharp image."
            )
        self.register_modules(
            condition_encoder=condition_encoder, denoiser=denoiser, scheduler=scheduler, transformer=transformer
        )

    @property
    def num_timesteps(self) -> int:
        """Steps of the reverse chain in the last call."""
        return self._num_timesteps

    def check_inputs(
        self,
        num_images: int,
        num_inference_steps: int | None,
        timesteps: Sequence[int] | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        prior: Tensor | None,
        callback_on_step_end: StepCallback | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Refuses what cannot work, before any network runs."""
        if num_inference_steps is not None and timesteps is not None:
            raise ValueError(
                f"Only one of `num_inference_steps` and `timesteps` may be given, got {num_inference_steps} and {timesteps}."
            )
        if num_inference_steps is not None and (
            isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int | np.integer)
        ):
            raise TypeError(f"`num_inference_steps` must be an integer, got {num_inference_steps!r}.")
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(
                f"`generator` must be one generator or one per image, got {len(generator)} for {num_images} image(s)."
            )
        shape = (num_images, self.transformer.config.num_prior_tokens, self.transformer.config.prior_dim)
        for name, tensor in (("latents", latents), ("prior", prior)):
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"`{name}` must be a tensor, got {type(tensor).__name__}.")
            if tensor.shape != shape:
                raise ValueError(f"`{name}` must have shape {shape}, got {tuple(tensor.shape)}.")
            if not tensor.isfinite().all():
                raise ValueError(f"`{name}` must be finite, got NaN or infinity.")
        if latents is not None and prior is not None:
            raise ValueError("Only one of `latents` and `prior` may be given: a given prior skips the diffusion.")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise TypeError(f"`callback_on_step_end` must be callable, got {type(callback_on_step_end).__name__}.")
        if unknown := [n for n in callback_on_step_end_tensor_inputs if n not in self._callback_tensor_inputs]:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, got {unknown}."
            )

    def set_timesteps(self, num_inference_steps: int | None, timesteps: Sequence[int] | None) -> None:
        """Sets the scheduler's timesteps, or says why they cannot be.

        Raises:
            ValueError: The scheduler cannot do so many steps, or not these.
        """
        device = self._execution_device
        if timesteps is None:
            steps = self.scheduler.config.num_train_timesteps if num_inference_steps is None else num_inference_steps
            check_scheduler(self.scheduler, steps)
            self.scheduler.set_timesteps(int(steps), device=device)
        else:
            timesteps = [int(timestep) for timestep in timesteps]
            if any(later >= earlier for earlier, later in pairwise(timesteps)):
                raise ValueError(f"`timesteps` must descend, got {timesteps}.")
            check_timesteps(self.scheduler, timesteps)
            check_scheduler(self.scheduler, len(timesteps))
            if "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(
                    f"`timesteps` cannot be chosen with {type(self.scheduler).__name__}; use `num_inference_steps`."
                )
            self.scheduler.set_timesteps(timesteps=timesteps, device=device)
        check_timesteps(self.scheduler, self.scheduler.timesteps)

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput],
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prior: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_priors: int = 1,
        average: Literal["prior", "image"] = "prior",
        self_ensemble: bool = False,
        tile: int | None = None,
        tile_overlap: int = 64,
    ) -> HIDiffPipelineOutput | tuple[Any]:
        """Restores blurry images.

        Args:
            image: What to restore: a path, URL, PIL image of any mode, NumPy array [H, W, C] or [B, H, W, C] (uint8, uint16
                or floating point in [0, 1]), tensor [C, H, W] or [B, C, H, W], or a list of those, of any sizes.
            num_inference_steps: Steps of the reverse chain, at most the scheduler's T, which is the default.
            timesteps: Which steps to take instead, descending from T - 1.
            generator: Source of the initial noise; a list of one per image gives each the picture it gets alone.
            latents: The initial noise instead, [B, N, D], standard normal.
            prior: The prior itself, [B, N, D]; the diffusion is skipped.
            output_type: "pil", "np" ([B, H, W, C] in [0, 1]), "pt" ([B, C, H, W] in [0, 1]) or "latent", which stops at the
                prior [B, N, D]. Grey stays grey, alpha is carried over.
            return_dict: Whether to return a `HIDiffPipelineOutput` or a tuple.
            callback_on_step_end: Called after each reverse step with the pipeline, the step's number, the timestep and
                {"latents": …}; latents that it returns take the place of the chain's.
            callback_on_step_end_tensor_inputs: What the callback is given; there is only "latents".
            num_priors: How many priors are drawn for an image, each from its own noise, and averaged.
            average: Whether the priors are averaged, at next to no cost, or the images that they give.
            self_ensemble: Restores the eight flips and rotations of an image and averages them, in eight times the time.
            tile: Restores tiles of this height and width, a multiple of 8, each alone but with the prior of the whole image.
                It changes the picture; `limit_memory` does not.
            tile_overlap: Pixels over which neighbouring tiles are blended, a multiple of 8 up to half a tile.
        Returns:
            The restored images; a list where their sizes differ.
        Raises:
            ValueError, TypeError: An argument is not as said; the message names it.
        """
        # 1. Refuse before any work is done
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {list(OUTPUT_TYPES)}, got {output_type!r}.")
        pictures = preprocess(image)
        self.check_inputs(
            len(pictures),
            *(num_inference_steps, timesteps, generator, latents, prior),
            *(callback_on_step_end, callback_on_step_end_tensor_inputs),
        )
        check_averages(num_priors, average, self_ensemble, latents, prior, output_type)
        check_tiles(tile, tile_overlap)
        if prior is None:
            self.set_timesteps(num_inference_steps, timesteps)
        self._num_timesteps = 0 if prior is not None else len(self.scheduler.timesteps)

        # 2. Images of one padded size make a batch; the noise of each, [K, B, N, D]
        batches = self.batches_of_one_size(pictures)
        if prior is None:
            noise = self.draw_noise(len(pictures), num_priors, generator, latents)

        sums: list[Any] = [None] * len(pictures)
        views = VIEWS if self_ensemble else VIEWS[:1]
        for turns, flip in views:
            viewed = [(indices, turn(pixels, turns, flip)) for indices, pixels in batches]

            # 3. The priors, [K, B, N, D]
            if prior is None:
                condition, drawn = self.encode(viewed), []
                for one_noise in noise:
                    self.set_timesteps(num_inference_steps, timesteps)  # forgets the steps of the chain before
                    callbacks = callback_on_step_end, callback_on_step_end_tensor_inputs
                    drawn.append(self.draw_prior(condition, one_noise, generator, *callbacks))
                priors = torch.stack(drawn)
                if average == "prior" or output_type == "latent":
                    priors = priors.mean(dim=0, keepdim=True)
            else:
                priors = prior[None].to(self._execution_device)
            if output_type == "latent":
                continue

            # 4. The images, each [3, H, W]
            for one_prior in priors:
                for indices, pixels in viewed:
                    restored = self.restore(pixels, one_prior[indices].to(self.transformer.dtype), tile, tile_overlap)
                    for index, one_image in zip(indices, turn_back(restored, turns, flip).cpu(), strict=True):
                        sums[index] = added(sums[index], one_image)
        number = len(priors) * len(views)
        images: Any = (
            priors[0]
            if output_type == "latent"
            else postprocess([averaged(image, number) for image in sums], pictures, output_type)
        )

        self.maybe_free_model_hooks()
        return HIDiffPipelineOutput(images=images) if return_dict else (images,)

    def limit_memory(self, max_memory: int | float | str | None) -> None:
        """Keeps to an amount of memory, "4GB" say; the picture stays the same to rounding. See `SlicingMixin.limit_memory`.

        Args:
            max_memory: Bytes, or text such as "4GB" or "800MB"; None for what is free.
        Raises:
            ValueError: `max_memory` is no amount of memory. One too small for an image is refused when that comes.
        """
        for model in (self.condition_encoder, self.transformer):
            model.limit_memory(max_memory)

    def batches_of_one_size(self, pictures: Sequence[Picture]) -> list[tuple[list[int], Tensor]]:
        """Pictures that have one size once padded, as (their numbers, [b, 3, H, W] float32 on the device)."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, picture in enumerate(pictures):
            groups.setdefault(tuple(side + -side % 8 for side in picture.size), []).append(index)
        batches, cpu = [], torch.device("cpu")
        for size, indices in groups.items():
            shape = (len(indices), 3, *size)
            pixels = empty(shape, torch.float32, cpu, self.place_of_pixels(shape))
            for one, index in zip(pixels, indices, strict=True):
                fill_padded(one, pictures[index])
            batches.append((indices, pixels.to(self._execution_device)))
        return batches

    def place_of_pixels(self, shape: Sequence[int]) -> Place:
        """Where images go: to a file if their features do.

        Raises:
            ValueError: The limit of memory does not suffice.
        """
        images = torch.empty((), device=self._execution_device).expand(shape)
        self.condition_encoder.slicing_for(images)
        return "file" if self.transformer.slicing_for(images).place == "file" else "device"

    def restore(self, pixels: Tensor, prior: Tensor, tile: int | None, tile_overlap: int) -> Tensor:
        """Images of one size and their priors through the transformer, [B, 3, H, W]."""

        def whole(pixels: Tensor) -> Tensor:
            return self.transformer(pixels, prior, return_dict=False)[0]

        return whole(pixels) if tile is None else restore_in_tiles(pixels, tile, tile_overlap, whole)

    def encode(self, batches: Sequence[tuple[list[int], Tensor]]) -> Tensor:
        """The condition of every picture, [B, N, D], in the denoiser's dtype."""
        dtype = self.condition_encoder.dtype
        rows: dict[int, Tensor] = {}
        for indices, pixels in batches:
            rows.update(zip(indices, self.condition_encoder(pixels.to(dtype), return_dict=False)[0], strict=True))
        return torch.stack([rows[i] for i in range(len(rows))]).to(self.denoiser.dtype)

    def draw_noise(
        self,
        num_images: int,
        num_priors: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
    ) -> Tensor:
        """The initial noise, [K, B, N, D] float32, scaled as the scheduler asks."""
        device = self._execution_device
        if latents is None:
            shape = (num_images, self.transformer.config.num_prior_tokens, self.transformer.config.prior_dim)
            noise = torch.stack([randn_tensor(shape, generator, device, torch.float32) for _ in range(num_priors)])
        else:
            noise = latents[None].to(device, torch.float32)
        return noise * self.scheduler.init_noise_sigma

    def draw_prior(
        self,
        condition: Tensor,
        latents: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        callback_on_step_end: StepCallback | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> Tensor:
        """Runs the reverse chain for all images at once; [B, N, D] each, the result float32."""
        with self.progress_bar(total=self._num_timesteps) as progress_bar:

            def after_step(index: int, timestep: Tensor, latents: Tensor) -> Tensor:
                if callback_on_step_end is not None:
                    wanted = {name: latents for name in callback_on_step_end_tensor_inputs}
                    latents = callback_on_step_end(self, index, timestep, wanted).pop("latents", latents)
                progress_bar.update()
                return latents

            return sample_prior(self.denoiser, self.scheduler, condition, latents, generator, after_step)
