"""What the transformer of diffusers' layout refuses, and how large it is.

Its equality with PyTorch is shown through folders, in ``test_teacher_diffusers``.
"""

from typing import Any

import jax
import jax.numpy as jnp
import pipelines
import pytest
import torch
from diffusers import DiTTransformer2DModel

from boot_jax.models.transformer import Transformer


def shapes(network: Transformer) -> Any:
    size = network.sample_size
    x, time = jnp.zeros((1, size, size, network.in_channels)), jnp.zeros(1)
    label = {"label": jnp.zeros(1, jnp.int32)}
    return jax.eval_shape(network.init, jax.random.key(0), x, time, label)["params"]


def test_dit_xl_2_has_the_parameters_of_pytorch():
    """At full size, without making it."""
    config = {"out_channels": 8, "sample_size": 32}
    params = shapes(Transformer.from_config(config))
    with torch.device("meta"):
        model = DiTTransformer2DModel(**config)
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected
    assert expected > 675e6


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"activation_fn": "geglu"}, "activation_fn='geglu' .* use 'gelu-approximate'"),
        ({"norm_type": "layer_norm"}, "norm_type='layer_norm'"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm=None .* positive"),
        ({"out_channels": 5}, "out_channels=5 .* or twice that"),
        ({"patch_size": 3}, "patch_size=3 .* a divisor of sample_size=8"),
        ({"cross_attention_dim": 8}, "cross_attention_dim=8 is not supported"),
    ],
)
def test_refuses_what_it_would_compute_otherwise(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"Transformer: {message}"):
        Transformer.from_config(pipelines.DIT | changes)


def test_refuses_images_of_another_size():
    network = Transformer.from_config(pipelines.DIT)
    label = {"label": jnp.zeros(1, jnp.int32)}
    args = (jnp.zeros((1, 8, 6, 4)), jnp.zeros(1), label)
    with pytest.raises(ValueError, match="must be 8x8x4, but are 8x6x4"):
        jax.eval_shape(network.init, jax.random.key(0), *args)
