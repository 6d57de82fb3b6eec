"""A student's transformer as diffusers' ``DiTTransformer2DModel``.

There every block embeds time and label on its own, so the constant embedding goes into
each block's bias. A transformer that was imported has that layout already. Our own DiT
is given it, and differs from diffusers' in two more things:

  * The position embedding of a row comes before that of a column here, after it there.
    Swapping the halves of the token features everywhere, in what reads them and in what
    writes them, changes nothing but this order.
  * The perceptron is four times as wide there. A narrower one gets hidden units whose
    weights are zero.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
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
from boot_jax.models import layers
from boot_jax.models.dit import DiT
from boot_jax.models.transformer import Transformer
from boot_jax.models.weights import to_diffusers

_EMBEDDER = ("norm1", "emb", "timestep_embedder")
_TABLE = ("norm1", "emb", "class_embedder", "embedding_table", "embedding")
_NAMES = [field.name for field in dataclasses.fields(Transformer)]
#: The fields of a transformer that are diffusers' own.
_THEIRS = _NAMES[: _NAMES.index("norm_eps") + 1]
_LEAVES = ("kernel", "bias")
_WAVES = 256  # features of a time, in diffusers' blocks


def convert_transformer(finished: FinishedStudent) -> StockModel:
    """Folds a student of an imported transformer: only its constants."""
    network, params = finished.network, flat(finished.params)
    assert isinstance(network, Transformer)
    added = constant_embedding(finished, ("added_embeddings",))
    waves = layers.timestep_embedding(
        jnp.asarray([frozen_time(finished)]),
        _WAVES,
        flip_sin_to_cos=True,
        downscale_freq_shift=1.0,
    )
    embed = layers.TimestepEmbedding(
        network.num_attention_heads * network.attention_head_dim
    )
    for block in _blocks(network.num_layers):
        own = finished.params[block]["norm1"]["emb"]["timestep_embedder"]
        time = np.asarray(embed.apply({"params": own}, waves))[0]
        hold(params, (block, *_EMBEDDER, "linear_2"), time + added)
    config = {name: getattr(network, name) for name in _THEIRS}
    channels = network.in_channels
    config["out_channels"] = channels  # not None: the stock pipeline reads it
    given = network.out_channels or channels
    keep_channels(params, ("proj_out_2",), channels, given)
    return _stock(finished, config, params)


def convert_dit(finished: FinishedStudent) -> StockModel:
    """Folds a student that is our own DiT.

    Raises:
      ExportError: it reads text, its images are not square, or its perceptrons are too
        wide.
    """
    network, (height, width, channels) = finished.network, finished.sample_shape
    assert isinstance(network, DiT)
    if network.vocab_size is not None:
        raise ExportError(
            "diffusers' transformer takes class labels, and this one reads text; use "
            "the exported jax/ files"
        )
    if height != width:
        raise ExportError(
            f"diffusers' transformer makes square images only, not {height}x{width}"
        )
    if network.mlp_ratio > 4:
        raise ExportError(
            "diffusers' transformer has perceptrons of mlp_ratio 4, and this one has "
            f"{network.mlp_ratio:g}"
        )
    dim = network.hidden_size
    config = {
        "num_attention_heads": network.num_heads,
        "attention_head_dim": dim // network.num_heads,
        "in_channels": channels,
        "out_channels": channels,
        "num_layers": network.num_layers,
        "attention_bias": True,
        "sample_size": height,
        "patch_size": network.patch_size,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": finished.num_classes or 1,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }
    embedding = constant_embedding(finished, ("time_linear_2", "added_embeddings"))
    ours = flat(finished.params)
    labels = ours.get(("label_embedding", "embedding"), np.zeros((2, dim), np.float32))
    params = _ends(ours, network.patch_size, dim)
    for index, block in enumerate(_blocks(network.num_layers)):
        params |= {
            (block, *path): leaf
            for path, leaf in _block(ours, f"block_{index}", dim).items()
        }
        params |= _held_embedder(block, embedding, labels)
    return _stock(finished, config, params)


def _stock(
    finished: FinishedStudent, config: dict[str, Any], params: Params
) -> StockModel:
    conversion = stock_conversion(finished)
    scale_input(params, ("pos_embed", "proj"), conversion.input_scale)
    last = conversion.output_scale, conversion.output_offset
    change_output(params, ("proj_out_2",), *last)
    return StockModel(
        class_name="DiTTransformer2DModel",
        config=config,
        tensors=to_diffusers(unflatten_dict(params), ignore=("added_embeddings",)),
        conversion=conversion,
    )


def _blocks(num_layers: int) -> list[str]:
    return [f"transformer_blocks_{index}" for index in range(num_layers)]


def _held_embedder(block: str, value: np.ndarray, labels: np.ndarray) -> Params:
    """A block's own embedding: the constant, and the table of labels."""
    dim = value.size
    embedder = (block, *_EMBEDDER)
    params: Params = {
        (*embedder, "linear_1", "kernel"): np.zeros((_WAVES, dim), np.float32),
        (*embedder, "linear_1", "bias"): np.zeros(dim, np.float32),
        (*embedder, "linear_2", "kernel"): np.zeros((dim, dim), np.float32),
        (block, *_TABLE): labels,
    }
    hold(params, (*embedder, "linear_2"), value)
    return params


