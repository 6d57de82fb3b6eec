"""The student as a folder that unmodified PyTorch diffusers loads; torch is not needed.

`boot_jax.export.folding` says why a stock network and a stock scheduler suffice. What
follows from it for each network:

    UNet, no classes      `UNet2DModel` in a DDIMPipeline (DDPMPipeline loads it too)
    UNet, class labels    `UNet2DModel`; stock pipelines pass it no labels, so a
                          one-file pipeline lies beside it
    UNet, texts           `UNet2DConditionModel` in a StableDiffusionPipeline or a
                          StableDiffusionXLPipeline, with the teacher's other parts
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

import numpy as np
import safetensors.numpy

from boot_jax.export.custom_pipeline import CLASS_NAME, MODULE_NAME, PIPELINE
from boot_jax.export.finished import ExportError, FinishedStudent
from boot_jax.export.folding import StockConversion, StockModel
from boot_jax.export.transformers import convert_dit, convert_transformer
from boot_jax.export.unets import convert_text_unet, convert_unet
from boot_jax.models.dit import DiT
from boot_jax.models.text_unet import TextUNet
from boot_jax.models.transformer import Transformer
from boot_jax.models.unet import UNet
from boot_jax.models.weights import PICKLES, modern_names, read_weights
from boot_jax.teachers.folder import Component

#: The release that the tests load exports with.
DIFFUSERS_VERSION = "0.39.0"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"

# The teacher's parts that each pipeline needs.
_PARTS = {
    "DiTPipeline": ("vae",),
    "StableDiffusionPipeline": ("vae", "text_encoder", "tokenizer"),
    "StableDiffusionXLPipeline": (
        "vae",
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
    ),
}
# Pickles, weights of other frameworks, and variants that nobody asked for.
_LEFT_OUT = (*(f"*{kind}" for kind in PICKLES), "*.bin.*", "*.msgpack", "*.h5")
_LEFT_OUT += ("*.onnx*", "*.fp16.*", "*.bf16.*", "*non_ema*")


def stock_model(
    finished: FinishedStudent, parts: Mapping[str, Component] | None = None
) -> StockModel:
    """Folds a student into a model of diffusers.

    Args:
      finished: the student.
      parts: of its teacher's pipeline, by name.

    Raises:
      ExportError: no model of diffusers computes what this network does, or its
        pipeline needs a part that the teacher's has not.
    """
    parts = parts or {}
    for network, convert in _CONVERTERS.items():
        if isinstance(finished.network, network):
            model = convert(finished)
            break
    else:
        name = type(finished.network).__name__
        raise ExportError(f"diffusers has no network like {name}")
    if isinstance(finished.network, Transformer) and "vae" in parts:
        model = dataclasses.replace(
            model, pipeline="DiTPipeline", component="transformer"
        )
    needed = _PARTS.get(model.pipeline or "", ())
    lacking = [name for name in needed if name not in parts]
    if lacking:
        raise ExportError(
            f"a {model.pipeline} needs {', '.join(lacking)}, which the teacher did not "
            "come with"
        )
    return dataclasses.replace(model, parts={name: parts[name] for name in needed})


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
    if "tokenizer" in model.parts:
        none = [None, None]
        index |= {"feature_extractor": none, "image_encoder": none}
    if model.pipeline == "StableDiffusionPipeline":
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    for name, part in model.parts.items():
        library = "diffusers" if name == "vae" else "transformers"
        index[name] = [library, part.class_name]
        copy_part(part, folder / name)
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
        "steps_offset": 1,  # not read; Stable Diffusion's pipelines warn of another
        "clip_sample": False,
        "thresholding": False,
        "rescale_betas_zero_snr": False,
    }


def copy_part(part: Component, folder: pathlib.Path) -> None:
    """Copies a part of a pipeline, without pickles; Flax weights become PyTorch's."""
    shutil.copytree(part.folder, folder, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    if not part.config or any(folder.glob("*.safetensors")):
        return
    tensors = {
        name: np.ascontiguousarray(tensor, np.float32)
        for name, tensor in modern_names(read_weights(part.folder)).items()
    }
    name = WEIGHTS if "_class_name" in part.config else TRANSFORMERS_WEIGHTS
    safetensors.numpy.save_file(tensors, str(folder / name), {"format": "pt"})
    if "_class_name" in part.config:
        config = dict(part.config) | {"_class_name": part.class_name}
        _write_json(folder / "config.json", config)


def _write_config(path: pathlib.Path, name: str, config: Mapping[str, Any]) -> None:
    path.parent.mkdir()
    head = {"_class_name": name, "_diffusers_version": DIFFUSERS_VERSION}
    _write_json(path, head | dict(config))


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


_CONVERTERS: dict[type, Callable[[FinishedStudent], StockModel]] = {
    UNet: convert_unet,
    TextUNet: convert_text_unet,
    DiT: convert_dit,
    Transformer: convert_transformer,
}
