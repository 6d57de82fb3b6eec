"""A student's UNet as diffusers' ``UNet2DModel``."""

import dataclasses
from typing import Any

from flax.traverse_util import unflatten_dict

from boot_jax.export.finished import ExportError, FinishedStudent
from boot_jax.export.folding import (
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
from boot_jax.models.unet import UNet
from boot_jax.models.weights import to_diffusers


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
        raise ExportError(
            "the student's input is scaled before center_input_sample, which diffusers "
            "has no place for; train it at objective.t_max=1"
        )
    embedding = constant_embedding(finished, ("time_embedding", "added_embeddings"))
    hold(params, ("time_embedding", "linear_2"), embedding)
    keep_channels(
        params, ("conv_out",), finished.sample_shape[-1], network.out_channels
    )
    scale_input(params, ("conv_in",), conversion.input_scale)
    change_output(params, ("conv_out",), output_scale, output_offset)
    return StockModel(
        class_name="UNet2DModel",
        config=_unet_config(network, finished.sample_shape),
        tensors=to_diffusers(unflatten_dict(params), ignore=("added_embeddings",)),
        conversion=conversion,
        stock_pipeline="DDIMPipeline" if finished.num_classes is None else None,
    )


def _unet_config(network: UNet, sample_shape: tuple[int, int, int]) -> dict[str, Any]:
    """The fields of a UNet that are diffusers' own."""
    names = [field.name for field in dataclasses.fields(UNet)]
    theirs = names[: names.index("num_train_timesteps") + 1]
    height, width, channels = sample_shape
    size = height if height == width else [height, width]
    sizes = {"sample_size": size, "out_channels": channels}
    return {name: getattr(network, name) for name in theirs} | sizes
