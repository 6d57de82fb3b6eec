"""The autoencoder's decoder against PyTorch diffusers' ``AutoencoderKL``."""

from typing import Any

import jax
import numpy as np
import pipelines
import pytest
import torch

from boot_jax.models.vae import PREFIXES, VAEDecoder
from boot_jax.models.weights import from_diffusers

LATENTS = np.random.default_rng(0).normal(size=(2, 4, 6, 4)).astype(np.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {},
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
    ids=["plain", "otherwise"],
)
def test_equals_diffusers(changes: dict[str, Any]):
    model = pipelines.vae(**changes)
    network = VAEDecoder.from_config(dict(model.config))
    shapes = jax.eval_shape(network.init, jax.random.key(0), LATENTS)["params"]
    tensors = {
        name: tensor.numpy()
        for name, tensor in model.state_dict().items()
        if name.startswith(PREFIXES)
    }
    params = from_diffusers(tensors, shapes)
    actual = jax.jit(network.apply)({"params": params}, LATENTS)
    scaled = LATENTS / network.scaling_factor + (network.shift_factor or 0)
    with torch.no_grad():
        decoded = model.decode(torch.tensor(scaled).permute(0, 3, 1, 2)).sample
    expected = decoded.permute(0, 2, 3, 1).numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


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
