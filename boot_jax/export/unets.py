"""A student's UNet as diffusers' ``UNet2DModel`` or ``UNet2DConditionModel``."""

import dataclasses
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from boot_jax.export.finished import ExportError, FinishedStudent
from boot_jax.export.folding import (
    Params,
    StockModel,
    change_output,
    constant_embedding,
    flat,
    frozen_time,
    hold,
    keep_channels,
    scale_input,
    stock_conversion,
)
from boot_jax.models.text_unet import TextUNet
from boot_jax.models.unet import UNet
from boot_jax.models.weights import to_diffusers

# Features of a guidance scale: diffusers needs at least four.
_SCALE_FEATURES = 4

_CENTRED = (
    "the student's input is scaled before center_input_sample, which diffusers has no "
    "place for; train it at objective.t_max=1"
)


def convert_unet(finished: FinishedStudent) -> StockModel:
    """Folds a student that is a UNet.

    Raises:
      ExportError: its input is centred after a scale that is not 1.
    """
    network, params = finished.network, flat(finished.params)
    assert isinstance(network, UNet)
    fourier = network.time_embedding_type == "fourier"
    # A Fourier network takes the logarithm of its time and divides by it: step 0 of a
    # scheduler will not do, step 1 will. The division is made up for.
    conversion = stock_conversion(finished, num_steps=2 if fourier else 1)
    output_scale, output_offset = conversion.output_scale, conversion.output_offset
    if fourier:
        step = len(conversion.betas) - 1
        output_scale *= step / frozen_time(finished)
        output_offset *= step
    if network.center_input_sample and conversion.input_scale != 1:
        raise ExportError(_CENTRED)
    _fold(finished, params, conversion.input_scale, output_scale, output_offset)
    labelled = finished.num_classes is not None
    return StockModel(
        class_name="UNet2DModel",
        config=_config(network, "num_train_timesteps", finished.sample_shape),
        tensors=to_diffusers(unflatten_dict(params), ignore=("added_embeddings",)),
        conversion=conversion,
        pipeline=None if labelled else "DDIMPipeline",
        component="network" if labelled else "unet",
    )


def convert_text_unet(finished: FinishedStudent) -> StockModel:
    """Folds a student that is a UNet which reads texts.

    What SDXL's adds to the time's embedding, of the sizes and the pooled text, stays
    live. A stock pipeline would guide by default, and so draw the student twice over:
    one whose UNet itself takes a guidance scale (``time_cond_proj_dim``, as consistency
    models have it) does not, so this one is said to, and ignores it.
    """
    network, params = finished.network, flat(finished.params)
    assert isinstance(network, TextUNet)
    conversion = stock_conversion(finished)
    if network.center_input_sample and conversion.input_scale != 1:
        raise ExportError(_CENTRED)
    _fold(
        finished,
        params,
        conversion.input_scale,
        conversion.output_scale,
        conversion.output_offset,
    )
    scales = np.zeros((_SCALE_FEATURES, network.block_out_channels[0]), np.float32)
    params["time_embedding", "cond_proj", "kernel"] = scales
    last = "projection_class_embeddings_input_dim"
    is_xl = network.addition_embed_type is not None
    return StockModel(
        class_name="UNet2DConditionModel",
        config=_config(network, last, finished.sample_shape)
        | {"time_cond_proj_dim": _SCALE_FEATURES},
        tensors=to_diffusers(unflatten_dict(params), ignore=("added_embeddings",)),
        conversion=conversion,
        pipeline=f"StableDiffusion{'XL' if is_xl else ''}Pipeline",
        component="unet",
    )


def _fold(
    finished: FinishedStudent,
    params: Params,
    input_scale: float,
    output_scale: float,
    output_offset: float,
) -> None:
    """Writes the constant embedding, and both scales, into a UNet's parameters."""
    network = finished.network
    assert isinstance(network, UNet | TextUNet)
    embedding = constant_embedding(finished, ("time_embedding", "added_embeddings"))
    hold(params, ("time_embedding", "linear_2"), embedding)
    keep_channels(
        params, ("conv_out",), finished.sample_shape[-1], network.out_channels
    )
    scale_input(params, ("conv_in",), input_scale)
    change_output(params, ("conv_out",), output_scale, output_offset)


def _config(
    network: UNet | TextUNet, last: str, sample_shape: tuple[int, int, int]
) -> dict[str, Any]:
    """The fields of a UNet that are diffusers' own: those up to ``last``."""
    names = [field.name for field in dataclasses.fields(network)]
    theirs = names[: names.index(last) + 1]
    height, width, channels = sample_shape
    size = height if height == width else [height, width]
    sizes = {"sample_size": size, "out_channels": channels}
    return {name: getattr(network, name) for name in theirs} | sizes
