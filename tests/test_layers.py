"""Layers against PyTorch's and diffusers' ones, and numpy re-derivations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models import embeddings
from diffusers.models.activations import get_activation
from diffusers.models.attention_processor import Attention as TorchAttention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D

from boot_jax.models import layers
from boot_jax.models.weights import from_diffusers

TIMES = np.array([0.0, 0.3, 17.0, 999.0], np.float32)
X = np.random.default_rng(0).normal(size=(2, 4, 6, 8)).astype(np.float32)
EMBEDDING = np.random.default_rng(1).normal(size=(2, 12)).astype(np.float32)


def randomise(module: torch.nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x).permute(0, 3, 1, 2) if x.ndim == 4 else torch.tensor(x)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).detach().numpy()


def assert_equal_layers(ours: Any, theirs: torch.nn.Module, *args: np.ndarray) -> None:
    """Ours with their parameters gives what theirs gives."""
    randomise(theirs)
    template = jax.eval_shape(ours.init, jax.random.key(0), *args)["params"]
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    params = from_diffusers(tensors, template)
    actual = jax.jit(ours.apply)({"params": params}, *args)
    expected = to_numpy(theirs(*map(to_torch, args)))
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dim", [8, 9])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0])
def test_timestep_embedding(dim: int, flip: bool, shift: float):
    actual = layers.timestep_embedding(
        jnp.asarray(TIMES), dim, flip_sin_to_cos=flip, downscale_freq_shift=shift
    )
    expected = embeddings.get_timestep_embedding(
        torch.tensor(TIMES), dim, flip_sin_to_cos=flip, downscale_freq_shift=shift
    )
    np.testing.assert_allclose(actual, expected.numpy(), atol=1e-4)


def test_timestep_embedding_by_hand():
    actual = layers.timestep_embedding(jnp.array([2.0]), 4, max_period=100.0)
    expected = [np.sin(2.0), np.sin(0.02), np.cos(2.0), np.cos(0.02)]
    np.testing.assert_allclose(actual, [expected], rtol=1e-5)


def added_inputs(value: np.ndarray) -> np.ndarray:
    waves = np.pi * np.array([1.0, 2.0]) * value[:, None]
    return np.concatenate([value[:, None], np.sin(waves), np.cos(waves)], axis=1)


def test_added_embedding_is_a_perceptron_of_low_waves():
    module = layers.AddedEmbedding(6)
    value = np.array([0.0, 0.25, 1.0], np.float32)
    params = module.init(jax.random.key(0), value)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype("f4"), params)
    hidden = added_inputs(value) @ params["linear_1"]["kernel"]
    hidden = hidden + params["linear_1"]["bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    expected = hidden @ params["linear_2"]["kernel"] + params["linear_2"]["bias"]
    actual = module.apply({"params": params}, jnp.asarray(value))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_added_embeddings_are_summed_and_start_at_zero():
    module = layers.AddedEmbeddings(("target_time", "guidance_scale"), 6)
    added = {"target_time": jnp.array([0.1]), "guidance_scale": jnp.array([0.7])}
    params = module.init(jax.random.key(0), added)["params"]
    assert not np.any(module.apply({"params": params}, added))
    for name, bias in (("target_time", 1.0), ("guidance_scale", 20.0)):
        params[name]["linear_2"]["bias"] = jnp.full(6, bias)
    total = module.apply({"params": params}, added)
    np.testing.assert_array_equal(total, np.full((1, 6), 21.0, np.float32))


@pytest.mark.parametrize("given", [None, {}, {"target_time": 0, "more": 0}])
def test_added_embeddings_want_their_names(given: dict[str, Any] | None):
    module = layers.AddedEmbeddings(("target_time",), 6)
    with pytest.raises(ValueError, match=r"adds embeddings of \['target_time'\]"):
        module.init(jax.random.key(0), given)


def test_no_added_embeddings_add_nothing():
    assert layers.AddedEmbeddings((), 6).apply({}, None) == 0.0


def test_timestep_projection_and_embedding():
    theirs = embeddings.TimestepEmbedding(12, 20)
    assert_equal_layers(layers.TimestepEmbedding(20), theirs, EMBEDDING)
    fourier = embeddings.GaussianFourierProjection(5, scale=16)
    assert_equal_layers(layers.GaussianFourierProjection(5), fourier, TIMES[1:])


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activations(name: str):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    expected = get_activation(name)(torch.tensor(x)).numpy()
    actual = layers.ACTIVATIONS[name](jnp.asarray(x))
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_resizing():
    images = to_torch(X)
    twice = to_numpy(F.interpolate(images, scale_factor=2.0, mode="nearest"))
    np.testing.assert_array_equal(layers.upsample_nearest(jnp.asarray(X)), twice)
    half = to_numpy(F.avg_pool2d(images, 2))
    actual = layers.downsample_mean(jnp.asarray(X))
    np.testing.assert_allclose(actual, half, atol=1e-6)


@pytest.mark.parametrize("padding", [0, 1])
def test_downsample(padding: int):
    theirs = Downsample2D(8, use_conv=True, padding=padding, name="op")
    assert_equal_layers(layers.Downsample(padding), theirs, X)


def test_upsample():
    assert_equal_layers(layers.Upsample(), Upsample2D(8, use_conv=True), X)


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("resize", [None, "up", "down"])
def test_resnet_block(scale_shift: bool, resize: str | None):
    theirs = ResnetBlock2D(
        in_channels=8,
        out_channels=12,
        temb_channels=12,
        groups=4,
        eps=1e-3,
        non_linearity="gelu",
        time_embedding_norm="scale_shift" if scale_shift else "default",
        output_scale_factor=1.5,
        up=resize == "up",
        down=resize == "down",
    )
    settings = layers.LayerSettings(
        num_groups=4,
        epsilon=1e-3,
        activation="gelu",
        scale_shift=scale_shift,
        output_scale_factor=1.5,
    )
    resizings = {"up": layers.upsample_nearest, "down": layers.downsample_mean}
    resample = resizings[resize] if resize else None
    ours = layers.ResnetBlock(12, settings, resample)
    assert_equal_layers(ours, theirs, X, EMBEDDING)


@pytest.mark.parametrize("head_dim", [None, 2, 3])
@pytest.mark.parametrize("groups", [None, 2])
def test_attention(head_dim: int | None, groups: int | None):
    width = head_dim or 8
    theirs = TorchAttention(
        8,
        heads=8 // width,
        dim_head=width,
        norm_num_groups=groups,
        eps=1e-3,
        bias=True,
        residual_connection=True,
        rescale_output_factor=1.5,
    )
    settings = layers.LayerSettings(
        attention_groups=groups,
        head_dim=head_dim,
        epsilon=1e-3,
        output_scale_factor=1.5,
    )
    assert_equal_layers(layers.Attention(settings), theirs, 3 * X)


def test_cudnn_is_asked_for():
    settings = layers.LayerSettings(
        attention_groups=4, attention_implementation="cudnn", dtype=jnp.bfloat16
    )
    x = jnp.asarray(X, jnp.bfloat16)
    with pytest.raises(RuntimeError, match=r"(?i)cudnn"):
        layers.Attention(settings).init(jax.random.key(0), x)


def test_group_norm_keeps_its_statistics_in_float32():
    class Norm(layers.nn.Module):
        @layers.nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return layers.group_norm(x, 2, 1e-5, jnp.bfloat16, name="norm")

    # In 16 bits, the mean of so many and the variance about it would be lost.
    x = jnp.asarray(np.tile(X, (1, 16, 16, 1)) + 50, jnp.bfloat16)
    params = Norm().init(jax.random.key(0), x)
    actual = Norm().apply(params, x)
    assert actual.dtype == jnp.bfloat16
    exact = to_torch(np.asarray(x, np.float64))
    expected = to_numpy(F.group_norm(exact, 2, eps=1e-5))
    np.testing.assert_allclose(actual.astype("f4"), expected, rtol=2**-8, atol=1e-3)
