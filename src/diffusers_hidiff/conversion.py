"""Original checkpoint <-> our configs and weights: one table of names per network.

The original files are `{"params": state_dict}`, one a network. A 1x1 convolution there is a linear layer here: the same
numbers, [out, in, 1, 1] there and [out, in] here. Families and sizes are read from names and shapes, so that networks
of other widths and depths than the published ones convert as well.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from math import ceil
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from .models.denoiser import HIDiffMixerDenoiser, HIDiffMLPDenoiser
from .models.latent_encoder import HIDiffLatentEncoder
from .models.transformer_hidiff import HIDiffTransformer
from .schedulers.scheduling_hidiff import HIDiffScheduler

# Original file -> our component. `net_le` is the teacher of stage 1; inference does not need it.
COMPONENTS = {
    "net_g": "transformer",
    "net_le_dm": "condition_encoder",
    "net_d": "denoiser",
    "net_le": "latent_encoder",
}

# A row is (original name, our name). `#` stands for a number, `*` for weight or bias; both are carried over.
MIXER_TABLE = [
    ("patch_mixer.#.*", "token_mlp.#.*"),
    ("channel_mixer.#.*", "channel_mlp.#.*"),
    ("norm#.*", "norm#.*"),
]
ENCODER_TABLE = [
    ("conv1.0.*", "conv_in.*"),
    ("blocks.#.0.*", "blocks.#.conv1.*"),
    ("blocks.#.2.*", "blocks.#.conv2.*"),
    *((f"mlp.{original}", f"mixer.{ours}") for original, ours in MIXER_TABLE),
    ("end.0.*", "proj_out.*"),
]
NARROW_HEAD_TABLE = [("conv2.*", "head.0.*")]
WIDE_HEAD_TABLE = [("conv2.#.*", "head.#.*")]
MIXER_DENOISER_TABLE = [
    ("time_mlp", "time_scale"),
    ("first_layer.0.*", "proj_in.*"),
    *((f"blocks.#.0.{original}", f"blocks.#.{ours}") for original, ours in MIXER_TABLE),
    ("final_layer.0.*", "proj_out.*"),
]
BLOCK_TABLE = [
    ("norm#.body.*", "norm#.*"),
    ("attn.temperature", "attention.temperature"),
    ("attn.qkv.*", "attention.to_qkv.*"),
    ("attn.qkv_dwconv.*", "attention.depthwise.*"),
    ("attn.project_out.*", "attention.to_out.*"),
    ("attn.ln1.*", "modulation1.scale.*"),
    ("attn.ln2.*", "modulation1.shift.*"),
    ("ffn.project_in.*", "feed_forward.proj_in.*"),
    ("ffn.dwconv.*", "feed_forward.depthwise.*"),
    ("ffn.project_out.*", "feed_forward.proj_out.*"),
    ("ffn.ln1.*", "modulation2.scale.*"),
    ("ffn.ln2.*", "modulation2.shift.*"),
]
INTEGRATION_TABLE = [
    ("norm1.body.*", "norm.*"),
    ("norm2.body.*", "norm_prior.*"),
    ("q.*", "to_q.*"),
    ("kv.*", "to_kv.*"),
    ("proj.*", "to_out.*"),
]
LEVELS = [
    ("encoder_level1", "encoder1"),
    ("encoder_level2", "encoder2"),
    ("encoder_level3", "encoder3"),
    ("latent", "latent"),
    ("decoder_level3", "decoder3"),
    ("decoder_level2", "decoder2"),
    ("decoder_level1", "decoder1"),
    ("refinement", "refinement"),
]
TRANSFORMER_TABLE = [
    ("down_1.1.*", "prior_down2.token_proj.*"),
    ("down_1.3.*", "prior_down2.channel_proj.*"),
    ("down_2.1.*", "prior_down3.token_proj.*"),
    ("down_2.3.*", "prior_down3.channel_proj.*"),
    ("patch_embed.proj.*", "conv_in.*"),
    ("down1_2.body.0.*", "down1.conv.*"),
    ("down2_3.body.0.*", "down2.conv.*"),
    ("down3_4.body.0.*", "down3.conv.*"),
    ("up4_3.body.0.*", "up3.conv.*"),
    ("up3_2.body.0.*", "up2.conv.*"),
    ("up2_1.body.0.*", "up1.conv.*"),
    ("reduce_chan_level3.*", "reduce3.*"),
    ("reduce_chan_level2.*", "reduce2.*"),
    ("output.*", "conv_out.*"),
    *(
        (f"{level}.him.{row}", f"{ours}.integration.{name}")
        for level, ours in LEVELS
        for row, name in INTEGRATION_TABLE
    ),
    *((f"{level}.blocks.#.{row}", f"{ours}.blocks.#.{name}") for level, ours in LEVELS for row, name in BLOCK_TABLE),
]
POINTWISE = re.compile(r"attn\.(qkv|project_out)\.|ffn\.project_(in|out)\.|reduce_chan_level")  # 1x1 convolutions


class ConversionError(ValueError):
    """A checkpoint that is not what it should be; the message lists every key that is wrong."""


def table_of(model: ModelMixin) -> list[tuple[str, str]]:
    """Rows of (original name, our name) for the parameters of `model`."""
    match model:
        case HIDiffTransformer():
            return TRANSFORMER_TABLE
        case HIDiffLatentEncoder():
            return ENCODER_TABLE + (WIDE_HEAD_TABLE if model.config.wide_head else NARROW_HEAD_TABLE)
        case HIDiffMixerDenoiser():
            return MIXER_DENOISER_TABLE
        case HIDiffMLPDenoiser():  # the original counts an activation as a layer
            layers = [(f"resmlp.{i + 2}.resmlp.0.*", f"layers.{i}.*") for i in range(len(model.layers))]
            return [("resmlp.0.*", "proj_in.*"), *layers]
        case _:
            raise TypeError(f"`model` must be one of the networks of HI-Diff, got {type(model).__name__}.")


def original_names(model: ModelMixin) -> dict[str, str]:
    """Our name -> original name, for every parameter of `model`."""
    rows = [
        (re.compile(re.escape(ours).replace(r"\#", r"(\d+)").replace(r"\*", "(weight|bias)")), original)
        for original, ours in table_of(model)
    ]
    names = {}
    for name in model.state_dict():
        match, original = next((match, row) for pattern, row in rows if (match := pattern.fullmatch(name)))
        values = iter(match.groups())
        names[name] = re.sub(r"[#*]", lambda _: next(values), original)  # noqa: B023
    return names


def to_original(model: ModelMixin) -> dict[str, Tensor]:
    """The parameters of `model` under the original's names and in its shapes, bit for bit."""
    state = model.state_dict()
    return {
        original: state[name][:, :, None, None] if POINTWISE.search(original) else state[name]
        for name, original in original_names(model).items()
    }