def _ends(ours: Params, patch_size: int, dim: int) -> Params:
    """The layers before and after the blocks."""
    patches = ours["patch_embedding", "kernel"]
    square = (patch_size, patch_size, -1, dim)
    return {
        ("pos_embed", "proj", "kernel"): _swap(patches, dim).reshape(square),
        ("pos_embed", "proj", "bias"): _swap(ours["patch_embedding", "bias"], dim),
        ("proj_out_1", "kernel"): _swap(ours["modulation", "kernel"], dim),
        ("proj_out_1", "bias"): _swap(ours["modulation", "bias"], dim),
        ("proj_out_2", "kernel"): _swap(ours["linear_out", "kernel"].T, dim).T,
        ("proj_out_2", "bias"): ours["linear_out", "bias"],
    }


def _block(ours: Params, name: str, dim: int) -> Params:
    """One block but for its embedding."""

    def reads(*path: str) -> np.ndarray:
        return _swap(ours[name, *path, "kernel"].T, dim).T

    def writes(*path: str) -> Params:
        return {(leaf,): _swap(ours[name, *path, leaf], dim) for leaf in _LEAVES}

    def under(module: tuple[str, ...], leaves: Params) -> Params:
        return {(*module, *path): leaf for path, leaf in leaves.items()}

    missing = 4 * dim - ours[name, "linear_1", "bias"].size
    hidden = {
        ("kernel",): np.pad(reads("linear_1"), ((0, 0), (0, missing))),
        ("bias",): np.pad(ours[name, "linear_1", "bias"], (0, missing)),
    }
    last = writes("linear_2")
    last["kernel",] = np.pad(last["kernel",], ((0, missing), (0, 0)))
    params = under(("norm1", "linear"), writes("modulation"))
    for part in ("to_q", "to_k", "to_v"):
        bias = ours[name, "attention", part, "bias"]
        kernel = reads("attention", part)
        params |= under(("attn1", part), {("kernel",): kernel, ("bias",): bias})
    params |= under(("attn1", "to_out_0"), writes("attention", "to_out"))
    params |= under(("ff", "net_0", "proj"), hidden)
    return params | under(("ff", "net_2"), last)


def _swap(array: np.ndarray, dim: int) -> np.ndarray:
    """Swaps the halves of each ``dim`` features in a last axis."""
    parts = array.reshape(*array.shape[:-1], -1, 2, dim // 2)
    return parts[..., ::-1, :].reshape(array.shape)
