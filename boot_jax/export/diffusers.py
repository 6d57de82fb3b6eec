"""The student as a folder that unmodified PyTorch diffusers loads; torch is not needed.

`boot_jax.export.folding` says why a stock network and a stock scheduler suffice. What
follows from it for each network:

    UNet, no classes      `UNet2DModel` in a DDIMPipeline (DDPMPipeline loads it too)
    UNet, class labels    `UNet2DModel`; stock pipelines pass it no labels, so a
                          one-file pipeline lies beside it
    transformers          `DiTTransformer2DModel`; in a DiTPipeline if the teacher
                          has a VAE, which that asks for, else as above

The scheduler has as few training steps as float32 allows, one for most: asked for 50
steps, a pipeline refuses, instead of iterating a network that has only one.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.numpy

from boot_jax.export.custom_pipeline import CLASS_NAME, MODULE_NAME, PIPELINE
from boot_jax.export.finished import ExportError, FinishedStudent
from boot_jax.export.folding import StockConversion, StockModel
from boot_jax.export.transformers import convert_dit, convert_transformer
from boot_jax.export.unets import convert_unet
from boot_jax.models.dit import DiT
from boot_jax.models.transformer import Transformer
from boot_jax.models.unet import UNet

#: The release that the tests load exports with.
DIFFUSERS_VERSION = "0.39.0"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def stock_model(
    finished: FinishedStudent, vae: pathlib.Path | None = None
) -> StockModel:
    """Folds a student into a model of diffusers.

    Args:
      finished: the student.
      vae: the folder of its teacher's VAE; None for one without.

    Raises:
      ExportError: no model of diffusers computes what this network does.
    """
    for network, convert in _CONVERTERS.items():
        if isinstance(finished.network, network):
            model = convert(finished)
            latent = vae is not None and isinstance(finished.network, Transformer)
            return dataclasses.replace(model, vae=vae) if latent else model
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
    index: dict[str, Any] = {
        "_class_name": model.pipeline,
        "_diffusers_version": DIFFUSERS_VERSION,
        model.component: ["diffusers", model.class_name],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    if model.pipeline is None:
        index |= {"_class_name": [MODULE_NAME, CLASS_NAME], "num_classes": num_classes}
        (folder / f"{MODULE_NAME}.py").write_text(PIPELINE)
    if model.vae is not None:
        index["vae"] = ["diffusers", "AutoencoderKL"]
        shutil.copytree(model.vae, folder / "vae")
    _write_json(folder / "model_index.json", index)
    _write_config(
        folder / "scheduler" / "scheduler_config.json",
        "DDIMScheduler",
        scheduler_config(model.conversion),
    )
    network = folder / model.component
    _write_config(network / "config.json", model.class_name, model.config)
    # The metadata is how PyTorch loaders know whose layout a file has.
    safetensors.numpy.save_file(
        dict(model.tensors), str(network / WEIGHTS), {"format": "pt"}
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


def _write_config(path: pathlib.Path, name: str, config: Mapping[str, Any]) -> None:
    path.parent.mkdir()
    head = {"_class_name": name, "_diffusers_version": DIFFUSERS_VERSION}
    _write_json(path, head | dict(config))


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


_CONVERTERS: dict[type, Callable[[FinishedStudent], StockModel]] = {
    UNet: convert_unet,
    DiT: convert_dit,
    Transformer: convert_transformer,
}