def from_original(network: str, state_dict: Mapping[str, Tensor]) -> ModelMixin:
    """One network with the weights of an original checkpoint.

    Args:
        network: "net_g", "net_le", "net_le_dm" or "net_d", as the original's files are called.
        state_dict: What stands in it under "params".
    Returns:
        The model, in the dtype of the checkpoint.
    Raises:
        ConversionError: Keys are missing, unknown or of another shape than the rest of the checkpoint asks for.
    """
    state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}
    try:
        build, config = RECOGNISERS[network](state_dict)
        with torch.device("meta"):
            model = build(**config)
    except _Missing as missing:
        raise ConversionError(f"{network} lacks {missing}, without which its size cannot be told.") from None
    except (ValueError, IndexError, ZeroDivisionError) as error:  # too few dimensions, or sizes that no model can have
        raise ConversionError(f"{network} has shapes that contradict one another: {error}") from None
    names = original_names(model)
    shapes = {original: tuple(value.shape) for original, value in to_original(model).items()}
    problems = [f"missing: {name}" for name in shapes if name not in state_dict]
    problems += [f"unknown: {name}" for name in state_dict if name not in shapes]
    problems += [
        f"shape: {name} is {tuple(state_dict[name].shape)}, must be {shape}"
        for name, shape in shapes.items()
        if name in state_dict and tuple(state_dict[name].shape) != shape
    ]
    if problems:
        raise ConversionError("\n  ".join([f"{network} does not fit {type(model).__name__}:", *problems]))
    state = {name: state_dict[original] for name, original in names.items()}
    state = {name: value[:, :, 0, 0] if POINTWISE.search(names[name]) else value for name, value in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def scheduler_of(family: str) -> HIDiffScheduler:
    """The noise schedule of a published family, "gopro" or "realblur". It cannot be read from the weights."""
    if family == "gopro":
        return HIDiffScheduler()
    return HIDiffScheduler(
        num_train_timesteps=16, beta_schedule="scaled_linear", prediction_type="sample", clip_sample=False
    )


def family_of(model: ModelMixin) -> str | None:
    """The published family that a network belongs to: "gopro", "realblur" or None.

    The transformers of the two differ only in one width, so one of another size than the published goes with either.
    """
    match model:
        case HIDiffMixerDenoiser():
            return "gopro"
        case HIDiffMLPDenoiser():
            return "realblur"
        case HIDiffLatentEncoder():
            return "realblur" if model.config.wide_head else "gopro"
        case HIDiffTransformer() if (model.config.dim, list(model.config.num_blocks)) == (48, [3, 5, 6, 6]):
            return {2.66: "gopro", 2.0: "realblur"}.get(model.config.ffn_expansion_factor)
    return None


def networks_from_original(checkpoints: Mapping[str, Mapping[str, Tensor]]) -> dict[str, ModelMixin]:
    """The networks of one original checkpoint: each sound by itself, all of one family and made for the same prior.

    Args:
        checkpoints: State dicts by original name ("net_g" …), see `from_original`.
    Returns:
        Models by our name ("transformer" …).
    Raises:
        ConversionError: Lists what is wrong with every network, or how they do not fit one another.
    """
    networks, problems = {}, []
    for network, state_dict in checkpoints.items():
        try:
            networks[COMPONENTS[network]] = from_original(network, state_dict)
        except ConversionError as error:
            problems.append(str(error))
    problems = problems or misfits(networks)
    if problems:
        raise ConversionError("\n".join(problems))
    return networks


def misfits(networks: Mapping[str, ModelMixin]) -> list[str]:
    """What keeps networks, by our name, from working together; empty if nothing does."""
    problems = []
    for name, channels in (("condition_encoder", 3), ("latent_encoder", 6)):
        if name in networks and (found := networks[name].config.in_channels) != channels:
            problems.append(f"{name} must take {channels} channels, takes {found}.")
    properties: dict[str, dict[str, object]] = {
        "families": {name: family_of(model) for name, model in networks.items()},
        "prior widths": {name: _prior_size(model)[0] for name, model in networks.items()},
        "numbers of prior tokens": {name: _prior_size(model)[1] for name, model in networks.items()},
    }
    for what, values in properties.items():
        known = {name: value for name, value in values.items() if value is not None}
        if len(set(known.values())) > 1:
            listed = ", ".join(f"{name} {value}" for name, value in known.items())
            problems.append(f"The networks have different {what}: {listed}.")
    return problems


def _prior_size(model: ModelMixin) -> tuple[int, int | None]:
    """Width D and number N of the prior tokens that `model` reads or writes; N is None if any will do."""
    if isinstance(model, HIDiffLatentEncoder):
        return 4 * model.config.embed_dim, model.config.grid_size**2
    return model.config.prior_dim, model.config.get("num_prior_tokens")


class _Missing(KeyError):
    """The key that a size should have been read from."""


def _shape(state_dict: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in state_dict:
        raise _Missing(name)
    return tuple(state_dict[name].shape)


def _count(state_dict: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers `pattern` (with one group) finds in the names."""
    return len({match[1] for name in state_dict if (match := re.match(pattern, name))})


def expansion_factor(widths: Mapping[int, int]) -> float:
    """The shortest decimal f with int(dim·f) = hidden for every dim: hidden in `widths`.

    The published 2.66 is found from {48: 127, 96: 255, 192: 510, 384: 1021}.
    """
    low = max(Fraction(hidden, dim) for dim, hidden in widths.items())
    high = min(Fraction(hidden + 1, dim) for dim, hidden in widths.items())
    for digits in range(16):
        factor = ceil(low * 10**digits) / 10**digits
        if factor < high and all(int(dim * factor) == hidden for dim, hidden in widths.items()):
            return factor
    raise ConversionError(f"No one expansion factor gives these feed-forward widths: {dict(widths)}.")


def _transformer(state_dict: Mapping[str, Tensor]) -> tuple[type[ModelMixin], dict[str, Any]]:
    dim, in_channels = _shape(state_dict, "patch_embed.proj.weight")[:2]
    levels = ["encoder_level1", "encoder_level2", "encoder_level3", "latent"]
    widths = {
        2**i * dim: _shape(state_dict, f"{level}.blocks.0.ffn.project_out.weight")[1] for i, level in enumerate(levels)
    }
    return HIDiffTransformer, {
        "in_channels": in_channels,
        "dim": dim,
        "num_blocks": [_count(state_dict, rf"{level}\.blocks\.(\d+)\.") for level in levels],
        "num_refinement_blocks": _count(state_dict, r"refinement\.blocks\.(\d+)\."),
        "num_heads": [_shape(state_dict, f"{level}.blocks.0.attn.temperature")[0] for level in levels],
        "ffn_expansion_factor": expansion_factor(widths),
        "prior_dim": _shape(state_dict, "down_1.3.weight")[0],
        "num_prior_tokens": _shape(state_dict, "down_1.1.weight")[1],
    }


def _encoder(state_dict: Mapping[str, Tensor]) -> tuple[type[ModelMixin], dict[str, Any]]:
    embed_dim, unshuffled = _shape(state_dict, "conv1.0.weight")[:2]
    wide_head = _count(state_dict, r"conv2\.(\d+)\.") > 0
    return HIDiffLatentEncoder, {
        "in_channels": unshuffled // 16,
        "embed_dim": embed_dim,
        "num_blocks": _count(state_dict, r"blocks\.(\d+)\."),
        "grid_size": round(_shape(state_dict, "mlp.patch_mixer.0.weight")[1] ** 0.5),
        "activation": "leaky_relu" if wide_head else "gelu",  # the two always go together
        "wide_head": wide_head,
    }


def _denoiser(state_dict: Mapping[str, Tensor]) -> tuple[type[ModelMixin], dict[str, Any]]:
    if _count(state_dict, r"resmlp\.(\d+)\."):
        prior_dim = _shape(state_dict, "resmlp.0.weight")[0]
        return HIDiffMLPDenoiser, {
            "prior_dim": prior_dim,
            "num_layers": _count(state_dict, r"resmlp\.(\d+)\.resmlp\."),
        }
    return HIDiffMixerDenoiser, {
        "prior_dim": _shape(state_dict, "final_layer.0.weight")[0],
        "num_prior_tokens": _shape(state_dict, "blocks.0.0.patch_mixer.0.weight")[1],
        "num_blocks": _count(state_dict, r"blocks\.(\d+)\."),
    }


RECOGNISERS = {"net_g": _transformer, "net_le_dm": _encoder, "net_d": _denoiser, "net_le": _encoder}
