"""Tiny random pipelines of PyTorch diffusers, for tests to save and load."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
# For what takes a gradient, whose compilation grows with the levels.
ONE_LEVEL: dict[str, Any] = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
}
DIT: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 5,
}
VAE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 16,
}
# Noise that leaves a third of the signal: a random network then stays within colours.
MILD = {"beta_start": 1e-4, "beta_end": 2e-3, "clip_sample": False}


def randomised(model: Any, amount: float = 0.1) -> Any:
    """The model with all its parameters moved, also those that start at zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return model.eval()


def unet(**changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    return randomised(UNet2DModel(**(UNET | changes)))


def dit(**changes: Any) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return randomised(DiTTransformer2DModel(**(DIT | changes)))


def vae(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    return randomised(AutoencoderKL(**(VAE | changes)), 0.02)


def ddpm_pipeline(model: UNet2DModel, **scheduler: Any) -> DDPMPipeline:
    return DDPMPipeline(model, DDPMScheduler(**scheduler))


def ddim_pipeline(model: UNet2DModel, **scheduler: Any) -> DDIMPipeline:
    pipeline = DDIMPipeline(model, DDIMScheduler(**scheduler))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def dit_pipeline(
    model: DiTTransformer2DModel, decoder: AutoencoderKL, **scheduler: Any
) -> DiTPipeline:
    pipeline = DiTPipeline(model, decoder, DDIMScheduler(**scheduler))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
