"""The student as a folder that unmodified PyTorch diffusers loads; torch is not needed.

`boot_jax.export.folding` says why a stock network and a stock scheduler suffice. What
follows from it for each network:

    UNet, no classes      `UNet2DModel` in a DDIMPipeline (DDPMPipeline loads it too)
    UNet, class labels    `UNet2DModel`; stock pipelines pass it no labels, so a
                          one-file pipeline lies beside it
    DiT                   `DiTTransformer2DModel`; the stock pipeline wants a VAE and
                          ImageNet's classes, so the same one-file pipeline

The scheduler has as few training steps as float32 allows, one for most: asked for 50
steps, a pipeline refuses, instead of iterating a network that has only one.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from boot_jax.export.custom_pipeline import CLASS_NAME, MODULE_NAME, PIPELINE
from boot_jax.export.finished import ExportError, FinishedStudent
from boot_jax.export.folding import (
    StockConversion,
    constant_embedding,
    frozen_time,
    stock_conversion,
)
from boot_jax.models.unet import UNet
from boot_jax.models.weights import to_diffusers

#: The release that the tests load exports with.
DIFFUSERS_VERSION = "0.39.0"
WEIGHTS = "diffusion_pytorch_model.safetensors"

Params = dict[tuple[str, ...], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StockModel:
    """A student as a model and a scheduler of diffusers.

    Attributes:
      class_name: of the model, in diffusers.
      config: its ``config.json``, without what begins with ``_``.
      tensors: its weights, by name, in PyTorch's layout.
      conversion: what its scheduler does.
      pipeline: of diffusers; None for the one-file pipeline.
    """

    class_name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    conversion: StockConversion
    pipeline: str | None


def stock_model(finished: FinishedStudent) -> StockModel:
    """Folds a student into a model of diffusers.

    Raises:
      ExportError: no model of diffusers computes what this network does.
    """
    for network, convert in _CONVERTERS.items():
        if isinstance(finished.network, network):
            return convert(finished)
    name = type(finished.network).__name__
    raise ExportError(f"diffusers has no network like {name}")


def save_pipeline(
    folder: pathlib.Path, model: StockModel, num_classes: int | None
) -> None:
    """Writes ``model_index.json``, model, scheduler and, where needed, a pipeline.

    Args:
      folder: it exists.
      model: of `stock_model`.
      num_classes: what labels the one-file pipeline accepts; None for none.
    """
    index: dict[str, Any] = {"_diffusers_version": DIFFUSERS_VERSION}
    component = "unet"
    if model.pipeline is not None:
        index["_class_name"] = model.pipeline
    else:
        component = "network"
        index["_class_name"] = [MODULE_NAME, CLASS_NAME]
        index["num_classes"] = num_classes
        (folder / f"{MODULE_NAME}.py").write_text(PIPELINE)
    index[component] = ["diffusers", model.class_name]
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    _write_json(folder / "model_index.json", index)
    _write_config(
        folder / "scheduler" / "scheduler_config.json",
        "DDIMScheduler",
        scheduler_config(model.conversion),
    )
    _write_config(folder / component / "config.json", model.class_name, model.config)
    # The metadata is how PyTorch loaders know whose layout a file has.
    safetensors.numpy.save_file(
        dict(model.tensors), str(folder / component / WEIGHTS), {"format": "pt"}
    )


def scheduler_config(conversion: StockConversion) -> dict[str, Any]:
    """A DDIM scheduler whose one step is the student's conversion, unclipped."""
    return {
        "num_train_timesteps": len(conversion.betas),
        "trained_betas": list(conversion.betas),
        "prediction_type": conversion.prediction_type,
        "timestep_spacing": "trailing",  # one step begins at the last level
        "set_alpha_to_one": True,  # and ends at clean data
        "steps_offset": 0,
        "clip_sample": False,
        "thresholding": False,
        "rescale_betas_zero_snr": False,
    }


def _convert_unet(finished: FinishedStudent) -> StockModel:
    network, params = finished.network, flatten_dict(finished.params)
    assert isinstance(network, UNet)
    fourier = network.time_embedding_type == "fourier"
    # A Fourier network takes the logarithm of its time and divides by it: step 0 of a
    # scheduler will not do, step 1 will. The division is made up for.
    conversion = stock_conversion(finished, num_steps=2 if fourier else 1)
    output_scale = conversion.output_scale
    if fourier:
        output_scale *= (len(conversion.betas) - 1) / frozen_time(finished)
    if network.center_input_sample and conversion.input_scale != 1:
        raise ExportError(
            "the student's input is scaled before center_input_sample, which diffusers "
            "has no place for; train it at objective.t_max=1"
        )
    embedding = constant_embedding(finished, ("time_embedding", "added_embeddings"))
    _hold(params, ("time_embedding", "linear_2"), embedding)
    _scale(params, ("conv_in", "kernel"), conversion.input_scale)
    for leaf in ("kernel", "bias"):
        _scale(params, ("conv_out", leaf), output_scale)
    return StockModel(
        class_name="UNet2DModel",
        config=_unet_config(network, finished.sample_shape),
        tensors=to_diffusers(unflatten_dict(params), ignore=("added_embeddings",)),
        conversion=conversion,
        pipeline="DDIMPipeline" if finished.num_classes is None else None,
    )


def _unet_config(network: UNet, sample_shape: tuple[int, int, int]) -> dict[str, Any]:
    """The fields of a UNet that are diffusers' own."""
    names = [field.name for field in dataclasses.fields(UNet)]
    theirs = names[: names.index("num_train_timesteps") + 1]
    height, width, _ = sample_shape
    size = height if height == width else [height, width]
    return {name: getattr(network, name) for name in theirs} | {"sample_size": size}


def _hold(params: Params, layer: tuple[str, ...], value: np.ndarray) -> None:
    """Makes a linear layer give one value, whatever it is given."""
    params[*layer, "kernel"] = np.zeros_like(params[*layer, "kernel"])
    params[*layer, "bias"] = value


def _scale(params: Params, path: tuple[str, ...], factor: float) -> None:
    if factor != 1:
        params[path] = params[path] * np.float32(factor)


def _write_config(path: pathlib.Path, name: str, config: Mapping[str, Any]) -> None:
    path.parent.mkdir()
    head = {"_class_name": name, "_diffusers_version": DIFFUSERS_VERSION}
    _write_json(path, head | dict(config))


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


_CONVERTERS: dict[type, Callable[[FinishedStudent], StockModel]] = {
    UNet: _convert_unet,
}
