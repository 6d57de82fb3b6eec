"""The autoencoder's decoder against PyTorch diffusers' ``AutoencoderKL``."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pipelines
import pytest
import stable_diffusion
import torch

from boot_jax.models.vae import PREFIXES, VAEDecoder
from boot_jax.models.weights import from_diffusers, read_weights, to_diffusers

LATENTS = np.random.default_rng(0).normal(size=(2, 4, 6, 4)).astype(np.float32)


STABLE_DIFFUSION: dict[str, Any] = {
    "block_out_channels": (16, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 16,
    "scaling_factor": 0.18215,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        # As of Stable Diffusion 1.x and XL, an eighth as wide.
        STABLE_DIFFUSION,
        STABLE_DIFFUSION | {"scaling_factor": 0.13025, "force_upcast": True},
        {
            "layers_per_block": 2,
            "mid_block_add_attention": False,
            "use_post_quant_conv": False,
            "shift_factor": 0.3,
            "scaling_factor": 1.7,
            "act_fn": "relu",
            "out_channels": 1,
        },
    ],
    ids=["plain", "sd", "sdxl", "otherwise"],
)
def test_equals_diffusers(changes: dict[str, Any]):
    model = pipelines.vae(**changes)
    network = VAEDecoder.from_config(dict(model.config))
    params = from_diffusers(tensors_of(model), template(network))
    assert_decodes_as(model, network, params)


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    return {
        name: tensor.numpy()
        for name, tensor in model.state_dict().items()
        if name.startswith(PREFIXES)
    }


def template(network: VAEDecoder) -> Any:
    return jax.eval_shape(network.init, jax.random.key(0), LATENTS)["params"]


def assert_decodes_as(model: Any, network: VAEDecoder, params: Any) -> None:
    actual = jax.jit(network.apply)({"params": params}, LATENTS)
    scaled = LATENTS / network.scaling_factor + (network.shift_factor or 0)
    with torch.no_grad():
        decoded = model.decode(torch.tensor(scaled).permute(0, 3, 1, 2)).sample
    expected = decoded.permute(0, 2, 3, 1).numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("as_convolutions", [False, True])
def test_old_checkpoints_name_the_attention_otherwise(as_convolutions: bool):
    """As those of Stable Diffusion 1.x do, some with 1x1 convolutions."""
    model = pipelines.vae()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in tensors_of(model).items():
        for new_name, old_name in old.items():
            name = name.replace(f".{new_name}.", f".{old_name}.")
        is_attention = name.split(".")[-2] in old.values()
        if as_convolutions and is_attention and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        renamed[name] = tensor
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in renamed
    network = VAEDecoder.from_config(dict(model.config))
    loaded = to_diffusers(from_diffusers(renamed, template(network)))
    for name, tensor in tensors_of(model).items():
        np.testing.assert_array_equal(loaded[name], tensor)


def test_flax_folder_decodes_as_flax_and_pytorch(tmp_path: Path):
    """Flax's class has the old names, too."""
    from diffusers import FlaxAutoencoderKL

    rng = np.random.default_rng(0)
    with stable_diffusion.lenient():
        model = FlaxAutoencoderKL(**pipelines.VAE)
        shapes = jax.eval_shape(model.init_weights, jax.random.key(0))
        params = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32),
            shapes,
        )
        scaled = jnp.asarray(LATENTS.transpose(0, 3, 1, 2)) / 0.18215
        decode = functools.partial(model.apply, method=model.decode)
        expected = np.asarray(jax.jit(decode)({"params": params}, scaled).sample)
    assert "proj_attn" in params["decoder"]["mid_block"]["attentions_0"]
    model.save_pretrained(tmp_path, params=params)
    network = VAEDecoder.from_config(json.loads((tmp_path / "config.json").read_text()))
    read = read_weights(tmp_path)
    tensors = {k: v for k, v in read.items() if k.startswith(PREFIXES)}
    ours = from_diffusers(tensors, template(network))
    actual = jax.jit(network.apply)({"params": ours}, LATENTS)
    expected = expected.transpose(0, 2, 3, 1)
    assert expected.std() > 0.1
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    torch_vae = pipelines.vae()
    exported = {k: torch.tensor(v) for k, v in to_diffusers(ours).items()}
    assert not torch_vae.load_state_dict(exported, strict=False).unexpected_keys
    assert_decodes_as(torch_vae, network, ours)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 2}, "use .'UpDecoderBlock2D'"),
        ({"latents_mean": [0.0] * 4}, "latents_mean"),
        ({"act_fn": "tanh"}, "act_fn='tanh' is not supported; use one of"),
        ({"spectral": True}, "spectral=True is not supported; use .*latent_channels"),
    ],
)
def test_refuses_what_it_would_decode_otherwise(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        VAEDecoder.from_config(pipelines.VAE | changes)
