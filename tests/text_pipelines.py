"""Tiny random pipelines of Stable Diffusion and SDXL, for tests to save and load."""

import pathlib
import tempfile
from typing import Any

import clip_folders
import jax
import pipelines
import stable_diffusion
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

LENGTH = 16
VOCABULARY = 512 + len(clip_folders.learned_merges()) + 2
CLIP: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "bos_token_id": VOCABULARY - 2,
    "eos_token_id": VOCABULARY - 1,
}
# Noise that leaves a third of the signal: a random network then stays within colours.
MILD = pipelines.MILD | {"timestep_spacing": "trailing", "steps_offset": 1}
# For what takes a gradient, whose compilation grows with the levels.
ONE_LEVEL = stable_diffusion.TINY | {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",),
}
PROMPTS = ["a small red house beside the river", "an astronaut riding a horse"]


def tokenizer(special: dict[str, Any]) -> CLIPTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        made = clip_folders.write_clip_folder(
            pathlib.Path(folder) / "tokenizer", length=LENGTH, special=special
        )
        return CLIPTokenizer.from_pretrained(made)


def text_encoder(cls: Any, **changes: Any) -> Any:
    model = stable_diffusion.randomised(cls(CLIPTextConfig(**(CLIP | changes))))
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    return model


def unet(**config: Any) -> UNet2DConditionModel:
    """A network that the text moves as much as the noise does."""
    torch.manual_seed(0)
    model = stable_diffusion.randomised(UNet2DConditionModel(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn2.to_out.0.weight" in name:
                parameter.mul_(10)
    return model


def vae(**changes: Any) -> AutoencoderKL:
    return pipelines.vae(**changes)


def sd_pipeline(
    unet_config: dict[str, Any] = stable_diffusion.TINY, **scheduler: Any
) -> StableDiffusionPipeline:
    logging.set_verbosity_error()
    pipeline = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(CLIPTextModel),
        tokenizer=tokenizer(clip_folders.SD1),
        unet=unet(**unet_config),
        scheduler=DDIMScheduler(**(MILD | scheduler)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sdxl_pipeline(**scheduler: Any) -> StableDiffusionXLPipeline:
    logging.set_verbosity_error()
    pipeline = StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025),
        text_encoder=text_encoder(CLIPTextModel, hidden_size=16),
        text_encoder_2=text_encoder(
            CLIPTextModelWithProjection,
            hidden_size=8,
            projection_dim=20,
            hidden_act="gelu",
            eos_token_id=2,
        ),
        tokenizer=tokenizer(clip_folders.SD1),
        tokenizer_2=tokenizer(clip_folders.SDXL_2),
        unet=unet(**stable_diffusion.TINY_XL),
        scheduler=DDIMScheduler(**(MILD | scheduler)),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_flax(
    pipeline: StableDiffusionPipeline,
    folder: pathlib.Path,
    unet_config: dict[str, Any] = stable_diffusion.TINY,
) -> None:
    """Saves a pipeline's weights as ``FlaxStableDiffusionPipeline`` does."""
    from diffusers import (
        FlaxAutoencoderKL,
        FlaxDDIMScheduler,
        FlaxStableDiffusionPipeline,
        FlaxUNet2DConditionModel,
    )
    from transformers import FlaxCLIPTextModel

    with stable_diffusion.lenient():
        unet = FlaxUNet2DConditionModel(**unet_config)
        decoder = FlaxAutoencoderKL(**pipelines.VAE)
        text = FlaxCLIPTextModel(pipeline.text_encoder.config, _do_init=False)
        scheduler = FlaxDDIMScheduler.from_config(pipeline.scheduler.config)
        key = jax.random.key(0)
        shapes = {
            "unet": jax.eval_shape(unet.init_weights, key),
            "vae": jax.eval_shape(decoder.init_weights, key),
            "text_encoder": text.params_shape_tree,
        }
        params = {
            name: stable_diffusion.filled(tree, getattr(pipeline, name))
            for name, tree in shapes.items()
        }
        flax_pipeline = FlaxStableDiffusionPipeline(
            vae=decoder,
            text_encoder=text,
            tokenizer=pipeline.tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
        )
        flax_pipeline.save_pretrained(
            folder, params=params | {"scheduler": scheduler.create_state()}
        )
