"""The published configs of Stable Diffusion's networks, and tiny ones like them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import torch
from diffusers.utils import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from boot_jax.models.weights import diffusers_name

_CROSS_DOWN, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"

# As on the hub; the keys that are left out have diffusers' defaults there.
SD_1_5: dict[str, Any] = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [*[_CROSS_DOWN] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *[_CROSS_UP] * 3],
}
SD_2_1: dict[str, Any] = SD_1_5 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
SDXL: dict[str, Any] = SD_1_5 | {
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", _CROSS_DOWN, _CROSS_DOWN],
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": [_CROSS_UP, _CROSS_UP, "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}

# The smallest UNet of two levels; Flax's classes have 32 groups whatever the config.
TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": (_CROSS_DOWN, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", _CROSS_UP),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
}
TINY_XL: dict[str, Any] = TINY | {
    "down_block_types": ("DownBlock2D", _CROSS_DOWN),
    "up_block_types": (_CROSS_UP, "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "upcast_attention": None,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,
}


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Lets diffusers' Flax classes promote ranks and types, and keeps them quiet."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
    logging.set_verbosity(verbosity)


def randomised(model: Any) -> Any:
    """The model with no parameter at its start, and outputs of order 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.3)
            elif parameter.ndim == 1:
                parameter.normal_(0.0, 0.3)
    return model.eval()


def torch_shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """The shapes that parameters of ours have in PyTorch, by their names there."""

    def turned(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-3:-1], *shape[:-2]) if leaf == "kernel" else shape

    return {
        diffusers_name(path): turned(path[-1], leaf.shape)
        for path, leaf in flatten_dict(params).items()
    }


def filled(shapes: Any, model: Any) -> Any:
    """A Flax class's parameters with the weights of the same model in PyTorch."""
    # The autoencoder's attention has its old names in Flax.
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    leaves = {}
    for path, leaf in flatten_dict(shapes).items():
        modules = diffusers_name(path).split(".")
        tensor = tensors[".".join(old.get(module, module) for module in modules)]
        if path[-1] == "kernel":
            tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
        assert tensor.shape == leaf.shape
        leaves[path] = jnp.asarray(tensor)
    return unflatten_dict(leaves)
