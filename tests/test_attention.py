"""Which implementation of attention runs what."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from boot_jax.models.attention import dot_product_attention
from boot_jax.models.dit import DiT


@pytest.fixture
def seen(monkeypatch):
    """The implementations that were asked for."""
    asked = []

    def attend(q: Any, k: Any, v: Any, *, is_causal: bool, implementation: Any) -> Any:
        asked.append(implementation)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    return asked


@pytest.mark.parametrize(
    "queries, keys, head_dim, runs",
    [
        (64, 64, 40, "cudnn"),
        (64, 64, 128, "cudnn"),
        (64, 77, 40, "xla"),  # the tokens of a prompt
        (63, 64, 40, "xla"),
        (64, 64, 160, "xla"),
        (64, 64, 20, "xla"),
    ],
)
def test_what_cudnn_does_not_take_is_left_to_xla(seen, queries, keys, head_dim, runs):
    shapes = [(1, length, 2, head_dim) for length in (queries, keys, keys)]
    arguments = [jnp.zeros(shape, jnp.bfloat16) for shape in shapes]
    dot_product_attention(*arguments, "cudnn")
    dot_product_attention(*arguments, "xla")
    dot_product_attention(*arguments, None)
    assert seen == [runs, "xla", None]


def test_a_network_asks_for_what_it_was_told(seen):
    sizes = {"patch_size": 2, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    network = DiT(out_channels=1, attention_implementation="cudnn", **sizes)
    x, time = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1)
    jax.eval_shape(network.init, jax.random.key(0), x, time)
    assert seen == ["cudnn", "cudnn"]
